"""The sources `reasoning` and `procedures`: generated problems in two splits, as text, as chats and as questions.

The split is decided by a hash of the question alone, so a question is in one split whatever its kind, difficulty, seed
or index, as long as `holdout` is the same; and what is held out at a small share is held out at any larger one. All
stages use `documents.HOLDOUT`, so no stage trains on what another one evaluates.
A question that comes again is dropped, so a split holds each of its questions once.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from qwen3f.data.sources.documents import HOLDOUT, Document, Split, distinct, stable_hash
from qwen3f.data.sources.reasoning.problem import DIFFICULTIES, FAMILIES, KINDS, Problem, problem
from qwen3f.errors import UserError

NUM_PROBLEMS = 32_768
"""Problems generated for the mixture `reasoning`, both splits together and before repetitions are dropped.

They are 13 MB of text. Its words are few: a tokenizer trained on it alone has at most about 4,500 pieces.
"""

_FORMAT = 1  # part of the fingerprint: raise it when the same settings would give other problems


@dataclass(frozen=True)
class ReasoningSource:
    """Generated problems; kinds and difficulties take turns, so each makes up the same share of them.

    Attributes:
        holdout: share of the questions held out, in [0, 1).
        seed: other seeds give other problems.
        num_problems: problems generated, both splits together and before repetitions are dropped.
        kinds: kinds to generate, see `problem.FAMILIES`.
        difficulties: difficulties to generate, see `problem.DIFFICULTIES`.
    """

    holdout: float = HOLDOUT
    seed: int = 0
    num_problems: int = NUM_PROBLEMS
    kinds: tuple[str, ...] = KINDS
    difficulties: tuple[int, ...] = DIFFICULTIES
    name: str = "reasoning"

    def __post_init__(self) -> None:
        if not self.kinds or not self.difficulties:
            raise UserError("A reasoning source without kinds or difficulties has no problem: give at least one.")

    def family(self, name: str) -> Self:
        """The source of only one family's problems, with its name. Raises UserError if it has no kind of the family."""
        own = tuple(kind for kind in self.kinds if kind in FAMILIES[name])
        if not own:
            raise UserError(
                f"--config.data.kinds={','.join(self.kinds)} has no kind of {name}: write some of "
                f"{', '.join(FAMILIES[name])}"
            )
        return replace(self, kinds=own, name=name)

    def problems(self, split: Split, counts: Counter[str] | None = None) -> Iterator[Problem]:
        """Stream the problems of `split`; repetitions within it are counted as `repeated_questions` and left out.

        Raises:
            UserError: unknown kind or difficulty.
        """
        for _, item in self._numbered(split, counts):
            yield item

    def documents(self, split: Split, counts: Counter[str] | None = None) -> Iterator[Document]:
        """Stream the problems of `split` as text: the question, an empty line, the solution. Counts as `problems`."""
        for number, item in self._numbered(split, counts):
            yield Document(f"{item.question}\n\n{item.solution}\n", f"{self.name}:{number}")

    def fingerprint(self, split: Split) -> str:
        """Digest of the settings, `split` and this format's version."""
        settings = (_FORMAT, split, self.holdout, self.seed, self.num_problems, self.kinds, self.difficulties)
        return f"{stable_hash(repr(settings).encode()):016x}"

    def _numbered(self, split: Split, counts: Counter[str] | None) -> Iterator[tuple[int, Problem]]:
        def generated() -> Iterator[tuple[int, Problem]]:
            for number in range(self.num_problems):
                turn, kind = divmod(number, len(self.kinds))
                index, difficulty = divmod(turn, len(self.difficulties))
                yield number + 1, problem(self.kinds[kind], self.difficulties[difficulty], self.seed, index)

        def question(numbered: tuple[int, Problem]) -> bytes:
            return numbered[1].question.encode()

        return distinct(generated(), question, split, self.holdout, counts, "repeated_questions")


def chat_messages(item: Problem, thinking: bool = True) -> list[dict[str, str]]:
    """The problem as a chat of two turns for `chat.template.render` and `encode_chat`.

    Args:
        item: the problem.
        thinking: the derivation is the answer's `reasoning_content` and the content its last line, with the boxed
            answer. Without, the content is that line alone: the answer at once.
    """
    derivation, _, conclusion = item.solution.rpartition("\n")
    user = {"role": "user", "content": item.question}
    if thinking:
        return [user, {"role": "assistant", "reasoning_content": derivation, "content": conclusion}]
    return [user, {"role": "assistant", "content": conclusion}]


def question_answer(item: Problem) -> dict[str, str]:
    """The problem for reinforcement learning: {"question": …, "answer": …}, the answer as in `Problem.answer`."""
    return {"question": item.question, "answer": item.answer}
