"""Online DPO: the model answers, a judge ranks its answers, and it learns from the best and the worst of each prompt.

    python launch.py --config experiments/dpo_online.py:nano --config.init_from=W --workdir W2
    python launch.py --config experiments/dpo_online.py:small --config.init_from=W \
        --config.online.judge=reward_model --config.online.reward_model=W3

The preset after the colon sets steps, rates and batch (default small). The model comes from the weights in W. W3 is a
workdir of experiments/reward_model.py. A prompt is left out, and counted, if the judge ranks all of its answers equal.
The learning rates are ours.
"""

from ml_collections import ConfigDict

from qwen3f.stages.configs import dpo_online_config

PEAK_LR = {"nano": 1e-4, "debug": 3e-5, "debug_moe": 3e-5}


def get_config(preset: str = "small") -> ConfigDict:
    preset = preset or "small"
    config = dpo_online_config(preset)
    config.schedule.kind = "constant"
    config.schedule.peak_lr = PEAK_LR.get(preset, 5e-7)
    config.schedule.warmup = 0.05
    config.seq_len = 4096
    config.online.max_new_tokens = 1024
    config.steps, config.batch_size, config.log_every = 500, 32, 1
    if preset in PEAK_LR:  # short answers to short problems
        config.seq_len, config.online.max_new_tokens = 1024, 200
        config.data.difficulties = "1"
        config.data.kinds = "number_theory,sequence" if preset == "nano" else ""
        config.steps, config.batch_size = (100, 16) if preset == "nano" else (300, 32)
        if preset != "nano":  # a GPU generates many answers at a time
            config.online.rows, config.online.cache_tokens = 1024, 512 * 1024
        config.eval.every = 25
        config.checkpoint.every = 25
    if preset == "large":
        config.model.gradient_checkpointing = "full"
    return config
