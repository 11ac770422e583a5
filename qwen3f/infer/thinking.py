"""Thinking budget: after N tokens of thinking, end it with Qwen3's closing sentence (arXiv:2505.09388, §4.7)."""

import dataclasses

from qwen3f.errors import UserError

# Exactly as the report prints it, with the full stop after the tag.
CLOSING = (
    "Considering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>.\n\n"
)


@dataclasses.dataclass(frozen=True)
class ThinkingBudget:
    """A limit on thinking, for prompts after which the model thinks first.

    tokens: if the first `tokens` tokens of the answer, `<think>` included, hold no `end_id`, the closing is forced.
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
    """The token that the budget forces at `place` of the answer, from 0, while thinking is still open; or None."""
    number = place - budget.tokens
    return budget.closing_ids[number] if 0 <= number < len(budget.closing_ids) else None


def still_thinks(budget: ThinkingBudget, place: int, token: int) -> bool:
    """Whether thinking is still open after the answer's `token` at `place`, if it was open before it.

    An end_id at a place beyond the budget does not count: the closing is being forced.
    """
    return place >= budget.tokens or token != budget.end_id
