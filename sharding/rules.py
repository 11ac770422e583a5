"""Where every parameter lives: one table from paths to the dimension that each mesh axis cuts.

Dimensions are counted in the stored (stacked) shape, so dim 0 of a layer's parameter is the stack. An axis that a row
does not name leaves the parameter replicated: norms and routers are replicated over tp. FSDP then cuts one more
dimension over dp, ep and cp: the first one that the table left whole and that divides, never the stack's. Experts are
already cut over ep, so FSDP cuts them over dp and cp only. Nothing is ever cut over dr.
"""

import dataclasses
import math
import re

from torch.distributed.tensor import Placement, Replicate, Shard

from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from sharding.mesh import AXES, FSDP, ROWS, MeshShape, divisors, nearest
from sharding.pipeline.cut import Slices
from sharding.sequence_split import check_length

# First match wins; a pattern must match the whole path.
RULES: list[tuple[str, dict[str, int]]] = [
    (r"model\.embed_tokens\.weight|lm_head\.weight", {"tp": 0}),  # vocabulary
    (r"model\.norm\.weight|score\.weight", {}),
    (r".*\.self_attn\.[qkv]_proj\.(weight|bias)", {"pp": 0, "tp": 1}),  # heads
    (r".*\.self_attn\.o_proj\.weight", {"pp": 0, "tp": 2}),  # heads
    (r".*\.self_attn\.o_proj\.bias", {"pp": 0}),
    (r".*\.mlp\.experts\.(gate|up)_proj\.weight", {"pp": 0, "ep": 1, "tp": 2}),  # experts, their width
    (r".*\.mlp\.experts\.down_proj\.weight", {"pp": 0, "ep": 1, "tp": 3}),
    (r".*\.mlp\.gate\.weight", {"pp": 0}),  # the router
    (r".*\.mlp\.(gate|up)_proj\.weight", {"pp": 0, "tp": 1}),
    (r".*\.mlp\.down_proj\.weight", {"pp": 0, "tp": 2}),
    (r"model\.visual\..*", {}),  # the vision tower: replicated over tp, cp and pp; only pp's first stage uses it
    (r".*\.(input_layernorm|post_attention_layernorm|q_norm|k_norm)\.weight", {"pp": 0}),
]


@dataclasses.dataclass(frozen=True)
class Placed:
    """How one parameter is cut on a mesh.

    explicit: (axis, dim) pairs from the table, for axes of size > 1. fsdp: the axes that FSDP cuts `fsdp_dim` over, in
    the mesh's order. It is empty when FSDP is off, when no dimension divides (fsdp_dim None), or when those axes have
    size 1. stack: as ParamSpec.stack.
    """

    explicit: tuple[tuple[str, int], ...]
    fsdp: tuple[str, ...]
    fsdp_dim: int | None
    stack: str = ""

    @property
    def cuts(self) -> dict[str, int]:
        """axis -> the dimension it cuts, for every axis that cuts one (table and FSDP)."""
        return dict(self.explicit) | {axis: self.fsdp_dim for axis in self.fsdp}


def rule(path: str) -> dict[str, int]:
    """axis -> dim of the first row that matches. UserError for a path that no row matches."""
    for pattern, dims in RULES:
        if re.fullmatch(pattern, path):
            return dims
    raise UserError(f"parameter {path}: no row of sharding/rules.py matches it; add one to RULES")


def place(cfg: ModelConfig, shape: MeshShape, fsdp: bool = True) -> dict[str, Placed]:
    """Every parameter of the model on a mesh of this shape.

    Raises UserError, with path, dim and axis, when a dimension of the table doesn't divide. Heads are never split, so
    dimensions of attention are counted in heads. If there are fewer key/value heads than tp ranks and tp is a multiple
    of their number, key/value projections are replicated over tp. The stack is cut over pp in equal stages; the last
    one is padded if it has fewer layers.
    """
    return {path: _place(cfg, path, spec, shape, fsdp) for path, spec in P.abstract_params(cfg).items()}


def _place(cfg: ModelConfig, path: str, spec: P.ParamSpec, shape: MeshShape, fsdp: bool) -> Placed:
    dims = rule(path)
    explicit = []
    for axis, dim in dims.items():
        size = getattr(shape, axis)
        if size == 1 or _kv_replicated(cfg, path, axis, size):
            continue
        if axis == "pp":
            if spec.shape[dim] < size:
                raise UserError(
                    f"{path}: dim {dim} has {spec.shape[dim]} layers, fewer than pp={size} stages; write in "
                    f"config.mesh pp{spec.shape[dim]} at most"
                )
        else:
            count, unit = _units(cfg, path, spec, dim)
            if count % size:
                raise UserError(
                    f"{path}: dim {dim} ({count} {unit}) doesn't divide by {axis}={size}; write in config.mesh "
                    f"{nearest(axis, size, divisors(count))}"
                )
        explicit.append((axis, dim))
    data = tuple(axis for axis in FSDP if getattr(shape, axis) > 1 and axis not in dims) if fsdp else ()
    parts = math.prod(getattr(shape, axis) for axis in data)
    taken = {dim for _, dim in explicit} | ({0} if spec.stack else set())
    fsdp_dim = next((d for d, n in enumerate(spec.shape) if d not in taken and n % parts == 0), None)
    return Placed(tuple(explicit), data if fsdp_dim is not None else (), fsdp_dim if data else None, spec.stack)


def _kv_replicated(cfg: ModelConfig, path: str, axis: str, size: int) -> bool:
    heads = cfg.num_key_value_heads
    return axis == "tp" and re.search(r"[kv]_proj", path) is not None and heads < size and size % heads == 0


def _units(cfg: ModelConfig, path: str, spec: P.ParamSpec, dim: int) -> tuple[int, str]:
    """(count, name) of the units that the dimension consists of and that must not be split, such as (16, "heads")."""
    if "self_attn" in path:
        return spec.shape[dim] // cfg.head_dim, "heads"
    if ".experts." in path and dim == 1:
        return spec.shape[dim], "experts"
    return spec.shape[dim], "ids" if path in (P.EMBED, P.HEAD) else "columns" if dim > 1 else "rows"


def local_shape(spec: P.ParamSpec, placed: Placed, shape: MeshShape, stages: Slices) -> tuple[int, ...]:
    """The shape of one rank's shard; a stack has the rows of all the rank's stages, padding included.

    stages: how the pipeline cuts the layers.
    """
    local = list(spec.shape)
    for axis, dim in placed.cuts.items():
        local[dim] = stages.rows(spec.layers) if axis == "pp" else local[dim] // getattr(shape, axis)
    return tuple(local)


def placements(placed: Placed) -> tuple[Placement, ...]:
    """DTensor's placements, one for each of AXES."""
    return tuple(Shard(placed.cuts[axis]) if axis in placed.cuts else Replicate() for axis in AXES)


def replicated_axes(placed: Placed, shape: MeshShape) -> tuple[str, ...]:
    """The axes of size > 1 that do not cut the parameter. Its gradient must be summed over them."""
    return tuple(axis for axis in AXES if getattr(shape, axis) > 1 and axis not in placed.cuts)


def check_batch(
    shape: MeshShape, rows: int, length: int, microbatches: int = 1, key: str = "config.batch_size"
) -> None:
    """UserError when the global batch [rows, length] can't be cut: rows over dr, dp, ep and micro-batches, length over
    cp, tokens of a micro-batch over tp. key: the flag that sets the number of rows, for the message."""
    sizes = {axis: getattr(shape, axis) for axis in ROWS} | {"config.microbatches": microbatches}
    if rows % (parts := math.prod(sizes.values())):
        product = " · ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        raise UserError(f"{key}={rows} doesn't divide by {product}; make it a multiple of {parts}")
    check_length(length, shape.cp)
    tokens = rows // parts * length // shape.cp
    if tokens % shape.tp:
        raise UserError(
            f"a rank's micro-batch has {tokens} tokens ({rows // parts} × {length}, over cp={shape.cp}), which don't "
            f"divide by tp={shape.tp}; make config.seq_len a multiple of {shape.tp * shape.cp}, or change {key}"
        )
