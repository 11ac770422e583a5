"""DPO on given pairs: of two answers the better one becomes likelier.

    python launch.py --config experiments/dpo.py:nano --config.init_from=W --workdir W2
    python launch.py --config experiments/dpo.py:small --config.init_from=W --config.data.mixture=ultrafeedback@DIR \
        --config.dpo.loss=ipo

The preset after the colon sets steps, rates and batch (default small). The model comes from the weights in W, and these
are also the reference. Its log-probabilities are computed once and stored;
--config.dpo.reference_log_probs=live keeps its weights in memory instead. Without a network, a rule decides which of
two answers to a generated problem is better. The learning rates of tiny presets are ours; the others use TRL's.
"""

from ml_collections import ConfigDict

from qwen3f.stages.configs import dpo_config

PEAK_LR = {"nano": 1e-4, "debug": 3e-5, "debug_moe": 3e-5}


def get_config(preset: str = "small") -> ConfigDict:
    preset = preset or "small"
    config = dpo_config(preset)
    config.schedule.kind = "cosine"
    config.schedule.peak_lr = PEAK_LR.get(preset, 1e-6)
    config.schedule.warmup = 0.1
    config.seq_len = 4096
    config.steps, config.batch_size = 1000, 32
    if preset in PEAK_LR:  # the generated problems
        config.seq_len = 1024
        config.data.difficulties = "1"
        config.data.kinds = "number_theory,sequence" if preset == "nano" else ""
        config.steps, config.batch_size = (300, 8) if preset == "nano" else (1000, 32)
        config.eval.every = 100
        config.eval.questions, config.eval.max_new_tokens = 128, 200
    if preset == "large":
        config.model.gradient_checkpointing = "full"
    return config
