"""What ranks exchange: gathered values, those of the first rank, the highest, and errors."""

import pytest

from qwen3f.errors import TrainingError, UserError
from qwen3f.processes.world import ALONE, open_world
from sharding.mesh import parse_mesh
from tests.sharding.worlds import run_processes


def talk(rank):
    world = open_world(parse_mesh("dp2,tp2"), "cpu", rank)
    thread = world.apart()
    found = {
        "rank": (world.rank, world.size, world.main, world.axes.dp.index, world.axes.tp.index, world.axes.rows),
        "gather": world.gather({"rank": rank, "text": "ä" * rank}),
        "first": world.first(rank + 7),
        "highest": world.highest(-rank),
        "apart": thread.gather(rank),
        "fine": world.together(lambda: rank * 10, ValueError),
    }

    def fail():
        if rank == 2:
            raise UserError("two")
        if rank == 3:
            raise TrainingError("three")

    with pytest.raises(UserError, match="^two$"):
        world.together(fail, TrainingError, UserError)
    return found


def test_four_ranks_agree():
    for rank, found in enumerate(run_processes(talk, 4)):
        assert found == {
            "rank": (rank, 4, rank == 0, rank // 2, rank % 2, (rank // 2, 2)),
            "gather": [{"rank": r, "text": "ä" * r} for r in range(4)],
            "first": 7,
            "highest": 0,
            "apart": [0, 1, 2, 3],
            "fine": rank * 10,
        }


def test_one_rank_talks_to_itself():
    assert (ALONE.gather([1]), ALONE.first("x"), ALONE.highest(3), ALONE.apart()) == ([[1]], "x", 3, ALONE)
    with pytest.raises(ValueError, match="no"):
        ALONE.together(lambda: (_ for _ in ()).throw(ValueError("no")), ValueError)
