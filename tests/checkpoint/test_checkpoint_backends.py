"""The dcp backend, and what the default one refuses in files of strangers: pickles, paths out of them, false sizes."""

import json
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from ml_collections import ConfigDict

from qwen3f.checkpoint import inspect, manifest, zarr
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.checkpoint.manifest import DamagedCheckpoint
from qwen3f.errors import UserError
from tests.train.runs import assert_same_bits


def make_state():
    g = torch.Generator().manual_seed(0)
    weights = {"a.b": torch.randn(6, 5, generator=g), "norm": torch.randn(7, generator=g).bfloat16()}
    moments = ({"a.b": torch.randn(6, 5, generator=g)}, torch.rand(2, 6, generator=g, dtype=torch.float64).T)
    return {"params": weights, "opt": moments, "step": torch.tensor(2**53 + 1), "flag": torch.tensor(True)}


def save(directory, backend, step=3, state=None):
    with Checkpointer(directory, 1, 0, backend=backend) as checkpoints:
        checkpoints.save(step, make_state() if state is None else state, {"config": {"stage": "pretrain", "seed": 3}})
    return directory / str(step)


def forge(place):
    """Write a manifest that fits the files in `place`, as somebody who forged them would."""
    manifest.write(place, {})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_round_trip(tmp_path):
    """Bit for bit, in whole and in part, converted on request; damage is named; torch's own load reads it."""
    state, place = make_state(), save(tmp_path / "c", "dcp")
    checkpoints = Checkpointer(tmp_path / "c", 1, 0, backend="dcp")
    like = {key: torch.utils._pytree.tree_map(lambda leaf: leaf.to("meta"), value) for key, value in state.items()}
    restored, meta = checkpoints.restore(like)
    assert_same_bits(restored, state)
    assert meta["config"]["seed"] == 3
    assert_same_bits(checkpoints.restore_part("params", like["params"])[0], state["params"])
    half = {name: leaf.double() for name, leaf in state["params"].items()}
    assert_same_bits(checkpoints.restore_part("params", half, cast=True)[0], half)
    plain = {"params/a.b": torch.zeros(6, 5)}
    torch_dcp.load(plain, checkpoint_id=place / "state", no_dist=True)
    assert torch.equal(plain["params/a.b"], state["params"]["a.b"])
    with pytest.raises(UserError, match="another model"):
        checkpoints.restore(like | {"flag": torch.zeros(2)})
    data = next((place / "state").glob("*.distcp"))
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(DamagedCheckpoint, match="the checksum of state/__0_0.distcp"):
        checkpoints.restore(like)


def test_either_backend_goes_on_from_the_other(tmp_path):
    save(tmp_path, "orbax", 1)
    save(tmp_path, "dcp", 2)
    checkpoints = Checkpointer(tmp_path, 1, 0, backend="dcp")
    for step in (1, 2):
        assert_same_bits(checkpoints.restore(make_state(), step)[0], make_state())
    with pytest.raises(UserError, match="backend is 'zarr': write orbax or dcp"):
        Checkpointer(tmp_path, 1, 0, backend="zarr")


@pytest.mark.parametrize("how", ["restore", "part", "tree", "inspect"])
def test_a_pickle_is_opened_by_the_dcp_backend_alone(tmp_path, how):
    """An opened pickle would create a file. The error says that there is one, and what to write if it is trusted."""
    place = save(tmp_path / "checkpoints", "dcp")

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (place / "state" / ".metadata").write_bytes(pickle.dumps(Payload()))
    forge(place)
    checkpoints = Checkpointer(tmp_path / "checkpoints", 1, 0)
    ways = {
        "restore": lambda: checkpoints.restore(make_state()),
        "part": lambda: checkpoints.restore_part("params", make_state()["params"]),
        "tree": lambda: checkpoints.read_tree(3),
        "inspect": lambda: inspect.report(str(tmp_path), verify=True),
    }
    with pytest.raises(UserError, match=r"contains a pickle, .* write --config\.checkpoint\.backend=dcp"):
        ways[how]()
    assert not (tmp_path / "executed").exists()


def test_the_default_path_never_unpickles(tmp_path, monkeypatch):
    """Saving, restoring, restoring in part and inspecting, with every way into the unpickler closed."""
    import _pickle

    def forbidden(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(pickle, "_Unpickler", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    with pytest.raises(AssertionError, match="unpickled"):
        pickle.loads(b"")
    place = save(tmp_path / "checkpoints", "orbax")
    checkpoints = Checkpointer(tmp_path / "checkpoints", 1, 0)
    assert_same_bits(checkpoints.restore(make_state())[0], make_state())
    checkpoints.restore_part("params", make_state()["params"])
    inspect.run(ConfigDict({"path": str(tmp_path), "verify": True, "backend": "orbax"}), tmp_path)
    for path in [p for p in place.rglob("*") if p.is_file()]:  # nor is any file a pickle
        assert not path.read_bytes().startswith(b"\x80")
        assert not zipfile.is_zipfile(path)


def test_dcp_is_not_imported_unasked(tmp_path):
    save(tmp_path, "orbax")
    code = (
        "import sys; from pathlib import Path; from qwen3f.checkpoint.checkpointer import Checkpointer\n"
        "Checkpointer(Path(sys.argv[1]), 1, 0).read_tree(3)\n"
        "assert not {'qwen3f.checkpoint.dcp', 'torch.distributed.checkpoint', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def rename_leaf(values, name):
    tree = values["tree_metadata"]
    entry = tree.pop("('params', 'a.b')")
    entry["key_metadata"] = [{"key": part, "key_type": 2} for part in name]
    tree[str(name)] = entry


ARRAY, NAMES = "state/params.a.b/.zarray", "state/_METADATA"
LIES = {
    "name up": (NAMES, lambda v: rename_leaf(v, ("params", "/../../../elsewhere")), "leads out of the checkpoint"),
    "name absolute": (NAMES, lambda v: rename_leaf(v, ("/etc",)), "leads out of the checkpoint"),
    "name dots": (NAMES, lambda v: rename_leaf(v, ("", "")), "there is no file|leads out"),
    "format": (NAMES, lambda v: v.update(use_ocdbt=True), "not in the format"),
    "huge shape": (ARRAY, lambda v: v.update(shape=[10**9, 10**9]), "belongs to another model"),
    "negative shape": (ARRAY, lambda v: v.update(shape=[-6, 5]), "the shape of params.a.b is"),
    "huge chunk": (ARRAY, lambda v: v.update(chunks=[10**9, 10**9]), "not stored as whole, plain chunks"),
    "tiny chunks": (ARRAY, lambda v: v.update(chunks=[1, 1]), "is not in 30 files of 4 bytes"),
    "compressed": (ARRAY, lambda v: v.update(compressor={"id": "zstd", "level": 1}), "not stored as whole, plain"),
    "dtype": (ARRAY, lambda v: v.update(dtype="__builtins__"), "which torch does not have"),
    "dtype object": (ARRAY, lambda v: v.update(dtype="|O"), "which torch does not have"),
    "no record": (ARRAY, lambda v: v.clear(), "cannot be read"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_files_claim_is_checked_before_memory_is_taken(tmp_path, lie, monkeypatch):
    """The manifest is forged to fit, so that no checksum finds the change."""
    place = save(tmp_path, "orbax")
    file, change, words = LIES[lie]
    edit(place / file, change)
    forge(place)
    monkeypatch.setattr(zarr, "read", lambda *args: pytest.fail("values were loaded"))
    checkpoints = Checkpointer(tmp_path, 1, 0)
    with pytest.raises(UserError, match=words):
        checkpoints.restore(make_state())


def test_a_dcp_file_that_leads_out_is_refused(tmp_path):
    place = save(tmp_path, "dcp")
    metadata = pickle.loads((place / "state" / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../elsewhere"
    (place / "state" / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(place)
    with pytest.raises(DamagedCheckpoint, match=r"its file \.\./\.\./elsewhere is not in it"):
        Checkpointer(tmp_path, 1, 0, backend="dcp").restore(make_state())


def test_a_shape_that_lies_makes_no_list_of_files(tmp_path):
    """2^31 × 4 elements in chunks of one: a list of so many file names would fill the memory."""
    place = save(tmp_path, "orbax", state={"params": {"w": torch.zeros(3, 4)}})
    array = place / "state" / "params.w" / ".zarray"
    array.write_text(json.dumps({**json.loads(array.read_text()), "shape": [2**31, 4], "chunks": [1, 1]}))
    forge(place)
    like = {"params": {"w": torch.empty(2**31, 4, device="meta")}}
    tracemalloc.start()
    try:
        with pytest.raises(DamagedCheckpoint, match=r"params.w, .* is not in 8589934592 files of 4 bytes"):
            Checkpointer(tmp_path, 1, 0).restore(like)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    array.write_text(json.dumps({**json.loads(array.read_text()), "shape": [2**62, 4]}))
    forge(place)
    assert Checkpointer(tmp_path, 1, 0).read_tree(3)["params", "w"].bytes == 2**66


@pytest.mark.parametrize("content", ["{", '{"a": 1, "a": 2}', "[]"])
def test_a_record_that_is_no_json_object_is_damage(tmp_path, content):
    place = save(tmp_path, "orbax")
    (place / "meta" / "metadata").write_text(content)
    forge(place)
    with pytest.raises(DamagedCheckpoint, match="damaged or incomplete"):
        Checkpointer(tmp_path, 1, 0).read_meta(3)


def test_remote_code_is_never_trusted():
    """No part of the program names trust_remote_code, the option of the Hub's libraries that runs downloaded code."""
    root = Path(__file__).parents[2]
    files = [path for part in ("qwen3f", "kernels", "sharding", "experiments") for path in (root / part).rglob("*.py")]
    assert len(files) > 50
    assert [path.name for path in [*files, root / "launch.py"] if "trust_remote_code" in path.read_text()] == []
