"""Trains a reward model: a language model with a scalar head learns to score the better of two answers higher.

    python launch.py --config experiments/reward_model.py:nano --config.init_from=W --workdir W2
    python launch.py --config experiments/reward_model.py:small --config.init_from=W \
        --config.data.mixture=ultrafeedback@DIR --config.reward_model.margin=0.5

The preset after the colon sets steps, rates and batch (default small). The model comes from the weights in W. Without a
network, a rule decides which of two answers to a generated problem is better: right, in the requested form, short.
--config.data.mixture=pairs@DIR reads your own pairs.
"""

from ml_collections import ConfigDict

from qwen3f.stages.configs import reward_model_config

PEAK_LR = {"nano": 1e-3, "debug": 3e-4, "debug_moe": 3e-4}


def get_config(preset: str = "small") -> ConfigDict:
    preset = preset or "small"
    config = reward_model_config(preset)
    config.reward_model.centre = 0.01
    config.schedule.kind = "cosine"
    config.schedule.peak_lr = PEAK_LR.get(preset, 1e-5)
    config.schedule.warmup = 0.03
    config.seq_len = 4096
    config.steps, config.batch_size = 1000, 32
    if preset in PEAK_LR:  # the generated problems
        config.seq_len = 1024
        config.data.difficulties = "1"
        config.data.kinds = "number_theory,sequence" if preset == "nano" else ""
        config.data.mixture = "right-or-wrong=0.8,boxed-or-not=0.1,short-or-padded=0.1"  # the first is the hard one
        config.steps, config.batch_size = (300, 8) if preset == "nano" else (1500, 32)
        config.eval.every = 100
    if preset == "large":
        config.model.gradient_checkpointing = "full"
    return config
