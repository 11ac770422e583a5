"""Pretraining, stage 3: long context, 32,768 tokens, with the rotary base raised to 1,000,000 (ABF).

    python launch.py --config experiments/pretrain_s3.py:small --config.init_from=W2 --workdir W3
    python launch.py --config experiments/pretrain_s3.py:small,yarn …     # YaRN over stage 1's context as well
    python launch.py --config experiments/pretrain_s3.py:small --config.mesh=dp8,tp2,pp4

Three quarters of the tokens come from documents longer than half the context, a quarter from documents between an
eighth and half of it (technical report, §3.2: 16,384 to 32,768 and 4,096 to 16,384 tokens). Shorter documents are left
out.

The model comes from init_from, as in every stage that starts from weights. A rotary base below 1,000,000 is raised, and
a log line says so; a higher base, or a longer context, stays. YaRN is off by default: Qwen3 trains with ABF alone and
adds YaRN at inference (technical report, §3.2). nano runs at 2,048 tokens.
"""

from ml_collections import ConfigDict

from experiments import pretrain_s1
from qwen3f.errors import UserError


def get_config(arg: str = "small") -> ConfigDict:
    preset, _, option = arg.partition(",")
    if option not in ("", "yarn"):
        raise UserError(f"pretrain_s3: unknown option '{option}'; write :preset or :preset,yarn")
    config = pretrain_s1.get_config(preset)
    before, config.seq_len = config.seq_len, 2048 if preset == "nano" else 32768
    config.model.max_position_embeddings = max(config.model.max_position_embeddings, config.seq_len)
    config.model.rope_theta = 1e6
    config.abf = True
    if option == "yarn":
        scaling = {"factor": config.seq_len / before, "original_max_position_embeddings": before}
        config.model.rope_scaling = ConfigDict({"rope_type": "yarn", **scaling})
    config.data.length_mix = "long=0.75,medium=0.25"
    config.steps //= 10
    config.batch_size //= 2  # enough for dp8 with pp4; rows are eight times as long
    config.schedule.peak_lr /= 10
    return config
