"""Each stage's default configuration: the keys of every run, and a section with its own. Imports no torch."""

from ml_collections import ConfigDict

from qwen3f.train.defaults import run_config


def pretrain_config(preset: str) -> ConfigDict:
    config = run_config(preset, "pretrain")
    config.context_warmup = ConfigDict()
    config.context_warmup.length = 0  # tokens that attention may look back over at first; 0: no such warmup
    config.context_warmup.steps = 0.5  # how long: below 1 a share of the steps, else a number of steps
    config.sample = _sample()
    return config


def _sample() -> ConfigDict:
    """Text at the end of a run."""
    sample = ConfigDict()
    sample.prompts = ("import ", "def main(", "The ")  # continued at the end of the run
    sample.tokens = 64
    sample.temperature = 0.7
    return sample
