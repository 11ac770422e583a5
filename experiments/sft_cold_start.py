"""The long-CoT cold start: a pretrained model learns to think before it answers.

    python launch.py --config experiments/sft_cold_start.py:nano --config.init_from=W --workdir W2
    python launch.py --config experiments/sft_cold_start.py:small --config.init_from=W --config.data.mixture=chats@DIR

The preset after the colon sets steps, rates and batch; the model comes from the weights in W. It trains on worked
solutions that the task's judge calls right (Qwen3 technical report, §4.1, which publishes no rates: those here are
ours).
"""

from ml_collections import ConfigDict

from qwen3f.stages.configs import sft_config

TINY = ("nano", "debug", "debug_moe")


def get_config(preset: str = "small") -> ConfigDict:
    preset = preset or "small"
    config = sft_config(preset)
    config.data.judge = "reasoning"
    config.schedule.kind = "cosine"
    config.schedule.peak_lr = 1e-5
    config.schedule.warmup = 0.03
    config.seq_len = 8192
    config.steps, config.batch_size = 2000, 32
    if preset in TINY:
        _solve_generated_problems(config, preset)
    if preset == "large":
        config.model.gradient_checkpointing = "full"
    return config


def _solve_generated_problems(config: ConfigDict, preset: str) -> None:
    """Problems that a tiny model can learn in minutes: nano two kinds on two CPU cores, debug all kinds on a GPU.

    qwen3f/tasks/README.md shows the results, those of debug without pretraining.
    """
    config.seq_len = 512
    if preset == "nano":
        config.data.kinds, config.data.difficulties, config.data.problems = "number_theory,sequence", "1", 65_536
        config.steps, config.batch_size = 1100, 4
        config.eval.max_new_tokens = 200
        _learn_by_muon(config, peak_lr=5e-3, update_rms=0.2 / 3, weight_decay=0.07)
    else:
        config.data.difficulties, config.data.problems = "1,2", 600_000
        config.steps, config.batch_size = 3000, 64
        config.eval.max_new_tokens = 300
        _learn_by_muon(config, peak_lr=3e-3, update_rms=0.2, weight_decay=0.1)


def _learn_by_muon(config: ConfigDict, peak_lr: float, update_rms: float, weight_decay: float) -> None:
    """Muon, at a rate that falls to 0 in the last 70% of the steps.

    From the demo's weights, AdamW at 5e-3 ended with a held-out loss of 0.086 after 1,600 steps; Muon at 1.5e-2 with
    0.059.
    """
    config.optimizer.kind = "muon"
    config.optimizer.update_rms = update_rms
    config.optimizer.weight_decay = weight_decay
    config.schedule.kind = "wsd"
    config.schedule.peak_lr = peak_lr
    config.schedule.decay = 0.7
    config.schedule.min_ratio = 0.0
