"""A Qwen3-style model of 1.6M parameters learns Python's standard library on two CPU cores, without a network.

    python launch.py --config experiments/demo.py

Under ten minutes, tokenizer included. experiments/README.md shows the curve that it reached.
"""

from ml_collections import ConfigDict

from qwen3f.stages.configs import pretrain_config


def get_config() -> ConfigDict:
    config = pretrain_config("nano")
    # The result depends on when the model learns to copy from its context. With these settings it does so after 1,100
    # steps; with AdamW it does not within this run. Muon's updates have a fixed size, so small initial weights learn
    # faster. A low rotary base gives more pairs of dimensions that tell near positions apart.
    config.model.initializer_range = 0.03
    config.model.rope_theta = 1e3
    config.steps = 2500
    config.batch_size = 8
    config.seq_len = 256
    # Muon trains the matrices at a rate that equals 1e-2 for AdamW; the embedding and the norms learn at 3e-2.
    config.optimizer.kind = "muon"
    config.optimizer.update_rms = 0.2 / 3
    config.optimizer.weight_decay = 0.07
    config.context_warmup.length = 128
    config.schedule.kind = "wsd"
    config.schedule.peak_lr = 3e-2
    config.schedule.min_ratio = 0.0
    config.schedule.warmup = 0.03
    config.schedule.decay = 0.8
    config.eval.every = 500
    config.eval.compare_gzip = True
    config.checkpoint.every = 500
    return config
