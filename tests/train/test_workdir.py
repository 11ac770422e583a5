"""A workdir's files are checked against its checkpoints before they are used: another tokenizer or model is named."""

import json
import shutil

import pytest
import torch

from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.data.tokenizers.sentencepiece_tokenizer import train_sentencepiece
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.errors import UserError
from qwen3f.interop import source
from qwen3f.train import workdir as W
from tests.data.tokenizers.small_bpe import small_tokenizer_json

CONFIG = {
    "model": {"hidden_size": 8, "rope_theta": 1e4, "attention_dropout": 0.0},
    "optimizer": {"kind": "adamw"},
    "data": {"tokenizer": ""},
    "seed": 0,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two tokenizers of the same size."""
    place = tmp_path_factory.mktemp("tokenizers")
    texts = {name: [f"{name} value {i}\n" for i in range(60)] for name in ("one", "other")}
    return [train_sentencepiece(text, 320, place / f"{name}.model") for name, text in texts.items()]


@pytest.fixture
def workdir(tokenizers, tmp_path):
    """The workdir of a run after its first checkpoint."""
    workdir = tmp_path / "w"
    W.write_config(workdir, CONFIG, 0)
    files = W.keep_tokenizer(workdir, tokenizers[0])
    with Checkpointer(workdir / W.CHECKPOINTS, 1, 0) as checkpoints:
        checkpoints.save(1, {"params": {"w": torch.zeros(3)}}, {"config": CONFIG, "tokenizer": files})
    return workdir


def with_model(**changes):
    return {**CONFIG, "model": {**CONFIG["model"], **changes}}


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_what_may_change_and_what_may_not(workdir):
    W.check_same_run(workdir, CONFIG)
    W.check_same_run(workdir, {**with_model(attention_dropout=0.1), "seed": 4})
    with pytest.raises(UserError, match=r"w belongs to another model: its model.hidden_size is 8, this run's is 16"):
        W.check_same_run(workdir, with_model(hidden_size=16))
    with pytest.raises(UserError, match=r"another optimizer: its optimizer.kind is adamw, this run's is muon"):
        W.check_same_run(workdir, {**CONFIG, "optimizer": {"kind": "muon"}})
    W.check_same_run(workdir.parent / "new", with_model(hidden_size=16))


def swapped(tokenizers, workdir):
    shutil.copyfile(tokenizers[1].path, workdir / "tokenizer" / "tokenizer.model")


def grown(tokenizers, workdir):
    (workdir / "tokenizer" / "tokenizer.json").write_text(json.dumps(small_tokenizer_json()))


CHANGES = {
    "another tokenizer": (swapped, "tokenizer.model has changed"),
    "one bit": (lambda _, w: flip(w / "tokenizer" / "tokenizer.model", 3000), "tokenizer.model has changed"),
    "nothing left": (lambda _, w: shutil.rmtree(w / "tokenizer"), "tokenizer.model was removed"),
    "one more file": (grown, "tokenizer.json was added"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tokenizer_is_named(change, tokenizers, workdir):
    """Both when the run resumes and when others read the workdir. The unchanged tokenizer keeps its fingerprint."""
    W.check_same_run(workdir, CONFIG)
    assert source.read_tokenizer(str(workdir)).fingerprint == tokenizers[0].fingerprint
    changes, words = CHANGES[change]
    changes(tokenizers, workdir)
    for use in (
        lambda: W.check_same_run(workdir, CONFIG),
        lambda: source.read_tokenizer(str(workdir)),
        lambda: source.read_tokenizer(str(workdir / "checkpoints" / "1")),
    ):
        with pytest.raises(UserError, match=rf"w/tokenizer/{words} since the checkpoints"):
            use()


def test_another_tokenizer_may_not_be_chosen(tokenizers, workdir):
    for tokenizer in tokenizers:
        config = {**CONFIG, "data": {"tokenizer": str(tokenizer.path)}}
        W.check_same_run(workdir.parent / "new", config)
        if tokenizer is tokenizers[0]:
            W.check_same_run(workdir, config)
            continue
        with pytest.raises(UserError, match=r"--config.data.tokenizer=.*other.model is not the tokenizer that the run"):
            W.check_same_run(workdir, config)


def test_every_bit_of_the_tokenizer_counts(workdir):
    path = workdir / "tokenizer" / "tokenizer.model"
    for at in range(0, path.stat().st_size, 97):
        flip(path, at)
        with pytest.raises(UserError, match="tokenizer.model has changed"):
            source.read_tokenizer(str(workdir))
        flip(path, at)
    assert load_tokenizer(path.parent)
    source.read_tokenizer(str(workdir))


def test_the_checkpoint_s_word_counts_more_than_the_file_s(workdir):
    path = workdir / "config.json"
    path.write_text(json.dumps(with_model(rope_theta=3e4)))
    with pytest.raises(
        UserError, match=r"config.json was changed: it says that model.rope_theta is 30000.0, the check"
    ):
        W.check_same_run(workdir, CONFIG)
    with pytest.raises(UserError, match=r"another model: its model.rope_theta is 10000.0, this run's is 30000.0"):
        W.check_same_run(workdir, with_model(rope_theta=3e4))
    path.unlink()
    W.check_same_run(workdir, CONFIG)
    with pytest.raises(UserError, match=r"another model: its model.rope_theta is 10000.0"):
        W.check_same_run(workdir, with_model(rope_theta=3e4))


def test_a_damaged_record_is_passed_over_for_the_one_before(workdir):
    """The run itself names the damaged checkpoint, and goes on from the one before."""
    with Checkpointer(workdir / W.CHECKPOINTS, 1, 0) as checkpoints:
        meta = checkpoints.read_meta(1)
        checkpoints.save(2, {"params": {"w": torch.zeros(3)}}, {**meta, "config": with_model(hidden_size=16)})
    with pytest.raises(UserError, match="hidden_size is 16, this run's is 8"):
        W.check_same_run(workdir, CONFIG)
    flip(workdir / "checkpoints" / "2" / "meta" / "metadata", 20)
    W.check_same_run(workdir, CONFIG)


@pytest.mark.parametrize("content", ["[1]", "null", "{", "[" * 5000, '{"model": 3}', '{"model": {}}', '"x"'])
def test_a_config_that_is_none(content, workdir):
    (workdir / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"w/config.json is not what a run writes .*: put it back, delete it"):
        W.check_same_run(workdir, CONFIG)


def test_a_config_that_is_a_directory(workdir):
    (workdir / "config.json").unlink()
    (workdir / "config.json").mkdir()
    with pytest.raises(UserError, match=r"w/config.json is not what a run writes"):
        W.check_same_run(workdir, CONFIG)


def test_every_config_that_was_changed_at_a_step_is_kept(tmp_path):
    for seed in range(4):
        W.write_config(tmp_path, {"model": {}, "optimizer": {}, "seed": seed}, 2)
    kept = sorted(tmp_path.glob("config.until-step-2*"))
    assert sorted(json.loads(path.read_text())["seed"] for path in kept) == [0, 1, 2]
    assert json.loads((tmp_path / "config.until-step-2.json").read_text())["seed"] == 0
