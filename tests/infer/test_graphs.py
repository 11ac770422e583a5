"""Which CUDA graph runs a pass. Few sizes are captured, since a capture takes as long as hundreds of passes."""

from qwen3f.infer.graphs import WORTH, DecodeGraphs


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
