"""Packing puts every chat that fits into exactly one row, and fills no row beyond its room."""

from hypothesis import given
from hypothesis import strategies as st

from qwen3f.data.multimodal.packing import Needs, pack

ROOM = Needs(40, 24, 3)


@given(st.lists(st.builds(Needs, st.integers(1, 50), st.integers(0, 30), st.integers(0, 4)), max_size=300))
def test_every_chat_that_fits_is_in_one_row_with_room(needs):
    rows, left_out = pack(needs, ROOM)
    assert sorted([*left_out, *(i for row in rows for i in row)]) == list(range(len(needs)))
    assert all(not needs[i].within(ROOM) for i in left_out)
    for row in rows:
        assert Needs(*map(sum, zip(*(needs[i] for i in row)))).within(ROOM)
    assert pack(needs, ROOM) == (rows, left_out)


def test_a_budget_of_patches_fills_rows_by_patches():
    """Chats of few tokens and many patches: two a row, though ten would fit by tokens."""
    rows, _ = pack([Needs(4, 12, 1)] * 10, ROOM)
    assert [len(row) for row in rows] == [2] * 5
    rows, _ = pack([Needs(4, 0, 0)] * 20, ROOM)
    assert [len(row) for row in rows] == [10, 10]
