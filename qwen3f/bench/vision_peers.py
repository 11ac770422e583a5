"""Peers of the vision tower: transformers' module, and plain layers over a batch of images of one size.

N images · n patches of an image · P patches of all · C width · H heads
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3f.bench.report import compute_dtype, cudnn_first
from qwen3f.config import ModelConfig
from qwen3f.interop.vision_config import to_hf
from qwen3f.vision.merger import make_merger
from qwen3f.vision.preprocess import MAX_PIXELS, MIN_PIXELS, Grid

VARLEN = "flash_varlen"  # transformers packs frames only for an attention with "flash" in its name


class Passes(NamedTuple):
    """forward: forward pass without gradients. train: forward and backward to all parameters."""

    forward: Callable[[], Any]
    train: Callable[[], Any]


def make_passes(forward: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor]) -> Passes:
    """The two passes of a model. leaves: its parameters. The gradient of the outputs is random, the same each time."""
    seeds: list[Tensor] = []

    def only_forward() -> None:
        with torch.no_grad():
            forward()

    def train() -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.requires_grad_(True)
        out = forward()
        if not seeds:
            seeds.extend(torch.randn_like(x) for x in out)
        return torch.autograd.grad(out, leaves, seeds)

    return Passes(only_forward, train)


def random_pixels(cfg: ModelConfig, patches: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random pixels [P, values of a patch] in [−1, 1)."""
    values = cfg.vision_num_channels * cfg.vision_temporal_patch_size * cfg.vision_patch_size**2
    return torch.rand(patches, values, device=device, dtype=dtype) * 2 - 1


# -- transformers ------------------------------------------------------------------------------------------------------


def transformers_passes(cfg: ModelConfig, grids: list[Grid], device: torch.device, attention: str) -> Passes:
    """Passes of transformers' tower. attention: "sdpa", uncompiled; or "varlen", with compiled blocks."""
    import transformers
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    if attention == "varlen":
        register_varlen()
    config = transformers.AutoConfig.for_model(**to_hf(cfg, compute_dtype(device))).vision_config
    with torch.device(device):
        module = Qwen3VLVisionModel._from_config(config, attn_implementation="sdpa", dtype=compute_dtype(device))
    if attention == "varlen":
        for part in module.modules():
            if hasattr(part, "config"):
                part.config._attn_implementation = VARLEN
        for block in module.blocks:
            block.compile(dynamic=False)
    pixels = random_pixels(cfg, sum(t * h * w for t, h, w in grids), device, compute_dtype(device))
    shapes = torch.tensor(grids, device=device)

    def forward() -> list[Tensor]:
        with cudnn_first(device):
            found = module(pixels, shapes)
        return [found.pooler_output, *found.deepstack_features]

    return make_passes(forward, list(module.parameters()))


def register_varlen() -> None:
    """Registers torch's FlashAttention-2 over packed frames as an attention of transformers."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface

    def varlen(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, **packed: Any
    ) -> tuple[Tensor, None]:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        ends, longest = packed["cu_seq_lens_q"], packed["max_length_q"]
        return varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling)[None], None

    AttentionInterface.register(VARLEN, varlen)


def pil_processor(cfg: ModelConfig, image: Any) -> Callable[[], Any]:
    """transformers' image processor on pillow, with Qwen3-VL's settings."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        patch_size=cfg.vision_patch_size,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return lambda: processor(images=[image], return_tensors="np")


# -- plain layers ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block of the tower over [N, n, C]. A patch attends to all n of its image, so no mask is needed and any kernel
    works."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        width, inner = cfg.vision_hidden_size, cfg.vision_intermediate_size
        self.heads = cfg.vision_num_attention_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (_turned(q, cos, sin), _turned(k, cos, sin), v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class Tower(nn.Module):
    """A tower of plain layers. Positions and angles are arguments, since they are the same for all images."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        values = cfg.vision_num_channels * cfg.vision_temporal_patch_size * cfg.vision_patch_size**2
        self.patches = nn.Linear(values, cfg.vision_hidden_size)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.vision_num_hidden_layers))
        self.merger = make_merger(cfg, tap=False)
        self.taps = nn.ModuleDict({str(layer): make_merger(cfg, tap=True) for layer in cfg.vision_deepstack_layers})

    def forward(self, pixels: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        x, taps = self.patches(pixels) + positions, []
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin)
            if str(layer) in self.taps:
                taps += self.taps[str(layer)](x)
        return [*self.merger(x), *taps]


def batched_passes(cfg: ModelConfig, grids: list[Grid], device: torch.device) -> Passes:
    """Passes of the plain tower. grids: must all be equal."""
    ((t, h, w),) = set(grids)
    dtype, count = compute_dtype(device), t * h * w
    with torch.device(device):
        tower = Tower(cfg).to(dtype)
        positions = torch.nn.Parameter(torch.randn(count, cfg.vision_hidden_size, dtype=dtype))
        half = cfg.vision_hidden_size // cfg.vision_num_attention_heads // 2
        angles = torch.rand(count, 1, half)
    if device.type == "cuda":
        for part in (*tower.blocks, tower.merger, *tower.taps.values()):
            part.compile(dynamic=False)
    pixels = random_pixels(cfg, len(grids) * count, device, dtype).unflatten(0, (len(grids), count))
    cos, sin = angles.cos(), angles.sin()

    def forward() -> list[Tensor]:
        with cudnn_first(device):
            return tower(pixels, positions, cos, sin)

    return make_passes(forward, [*tower.parameters(), positions])


# -- products alone, and with attention --------------------------------------------------------------------------------


def bare_passes(cfg: ModelConfig, grids: list[Grid], device: torch.device, attention: bool) -> Passes:
    """Only the tower's matrix products, by cuBLAS, and with `attention` torch's attention (cuDNN's first) of images of
    one size: no tower of these operators can be faster.

    All layers read the same tensors here, which can only make them faster. Training adds two products for each: the
    gradients of its input and of its weight.
    """
    dtype = compute_dtype(device)
    counts = product_shapes(cfg, sum(t * h * w for t, h, w in grids))
    tensors = [
        (
            times,
            *(
                torch.randn(shape, device=device, dtype=dtype)
                for shape in ((rows, inner), (inner, outer), (rows, outer))
            ),
        )
        for times, rows, inner, outer in counts
    ]

    layers = cfg.vision_num_hidden_layers if attention else 0
    heads, (t, h, w) = cfg.vision_num_attention_heads, grids[0]
    shape = (len(grids) if attention else 0, t * h * w, heads, cfg.vision_hidden_size // heads)
    qkv = [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    seed = torch.randn_like(qkv[0])

    def products() -> None:
        for times, x, weight, y in tensors:
            for _ in range(times):
                torch.mm(x, weight, out=y)

    def forward() -> None:
        products()
        with torch.no_grad(), cudnn_first(device):
            for _ in range(layers):
                F.scaled_dot_product_attention(*qkv)

    def train() -> tuple[Tensor, ...]:
        products()
        for times, x, weight, y in tensors:
            for _ in range(times):
                gradients = y @ weight.mT, x.mT @ y
        with cudnn_first(device):
            for _ in range(layers):
                gradients = torch.autograd.grad(F.scaled_dot_product_attention(*qkv), qkv, seed)
        return gradients

    return Passes(forward, train)


def product_shapes(cfg: ModelConfig, patches: int) -> list[tuple[int, int, int, int]]:
    """(count, rows, inner, outer) of the tower's products [rows, inner] · [inner, outer]."""
    width, inner, depth = cfg.vision_hidden_size, cfg.vision_intermediate_size, cfg.vision_num_hidden_layers
    values = cfg.vision_num_channels * cfg.vision_temporal_patch_size * cfg.vision_patch_size**2
    count, mergers = cfg.vision_merger_spatial_factor**2, 1 + len(cfg.vision_deepstack_layers)
    layers = [
        (depth, patches, *sizes) for sizes in ((width, 3 * width), (width, width), (width, inner), (inner, width))
    ]
    merger = [(mergers, patches // count, count * width, out) for out in (count * width, cfg.hidden_size)]
    return [(1, patches, values, width), *layers, *merger]
