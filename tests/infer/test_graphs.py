"""Which CUDA graph runs a pass. Few sizes are captured, since a capture takes as long as hundreds of passes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.infer.graphs import WORTH, DecodeGraphs, PageTable


class Sizes(DecodeGraphs):
    """DecodeGraphs whose graphs are only their sizes, (places, pages of the table)."""

    def __init__(self):
        self._graphs, self._asked = {}, {}

    def _capture(self, count, width):
        return count, width


def test_the_first_graph_has_places_for_all_rows_that_wait():
    graphs = Sizes()
    assert graphs._fitting(8, 4, 128) == (128, 4)
    assert graphs._fitting(128, 8, 128) == (128, 8)  # no captured graph has so wide a table


def test_a_rare_size_runs_in_the_smallest_graph_that_holds_it():
    graphs = Sizes()
    for count, width in ((256, 16), (64, 16), (32, 4)):
        graphs._graphs[count, width] = (count, width)
    assert {graphs._fitting(24, 8, 32) for _ in range(WORTH)} == {(64, 16)}
    assert graphs._fitting(24, 8, 32) == (24, 8)  # this size has now occurred often enough for its own graph
    assert graphs._fitting(16, 8, 32) == (24, 8)
    assert graphs._fitting(64, 16, 64) == (64, 16)


PLACES, WIDTH = 5, 3
PAGES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=WIDTH), max_size=PLACES)


@given(passes=st.lists(PAGES, max_size=6))
def test_a_page_table_is_that_of_the_last_pass(passes):
    table, last = PageTable(PLACES, WIDTH), None
    for pages in passes:
        table.fill(pages)
        whole = [own + [0] * (WIDTH - len(own)) for own in pages] + [[0] * WIDTH] * (PLACES - len(pages))
        assert table.array.tolist() == whole
        assert table.copied == (whole == last)
        table.copied, last = True, whole


def test_a_page_table_that_was_interrupted_is_written_again():
    class Interrupted(list):
        def __len__(self):
            raise KeyboardInterrupt

    table = PageTable(PLACES, WIDTH)
    table.fill([[1, 2], [3]])
    with pytest.raises(KeyboardInterrupt):
        table.fill([[4], Interrupted([5])])
    assert not table.copied
    table.fill([[1, 2], [3]])
    assert table.array[:2].tolist() == [[1, 2, 0], [3, 0, 0]]
