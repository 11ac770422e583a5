"""The whole chain with real training, two steps a stage, on a tiny model and tiny data."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from qwen3f.interop import source
from qwen3f.pipeline import commands
from tests.pipeline import toy
from tests.pipeline.fork_server import ForkServer

STEPS = 2
_ALL = {"steps": STEPS, "batch_size": 2, "eval__batch_size": 2, "checkpoint__every": 1, "eval__every": 2}
_TEXT = {"seq_len": 64, "eval__max_docs": 2, "sample__tokens": 2, "context_warmup__length": 0}
_CHATS = {"data__problems": 300, "seq_len": 512, "eval__questions": 2, "eval__max_new_tokens": 4}
_TINY = {
    "model__vocab_size": 320, "model__num_hidden_layers": 1, "model__hidden_size": 32, "model__intermediate_size": 48,
    "model__head_dim": 16,
}  # fmt: skip
_OWN = {
    "pretrain_s1": {**_TEXT, **_TINY},
    "pretrain_s2": _TEXT,
    "pretrain_s3": _TEXT,
    "sft_cold_start": {**_CHATS, "eval__max_rows": 2},
    "grpo": {**_CHATS, "rollout__max_new_tokens": 4, "rollout__samples": 2, "rollout__draws": 1},
    "sft_fusion": {**_CHATS, "eval__max_rows": 2},
    "grpo_general": {
        **_CHATS, "tasks": "reasoning", "rollout__max_new_tokens": 4, "rollout__samples": 2, "rollout__draws": 1,
        "rewards": "correct=1,format=0.2",
    },
    "dpo": {**_CHATS, "eval__max_rows": 2, "data__max_samples": 20},
}  # fmt: skip


def changes(corpus, cache):
    """The changes for toy.make_config that make the pipeline tiny."""
    out = {"report": True, "set__measure__limit": 2, "set__measure__max_new_tokens": 4, "device": "cpu"}
    out |= {"set__evaluation__limit": 3, "set__evaluation__max_new_tokens": 4}
    for name, own in _OWN.items():
        values = _ALL | own | {"data__cache": str(cache)}
        if name.startswith("pretrain"):
            values["data__mixture"] = f"files@{corpus}"
        out |= {f"set__{name}__{key}": value for key, value in values.items()}
    return out


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ForkServer(tmp_path_factory.mktemp("fork")) as server:
        yield server


@pytest.fixture(scope="module")
def settings(corpus, tmp_path_factory):
    return changes(corpus, tmp_path_factory.mktemp("cache"))


def start(server, directory, settings):
    """The pipeline as a process of its own, with stages from the fork server."""
    command = [sys.executable, "-m", "tests.pipeline.toy", str(directory), json.dumps(settings), "fork_client.py"]
    environment = {**os.environ, **server.environment}
    return subprocess.Popen(
        command, cwd=toy.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


@pytest.fixture(scope="module")
def real(server, settings, tmp_path_factory):
    """(directory, what was printed) of a chain that ran without interruption."""
    place = tmp_path_factory.mktemp("whole") / "P"
    process = start(server, place, settings)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return place, said


def assert_same(directory, wanted, names):
    """Assert that the measures of these stages are equal, and the weights of the last one that trains."""
    records = [toy.read(place) for place in (directory, wanted)]
    for name in names:
        found, right = (toy.stage(record, name) for record in records)
        assert found["measures"] == right["measures"]
    one = [toy.stage(records[0], name) for name in names if name in toy.TRAINED][-1]
    places = [str(place / one["workdir"] / "checkpoints" / str(STEPS)) for place in (directory, wanted)]
    params = [source.read_params(place, source.read_model_config(place), "cpu") for place in places]
    assert params[0].keys() == params[1].keys()
    assert all(torch.equal(leaf, params[1][path]) for path, leaf in params[0].items())


def every_stage_trains_and_is_measured(place, said):
    found = toy.read(place)
    assert set(toy.statuses(found).values()) == {"done"}
    for one in found["stages"]:
        workdir = place / one["workdir"]
        if one["name"] != "evaluation":
            assert (workdir / "checkpoints" / str(STEPS)).is_dir()
            config = json.loads((workdir / "config.json").read_text())
            assert config["steps"] == STEPS
            assert config["model"]["hidden_size"] == 32
            assert config["init_from"] == (str(place / one["init_from"]) if one["init_from"] else "")
    assert set(toy.stage(found, "pretrain_s2")["measures"]) == {"val_loss/files"}
    assert toy.stage(found, "dpo")["measures"]["reasoning_plain"]["n"] == 4
    assert toy.stage(found, "evaluation")["measures"]["reasoning_thinking"]["n"] == 6
    assert "what next:" in said
    assert f"report: {place / 'report.html'}" in said
    page = (place / "report.html").read_text()
    assert all(name in page for name in toy.NAMES)


def all_have_the_first_one_s_tokenizer_with_the_chats_tokens(place):
    tokenizers = [source.read_tokenizer(str(path)) for path in sorted(place.glob("0[1-8]_*"))]
    assert len({one.fingerprint for one in tokenizers}) == 1
    for text in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert tokenizers[0].encode(text, allow_special=True) == [tokenizers[0].special_id(text)]


def all_checkpoints_are_asked_the_same_questions_which_no_stage_trains(place):
    asked = set()
    for path in place.glob("*/measures/*/results.json"):
        found = json.loads(path.read_text())["benchmarks"]["reasoning"]
        asked.add((path.parent.name, tuple(record["prompt"] for record in found["samples"])))
        assert found["settings"]["split"] == "heldout"
        assert found["settings"]["kinds"] == "number_theory,sequence"
    assert sorted(mode for mode, _ in asked) == ["plain", "thinking"]


def kill_and_go_on(name, server, settings, directory):
    process = start(server, directory, settings)
    until = time.monotonic() + 120
    while not begun(directory, name):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start(server, directory, settings)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert not list(directory.glob("*.old-*"))


def begun(directory, name):
    """Whether a stage has done a step: trained it, or asked a question."""
    places = list(directory.glob(f"*_{name}"))
    return places and (any(places[0].glob("checkpoints/1")) or any(places[0].glob("*/records")))


def a_kill_changes_nothing(place, server, settings, directory):
    start = place / "03_pretrain_s3" / "checkpoints" / str(STEPS)
    alone = {"skip": "pretrain_s1,pretrain_s2,pretrain_s3", "set__sft_cold_start__init_from": str(start)}
    alone |= {"stages": "sft_cold_start"}
    kill_and_go_on("sft_cold_start", server, settings | alone, directory)
    assert_same(directory, place, ("sft_cold_start",))


def test_a_chain_of_real_stages(real, server, settings, tmp_path):
    """One test: with several, each worker of pytest would train the whole chain."""
    place, said = real
    every_stage_trains_and_is_measured(place, said)
    all_have_the_first_one_s_tokenizer_with_the_chats_tokens(place)
    all_checkpoints_are_asked_the_same_questions_which_no_stage_trains(place)
    a_kill_changes_nothing(place, server, settings, tmp_path / "P")


@pytest.mark.nightly
@pytest.mark.parametrize("name", toy.NAMES)
def test_a_kill_in_each_real_stage_changes_nothing(name, real, server, settings, tmp_path):
    kill_and_go_on(name, server, settings, tmp_path / "P")
    assert_same(tmp_path / "P", real[0], toy.NAMES)


def test_the_real_launcher_is_launch_py():
    assert commands.LAUNCHER == toy.ROOT / "launch.py"
    assert commands.FORESEE == ("-m", "qwen3f.pipeline.foresee")
