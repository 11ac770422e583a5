"""The pages are true: their Python runs as it is written, and what they name exists.

Blocks run in a directory with what they name: DIR, a model; VL, a vision-language model; a.png; DATA, data sets.
"""

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from qwen3f import cli, presets
from qwen3f import params as P
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.interop import hf
from qwen3f.train import bench
from tests.data.sources.adapters import real_rows
from tests.data.tokenizers.small_bpe import small_files
from tests.pages import CODE, PAGES, ROOT, commands, folders, launches, links, name_of, prose, python_blocks, spans

TOP = ROOT / "README.md"
STAGES, TASKS = ROOT / "qwen3f/stages/README.md", ROOT / "qwen3f/tasks/README.md"
BLOCKS = {f"{name_of(page)}:{i}": block for page in PAGES for i, block in enumerate(python_blocks(page))}
ON_A_MESH = {name: block for name, block in BLOCKS.items() if "init_process_group" in block}
ALONE = {name: block for name, block in BLOCKS.items() if name not in ON_A_MESH}
OWN = {"mine/focal.py", "qwen3f/tasks/parity.py"}  # files that a page tells its reader to write

pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


# -- what is written runs ----------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    small_files(tmp_path / "files")
    tokenizer = Tokenizer(backend="tiktoken", path="files")
    cfg = presets.get("nano").replace(vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    hf.save_pretrained("DIR", cfg, P.init_params(cfg, 0), tokenizer)
    vl = presets.get("nano_vl").replace(num_hidden_layers=2, tie_word_embeddings=True)  # as Qwen3-VL's 2B and 4B
    hf.save_pretrained("VL", vl, P.init_params(vl, 0))
    Image.new("RGB", (64, 48), "red").save("a.png")
    for name, rows in (("web", "fineweb"), ("pajama", "slimpajama")):
        real_rows.write(real_rows.ROWS[rows], tmp_path / "DATA" / name / "rows.jsonl")
    for name in ("openmathinstruct-2", "numinamath-cot", "gsm8k", "math"):
        rows = [row for row in real_rows.ROWS[name] if "Prove" not in str(row) and "Draw" not in str(row)]
        real_rows.write(rows, tmp_path / "DATA" / name / "rows.jsonl")
    return tmp_path


def test_there_are_blocks_of_both_kinds():
    assert len(ALONE) >= 8
    assert len(ON_A_MESH) == 1


@pytest.mark.parametrize("name", ALONE)
def test_a_block_runs_on_its_own(name, place):
    exec(compile(ALONE[name], name, "exec"), {"__name__": "page"})


def run_as_rank(rank, block, port):
    """Run the block as a rank of torchrun would, but forked from a server that has imported torch."""
    variables = {"RANK": rank, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    exec(compile(block, "README.md", "exec"), {"__name__": "page"})
    torch.distributed.destroy_process_group()


def test_the_block_for_a_mesh_runs_on_four_ranks():
    multiprocessing.set_forkserver_preload(["tests.sharding.preload"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (block,) = ON_A_MESH.values()
    mp.start_processes(run_as_rank, (block, port), nprocs=4, start_method="forkserver")  # raises a rank's error


def test_the_toy_stage_of_the_page_trains(make, tmp_path, monkeypatch):
    """The page's code is put into the file that the page names, and run by the page's command. Only sizes and data are
    changed for the test."""
    (block,) = (block for block in python_blocks(STAGES) if "def make(run)" in block)
    (command,) = (words for words in launches(STAGES) if words[2] == "mine/focal.py")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "focal.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    cli._check_overrides(command)
    config = cli.load_experiment(command[2])
    small = make(steps=4)
    config.update(steps=4, batch_size=4, seq_len=32, log_every=1, device="cpu")
    for section in ("model", "data", "schedule", "eval", "sample"):
        config[section] = small[section]
    cli.run_stage(config, tmp_path / "W", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "W" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert len(trained) == 4
    assert all(0 < line["known"] < 1 and 0 < line["loss"] < 10 for line in trained)
    assert any("val_loss" in line for line in lines)


ASK = """
from qwen3f.rl.judge import Judge
from qwen3f.rl.rewards import Sample
from qwen3f.tasks.registry import open_task
task = open_task("parity", "--config.tasks")
train, held_out = ({q.prompt for q in task.questions(split)} for split in ("train", "heldout"))
assert len(train) > len(held_out) > 100 and not train & held_out
q = next(iter(task.questions("heldout")))
texts = ["<think>\\nno remainder\\n</think>\\n\\n" + "\\\\boxed{%s}" % word for word in (q.gold, "neither")]
samples = [Sample("parity", q.prompt, q.gold, text, True, True, 9, 99) for text in texts]
with Judge({"correct": 1.0}, processes=1, deadline=60.0) as judge:
    print(judge(samples).values)
"""


def test_the_toy_task_of_the_page_is_asked_and_judged(tmp_path):
    """A copy of the package gets the page's file, and the page's line in its registry. Then the processes that judge
    use the task."""
    (block,) = (block for block in python_blocks(TASKS) if "def judge" in block)
    (line,) = re.findall(r'`("parity": \w+)`', TASKS.read_text())
    (tmp_path / "qwen3f").mkdir()
    for there in (ROOT / "qwen3f").iterdir():
        if there.name not in ("tasks", "__pycache__"):
            (tmp_path / "qwen3f" / there.name).symlink_to(there)
    shutil.copytree(ROOT / "qwen3f/tasks", tmp_path / "qwen3f/tasks")
    for top in ("kernels", "sharding"):
        (tmp_path / top).symlink_to(ROOT / top)
    (tmp_path / "qwen3f/tasks/parity.py").write_text(block)
    registry = tmp_path / "qwen3f/tasks/registry.py"
    text, count = re.subn(
        r"(?m)^(_TASKS\b.* = \{)", rf"from qwen3f.tasks.parity import Parity\n\g<1>{line}, ", registry.read_text()
    )
    assert count == 1
    registry.write_text(text)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", ASK], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'correct': [1.0, 0.0]}"


# -- what is named exists ----------------------------------------------------------------------------------------------


def test_every_folder_of_code_has_a_page():
    assert [str(folder.relative_to(ROOT)) for folder in folders() if not (folder / "README.md").exists()] == []


@pages
def test_a_page_is_short(page):
    lines = page.read_text().splitlines()
    if page == TOP:
        assert len(lines) <= 150
        assert max(map(len, lines)) <= 160
    else:
        assert 20 <= len(lines) <= 60
        assert max(len(line) for line in lines if not line.startswith("|")) <= 160


def places(page):
    """Folders where a file named by the page may be: beside the page, in the tests of its folder or of one above, or
    below one of the roots."""
    folder = page.parent.relative_to(ROOT)
    inner = folder.relative_to("qwen3f") if folder.is_relative_to("qwen3f") else folder
    roots = (folder, *("tests" / above for above in (inner, *inner.parents)), "", *CODE)
    return [ROOT / root for root in roots]


def found(page, name):
    return next((place / name for place in places(page) if (place / name).exists()), None)


@pages
def test_links_lead_somewhere(page):
    wrong = [link for link in links(page) if not link.startswith("http") and not (page.parent / link).exists()]
    assert wrong == []


@pages
def test_every_file_that_is_named_exists(page):
    code = spans(prose(page))
    files = {
        name for span in code for name in re.findall(r"^[\w/.-]+\.(?:py|md|sh|txt)(?=$|:)|^[\w.-]+/(?:[\w-]+/)*$", span)
    }
    of_runs = {"checkpoints/", "tokenizer/", "nonfinite/", "samples/", "answers/", "state/", "meta/", "results.md"}
    named = {name for name in files - OWN - of_runs if not re.search(r"(^|[/_])[A-Z]+([./]|$)", name)}  # not NAME.py
    assert sorted(name for name in named if found(page, name) is None) == []


@pages
def test_every_test_that_is_named_exists(page):
    """Tests are named as `path::name`. A `test_name` alone is in the file that is named before it in the same line."""
    wrong = []
    for line in prose(page).splitlines():
        file = None
        for span in spans(line):
            path, _, test = span.rpartition("::") if "::" in span else ("", "", span)
            file = found(page, path) if path else file
            if path or re.fullmatch(r"test_\w+", span):
                text = file.read_text() if file else ""
                wrong += [] if re.search(rf"^(async )?def {test}\(", text, re.MULTILINE) else [span]
    assert wrong == []


def keys_of(config, prefix="config."):
    for key, value in config.items():
        yield prefix + key
        if hasattr(value, "items"):
            yield from keys_of(value, f"{prefix}{key}.")


@pytest.fixture(scope="module")
def known():
    """Keys and sections of all experiments."""
    configs = [cli.load_experiment(str(path)) for path in sorted((ROOT / "experiments").glob("*.py"))]
    return {key for config in configs for key in keys_of(config)}


@pages
def test_every_key_that_is_named_exists(page, known):
    """In a row of a table, keys after the first one may leave out its section."""
    wrong = []
    for line in prose(page).splitlines():
        cell = spans(line.split("|")[1]) if re.match(r"\| `config\.(?!py`)", line) else []
        wrong += [key for key in cell if "config." not in key and f"{cell[0].rpartition('.')[0]}.{key}" not in known]
        named = re.findall(r"\bconfig\.[a-z_]+(?:\.[a-z_0-9]+)*(?![\w./:]*\.(?:py|json)\b)", " ".join(spans(line)))
        wrong += [key for key in named if key not in known and key not in ("config.py", "config.json", "config.key")]
    assert wrong == []


@pages
def test_every_experiment_and_preset_that_is_named_exists(page):
    for span in spans(prose(page)):
        if name := re.fullmatch(r"(?:experiments/)?(\w+)\.py:([a-z][\w.,-]*)", span):
            cli.load_experiment(f"experiments/{name[1]}.py:{name[2]}")


@pages
def test_every_command_that_is_written_down_is_one(page):
    """For launch.py, keys and types of values. For modules, that they exist. For the bench of training, its cases."""
    for words in commands(page):
        if words[0] == "launch.py" and "--config" in words:
            if words[2] not in OWN and words[2] != "experiments/X.py:PRESET":
                cli._check_overrides(words)
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2].rstrip(".")), words
            if words[2] == "qwen3f.train.bench":
                presets.get(max((bench.parse_case(case) for case in words[3:]), key=lambda case: case.layers).preset)


def test_every_experiment_is_listed_with_its_command():
    listed = {words[2].partition(":")[0] for words in launches(ROOT / "experiments/README.md")}
    assert {f"experiments/{path.name}" for path in (ROOT / "experiments").glob("*.py")} <= listed
