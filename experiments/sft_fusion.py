"""Thinking-mode fusion: a model that thinks learns to answer at once where it is asked to.

    python launch.py --config experiments/sft_fusion.py:nano --config.init_from=W2 --workdir W3
    python launch.py --config experiments/sft_fusion.py:small --config.init_from=W2 \
        --config.data.mixture=chats@DIR=0.7,ultrachat@DIR2=0.3

The preset after the colon sets steps, rates and batch; the model comes from the weights in W2. Thinking and plain data
are mixed by weight. A share of the samples names its mode by /think or /no_think; the last switch counts (Qwen3
technical report, §4.3). For thinking data by rejection sampling from the stage before, run
experiments/rejection_sample.py, then use chats@DIR.
"""

from ml_collections import ConfigDict

from experiments import sft_cold_start


def get_config(preset: str = "small") -> ConfigDict:
    config = sft_cold_start.get_config(preset)
    config.data.mixture = "reasoning=0.7,reasoning-plain=0.3"
    config.data.switches = 0.5
    config.data.judge = ""  # a conversation has no right answer; rejection sampling has already judged its answers
    config.eval.modes = "thinking,plain"
    config.schedule.peak_lr /= 3
    config.steps //= 3
    return config
