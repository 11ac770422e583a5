"""A Qwen3-style model of 1.6M parameters learns Python's standard library on two CPU cores, without a network.

    python launch.py --config experiments/demo.py

Under ten minutes, tokenizer included. The README shows the curve that it reached.
"""

from ml_collections import ConfigDict

from qwen3f.train.defaults import pretrain_config


def get_config() -> ConfigDict:
    config = pretrain_config("nano")
    config.steps = 2600
    config.batch_size = 8
    config.seq_len = 256
    config.schedule.kind = "wsd"
    config.schedule.peak_lr = 1e-2
    config.schedule.min_ratio = 0.0
    config.schedule.warmup = 0.03
    config.schedule.decay = 0.8
    config.eval.every = 650
    config.eval.compare_gzip = True
    config.checkpoint.every = 650
    return config
