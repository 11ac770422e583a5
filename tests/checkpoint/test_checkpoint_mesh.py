"""Checkpoints of a mesh: any other mesh resumes from them bit for bit, and all ranks agree on what went wrong."""

import errno
import os
import resource
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessExitedException

from qwen3f import params as P
from qwen3f import tree
from qwen3f.checkpoint import zarr
from qwen3f.checkpoint.checkpointer import Checkpointer, CheckpointWriteError, StuckWrite
from qwen3f.checkpoint.commit import OldCheckpointStays
from qwen3f.checkpoint.manifest import DamagedCheckpoint
from qwen3f.checkpoint.retention import Retention
from qwen3f.checkpoint.shards import param_shards, shards
from qwen3f.errors import UserError
from qwen3f.interop import hf, source
from qwen3f.processes.world import open_world
from qwen3f.train.state import init_state
from sharding.layout import Layout
from sharding.mesh import parse_mesh
from sharding.pipeline.cut import Pipeline
from sharding.state import as_dtensors, cut_params, local_shards, placed_like
from tests.checkpoint.test_shards import layouts
from tests.sharding.steps import MOE, config
from tests.sharding.worlds import run_processes

INTERLEAVED, ZBV = Pipeline("interleaved", 2), Pipeline("zbv", 2)
MODELS = {
    "tied": config(num_hidden_layers=7, tie_word_embeddings=True),  # in four stages one row is padding
    "mixed": config(num_hidden_layers=8, decoder_sparse_step=2, **MOE),
    "tower": config(
        vision_enabled=True,
        vision_hidden_size=16,
        vision_num_hidden_layers=3,
        vision_num_attention_heads=2,
        vision_intermediate_size=24,
        vision_patch_size=2,
        vision_image_size=8,
        vision_deepstack_layers=(1,),
        mrope_section=(4, 2, 2),
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    ),
}
# Each reads what the ones before it wrote. With dr2, and with tp4 (two key/value heads), leaves have replicas.
MESHES = {
    2: [
        ("tied", "tp2", Pipeline()),
        ("tied", "pp2", ZBV),
        ("tied", "pp2", Pipeline(layers=6)),
        ("mixed", "ep2", Pipeline()),
        ("tower", "dp2", Pipeline()),
        ("tower", "pp2", Pipeline()),
    ],
    4: [
        ("tied", "dp2,tp2", Pipeline()),
        ("tied", "pp2,dp2", INTERLEAVED),
        ("mixed", "tp4", Pipeline()),
        ("mixed", "pp2,ep2", ZBV),
        ("mixed", "dr2,cp2", Pipeline()),
    ],
}
# These read in this process, rank by rank.
READERS = [
    ("tied", "tp2", Pipeline()), ("tied", "dp2", Pipeline()), ("tied", "pp2", INTERLEAVED),
    ("mixed", "ep2", Pipeline()), ("mixed", "pp2,dr2,dp2,ep2,tp2", ZBV),
]  # fmt: skip


def truth(cfg):
    """A state after some steps, with moments in bfloat16."""
    state = init_state(cfg, 3)
    g = torch.Generator().manual_seed(1)
    moments = tree.map(lambda x: torch.randn(x.shape, generator=g).bfloat16(), state.opt)
    return state._replace(opt=moments, step=torch.tensor(2**53 + 1), position=torch.tensor(12))


def share_of(state, cfg, layout):
    """A rank's shards of a state of whole tensors, cut as a step cuts them."""
    opt = type(state.opt)(*(cut_params(cfg, moments, layout) for moments in state.opt))
    return state._replace(params=cut_params(cfg, state.params, layout), opt=opt)


def map_shards(fn, state):
    """Apply fn to the shards of DTensors. On DTensors it would take seconds: they try every placement first."""
    return tree.map(lambda x: placed_like(x, fn(local_shards(x))), state)


def assert_same(a, b):
    la, lb = tree.named_leaves(a), tree.named_leaves(b)
    assert la.keys() == lb.keys()
    for name, x in la.items():
        assert x.dtype == lb[name].dtype, name
        assert x.contiguous().view(-1).view(torch.uint8).equal(lb[name].contiguous().view(-1).view(torch.uint8)), name


def open_on(folder, model, mesh, pipeline, rank, **options):
    cfg = MODELS[model]
    world = open_world(parse_mesh(mesh), "cpu", rank)
    layout = Layout(world.axes, pipeline=pipeline)
    checkpoints = Checkpointer(folder / model, 1, 0, world=world, shard_of=shards(cfg, layout), **options)
    mine = as_dtensors(share_of(truth(cfg), cfg, layout), cfg, layout, world.mesh)
    return world, layout, checkpoints, mine


def to_and_fro(rank, size, folder):
    """On each mesh read all that was written before, and write it once more."""
    for model, mesh, pipeline in MESHES[size]:
        world, layout, checkpoints, mine = open_on(folder, model, mesh, pipeline, rank)
        like, written = map_shards(lambda leaf: leaf.to("meta"), mine), []
        for step in checkpoints.steps():
            got, meta = checkpoints.restore(like, step)
            assert meta == {"step": step}
            assert_same(local_shards(got), local_shards(mine))
            for x, y in zip(tree.leaves(got), tree.leaves(mine), strict=True):
                assert isinstance(x, DTensor)
                assert (x.placements, x.shape, x.device_mesh) == (y.placements, y.shape, y.device_mesh)
        if model == "tied":
            for place in ("run", "hf"):
                weights = source.read_params(str(folder / place), MODELS[model], "cpu", layout=layout, world=world)
                assert_same(weights, local_shards(mine.params))

        def write(parts, create, real=zarr.write, written=written):
            written += [f"{place.name}/{file}" for place, part in parts.items() for file in zarr.files_of(part)]
            real(parts, create=create)

        with pytest.MonkeyPatch.context() as patch, checkpoints:
            patch.setattr(zarr, "write", write)
            last = world.first(checkpoints.latest())
            checkpoints.save(last + 1, mine, {"step": last + 1})
        on_disk = {
            f"{file.parent.name}/{file.name}" for file in (folder / model / str(last + 1)).glob("state/*/[0-9]*")
        }
        assert sorted(name for names in world.gather(written) for name in names) == sorted(on_disk)  # no file twice


def on_two(rank, folder):
    to_and_fro(rank, 2, folder)
    _, _, checkpoints, mine = open_on(folder / "killed", "tied", "dp2", Pipeline(), rank)
    checkpoints.save(1, mine, {"step": 1})
    checkpoints.wait()
    (folder / f"ready-{rank}").touch()
    if rank == 1:
        zarr.write = lambda parts, create: os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.save(2, mine, {"step": 2})
    checkpoints.wait()


def on_four(rank, folder):
    to_and_fro(rank, 4, folder)
    return {
        fn.__name__: fn(rank, folder / fn.__name__) for fn in (full_disk, undeleted, unshared, stuck, damage, disagree)
    }


def error_of(kind, work):
    with pytest.raises(kind) as caught:
        work()
    return str(caught.value)


def full_disk(rank, folder):
    """The disk is full on rank 2 alone (a limit on file sizes). Then the copy of the state fails on rank 3 alone."""
    _, _, checkpoints, mine = open_on(folder, "tied", "dp2,tp2", Pipeline(), rank)
    said = []
    with checkpoints:
        checkpoints.save(1, mine, {})
        checkpoints.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if rank == 2 else limits[0], limits[1]))
        checkpoints.save(2, mine, {})
        said.append(error_of(CheckpointWriteError, checkpoints.wait))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 3:
                patch.setattr(checkpoints._snapshot, "begin", lambda leaves: 1 / 0)
            said.append(error_of(CheckpointWriteError, lambda: checkpoints.save(2, mine, {})))
        assert checkpoints.steps() == [1]
        checkpoints.save(2, mine, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert_same(local_shards(checkpoints.restore(mine, 2)[0]), local_shards(mine))
    return said


class FailingRetention(Retention):
    def expired(self, saved):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def undeleted(rank, folder):
    """Rank 0, which deletes for all, fails at it."""
    _, _, checkpoints, mine = open_on(folder, "tied", "dp4", Pipeline(), rank, timeout=60.0)
    with checkpoints:
        checkpoints.retention = FailingRetention(1)
        checkpoints.save(1, mine, {})
        said = error_of(OldCheckpointStays, checkpoints.wait)
        checkpoints.retention = Retention(1)
        checkpoints.save(2, mine, {})
        checkpoints.wait()
        assert checkpoints.steps() == [2]
    return said


def unshared(rank, folder):
    place = folder / "local" if rank == 3 else folder
    _, _, checkpoints, mine = open_on(place, "tied", "dp4", Pipeline(), rank)
    checkpoints.save(1, mine, {})
    return error_of(CheckpointWriteError, checkpoints.wait)


def stuck(rank, folder):
    """Rank 1's writing hangs."""
    _, _, checkpoints, mine = open_on(folder, "tied", "dp4", Pipeline(), rank, timeout=0.5)
    until, said = threading.Event(), []
    with pytest.MonkeyPatch.context() as patch, checkpoints:
        if rank == 1:
            patch.setattr(zarr, "write", lambda *a, real=zarr.write, **kw: (until.wait(60), real(*a, **kw)))
        checkpoints.save(1, mine, {})
        said += [error_of(StuckWrite, checkpoints.wait), error_of(StuckWrite, lambda: checkpoints.save(2, mine, {}))]
        until.set()
        checkpoints.timeout = 0.0
        checkpoints.wait()
        assert checkpoints.steps() == [1]
        checkpoints.save(2, mine, {})
    return said


def damage(rank, folder):
    """Flip one byte of a file that rank 3 wrote; then cut off its last byte."""
    world, layout, checkpoints, mine = open_on(folder, "tied", "dp2,tp2", Pipeline(), rank)
    checkpoints.save(1, mine, {})
    checkpoints.wait()
    path = P.LAYERS + "mlp.up_proj.weight"
    box = param_shards(MODELS["tied"], layout)[path].pieces[0][1]
    sizes = local_shards(mine.params)[path].shape
    file = folder / "tied/1/state" / f"params.{path}" / ".".join(str(s.start // n) for s, n in zip(box, sizes))
    said = []
    for content in (lambda old: bytes([old[0] ^ 1]) + old[1:], lambda old: old[:-1]):
        if rank == 3:
            file.write_bytes(content(file.read_bytes()))
        world.gather(None)
        said.append(error_of(DamagedCheckpoint, lambda: checkpoints.restore(mine)))
    return said, world.gather(file.name)[3]


def disagree(rank, folder):
    """Errors that are the same on all ranks; and set_aside, which rank 0 does for all."""
    _, _, checkpoints, mine = open_on(folder, "tied", "tp2,dp2", Pipeline(), rank)
    with checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, mine, {})
        said = [
            error_of(UserError, lambda: checkpoints.save(2, mine, {})),
            error_of(UserError, lambda: checkpoints.restore(mine, 7)),
            error_of(UserError, lambda: checkpoints.restore(map_shards(torch.Tensor.double, mine))),
        ]
        cast = map_shards(lambda x: x.double() if x.is_floating_point() else x, mine)
        assert_same(local_shards(checkpoints.restore(cast, cast=True)[0]), local_shards(cast))
        aside = checkpoints.set_aside(1)
        assert checkpoints.steps() == [1]
        said += [str(aside), checkpoints.set_aside(1)]
    said.append(error_of(UserError, lambda: Checkpointer(folder, 1, 0, backend="dcp", world=checkpoints.world)))
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(folder, results of four ranks). One device wrote there, then two ranks, of which one is killed, then four."""
    folder = tmp_path_factory.mktemp("mesh")
    for model, cfg in MODELS.items():
        with Checkpointer(folder / model, 1, 0) as checkpoints:
            checkpoints.save(1, truth(cfg), {"step": 1})
    cfg = MODELS["tied"]
    hf.save_pretrained(folder / "hf", cfg, truth(cfg).params)
    with Checkpointer(folder / "run" / "checkpoints", 1, 0) as checkpoints:
        checkpoints.save(1, truth(cfg), {"config": {"model": cfg.to_dict()}})
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_processes(on_two, 2, folder)
    assert {path.name for path in folder.glob("ready-*")} == {"ready-0", "ready-1"}
    return folder, run_processes(on_four, 4, folder)


def test_one_device_goes_on_from_any_mesh(folder):
    for model, cfg in MODELS.items():
        checkpoints = Checkpointer(folder[0] / model, 1, 0)
        assert checkpoints.steps() == list(
            range(1, 2 + sum(case[0] == model for cases in MESHES.values() for case in cases))
        )
        for step in checkpoints.steps():
            assert_same(checkpoints.restore(truth(cfg), step)[0], truth(cfg))


@pytest.mark.parametrize("model, mesh, pipeline", READERS)
def test_any_mesh_goes_on_from_any_other(folder, model, mesh, pipeline):
    """Each rank reads alone, because reading needs no other rank."""
    cfg, whole = MODELS[model], truth(MODELS[model])
    ranks = list(layouts(parse_mesh(mesh), pipeline=pipeline))
    for _, layout in ranks[:: max(1, len(ranks) // 4)]:
        with torch.device("meta"):
            like = tree.map(torch.empty_like, share_of(whole, cfg, layout))
        checkpoints = Checkpointer(folder[0] / model, 1, 0, shard_of=shards(cfg, layout))
        for step in checkpoints.steps():
            assert_same(checkpoints.restore(like, step)[0], share_of(whole, cfg, layout))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_plain_orbax_reads_what_a_mesh_wrote(folder):
    import jax
    import orbax.checkpoint as ocp

    whole = truth(MODELS["mixed"])
    last = folder[0] / "mixed" / str(Checkpointer(folder[0] / "mixed", 1, 0).latest() - 1)  # written by pp2,ep2
    assert len(list(last.glob("state/params.model.layers.mlp.experts.down_proj.weight/[0-9]*"))) > 4
    read = ocp.PyTreeCheckpointHandler().restore(last.absolute() / "state")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(read))
    for found, expected in ((read["params"], whole.params), (read["opt"]["m"], whole.opt.m)):
        assert found.keys() == expected.keys()
        for path, leaf in expected.items():
            assert found[path].dtype.name == str(leaf.dtype).removeprefix("torch.")
            bits = leaf.view(torch.int16 if leaf.itemsize == 2 else torch.int32).numpy()
            np.testing.assert_array_equal(np.asarray(found[path]).view(bits.dtype), bits)
    assert read["step"] == 2**53 + 1


def test_a_rank_that_is_killed_during_a_save_loses_no_committed_step(folder):
    place, whole = folder[0] / "killed" / "tied", truth(MODELS["tied"])
    assert (place / "2.writing").is_dir()
    with Checkpointer(place, 1, 0) as checkpoints:
        assert checkpoints.steps() == [1]
        state, meta = checkpoints.restore(whole)
        assert_same(state, whole)
        assert meta == {"step": 1}
        checkpoints.save(2, whole, {"step": 2})
    assert {path.name for path in place.iterdir()} == {"1", "2"}


def said_by_all(folder, case):
    first, *others = (ranks[case] for ranks in folder[1])
    assert others == [first] * 3
    return first


def test_what_fails_on_one_rank_fails_on_all_and_the_next_save_works(folder):
    disk, memory = said_by_all(folder, "full_disk")
    assert "step 2 could not be written" in disk
    assert "the last complete one is of step 1" in disk
    assert os.strerror(errno.EFBIG) in disk
    assert "step 2 could not be written" in memory
    assert "division by zero" in memory
    assert "rank 3 does not see" in (unshared := said_by_all(folder, "unshared"))
    assert "a file system that all hosts share" in unshared


def test_what_cannot_be_deleted_is_told_on_all_and_the_next_save_works(folder):
    said = said_by_all(folder, "undeleted")
    assert "the checkpoint of step 1 is written, but" in said
    assert os.strerror(errno.EIO) in said


def test_a_write_that_hangs_on_one_rank_is_stuck_on_all(folder):
    said = said_by_all(folder, "stuck")
    assert ["step 1 has not been written" in words for words in said] == [True, True]


def test_damage_to_one_ranks_file_is_named_on_all(folder):
    (flipped, cut), name = said_by_all(folder, "damage")
    assert f"the checksum of state/params.{P.LAYERS}mlp.up_proj.weight/{name} is not the one" in flipped
    assert f"mlp.up_proj.weight/{name} has" in cut


def test_ranks_agree_on_what_cannot_be_done(folder):
    there, absent, other, aside, none, dcp = said_by_all(folder, "disagree")
    assert "already holds step 2" in there
    assert "holds no checkpoint of step 7: there are 1, 2, 3" in absent
    assert "damaged" not in absent + other  # nothing is wrong with the files
    # the whole's shape, not a shard's
    assert "params.model.embed_tokens.weight is [40, 24] float32 on disk and [40, 24] float64" in other
    assert sorted(path.name for path in Path(aside).iterdir()) == ["2", "3"]
    assert none is None
    assert "backend=dcp saves one device's state; write orbax for a mesh" in dcp
