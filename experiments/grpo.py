"""Reasoning by reinforcement: a model that thinks answers questions with known answers, and learns from being right.

    python launch.py --config experiments/grpo.py:nano --config.init_from=W_SFT --workdir W
    python launch.py --config experiments/grpo.py:qwen3-0.6b --config.init_from=DIR --config.tasks=gsm8k@DIR2
    python launch.py --config experiments/grpo.py:nano_vl --config.init_from=W_VL --workdir W

The preset after the colon sets steps, rates and batch (default small). The model comes from the weights in W_SFT. The
tiny presets train on generated problems; nano_vl on questions about generated pictures (W_VL is a workdir of
experiments/multimodal.py:nano_vl). The others use GSM8K and MATH, from the Hub or from local copies. Updates are on
policy, with centred advantages, clipping at 0.2/0.28 and no KL, which worked at 1.7B parameters and below. For the
stage see the Qwen3 technical report, §4.2; the learning rates are ours.
"""

from ml_collections import ConfigDict

from qwen3f.stages.configs import grpo_config

# nano: after fine-tuning by Muon, AdamW at 2e-4 and above makes answers worse. debug: the rate that the trial found.
# debug_moe learns by Muon. See qwen3f/rl/trial/README.md.
PEAK_LR = {"nano": 1e-4, "nano_vl": 1e-4, "debug": 1e-4, "debug_moe": 5e-4}


def get_config(preset: str = "small") -> ConfigDict:
    preset = preset or "small"
    config = grpo_config(preset)
    config.schedule.peak_lr = PEAK_LR.get(preset, 1e-6)
    config.optimizer.kind = "muon" if preset == "debug_moe" else "adamw"
    config.optimizer.weight_decay = 0.0
    config.steps, config.batch_size, config.rollout.samples = 200, 32, 16
    config.seq_len, config.rollout.max_new_tokens = 4096, 2048
    config.eval.every, config.checkpoint.every, config.log_every = 20, 20, 1
    config.eval.max_new_tokens = config.rollout.max_new_tokens
    if preset in PEAK_LR:  # the generated problems, where a tiny model can learn to solve them
        config.data.difficulties = "1"
        config.data.kinds = "number_theory,sequence" if preset == "nano" else ""
        config.seq_len, config.rollout.max_new_tokens, config.eval.max_new_tokens = 512, 200, 200
        if preset in ("nano", "nano_vl"):
            config.steps, config.batch_size, config.rollout.samples = 60, 8, 8
            config.rollout.draws, config.rollout.microbatch_rows = 2, 8
        else:  # generate all 1,024 answers of a step at the same time
            config.batch_size, config.rollout.rows, config.rollout.microbatch_rows = 64, 1024, 64
            config.rollout.cache_tokens = 1024 * config.seq_len
    else:
        config.tasks = "gsm8k=0.5,math=0.5"
    if preset == "nano_vl":  # the pictures of experiments/multimodal.py:nano_vl, answered in a word
        config.tasks, config.rollout.thinking = "visual", False
        config.rollout.max_new_tokens, config.eval.max_new_tokens = 16, 16
        config.data.picture_kinds, config.data.min_side, config.data.max_side = "shapes,bar", 96, 96
        config.data.min_pixels, config.data.max_pixels, config.data.max_samples = 64 * 64, 128 * 128, 8192
    return config
