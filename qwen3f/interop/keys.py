"""Where each Hugging Face tensor lives in our parameter tree.

Ours are stacked: a leaf [L, …] holds a kind of layer, an expert leaf [L, E, …] its experts too. Theirs are apart:
`model.layers.3.mlp.experts.5.up_proj.weight`. Derived from the parameter table, so a new parameter needs no line here.

Qwen3-VL has the language model under `model.language_model.`, one tensor for q, k and v in the vision tower, and the
patch embedding in a convolution's shape. Qwen3-VL-MoE also joins the experts of a layer, and their gate and up.
Released files hold these transposed, [E, in, out]; newer transformers write [E, out, in].

E experts · I their width · D hidden
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3f.checkpoint.shards import Shard
from qwen3f.config import ModelConfig
from qwen3f.params import EMBED, HEAD, PATCH_EMBED, VISUAL, Params, ParamSpec, abstract_params

_EXPERTS = "mlp.experts."
_JOINED = {"attn.q_proj.": "attn.qkv.", "mlp.experts.gate_proj.weight": "mlp.experts.gate_up_proj"}
_FOLLOWING = {"attn.q_proj.": ("attn.k_proj.", "attn.v_proj."), "mlp.experts.gate_proj.": ("mlp.experts.up_proj.",)}
# Buffers that old versions of transformers stored; they follow from the config.
_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class Slot(NamedTuple):
    """How one Hugging Face tensor is made of our parameters.

    The parts params[path][index], one for each (path, index), are joined along `dim`; if `transposed`, the last two
    dimensions are swapped; the result is reshaped to `shape`.
    """

    parts: tuple[tuple[str, tuple[int, ...]], ...]
    shape: tuple[int, ...]
    dim: int = 0
    transposed: bool = False


def fetch(slot: Slot, params: Params) -> Tensor:
    """The Hugging Face tensor of a slot, made of our parameters."""
    parts = [params[path][index] for path, index in slot.parts]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, slot.dim)
    return (whole.transpose(-1, -2) if slot.transposed else whole).reshape(slot.shape)


def fill(slot: Slot, params: Params, tensor: Tensor, shards: Mapping[str, Shard]) -> None:
    """Copy a Hugging Face tensor into our parameters. shards: path -> the part of it that `params` holds; the rest of
    the tensor is not copied."""
    whole = tensor.transpose(-1, -2) if slot.transposed else tensor
    for (path, index), part in zip(slot.parts, whole.chunk(len(slot.parts), slot.dim), strict=True):
        shard, depth = shards[path], len(index)
        part = part.reshape(shard.shape[depth:])
        for here, there in shard.pieces:
            if all(box.start <= at < box.stop for at, box in zip(index, there)):
                place = tuple(box.start + at - other.start for at, box, other in zip(index, here, there))
                params[path][place + tuple(here[depth:])].copy_(part[tuple(there[depth:])])


def hf_name(cfg: ModelConfig, path: str) -> str:
    """Hugging Face's name for `path`: a parameter outside the stacks, or the prefix of a stack."""
    if cfg.vision_enabled and path.startswith("model.") and not path.startswith(VISUAL):
        return "model.language_model." + path.removeprefix("model.")
    return path


def slots(cfg: ModelConfig, transposed: bool = True) -> dict[str, Slot]:
    """Hugging Face key -> its slot, layer by layer in the order of the forward pass, experts by number.

    transposed: how joined experts are stored (only in Qwen3-VL-MoE), see the module's docstring.
    """
    table = abstract_params(cfg)
    out = {hf_name(cfg, EMBED): Slot(((EMBED, ()),), table[EMBED].shape)}
    stacks: dict[str, list[dict[str, Slot]]] = {}
    after = {}
    for path, spec in table.items():
        if spec.layers is None:
            after[hf_name(cfg, path)] = Slot(((path, ()),), _shape(cfg, path, spec))
            continue
        layers = stacks.setdefault(spec.stack, [{} for _ in range(_height(table, spec.stack))])
        name = path.removeprefix(spec.stack)
        for row, layer in enumerate(spec.layers):
            layers[layer] |= {
                f"{hf_name(cfg, spec.stack)}{layer}.{key}": slot
                for key, slot in _of_layer(cfg, spec, name, row, transposed).items()
            }
    for layers in stacks.values():
        for layer in layers:
            out |= layer
    return out | after


def count(cfg: ModelConfig) -> int:
    """How many keys `slots` has, without making them."""
    total = 0
    for path, spec in abstract_params(cfg).items():
        name = path.removeprefix(spec.stack)
        if spec.layers is None:
            total += 1
        elif name.startswith(_EXPERTS) and not cfg.vision_enabled:
            total += len(spec.layers) * cfg.num_experts
        elif not _is_joined_to_another(cfg, name):
            total += len(spec.layers)
    return total


def are_transposed(cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether joined experts are stored transposed, as in released files. It is seen by the shapes: of a layer's two
    tensors at most one is square."""
    if not (cfg.vision_enabled and cfg.sparse_layers):
        return False
    found = {True: 0, False: 0}
    for layout in found:
        wanted = {key: slot.shape for key, slot in slots(cfg, layout).items() if _EXPERTS in key}
        found[layout] = sum(shapes.get(key) == shape for key, shape in wanted.items())
    return found[True] > found[False]


def is_ignored(cfg: ModelConfig, key: str) -> bool:
    """Whether a stored tensor has no place of its own: a buffer of old files, or a tied head beside the embedding."""
    return bool(_BUFFER.fullmatch(key)) or is_tied_head(cfg, key)


def is_tied_head(cfg: ModelConfig, key: str) -> bool:
    return cfg.tie_word_embeddings and key == HEAD


def _height(table: Mapping[str, ParamSpec], stack: str) -> int:
    return 1 + max(max(spec.layers) for spec in table.values() if spec.stack == stack)


def _shape(cfg: ModelConfig, path: str, spec: ParamSpec) -> tuple[int, ...]:
    if path != PATCH_EMBED + "weight":
        return spec.shape
    frames, side = cfg.vision_temporal_patch_size, cfg.vision_patch_size
    return (spec.shape[0], cfg.vision_num_channels, frames, side, side)


def _is_joined_to_another(cfg: ModelConfig, name: str) -> bool:
    return cfg.vision_enabled and any(name.startswith(prefixes) for prefixes in _FOLLOWING.values())


def _of_layer(cfg: ModelConfig, spec: ParamSpec, name: str, row: int, transposed: bool) -> dict[str, Slot]:
    """Key within the layer -> its slot, for the parameter `name` of a stack; {} if it is a part of another's tensor."""
    if _is_joined_to_another(cfg, name):
        return {}
    path = spec.stack + name
    if not name.startswith(_EXPERTS):
        for first, others in _FOLLOWING.items():
            if cfg.vision_enabled and name.startswith(first):
                paths = [spec.stack + part + name.removeprefix(first) for part in (first, *others)]
                shape = (len(paths) * spec.shape[1], *spec.shape[2:])
                return {name.replace(first, _JOINED[first]): Slot(tuple((p, (row,)) for p in paths), shape)}
        return {name: Slot(((path, (row,)),), spec.shape[1:])}
    rest = name.removeprefix(_EXPERTS)
    if not cfg.vision_enabled:
        return {
            f"{_EXPERTS}{expert}.{rest}": Slot(((path, (row, expert)),), spec.shape[2:])
            for expert in range(cfg.num_experts)
        }
    parts, key = [path], name.removesuffix(".weight")
    if name in _JOINED:
        parts, key = [path, path.replace("gate_proj", "up_proj")], _JOINED[name]
    experts, rows, columns = spec.shape[1], len(parts) * spec.shape[2], spec.shape[3]
    shape = (experts, columns, rows) if transposed else (experts, rows, columns)
    return {key: Slot(tuple((part, (row,)) for part in parts), shape, 1, transposed)}
