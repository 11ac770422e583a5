"""The benchmark's cases run and say what they took; the figures themselves are in qwen3f/checkpoint/README.md."""

import re

from qwen3f import params, presets
from qwen3f.checkpoint import bench


def test_every_case_of_one_device_runs(tmp_path):
    table = params.abstract_params(presets.get("nano").replace(vocab_size=64, num_hidden_layers=1))
    ours, orbaxs = ["ours_stall", "ours_write", "ours_read", "ours_read_half"], ["orbax_write", "orbax_read"]
    assert list(bench.CASES)[:6] == ours + orbaxs
    for case in bench.CASES[:6]:  # the others need JAX with several devices, from its start
        said = bench.measure(case, tmp_path, table)
        assert re.fullmatch(rf"{case} +0\.00 GB: .* s of CPU time, .* GB more memory; before that .* GB", said), said
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "orbax"}
