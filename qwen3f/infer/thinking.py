"""Thinking budget: after N tokens of thinking, end it with Qwen3's closing sentence (arXiv:2505.09388, §4.7).

B rows
"""

import dataclasses

import torch
from torch import Tensor

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


def apply_budget(budget: ThinkingBudget, step: int, ids_B: Tensor, open_B: Tensor) -> tuple[Tensor, Tensor]:
    """(token of each row, which rows still think), for the answer's token number `step`, counted from 0.

    ids_B: int64 [B], what the model chose. open_B: bool [B], the rows that had no end_id before (at first all). A row
    that is still open after `budget.tokens` tokens gets the closing ids, one a step; others are left alone.
    """
    number = step - budget.tokens
    if number < 0:
        return ids_B, open_B & (ids_B != budget.end_id)
    if number >= len(budget.closing_ids):
        return ids_B, open_B
    return torch.where(open_B, budget.closing_ids[number], ids_B), open_B
