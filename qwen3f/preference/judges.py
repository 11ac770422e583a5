"""Judges that rank answers: a task's own judge, the rule of `wins`, or a reward model."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from qwen3f.config import ModelConfig
from qwen3f.data.packing.concat import IGNORED_TARGET
from qwen3f.errors import TrainingError, UserError
from qwen3f.interop import source
from qwen3f.params import Params
from qwen3f.preference.online_rows import Written
from qwen3f.preference.passes import joined_rows
from qwen3f.preference.rows import scores_at_ends
from qwen3f.tasks.task import Question, Task
from qwen3f.train.outputs import make_outputs
from qwen3f.train.setup import Setup
from qwen3f.train.stage import Run

Prompt = Sequence[int]
Rewards = list[list[float | None]]
Judge = Callable[[Sequence[Question], Sequence[Prompt], Sequence[Sequence[Written]]], Rewards]

_LONGEST = 2.0**40  # more tokens than any answer has, so the length only decides between otherwise equal answers
_STRIDE = 128  # rows are padded to a multiple of this, or to config.seq_len: few shapes, which cp can divide


def task_judge(task: Task) -> Judge:
    """Rewards: 1 for a right answer, 0 for a wrong one, None if the task cannot tell.

    Equal answers to a question are judged once: a trained model writes many of them.
    """

    def judge(
        questions: Sequence[Question], prompts: Sequence[Prompt], answers: Sequence[Sequence[Written]]
    ) -> Rewards:
        rewards = []
        for question, own in zip(questions, answers, strict=True):
            of_text = {text: task.judge(text, question.gold) for text in dict.fromkeys(a.text for a in own)}
            rewards.append([of_text[a.text] for a in own])
        return rewards

    return judge


def rule_judge(quality: Callable[[Question, Written], tuple[float, bool, int]]) -> Judge:
    """Rewards: numbers that order answers by their quality (`wins.quality`)."""

    def reward(question: Question, answer: Written) -> float:
        right, formed, shortness = quality(question, answer)
        return 4 * right + 2 * formed + shortness / _LONGEST

    def judge(
        questions: Sequence[Question], prompts: Sequence[Prompt], answers: Sequence[Sequence[Written]]
    ) -> Rewards:
        return [[reward(q, a) for a in own] for q, own in zip(questions, answers, strict=True)]

    return judge


def check_reward_model(place: str, setup: Setup, flag: str) -> None:
    """Raises UserError unless there is a reward model at `place`, the value of `flag`, with the run's vocabulary."""
    if not place:
        raise UserError(f"the run needs a reward model: write {flag}=W, a workdir of experiments/reward_model.py")
    there = source.read_model_config(place, flag)
    if not there.scalar_head or there.vocab_size != setup.model.vocab_size:
        raise UserError(
            f"{flag}={place} is not a reward model with a vocabulary of {setup.model.vocab_size}: "
            "train one from this model by experiments/reward_model.py"
        )


class RewardModel:
    """A reward model on all ranks of a run. It scores documents of ids at their last token.

    Its weights stay in memory in the dtype of the forward pass, sharded like the run's, so create it in Stage.complete.
    Raises UserError as `check_reward_model`.
    """

    def __init__(self, run: Run, place: str, flag: str) -> None:
        setup = self._setup = run.setup
        check_reward_model(place, setup, flag)
        cfg: ModelConfig = source.read_model_config(place).replace(gradient_checkpointing="none")
        self._run, self._rows = run, setup.config.eval.batch_size
        self._params: Params = source.read_params(
            place, cfg, setup.device, setup.compute_dtype, setup.config.checkpoint.backend, setup.layout, run.world
        )
        self._outputs = make_outputs(cfg, setup.execution, setup.layout, "scores", compute_dtype=setup.compute_dtype)

    def scores(self, documents: Sequence[Sequence[int]]) -> list[float]:
        """The score of each document. All ranks pass the same documents and get all scores. A score does not depend on
        padding or on other documents.

        Raises UserError for a document longer than config.seq_len or empty, TrainingError for a score that is not
        finite.
        """
        found: list[float] = []
        for first in range(0, len(documents), self._rows):
            part = documents[first : first + self._rows]
            batch = self._batch(part)
            values = joined_rows(
                self._run, batch, lambda own: scores_at_ends(self._outputs(self._params, own), own)[:, 0]
            )
            found += values[: len(part)].tolist()
        if bad := sum(not np.isfinite(x) for x in found):
            raise TrainingError(f"the reward model gave {bad} of {len(found)} answers a score that is not finite")
        return found

    def judge(
        self, questions: Sequence[Question], prompts: Sequence[Prompt], answers: Sequence[Sequence[Written]]
    ) -> Rewards:
        """As `Judge`."""
        flat = [[*prompt, *answer.ids] for prompt, own in zip(prompts, answers, strict=True) for answer in own]
        scores = iter(self.scores(flat))
        return [[next(scores) for _ in own] for own in answers]

    def _batch(self, documents: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        most, longest = self._setup.config.seq_len, max(map(len, documents))
        if longest > most or not all(documents):
            raise UserError(f"a reward model's input has 1 to config.seq_len={most} tokens, not {longest}")
        length = min(most, -(-longest // _STRIDE) * _STRIDE)
        tokens = torch.zeros(self._rows, length, dtype=torch.int64)
        segments = torch.zeros(self._rows, length, dtype=torch.int32)
        for row, ids in enumerate(documents):
            tokens[row, : len(ids)] = torch.tensor(ids)
            segments[row, : len(ids)] = 1
        return {
            "tokens": tokens,
            "targets": torch.full_like(tokens, IGNORED_TARGET),
            "loss_weights": torch.zeros_like(tokens, dtype=torch.float32),
            "positions": torch.arange(length).expand_as(tokens).contiguous(),
            "segments": segments,
        }
