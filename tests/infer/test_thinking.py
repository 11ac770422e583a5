"""The thinking budget, step by step without a model. With a model: test_generate.py."""

import pytest

from qwen3f.errors import UserError
from qwen3f.infer.thinking import CLOSING, ThinkingBudget, forced_token, still_thinks

END = 90
BUDGET = ThinkingBudget(tokens=3, end_id=END, closing_ids=(70, 71, END, 72))


def run(rows, budget=BUDGET):
    """The answers under the budget if the model would choose the tokens of `rows`."""
    answers = []
    for wanted in rows:
        thinks, out = True, []
        for place, token in enumerate(wanted):
            forced = forced_token(budget, place) if thinks else None
            out.append(token if forced is None else forced)
            thinks = thinks and still_thinks(budget, place, out[-1])
        answers.append(out)
    return answers


def test_only_rows_that_still_think_are_closed_and_exactly_at_the_budget():
    got = run(
        [
            [1, 2, 3, 4, 5, 6, 7, 8, 9],  # would not stop thinking
            [1, END, 3, 4, 5, 6, 7, 8, 9],  # ends its thought in time
            [1, 2, END, 4, 5, 6, 7, 8, 9],  # ends it with the last token of the budget
            [1, 2, 3, END, 5, 6, 7, 8, 9],  # one token too late
        ]
    )
    assert got == [
        [1, 2, 3, 70, 71, END, 72, 8, 9],
        [1, END, 3, 4, 5, 6, 7, 8, 9],
        [1, 2, END, 4, 5, 6, 7, 8, 9],
        [1, 2, 3, 70, 71, END, 72, 8, 9],
    ]
    assert run([[1, 2]], ThinkingBudget(0, END, (END, 5))) == [[END, 5]]
    assert run([[1, 2]]) == [[1, 2]]


def test_the_sentence_is_the_reports():
    assert CLOSING == (
        "Considering the limited time by the user, I have to give the solution based on the thinking directly now."
        "\n</think>.\n\n"
    )


def test_bad_budgets_are_named():
    with pytest.raises(UserError, match="from 0 on, got -1"):
        ThinkingBudget(-1, END, (END,))
    with pytest.raises(UserError, match="lacks </think>"):
        ThinkingBudget(4, END, (1, 2))
