"""Measures a model: answers to new held-out questions, greedily and at temperature 1."""

import dataclasses
from itertools import islice
from typing import Any

from qwen3f.data.sources.reasoning import ReasoningSource
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.eval.answers import AnswerOptions, answer
from qwen3f.eval.statistics import estimate
from qwen3f.interop import source
from qwen3f.rl.trial.settings import TASK, Trial
from qwen3f.tasks.answer_text import is_well_formed
from qwen3f.tasks.registry import open_task
from qwen3f.tasks.task import Question
from qwen3f.tasks.working import right_working
from qwen3f.train.choices import find_device, find_dtype

TEST_SEED = 1_000_003  # a seed of problems that no stage uses


def test_questions(trial: Trial) -> tuple[Question, ...]:
    """Held-out questions that no run has used, also not to choose a checkpoint."""
    kinds = tuple(part.strip() for part in trial.kinds.split(","))
    difficulties = tuple(int(part) for part in trial.difficulties.split(","))
    problems = ReasoningSource(seed=TEST_SEED, num_problems=40 * trial.tests, kinds=kinds, difficulties=difficulties)
    return tuple(islice(open_task(TASK, "kinds", problems).questions("heldout"), trial.tests))


def measure(trial: Trial, weights: str) -> dict[str, Any]:
    """{"greedy", "sampled": {"right", "right_working", "well_formed": estimate, "tokens", "marks": [0 or 1]}}.

    weights: a workdir or its checkpoints/N. right_working: the answer is right, and so is every line of the working.
    tokens: mean length of an answer.
    """
    place = source.pinned(weights)
    cfg = source.read_model_config(place)
    device = find_device(trial.device)
    params = source.read_params(place, cfg, device, find_dtype("auto", device))
    tokenizer = load_tokenizer(source.tokenizer_path(place))
    questions, task = test_questions(trial), open_task(TASK, "kinds")
    prompts = [question.prompt for question in questions]
    out: dict[str, Any] = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        options = AnswerOptions(trial.new_tokens, temperature, seed=TEST_SEED, batch_size=256)
        given = list(answer(cfg, params, tokenizer, prompts, True, options))
        right = [float(a.ended and task.judge(a.text, q.gold) == 1.0) for q, a in zip(questions, given)]
        worked = [mark * right_working(q.prompt, a.text) for mark, q, a in zip(right, questions, given)]
        formed = [float(a.ended and is_well_formed(a.text, thinking=True)) for a in given]
        found = {"right": right, "right_working": worked, "well_formed": formed}
        shares = {what: dataclasses.asdict(estimate(marks)) for what, marks in found.items()}
        tokens = sum(len(tokenizer.encode(a.text)) for a in given) / len(given)
        out[name] = {**shares, "tokens": tokens, "marks": [int(mark) for mark in right]}
    return out
