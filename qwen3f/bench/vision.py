"""Measures vision tower, preprocessing and a training step with pictures: python -m qwen3f.bench.vision [--towers=…]

Random weights in the compute dtype (bfloat16 on a GPU), random pixels. A case is a row of --patches patches: images of
one size, or of mixed sizes. "train" is forward and backward to every parameter of the tower. Peers, on the same images:

    transformers         its module unchanged, scaled_dot_product_attention for one image at a time
    transformers varlen  the same with torch's varlen_attn (FlashAttention-2) over all images, its blocks compiled
    batched sdpa         images of one size as a batch, compiled plain layers: what a careful author would write
    products alone       only the tower's matrix products, by cuBLAS: a lower bound of the time
    products, attention  these and torch's attention over a batch of images, without norms, GELU and rotation

MFU counts the FLOPs of `flops` (attention within a frame) over the datasheet's peak. `step` is the whole step of
`launch.py`, with float32 master weights and as many images as fit the row. `pixels` runs on one core.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen3f import model, presets
from qwen3f import params as P
from qwen3f.bench import vision_peers as peers
from qwen3f.bench.report import Report, clock, compute_dtype, device_of, peak_gib, reset_peak
from qwen3f.bench.step_time import step_time
from qwen3f.config import ModelConfig
from qwen3f.train.choices import find_compile_mode
from qwen3f.train.metrics import flops_per_token, peak_flops
from qwen3f.train.objective import NEXT_TOKEN
from qwen3f.vision.deepstack import Features
from qwen3f.vision.preprocess import Grid, image_patches
from qwen3f.vision.tower import make_tower


def grids_of(case: str, patches: int, cfg: ModelConfig) -> list[Grid]:
    """Grids of images with at most `patches` patches together.

    case: a side in pixels, or "LOW-HIGH" for mixed sizes. In a mixed case a last, narrow image fills the row, so that
    all mixed cases have the same shape and need one compiled graph.
    """
    low, mixed, high = case.partition("-")
    unit = cfg.vision_merger_spatial_factor
    sides = [int(side) // (cfg.vision_patch_size * unit) for side in (low, high or low)]
    chance, out, room = random.Random(0), [], patches
    while True:
        h, w = (unit * chance.randint(*sides) for _ in range(2))
        if h * w > room:
            return [*out, (1, unit, room // unit)] if mixed and room >= unit**2 else out
        out.append((1, h, w))
        room -= h * w


def flops(cfg: ModelConfig, grids: Sequence[Grid]) -> float:
    """FLOPs of the tower's forward pass: 2 for each weight and row of a product, and attention within each frame."""
    counts = peers.product_shapes(cfg, sum(t * h * w for t, h, w in grids))
    products = sum(2 * times * rows * inner * outer for times, rows, inner, outer in counts)
    attention = 4 * cfg.vision_num_hidden_layers * cfg.vision_hidden_size * sum(t * (h * w) ** 2 for t, h, w in grids)
    return float(products + attention)


def tower_params(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> P.Params:
    """Parameters of the tower only; a stack is the tuple of its layers, as in a training step."""
    short = cfg.replace(num_hidden_layers=max(1, len(cfg.vision_deepstack_layers)))
    table = P.abstract_params(short)
    own = {p: leaf for p, leaf in P.init_params(short, 0, device=device, dtype=dtype).items() if p.startswith(P.VISUAL)}
    return {path: leaf.unbind(0) if table[path].stack else leaf for path, leaf in own.items()}


def passes_of_ours(cfg: ModelConfig, grids: list[Grid], patches: int, device: torch.device) -> peers.Passes:
    dtype = compute_dtype(device)
    params = tower_params(cfg, device, dtype)
    tower = make_tower(cfg, "auto", find_compile_mode("auto", device))
    shapes = torch.tensor([grids], device=device)
    pixels = peers.random_pixels(cfg, patches, device, dtype)[None]
    leaves = [x for leaf in params.values() for x in (leaf if isinstance(leaf, tuple) else [leaf])]

    def forward() -> list[Tensor]:
        found: Features = tower(params, pixels, shapes)
        return [found.merged, *found.taps]

    return peers.make_passes(forward, leaves)


def towers(report: Report, names: list[str], cases: list[str], patches: int, device: torch.device) -> None:
    peak = peak_flops(device)
    for name in names:
        cfg = presets.get(name)
        for case in cases:
            grids = grids_of(case, patches, cfg)
            mixed = "-" in case
            makers: dict[str, Callable[[], peers.Passes]] = {
                "qwen3f": lambda cfg=cfg, grids=grids: passes_of_ours(cfg, grids, patches, device),
                "transformers": lambda cfg=cfg, grids=grids: peers.transformers_passes(cfg, grids, device, "sdpa"),
                "transformers varlen": lambda cfg=cfg, grids=grids: peers.transformers_passes(
                    cfg, grids, device, "varlen"
                ),
                "batched sdpa": lambda cfg=cfg, grids=grids: peers.batched_passes(cfg, grids, device),
                "products alone": lambda cfg=cfg, grids=grids: peers.bare_passes(cfg, grids, device, False),
                "products, attention": lambda cfg=cfg, grids=grids: peers.bare_passes(cfg, grids, device, True),
            }
            if mixed:
                del makers["batched sdpa"], makers["products, attention"]
            if device.type != "cuda":
                del makers["transformers varlen"]  # a CUDA operator
            for who, make in makers.items():
                run_tower(report, {"tower": name, "case": case, "who": who}, make, (grids, flops(cfg, grids)), device)
    print(f"MFU over {peak / 1e12:.4g} TFLOP/s", flush=True)


def run_tower(
    report: Report,
    names: dict[str, str],
    make: Callable[[], peers.Passes],
    work: tuple[list[Grid], float],
    device: torch.device,
) -> None:
    grids, cost = work
    peak, repeats = peak_flops(device), 5 if device.type == "cuda" else 1

    def measure() -> dict[str, float]:
        reset_peak(device)
        passes = make()
        forward = clock(passes.forward, device, repeats)
        train = clock(passes.train, device, repeats)
        return {
            "images": len(grids),
            "forward_images_s": len(grids) / forward,
            "forward_mfu": cost / forward / peak,
            "train_images_s": len(grids) / train,
            "train_mfu": 3 * cost / train / peak,
            "peak_gib": peak_gib(device),
        }

    report.peer(names, "transformers", measure)
    reset_peak(device)


def step(report: Report, name: str, case: str, sizes: tuple[int, int, int], device: torch.device) -> None:
    """Measures the whole training step. A row has images first, then words up to its end."""
    rows, tokens, patches = sizes
    cfg = presets.get(name).replace(max_position_embeddings=max(tokens, presets.get(name).max_position_embeddings))
    grids = grids_of(case, min(patches, (tokens - 1) * cfg.vision_merger_spatial_factor**2), cfg)
    batch = {key: x.to(device) for key, x in picture_batch(cfg, grids, rows, tokens, patches).items()}
    seconds, peak = step_time(cfg, NEXT_TOKEN, batch, repeats=5)
    work = rows * (tokens * flops_per_token(cfg.replace(vision_enabled=False), tokens) + 3 * flops(cfg, grids))
    report.add(
        tower=name,
        case=f"step, {rows} × {tokens} tokens, {rows * len(grids)} images of {case}",
        who="qwen3f",
        step_ms=seconds * 1e3,
        tokens_s=rows * tokens / seconds,
        train_images_s=rows * len(grids) / seconds,
        train_mfu=work / seconds / peak_flops(device),
        peak_gib=peak,
    )


def picture_batch(cfg: ModelConfig, grids: list[Grid], rows: int, tokens: int, patches: int) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    merged = sum(t * h * w for t, h, w in grids) // cfg.vision_merger_spatial_factor**2
    ids = torch.randint(0, min(cfg.vocab_size, 1000), (rows, tokens + 1), generator=chance)
    ids[ids == cfg.image_token_id] = 0
    ids[ids == cfg.video_token_id] = 0
    ids[:, :merged] = cfg.image_token_id
    targets = ids[:, 1:].clone()
    words = targets != cfg.image_token_id
    targets[~words] = -100
    batch = {
        "tokens": ids[:, :-1],
        "targets": targets,
        "loss_weights": words.float(),
        "segments": torch.ones(rows, tokens, dtype=torch.int32),
        "pixel_values": peers.random_pixels(cfg, rows * patches, torch.device("cpu"), torch.float32).unflatten(
            0, (rows, patches)
        ),
        "grids": torch.tensor([grids] * rows),
    }
    return model.transformer.with_places(batch, cfg)


def pixels(report: Report, sides: Sequence[int], seconds: float) -> None:
    """Measures preprocessing of noise in images per second on one thread, and transformers' pillow processor."""
    cfg = presets.get("qwen3-vl-2b")
    torch.set_num_threads(1)
    for side in sides:
        noise = np.random.default_rng(0).integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        names = {"tower": "pixels", "case": f"{side} × {side * 3 // 4}"}
        ours = _rate(lambda image=image: image_patches(image, cfg), seconds)
        report.add(**names, who="qwen3f", images_s=ours)
        report.peer(
            {**names, "who": "transformers pil"},
            "transformers",
            lambda image=image: {"images_s": _rate(peers.pil_processor(cfg, image), seconds)},
        )


def _rate(fn: Callable[[], object], seconds: float) -> float:
    """Calls per second, by the fastest fifth of the calls: other programs can only make calls slower."""
    took = []
    fn()
    until = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < until or len(took) < 5:
        fn()
        took.append(time.perf_counter() - begin)
    best = sorted(took)[: max(1, len(took) // 5)]
    return len(best) / sum(best)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="towers,step,pixels", help="some of towers, step, pixels")
    parser.add_argument("--towers", default="qwen3-vl-2b,qwen3-vl-8b", help="presets whose tower runs")
    parser.add_argument("--sizes", default="256,512,256-1024", help="sides of images in pixels, LOW-HIGH: mixed")
    parser.add_argument("--patches", type=int, default=32_768, help="patches of a case")
    parser.add_argument("--model", default="qwen3-vl-2b", help="preset of the training step")
    parser.add_argument("--step", default="2x4096x8192", help="rows x tokens x patches of a row")
    parser.add_argument("--step_size", default="512", help="sides of the step's images")
    parser.add_argument("--pixels", default="256,512,1024", help="widths of preprocessed images")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds to measure each preprocessing rate")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args(arguments)
    device = device_of(asked.device)
    report = Report("vision", device)
    for case in asked.cases.split(","):
        if case == "towers":
            towers(report, asked.towers.split(","), asked.sizes.split(","), asked.patches, device)
        elif case == "step":
            step(report, asked.model, asked.step_size, tuple(map(int, asked.step.split("x"))), device)
        elif case == "pixels":
            pixels(report, [int(side) for side in asked.pixels.split(",")], asked.seconds)
        else:
            parser.error(f"--cases={case}: write some of towers, step, pixels")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
