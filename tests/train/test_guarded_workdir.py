"""A workdir belongs to one run: a second writer or a changed tokenizer is an error before anything is touched."""

import shutil

import pytest

from qwen3f.data.tokenizers.sentencepiece_tokenizer import train_sentencepiece
from qwen3f.errors import UserError
from qwen3f.interop import source
from qwen3f.train.lock import held
from qwen3f.train.loop import run


def contents(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_second_run_touches_nothing(make, tmp_path):
    run(make(steps=2), tmp_path / "w", progress=False)
    before = contents(tmp_path / "w")
    with held(tmp_path / "w"), pytest.raises(UserError, match=r"w is in use: process .* on host"):
        run(make(steps=4), tmp_path / "w", progress=False)
    assert contents(tmp_path / "w") == before
    run(make(steps=4), tmp_path / "w", progress=False)


def test_another_tokenizer_on_resume_is_an_error(make, tmp_path):
    run(make(steps=2), tmp_path / "w", progress=False)
    place = tmp_path / "w" / "tokenizer" / "tokenizer.model"
    whole = place.read_bytes()
    other = train_sentencepiece([f"other words {i}" for i in range(90)], 320, tmp_path / "other.model")
    shutil.copyfile(other.path, place)
    before = contents(tmp_path / "w")
    for use in (
        lambda: run(make(steps=4), tmp_path / "w", progress=False),
        lambda: source.read_tokenizer(str(tmp_path / "w")),
    ):
        with pytest.raises(UserError, match="w/tokenizer/tokenizer.model has changed since the checkpoints"):
            use()
    assert contents(tmp_path / "w") == before
    place.write_bytes(whole)
    with pytest.raises(UserError, match="--config.data.tokenizer=.*other.model is not the tokenizer that the run"):
        run(make(steps=4, **{"data.tokenizer": str(other.path)}), tmp_path / "w", progress=False)
    run(make(steps=4), tmp_path / "w", progress=False)
