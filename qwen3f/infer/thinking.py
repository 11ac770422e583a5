"""Thinking budget: after N tokens of thinking, end it with Qwen3's closing sentence (arXiv:2505.09388, §4.7)."""

import dataclasses

from qwen3f.errors import UserError

# As the report prints it, with the full stop after the tag.
CLOSING = (
    "Considering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>.\n\n"
)


@dataclasses.dataclass(frozen=True)
class ThinkingBudget:
    """A limit on thinking, for prompts after which the model thinks first.

    tokens: how many tokens of an answer may go by, `<think>` included, before `end_id` must have come.
    end_id: the id of `</think>`.
    closing_ids: CLOSING in the model's tokens; must contain end_id.
    """

    tokens: int
    end_id: int
    closing_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise UserError(f"thinking_budget must be a number of tokens from 0 on, got {self.tokens}")
        if self.end_id not in self.closing_ids:
            raise UserError(
                f"thinking_budget: the closing sentence {list(self.closing_ids)} lacks </think> (id {self.end_id}); "
                "encode it with special tokens allowed"
            )


def forced_token(budget: ThinkingBudget, place: int) -> int | None:
    """What the budget sets at the answer's `place`, counted from 0, while thinking is still open; None: nothing."""
    number = place - budget.tokens
    return budget.closing_ids[number] if 0 <= number < len(budget.closing_ids) else None


def still_thinks(budget: ThinkingBudget, place: int, token: int) -> bool:
    """Whether thinking is still open behind the answer's token at `place`, if it was before. Later is too late."""
    return place >= budget.tokens or token != budget.end_id
