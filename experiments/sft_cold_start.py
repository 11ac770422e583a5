"""The long-CoT cold start: a pretrained model learns to think before it answers.

    python launch.py --config experiments/sft_cold_start.py:nano --config.init_from=W --workdir W2
    python launch.py --config experiments/sft_cold_start.py:small --config.init_from=W --config.data.mixture=chats@DIR

The preset after the colon says the run; the model is that of the weights in W. Trained are worked solutions that the
task's judge calls right (Qwen3 technical report, §4.1, which publishes no rates: those here are ours).
"""

from ml_collections import ConfigDict

from qwen3f.stages.configs import sft_config

PEAK_LR = {"nano": 3e-3, "debug": 1e-3, "debug_moe": 1e-3}


def get_config(preset: str = "small") -> ConfigDict:
    preset = preset or "small"
    config = sft_config(preset)
    config.data.judge = "reasoning"
    config.schedule.kind = "cosine"
    config.schedule.peak_lr = PEAK_LR.get(preset, 1e-5)
    config.schedule.warmup = 0.03
    config.seq_len = 8192
    config.steps, config.batch_size = 2000, 32
    if preset in PEAK_LR:  # the generated problems, where a tiny model can learn to solve them
        config.seq_len = 512
        config.data.difficulties = "1"
        config.data.kinds = "number_theory,sequence" if preset == "nano" else ""
        config.steps, config.batch_size = (1500, 8) if preset == "nano" else (3000, 64)
        config.eval.max_new_tokens = 200
    if preset == "large":
        config.model.gradient_checkpointing = "full"
    return config
