"""Pretraining, stage 1: general knowledge at 4,096 tokens, warmup and cosine decay.

    python launch.py --config experiments/pretrain_s1.py:small --config.data.mixture=files@DIR --workdir W1
    python launch.py --config experiments/pretrain_s1.py --config.mesh=dp8,tp2,pp4
    python launch.py --config experiments/pretrain_s1.py:large --config.mesh=dp16,tp2,pp4

The preset after the colon is any of qwen3f.presets (default small); nano runs at 512 tokens. Rotary base 10,000: the
long context of stage 3 raises it (Qwen3 technical report, §3.2, which publishes no rates or batch sizes: those here
are ours).
"""

from ml_collections import ConfigDict

from qwen3f.stages.configs import pretrain_config
from qwen3f.train.defaults import no_scaling

PEAK_LR = {"nano": 1e-2, "debug": 1e-3, "debug_moe": 1e-3}


def get_config(preset: str = "small") -> ConfigDict:
    preset = preset or "small"
    config = pretrain_config(preset)
    config.seq_len = 512 if preset == "nano" else 4096
    config.model.rope_theta = 1e4
    config.model.max_position_embeddings = max(config.model.max_position_embeddings, config.seq_len)
    config.model.rope_scaling = no_scaling()
    config.schedule.kind = "cosine"
    config.schedule.peak_lr = PEAK_LR.get(preset, 3e-4)
    if preset == "nano":
        config.batch_size, config.steps = 8, 1000
    if preset == "large":  # for meshes such as dp16,tp2,pp4
        config.model.gradient_checkpointing = "full"
    return config
