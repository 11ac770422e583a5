"""Configurations of experiments/eval.py on the model and the rows of conftest.place."""

from experiments.eval import get_config

NAMES = "mmlu,gsm8k,arc_challenge,hellaswag,winogrande,triviaqa"


def configure(place, **changes):
    config = get_config()
    config.update(init_from=str(place / "hf"), benchmarks=NAMES, max_new_tokens=6, device="cpu")
    config.data.root = str(place / "rows")
    config.update_from_flattened_dict(changes)
    return config
