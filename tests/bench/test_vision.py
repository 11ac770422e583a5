"""What the vision bench counts, and that each side runs. The speeds themselves are not checked."""

import json
import math

import pytest
import torch

from qwen3f import presets
from qwen3f.bench import vision, vision_peers

CPU = torch.device("cpu")
NANO = presets.get("nano_vl")


@pytest.mark.parametrize(
    "preset, per_image",  # TFLOPs of training on an image of 256², 512² and 1024², from the formula's table
    [("qwen3-vl-2b", (0.52, 2.33, 13.0)), ("qwen3-vl-8b", (0.72, 3.17, 17.4))],
)
def test_flops_are_those_of_the_table(preset, per_image):
    cfg = presets.get(preset)
    for side, expected in zip((16, 32, 64), per_image):
        assert 3 * vision.flops(cfg, [(1, side, side)]) / 1e12 == pytest.approx(expected, rel=0.01)


def test_images_fill_the_row():
    assert vision.grids_of("64", 64, NANO) == [(1, 64 // NANO.vision_patch_size, 64 // NANO.vision_patch_size)] * (
        64 // (64 // NANO.vision_patch_size) ** 2
    )
    mixed = vision.grids_of("32-96", 256, NANO)
    assert sum(math.prod(grid) for grid in mixed) == 256
    assert len({grid[1:] for grid in mixed}) > 1
    assert all(h % 2 == w % 2 == 0 for _, h, w in mixed)


def test_transformers_varlen_is_its_sdpa(monkeypatch):
    """transformers' packed path, with plain attention in place of the CUDA operator, equals its loop over images."""

    def plain(q, k, v, starts, _, longest, __, scale):
        assert longest == 16
        parts = zip(*(x.transpose(0, 1).split(starts.diff().tolist(), 1) for x in (q, k, v)))
        out = [torch.nn.functional.scaled_dot_product_attention(*part, scale=scale) for part in parts]
        return torch.cat(out, 1).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    grids = [(1, 4, 4), (1, 2, 6)]
    found = []
    for attention in ("sdpa", "varlen"):
        torch.manual_seed(0)
        passes = vision_peers.transformers_passes(NANO, grids, CPU, attention)
        torch.manual_seed(1)
        found.append(passes.train())
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()  # float32: the sums have another order


def test_every_side_runs(capsys):
    arguments = "--device=cpu --towers=nano_vl --sizes=64,32-96 --patches=64 --model=nano_vl --step=2x64x64 --pixels=64"
    assert vision.main([*arguments.split(), "--step_size=64", "--seconds=0.01"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]
    assert [row["who"] for row in rows] == [
        "qwen3f", "transformers", "batched sdpa", "products alone", "products, attention",
        "qwen3f", "transformers", "products alone", "qwen3f", "qwen3f", "transformers pil"
    ]  # fmt: skip
    assert all(row["forward_mfu"] > 0 and row["train_mfu"] > 0 for row in rows[:8])
    assert rows[8]["tokens_s"] > 0
    assert rows[8]["case"] == "step, 2 × 64 tokens, 2 images of 64"
    assert rows[9]["images_s"] > 0
