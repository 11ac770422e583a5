"""The benchmark of generation: bad arguments are named before it begins, and all rows of a case run at once."""

import pytest
import torch

from qwen3f import params, presets
from qwen3f.errors import UserError
from qwen3f.infer import bench
from sharding.axes import ONE


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--cases decode,fast", "--cases=decode,fast: write some of first, decode, workload, profile, peers"),
        ("--batches x", "--batches=x: write batch x context, as in 1x128,64x1024"),
        ("--batches 4", "--batches=4: write batch x context"),
        ("--batches 1x8,0x8", "--batches=1x8,0x8: write batch x context"),
        ("--tp 0", "--tp=0: write 1 or more"),
        ("--cases profile", "--cases=profile needs a GPU; leave out --device=cpu"),
        ("--device cuda", "--device=cuda: there is no GPU; write --device=cpu"),
    ],
)
def test_bad_arguments_are_named(arguments, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        bench.main(["--model", "nano", "--device", "cpu", *arguments.split()])


def test_all_rows_of_a_case_are_computed_at_a_time(monkeypatch):
    cfg = presets.get("nano").replace(num_hidden_layers=1)
    rows = []
    monkeypatch.setattr(bench, "decode_rate", lambda engine, *_, **__: rows.append(engine._rows) or 1.0)
    bench.table(cfg, params.init_params(cfg, 0), [(1, 8), (300, 8)], ONE.tp)
    assert min(rows) >= 300
