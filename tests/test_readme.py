"""README's Python runs as it is written, in a directory that holds what it names: DIR, a model; VL, one that sees;
a.png; DATA, data sets."""

import multiprocessing
import os
import re
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from qwen3f import params as P
from qwen3f import presets
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.interop import hf
from tests.data.sources.adapters import real_rows
from tests.data.tokenizers.small_bpe import small_files

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
ALONE = [block for block in BLOCKS if "init_process_group" not in block]
ON_A_MESH = [block for block in BLOCKS if "init_process_group" in block]


def name_of(block):
    return re.findall(r"^(?:from (?:qwen3f|sharding).*)$", block, re.MULTILINE)[-1].split()[-1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    small_files(tmp_path / "files")
    tokenizer = Tokenizer(backend="tiktoken", path="files")
    cfg = presets.get("nano").replace(vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    hf.save_pretrained("DIR", cfg, P.init_params(cfg, 0), tokenizer)
    vl = presets.get("nano_vl").replace(num_hidden_layers=2)
    hf.save_pretrained("VL", vl, P.init_params(vl, 0))
    Image.new("RGB", (64, 48), "red").save("a.png")
    for name, rows in (("web", "fineweb"), ("pajama", "slimpajama")):
        real_rows.write(real_rows.ROWS[rows], tmp_path / "DATA" / name / "rows.jsonl")
    for name in ("openmathinstruct-2", "numinamath-cot", "gsm8k", "math"):
        rows = [row for row in real_rows.ROWS[name] if "Prove" not in str(row) and "Draw" not in str(row)]
        real_rows.write(rows, tmp_path / "DATA" / name / "rows.jsonl")
    return tmp_path


def test_there_are_blocks_of_both_kinds():
    assert len(ALONE) >= 6
    assert len(ON_A_MESH) == 1


@pytest.mark.parametrize("block", ALONE, ids=name_of)
def test_a_block_runs_on_its_own(block, place):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def run_as_rank(rank, block, port):
    """As torchrun starts it, but forked from a server that has imported torch."""
    variables = {"RANK": rank, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    torch.distributed.destroy_process_group()


def test_the_block_for_a_mesh_runs_on_four_ranks():
    multiprocessing.set_forkserver_preload(["tests.sharding.preload"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    mp.start_processes(
        run_as_rank, (ON_A_MESH[0], port), nprocs=4, start_method="forkserver"
    )  # raises what a rank does
