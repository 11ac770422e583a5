"""A training run on a stream resumes bit for bit: its place in the data is in the checkpoint."""

import json
import random

import pytest

from qwen3f.errors import UserError
from qwen3f.stages.configs import pretrain_config
from qwen3f.train.loop import run
from tests.train.runs import assert_same_bits, final_state, metrics


@pytest.fixture
def config(tmp_path):
    rand = random.Random(0)
    (tmp_path / "corpus").mkdir()
    rows = [
        {"text": " ".join(rand.choices(["the", "cat", "sat", "on", "mats"], k=rand.randint(5, 90)))} for _ in range(150)
    ]
    (tmp_path / "corpus/x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(steps, **data):
        c = pretrain_config("nano")
        c.device = "cpu"
        c.model.update(vocab_size=320, num_hidden_layers=1, hidden_size=32, intermediate_size=48, head_dim=16)
        c.update(steps=12, batch_size=4, seq_len=32, log_every=4)
        c.update(steps=steps)
        c.schedule.update(kind="constant", warmup=0)
        c.eval.every = 0
        c.eval.max_docs = 2
        c.checkpoint.every = 6
        c.sample.tokens = 0
        c.data.update(mixture=f"fineweb@{tmp_path / 'corpus'}", cache=str(tmp_path / "cache"), **data)
        return c

    return make


def test_a_streamed_run_resumes_bit_for_bit(config, tmp_path):
    options = {"streaming": True, "shuffle_buffer": 50, "packing": "best_fit"}
    run(config(12, **options), tmp_path / "whole", progress=False)
    run(config(6, **options), tmp_path / "cut", progress=False)
    run(config(12, **options, workers=1), tmp_path / "cut", progress=False)
    for step in (6, 12):
        assert_same_bits(*(final_state(config(12), tmp_path / name, step) for name in ("whole", "cut")))
    last = metrics(tmp_path / "whole")[-1]
    assert 0 <= last["padding"] < 0.3
    meta = json.loads(next((tmp_path / "whole/checkpoints/12").rglob("metadata")).read_text())
    assert meta["data"]["examples"] == 48


def test_a_stream_that_ends_too_early_leaves_what_was_trained(config, tmp_path):
    options = {"streaming": True, "max_epochs": "1"}
    with pytest.raises(UserError, match="The stream ends after"):
        run(config(500, **options), tmp_path / "run", progress=False)
    last = max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir() if path.name.isdigit())
    assert last % 6  # no step at which a checkpoint was due
    run(config(last, **options), tmp_path / "straight", progress=False)
    assert_same_bits(*(final_state(config(last), tmp_path / name, last) for name in ("run", "straight")))


def test_one_long_text_is_streamed_with_its_last_part_held_out(config, tmp_path):
    (tmp_path / "text").mkdir()
    lines = [f"the cat sat on mat {number}" for number in range(900)]
    (tmp_path / "text/book.txt").write_text("\n".join(lines) + "\n")
    asked = config(6, streaming=True, holdout=0.1)
    asked.data.mixture, asked.eval.every = f"files@{tmp_path / 'text'}", 6
    run(asked, tmp_path / "run", progress=False)
    assert metrics(tmp_path / "run")[-1]["val_loss"] > 0
    plain = config(6, holdout=0.1)
    plain.data.mixture, plain.eval.every = asked.data.mixture, 6
    run(plain, tmp_path / "cached", progress=False)
    assert metrics(tmp_path / "cached")[-1]["val_loss"] > 0
