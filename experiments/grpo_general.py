"""General reinforcement: several tasks at once, with rewards by rule for correctness, form, language and length.

    python launch.py --config experiments/grpo_general.py:nano --config.init_from=W --workdir W2
    python launch.py --config experiments/grpo_general.py:qwen3-0.6b --config.init_from=DIR
    python launch.py --config experiments/grpo_general.py:nano --config.init_from=W --workdir W2 \
        --config.rewards=correct=1,format=0.2,reward_model=0.5 --config.judge.reward_model=W3

The preset after the colon sets steps, rates and batch (default small). The model comes from the weights in W. Tasks are
generated problems and code, which runs in a sandbox; the larger presets add GSM8K. A reward model W3 can give a reward
too: see experiments/reward_model.py. (Qwen3 technical report, §4.4, names the kinds of rewards; the tasks and weights
are ours.)
"""

from ml_collections import ConfigDict

from experiments import grpo


def get_config(preset: str = "small") -> ConfigDict:
    config = grpo.get_config(preset)
    tiny = (preset or "small") in grpo.PEAK_LR
    config.tasks = "reasoning=0.8,code=0.2" if tiny else "reasoning=0.3,code=0.3,gsm8k=0.4"
    config.rewards = "correct=1,format=0.2,language=0.1,overlong=0.2"
    config.advantages.combine = "normalize_then_sum"
    config.rollout.mask_truncated = True
    return config
