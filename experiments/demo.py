"""A Qwen3-style model of 2.4M parameters learns Python's standard library on two CPU cores, without a network.

    python launch.py --config experiments/demo.py

Under ten minutes, tokenizer included; bits a byte on held-out files end below 1.25 (gzip -9: about 2).
"""

from ml_collections import ConfigDict

from qwen3f.train.defaults import pretrain_config


def get_config() -> ConfigDict:
    config = pretrain_config("nano")
    config.steps = 1000
    config.batch_size = 8
    config.seq_len = 256
    config.schedule.kind = "wsd"
    config.schedule.peak_lr = 4e-3
    config.schedule.min_ratio = 0.0
    config.schedule.warmup = 0.05
    config.schedule.decay = 0.4
    config.eval.every = 250
    config.eval.compare_gzip = True
    config.checkpoint.every = 250
    return config
