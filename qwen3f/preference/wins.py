"""How often a policy's answers beat the reference's, by rule: right, then in the asked form, then short."""

from collections.abc import Sequence

from qwen3f.preference.online_rows import Written
from qwen3f.tasks.answer_text import is_well_formed
from qwen3f.tasks.task import Question, Task

Quality = tuple[float, bool, int]


def quality(task: Task, question: Question, answer: Written, thinking: bool) -> Quality:
    """To be compared: whether the answer is right (an answer that did not end is not), has its form, and is short."""
    right = (task.judge(answer.text, question.gold) or 0.0) if answer.ended else 0.0
    formed = answer.ended and is_well_formed(answer.text, thinking, block_in_prompt=not thinking)
    return right, formed, -len(answer.ids)


def win_rate(qualities: Sequence[Quality], of_reference: Sequence[Quality]) -> float:
    """Share of the questions that the first answers better; equals count half."""
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(qualities, of_reference, strict=True)]
    return sum(wins) / max(1, len(wins))
