"""Pretraining, stage 2: reasoning and code at 4,096 tokens, with a faster decay of the learning rate.

    python launch.py --config experiments/pretrain_s2.py:small --config.init_from=W1 --workdir W2

Training continues from stage 1's weights. The learning rate starts at a third of stage 1's peak and falls linearly over
the whole stage to 1% of that. (Qwen3 technical report, §3.2: "accelerate the learning rate decay"; the numbers are
ours.) The model comes from the weights in W1, with its rotary base and context; the preset after the colon only sets
steps, rates and batch.
"""

from ml_collections import ConfigDict

from experiments import pretrain_s1


def get_config(preset: str = "small") -> ConfigDict:
    config = pretrain_s1.get_config(preset)
    config.steps //= 2
    config.schedule.kind = "wsd"
    config.schedule.peak_lr /= 3
    config.schedule.warmup = 0.01
    config.schedule.decay = 0.99
    config.schedule.min_ratio = 0.01
    return config
