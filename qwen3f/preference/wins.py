"""How often a policy's answers beat the reference's, by rule: right, then in the requested form, then short."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from qwen3f.config import ModelConfig
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.eval.answers import KEPT_TEXTS
from qwen3f.params import Params
from qwen3f.preference.online_rows import Written
from qwen3f.preference.prompts import prompt_ids
from qwen3f.preference.sampling import Sampler, SamplerOptions
from qwen3f.tasks.answer_text import is_well_formed
from qwen3f.tasks.task import Question, Task
from qwen3f.train.stage import Evaluator, Interrupted, Run

Quality = tuple[float, bool, int]


def quality(task: Task, question: Question, answer: Written, thinking: bool) -> Quality:
    """(whether the answer is right, whether it has the requested form, minus its length); larger is better.

    An answer that did not end is neither right nor well formed.
    """
    right = (task.judge(answer.text, question.gold) or 0.0) if answer.ended else 0.0
    formed = answer.ended and is_well_formed(answer.text, thinking, block_in_prompt=not thinking)
    return right, formed, -len(answer.ids)


def win_rate(qualities: Sequence[Quality], of_reference: Sequence[Quality]) -> float:
    """Share of the questions where `qualities` are better; equal ones count half."""
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(qualities, of_reference, strict=True)]
    return sum(wins) / max(1, len(wins))


@dataclasses.dataclass(frozen=True)
class Asked:
    """Held-out questions, whether their prompts let the model think, and the options of answers (always greedy)."""

    task: Task
    questions: tuple[Question, ...]
    thinking: bool
    options: SamplerOptions


class Wins:
    """Compares the policy's answers to questions with the reference's, which are generated once.

    reference: () -> (its model, its weights, sharded like the policy's); called once, at the first evaluation. Between
    evaluations no weights and no cache stay in memory.
    """

    def __init__(
        self, run: Run, tokenizer: Tokenizer, asked: Asked, reference: Callable[[], tuple[ModelConfig, Params]]
    ) -> None:
        self._run, self._tokenizer, self._asked, self._reference = run, tokenizer, asked, reference
        self._prompts = [prompt_ids(tokenizer, question, asked.thinking) for question in asked.questions]
        self._of_reference: list[Quality] = []
        self._lines: list[dict[str, Any]] = []

    def evaluator(self) -> Evaluator:
        """wins: `win_rate` over the reference. accuracy, well_formed: shares. tokens: mean length of an answer."""
        return Evaluator(self._run.setup.config.eval.every, self._evaluate, _say, lambda: self._lines)

    def _evaluate(self, params: Params) -> dict[str, float]:
        if not self._of_reference:
            self._of_reference = self._qualities(self._answers(*self._reference()))
        answers = self._answers(self._run.setup.model, params)
        own = self._qualities(answers)
        self._lines = [self._line(*one) for one in zip(range(len(own)), self._asked.questions, answers, own)]
        right, formed, shortness = (sum(values) / len(own) for values in zip(*own))
        return {
            "wins": win_rate(own, self._of_reference),
            "accuracy": right,
            "well_formed": formed,
            "tokens": -shortness,
        }

    def _answers(self, cfg: ModelConfig, params: Params) -> list[Written]:
        if self._run.stopping():
            raise Interrupted
        sampler = Sampler(self._run, cfg, self._tokenizer, self._asked.options)
        return [own[0] for own in sampler.answers(params, self._prompts, 1, 0.0, "heldout")]

    def _qualities(self, answers: Sequence[Written]) -> list[Quality]:
        asked = self._asked
        pairs = zip(asked.questions, answers, strict=True)
        return [quality(asked.task, question, own, asked.thinking) for question, own in pairs]

    def _line(self, number: int, question: Question, answer: Written, found: Quality) -> dict[str, Any]:
        """A line of the answers, in the form of eval.answers.kept."""
        mode = "thinking" if self._asked.thinking else "plain"
        line = {"mode": mode, "number": number, "mark": found[0], "formed": found[1], "ended": answer.ended}
        if number < KEPT_TEXTS:
            line |= {"prompt": question.prompt, "gold": question.gold, "text": answer.text}
        return line


def _say(values: dict[str, float]) -> str:
    return (
        f"held-out questions: {100 * values['wins']:.1f}% won against the reference, {100 * values['accuracy']:.1f}% "
        f"right, {100 * values['well_formed']:.1f}% well formed, {values['tokens']:.1f} tokens an answer"
    )
