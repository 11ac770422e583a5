"""Turns a run into a Hugging Face directory that transformers loads, with its tokenizer.

   python launch.py --config experiments/export_hf.py --config.init_from=W1 --config.out=DIR

Only the weights are read. DIR must not exist or be empty; it appears when everything is written.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "export_hf"
    config.init_from = ""  # a workdir (its last checkpoint), its checkpoints/N, or a Hugging Face directory
    config.out = ""  # the directory to write
    config.dtype = "bfloat16"  # dtype to write: bfloat16, float16, float32, or stored to keep that of the checkpoint
    config.max_shard_gb = 5.0  # largest file in 10^9 bytes; larger weights are split into several files with an index
    config.tokenizer = True  # False: weights alone
    return config
