r"""The tasks `reasoning` and `procedures`: generated problems, whose answer in \boxed{…} is judged."""

from collections.abc import Iterator
from dataclasses import dataclass

from qwen3f.data.sources.documents import Split
from qwen3f.data.sources.reasoning import DIFFICULTIES, KINDS, NUM_PROBLEMS, ReasoningSource
from qwen3f.tasks.answer_text import boxed_answer, normalised
from qwen3f.tasks.task import Question


@dataclass(frozen=True)
class ReasoningTask:
    """Problems of `sources.reasoning`. Its held-out split is that of every stage: `documents.HOLDOUT`.

    Attributes:
        kinds, difficulties: which problems.
        seed: other seeds give other problems; a question stays in its split.
        num_problems: problems generated, both splits together and before repetitions are dropped.
    """

    kinds: tuple[str, ...] = KINDS
    difficulties: tuple[int, ...] = DIFFICULTIES
    seed: int = 0
    num_problems: int = NUM_PROBLEMS
    name: str = "reasoning"

    def questions(self, split: Split) -> Iterator[Question]:
        """As in `Task`, each question once; kinds and difficulties take turns.

        Raises:
            UserError: unknown kind or difficulty.
        """
        for item in self.source.problems(split):
            yield Question(item.question, item.answer, (item.kind, f"difficulty {item.difficulty}"))

    @property
    def source(self) -> ReasoningSource:
        """The problems with their worked solutions."""
        return ReasoningSource(
            seed=self.seed,
            num_problems=self.num_problems,
            kinds=self.kinds,
            difficulties=self.difficulties,
            name=self.name,
        )

    def judge(self, answer_text: str, gold: str) -> float:
        r"""1.0 if the last \boxed{…} after the thinking holds `gold`, both normalised; else 0.0, never None."""
        return float(boxed_answer(answer_text) == normalised(gold))
