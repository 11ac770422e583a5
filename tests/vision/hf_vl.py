"""transformers' Qwen3-VL and Qwen3-VL-MoE for tests; rows of text, images and video for its models and ours; its
tensors in the form of our parameter table.

The code is separate from qwen3f.interop on purpose, so that each checks the other.
"""

import random
from typing import NamedTuple

import torch
import transformers

from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.vision.mrope import merged_grids

IMAGE, VIDEO, BEGIN, END = 90, 91, 92, 93
IDS = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), (90, 91, 92, 93)))
MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
SAME = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size "
SAME += "max_position_embeddings rms_norm_eps hidden_act attention_bias"
SPARSE = "num_experts num_experts_per_tok moe_intermediate_size decoder_sparse_step"


def vl_config(**changes) -> ModelConfig:
    """A small configuration. No two sizes are equal, so that a transposed or misplaced tensor does not fit."""
    sizes = {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 80, "vocab_size": 97, "max_position_embeddings": 64, "mrope_section": (4, 2, 2),
        "vision_enabled": True, "vision_hidden_size": 24, "vision_num_hidden_layers": 4,
        "vision_num_attention_heads": 3, "vision_intermediate_size": 44, "vision_patch_size": 2,
        "vision_image_size": 10, "vision_deepstack_layers": (0, 2), **IDS,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes})


def hf_config(cfg: ModelConfig):
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta, "mrope_section": list(cfg.mrope_section)}
    text = {name: getattr(cfg, name) for name in SAME.split()} | {"rope_parameters": rope}
    vision = {
        "depth": cfg.vision_num_hidden_layers,
        "hidden_size": cfg.vision_hidden_size,
        "intermediate_size": cfg.vision_intermediate_size,
        "num_heads": cfg.vision_num_attention_heads,
        "patch_size": cfg.vision_patch_size,
        "spatial_merge_size": cfg.vision_merger_spatial_factor,
        "temporal_patch_size": cfg.vision_temporal_patch_size,
        "out_hidden_size": cfg.hidden_size,
        "num_position_embeddings": (cfg.vision_image_size // cfg.vision_patch_size) ** 2,
        "deepstack_visual_indexes": list(cfg.vision_deepstack_layers),
    }
    kind = "Moe" if cfg.num_experts else ""
    if kind:
        text |= {name: getattr(cfg, name) for name in SPARSE.split()} | {"mlp_only_layers": list(cfg.mlp_only_layers)}
        text |= {"tie_word_embeddings": cfg.tie_word_embeddings}
    make = getattr(transformers, f"Qwen3VL{kind}Config")
    return make(text_config=text, vision_config=vision, tie_word_embeddings=cfg.tie_word_embeddings, **IDS)


def hf_model(cfg: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' model with random weights that give logits of about ±10; norms and biases random too."""
    config = hf_config(cfg)
    config._attn_implementation = "eager"
    if cfg.num_experts:
        config.text_config._experts_implementation = "eager"
    kind = "Moe" if cfg.num_experts else ""
    model = getattr(transformers, f"Qwen3VL{kind}ForConditionalGeneration")(config).eval()
    g = torch.Generator().manual_seed(seed)
    for name, leaf in model.named_parameters():
        noise = torch.randn(leaf.shape, generator=g)
        if name.endswith("norm.weight") or ".norm1.weight" in name or ".norm2.weight" in name:
            leaf.data = (1 + 0.3 * noise).to(dtype)
        elif name.endswith("pos_embed.weight"):
            leaf.data = (0.5 * noise).to(dtype)
        else:
            gain = 2.4 if name.startswith(("lm_head", "model.language_model.embed")) else 1.5
            fan = leaf[0].numel() if ".patch_embed." in name and leaf.dim() > 1 else leaf.shape[-1]
            leaf.data = (noise * gain / (fan**0.5 if leaf.dim() > 1 else 5)).to(dtype)
    model.tie_weights()
    return model


def from_hf(cfg: ModelConfig, tensors: dict[str, torch.Tensor]) -> P.Params:
    """Our stacked parameters from transformers' tensors by name, or gradients from its gradients. Uses every tensor."""

    def theirs(path: str) -> str:
        return path if path.startswith((P.VISUAL, P.HEAD)) else path.replace("model.", "model.language_model.", 1)

    def one(stack: str, layer: int, name: str) -> torch.Tensor:
        key = f"{theirs(stack)}{layer}.{name}"
        part = {"q": 0, "k": 1, "v": 2}
        if stack == P.VISUAL_BLOCKS and name.startswith("attn.") and name[6:].startswith("_proj"):
            return tensors[key.replace(name[5:11], "qkv")].chunk(3)[part[name[5]]]
        if ".experts." not in key:
            return tensors[key]
        block, kind = key.removesuffix("_proj.weight").rsplit(".", 1)
        if kind == "down":
            return tensors[f"{block}.down_proj"]
        gate, up = tensors[f"{block}.gate_up_proj"].split(cfg.moe_intermediate_size, dim=1)
        return gate if kind == "gate" else up

    out = {}
    for path, spec in P.abstract_params(cfg).items():
        if spec.layers is None:
            out[path] = tensors[theirs(path)].reshape(spec.shape)
        else:
            name = path.removeprefix(spec.stack)
            out[path] = torch.stack([one(spec.stack, layer, name) for layer in spec.layers])
    assert sum(x.numel() for x in out.values()) == sum(x.numel() for x in tensors.values())
    P.check_params(cfg, out)
    return out


class Row(NamedTuple):
    """tokens, and the images and videos in order, each (whether it is a video, its grid)."""

    tokens: list[int]
    seen: list[tuple[bool, tuple[int, int, int]]]


def row(rand: random.Random, kinds: str, side: int = 2) -> Row:
    """A random row. kinds: its parts, such as "titv", where t is text, i an image and v a video. A video has words
    before each frame."""

    def words() -> list[int]:
        return [rand.randrange(80) for _ in range(rand.randint(1, 5))]

    tokens, seen = [], []
    for kind in kinds:
        if kind == "t":
            tokens += words()
            continue
        h, w = side * rand.randint(1, 3), side * rand.randint(1, 4)
        each = h * w // side**2
        if kind == "i":
            seen.append((False, (1, h, w)))
            tokens += [BEGIN, *[IMAGE] * each, END]
        else:
            t = rand.randint(1, 3)
            seen.append((True, (t, h, w)))
            for _ in range(t):
                tokens += [*words(), BEGIN, *[VIDEO] * each, END]
    return Row(tokens, seen)


def our_batch(cfg: ModelConfig, rows: list[Row], dtype: torch.dtype, spare: int = 3) -> dict[str, torch.Tensor]:
    """A batch of rows, padded on the right to one length, with random pixels. spare: room for this many more grids and
    merged patches, which stays unused."""
    length = max(len(r.tokens) for r in rows)
    count = max(sum(t * h * w for _, (t, h, w) in r.seen) for r in rows) + spare * cfg.vision_merger_spatial_factor**2
    most = max(len(r.seen) for r in rows) + spare
    g = torch.Generator().manual_seed(7)
    tokens = torch.tensor([[*r.tokens, *[1] * (length - len(r.tokens))] for r in rows])
    segments = torch.tensor([[1] * len(r.tokens) + [0] * (length - len(r.tokens)) for r in rows], dtype=torch.int32)
    grids = torch.tensor([[g for _, g in r.seen] + [(0, 0, 0)] * (most - len(r.seen)) for r in rows])
    pixels = torch.randn(len(rows), count, cfg.vision_patch_values, generator=g).to(dtype)
    return {"tokens": tokens, "segments": segments, "pixel_values": pixels, "grids": grids.to(torch.int32)}


def their_arguments(row: Row, batch: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """Row `index` of our batch, alone, as arguments of transformers' model."""
    tokens = batch["tokens"][index : index + 1, : len(row.tokens)]
    out = {"input_ids": tokens, "use_cache": False}
    out["mm_token_type_ids"] = ((tokens == IMAGE) * 1 + (tokens == VIDEO) * 2).int()
    at = 0
    parts = {False: ([], []), True: ([], [])}
    for video, (t, h, w) in row.seen:
        parts[video][0].append(batch["pixel_values"][index, at : at + t * h * w])
        parts[video][1].append((t, h, w))
        at += t * h * w
    for video, names in (
        (False, ("pixel_values", "image_grid_thw")),
        (True, ("pixel_values_videos", "video_grid_thw")),
    ):
        pixels, grids = parts[video]
        if pixels:
            out |= {names[0]: torch.cat(pixels), names[1]: torch.tensor(grids)}
    return out


def features_of(batch: dict[str, torch.Tensor], cfg: ModelConfig) -> list[int]:
    return merged_grids(batch["grids"], cfg).prod(-1).sum(1).tolist()
