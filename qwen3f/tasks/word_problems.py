r"""The tasks `gsm8k` and `math`: questions of the data sets, whose final answer is compared as mathematics.

Held out is each data set's own test split. Without a directory (gsm8k@DIR) the Hub is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from qwen3f.data.sources.documents import Split
from qwen3f.errors import UserError
from qwen3f.tasks.equivalence import math_reward
from qwen3f.tasks.task import Question

INSTRUCTION = "\nPut the final answer into \\boxed{}."


@dataclass(frozen=True)
class WordProblems:
    """A data set of adapters.grpo. name: its short name. root: a local copy's directory; "": the Hub."""

    name: str
    root: str = ""

    def questions(self, split: Split) -> Iterator[Question]:
        """As in `Task`. A row whose solution has no answer is left out. Raises UserError for a row that cannot be
        read, and for a data set that is not there."""
        # imported here: processes that only judge need neither data sets nor the torch that these load
        from qwen3f.data.sources.adapters.grpo import ADAPTERS
        from qwen3f.data.sources.adapters.opening import rows
        from qwen3f.data.sources.adapters.rows import LeftOut, RowFault

        adapter = ADAPTERS[self.name]
        for row in rows(self.name, self.root, "train" if split == "train" else "test"):
            try:
                found = adapter(row)
            except LeftOut:
                continue
            except RowFault as fault:
                raise UserError(fault.message) from None
            yield Question(found["question"] + INSTRUCTION, found["answer"])

    def judge(self, answer_text: str, gold: str) -> float | None:
        """math_reward: 1.0, 0.0, or None if gold cannot be compared."""
        return math_reward(answer_text, gold)
