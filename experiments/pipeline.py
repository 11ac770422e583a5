"""All stages to a model that reasons, in one command: S1, S2, S3, cold start, RL, fusion, general RL, evaluation.

    python launch.py --config experiments/pipeline.py:nano --workdir P
    python launch.py --config experiments/pipeline.py:nano --config.set.grpo.steps=10 --workdir P
    python launch.py --config experiments/pipeline.py:nano --config.stages=sft_cold_start,grpo --workdir P
    python launch.py --config experiments/pipeline.py:large --config.mesh=dp8,tp2,pp4 --config.plan=True

The preset after the colon names one of the tables below (default nano): nano runs on two CPU cores within half an hour,
debug and debug_moe on a GPU, nano_vl learns to see. P gets a directory for each stage; pipeline.json, which records
what each stage ran and from which checkpoint; and report.html. The same command again resumes where it stopped.
--config.set.STAGE.KEY sets a key of a stage, --config.set.measure.KEY a key of the evaluation that runs after each
stage. --config.stages runs only the named stages, even if they are done already; --config.skip leaves some out. If
settings of a finished stage have changed, its result is not reused: the command stops and says what to write.
"""

import difflib
from typing import Any

from ml_collections import ConfigDict

from qwen3f.errors import UserError
from qwen3f.pipeline.stages import PipelineStage, pipeline_config

Row = tuple[str, int, dict[str, Any]]  # experiment, budget in seconds (its measurement included), overrides

PURPOSES = {
    "pretrain_s1": "learns to write from general text",
    "pretrain_s2": "reads more reasoning",
    "pretrain_s3": "learns to use a long context",
    "multimodal": "learns to see",
    "sft_cold_start": "learns to think before it answers",
    "grpo": "learns from being right or wrong",
    "sft_fusion": "learns to answer at once where it is asked to",
    "grpo_general": "is rewarded for right answers in good form, on several tasks",
    "dpo": "learns which of two answers is better",
    "evaluation": "answers more held-out questions",
    "pictures": "is asked about held-out pictures",
}

_MUON = {"optimizer.kind": "muon", "optimizer.update_rms": 0.2 / 3, "optimizer.weight_decay": 0.07}
_TO_ZERO = {"schedule.kind": "wsd", "schedule.warmup": 0.03, "schedule.decay": 0.8, "schedule.min_ratio": 0.0}
_EASY = {"data.kinds": "number_theory,sequence", "data.difficulties": "1"}  # what nano trains


def _often(steps: int, questions: int = 0) -> dict[str, Any]:
    """Evaluations and checkpoints every `steps` steps. questions: number of questions in the stage's evaluations."""
    return {"eval.every": steps, "checkpoint.every": steps, **({"eval.questions": questions} if questions else {})}


# At 1e-4 without a warmup, AdamW's first steps made debug's answers worse.
_GENTLE = {"schedule.peak_lr": 3e-5}
# Add the next-token loss of the better answer: DPO's loss alone made right answers fewer in debug.
_LEARN = {"dpo.sft_weight": 1.0}
_TEXT = {"batch_size": 8, "seq_len": 256, "eval.max_docs": 16, "sample.tokens": 32, **_MUON}

# On two CPU cores.
NANO: dict[str, Row] = {
    "pretrain_s1": ("pretrain_s1.py:nano", 330, {
        **_TEXT, **_TO_ZERO, **_often(250), "steps": 1000, "schedule.peak_lr": 3e-2, "context_warmup.length": 128,
        "data.mixture": "embedded=0.5,reasoning=0.5", "model.vocab_size": 2048, "model.initializer_range": 0.03,
    }),
    "pretrain_s2": ("pretrain_s2.py:nano", 210, {
        **_TEXT, **_often(250), "steps": 750, "schedule.peak_lr": 1e-2, "data.mixture": "embedded=0.2,reasoning=0.8",
    }),
    "pretrain_s3": ("pretrain_s3.py:nano", 110, {
        **_MUON, **_often(20), "steps": 40, "schedule.peak_lr": 3e-3, "eval.max_docs": 16, "eval.batch_size": 4,
        "sample.tokens": 32,
    }),
    "sft_cold_start": ("sft_cold_start.py:nano", 450, {**_often(400, 64), "steps": 1600}),
    "grpo": ("grpo.py:nano", 170, {**_often(10, 64), "steps": 40, **_GENTLE}),
    "sft_fusion": ("sft_fusion.py:nano", 130, {**_often(100, 64), "steps": 300, "data.problems": 16_384}),
    "grpo_general": ("grpo_general.py:nano", 120, {**_often(5, 64), "steps": 10, **_GENTLE}),
    "dpo": ("dpo.py:nano", 100, {
        **_often(25, 64), "steps": 25, "data.problems": 8192, "data.max_samples": 300, "data.max_heldout": 100,
        "schedule.peak_lr": 2e-5, **_LEARN,  # 1e-4 ranked no more pairs right and gave fewer right answers
    }),
    "evaluation": ("eval.py", 60, {"benchmarks": "reasoning", "limit": 170, "max_new_tokens": 200, **_EASY}),
}  # fmt: skip
_NANO_ASKED = {"benchmarks": "reasoning", "limit": 64, "max_new_tokens": 200, **_EASY}  # 64 of each kind

# 25M parameters on one GPU.
_EAGER = {"compile": "off"}  # runs last a minute or two; nobody has measured whether compiling them saves time
_GPU_TEXT = {**_EAGER, "batch_size": 32, "seq_len": 1024, "eval.max_docs": 64, "sample.tokens": 32}
_GPU_TOKENS = 300  # tokens of an answer, at most; the hardest problems need them
_GPU_CHATS = {**_EAGER, "data.difficulties": "1,2,3", "eval.max_new_tokens": _GPU_TOKENS}
# Reinforcement teaches sorting: fine-tuning shows few worked solutions of it, reinforcement asks many questions and
# also rewards each number that is in the right place.
_KINDS = "arithmetic,algebra,number_theory,logic,word_problem,sequence,sorting"
# For reinforcement; a step has 64 questions.
_GPU_ASKED = {
    **_GPU_CHATS, "data.problems": 10_000, "rollout.max_new_tokens": _GPU_TOKENS, "judge.processes": 8,
}  # fmt: skip
DEBUG: dict[str, Row] = {
    "pretrain_s1": ("pretrain_s1.py:{}", 80, {
        **_GPU_TEXT, **_often(150), "steps": 300, "data.mixture": "embedded=0.5,reasoning=0.5",
    }),
    "pretrain_s2": ("pretrain_s2.py:{}", 35, {
        **_GPU_TEXT, **_often(250), "steps": 250, "schedule.peak_lr": 1e-3,
        "data.mixture": "embedded=0.2,reasoning=0.8",
    }),
    "pretrain_s3": ("pretrain_s3.py:{}", 20, {
        **_often(50), "batch_size": 4, "seq_len": 8192, "model.max_position_embeddings": 8192, "steps": 50,
        "eval.max_docs": 64, "eval.batch_size": 4, "sample.tokens": 32, **_EAGER,
    }),
    "sft_cold_start": ("sft_cold_start.py:{}", 100, {
        **_often(200, 256), **_GPU_CHATS, "data.problems": 30_000, "data.kinds": _KINDS, "steps": 600,
        "data.mixture": "reasoning=0.985,procedures=0.015",
    }),
    "grpo": ("grpo.py:{}", 80, {
        **_often(16, 256), **_GPU_ASKED, "data.kinds": "sorting", "tasks": "procedures", "steps": 32,
        "rewards": "correct=0.5,places=0.5", "schedule.warmup": 0.3,
    }),
    "sft_fusion": ("sft_fusion.py:{}", 40, {
        **_often(100, 256), **_GPU_CHATS, "data.problems": 10_000, "data.kinds": _KINDS, "steps": 100,
        "data.mixture": "reasoning=0.65,reasoning-plain=0.3,procedures=0.05",
    }),
    "grpo_general": ("grpo_general.py:{}", 70, {
        **_often(20, 256), **_GPU_ASKED, "data.kinds": _KINDS, "tasks": "reasoning=0.5,procedures=0.5", "steps": 20,
        **_GENTLE,
    }),
    # Online, on the model's own answers: given pairs, as in nano, made right answers fewer here. 256 questions give 43
    # to 84 pairs.
    "dpo": ("dpo_online.py:{}", 85, {
        **_often(20, 256), **_EAGER, **_LEARN, "data.kinds": "sorting", "data.difficulties": "1,2,3",
        "data.problems": 10_000, "online.task": "procedures", "online.samples": 8, "online.temperature": 1.0,
        "online.max_new_tokens": _GPU_TOKENS, "online.fill": 0.2, "steps": 20,
        "batch_size": 256, "microbatches": 16, "schedule.peak_lr": 1e-4, "schedule.warmup": 0.3,
    }),
    "evaluation": ("eval.py", 30, {
        "benchmarks": "reasoning,procedures", "limit": 500, "max_new_tokens": _GPU_TOKENS, "data.kinds": _KINDS,
        "data.difficulties": "1,2,3", "data.problems": 131_072,
    }),
}  # fmt: skip
# The mixture's reinforcement learns by Muon (experiments/grpo.py). In general GRPO, 20 steps gained nothing, and a rate
# of 3e-4 made right answers to problems fewer.
DEBUG_MOE: dict[str, Row] = DEBUG | {
    "grpo_general": ("grpo_general.py:{}", 85, {
        **DEBUG["grpo_general"][2], **_often(40, 256), "steps": 40, "schedule.peak_lr": 1.5e-4, "schedule.warmup": 0.3,
    }),
    "dpo": (DEBUG["dpo"][0], 70, DEBUG["dpo"][2]),
}  # fmt: skip
_DEBUG_ASKED = {
    "benchmarks": "reasoning,procedures", "limit": 300, "max_new_tokens": _GPU_TOKENS, "data.kinds": _KINDS,
    "data.difficulties": "1,2,3", "data.problems": 65_536,
}  # fmt: skip

# A text model gets a vision tower and learns to see; on two CPU cores.
NANO_VL: dict[str, Row] = {
    "pretrain_s1": ("pretrain_s1.py:nano", 200, {
        **_TEXT, **_TO_ZERO, **_often(250), "steps": 500, "schedule.peak_lr": 3e-2,
        "data.mixture": "embedded=0.5,reasoning=0.5", "model.vocab_size": 2048, "model.initializer_range": 0.03,
        "model.num_attention_heads": 4, "model.num_key_value_heads": 4, "model.head_dim": 32,  # as multimodal's
    }),
    # More steps than multimodal.py alone: the text model's tokenizer splits numbers into digits, so reading a bar's
    # value takes two tokens.
    "multimodal": ("multimodal.py:nano_vl", 1140, {**_often(325), "steps": 1300}),
    "pictures": ("generate.py", 60, {
        "max_new_tokens": 64, "temperature": 0.0, "thinking": False, "min_pixels": 64 * 64, "max_pixels": 128 * 128,
    }),
}  # fmt: skip

# The experiments without changes: 235B parameters need your own data and devices.
LARGE: dict[str, Row] = {
    name: (f"{name}.py:large", 0, {}) for name in (*PURPOSES,) if name not in ("multimodal", "evaluation", "pictures")
} | {"evaluation": ("eval.py", 0, {"benchmarks": "gsm8k,math,mmlu", "prompt": "chat"})}

PRESETS: dict[str, tuple[dict[str, Row], dict[str, Any]]] = {
    "nano": (NANO, _NANO_ASKED),
    "debug": (DEBUG, _DEBUG_ASKED),
    "debug_moe": (DEBUG_MOE, _DEBUG_ASKED),
    "nano_vl": (NANO_VL, {}),
    "large": (LARGE, {"benchmarks": "gsm8k", "limit": 200, "prompt": "chat"}),
}


def get_config(preset: str = "nano") -> ConfigDict:
    preset = preset or "nano"
    if preset not in PRESETS:
        close = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"presets: {', '.join(PRESETS)}"
        raise UserError(f"pipeline: unknown preset '{preset}'; {hint}")
    rows, asked = PRESETS[preset]
    stages = [
        (PipelineStage(name, PURPOSES[name], f"experiments/{file.format(preset)}", seconds), overrides)
        for name, (file, seconds, overrides) in rows.items()
    ]
    return pipeline_config(preset, stages, asked, overlap=asked is _DEBUG_ASKED)
