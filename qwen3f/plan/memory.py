"""Memory of one rank: parameters, optimizer and gradients exactly; activations by kind, from the tensors that autograd
saves.

N tokens of a rank's micro-batch · D hidden · I, F widths · R rows of experts · V vocabulary; sizes after the cut by tp
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence

import torch

from kernels import cross_entropy
from qwen3f import params as P
from qwen3f.plan import schedule
from qwen3f.plan.case import Case
from qwen3f.plan.hardware import Hardware
from qwen3f.train import optimizer
from sharding import rules
from sharding.mesh import AXES

# The share of a card's memory that a planned peak may use. The rest is for CUDA, NCCL, fragmentation, and the plan's
# error: measured peaks were up to 4% above planned ones (tests/plan/test_plan_measured.py).
FILLED = 0.95


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter on a mesh.

    local_shape: of a rank's shard, padding of its stages included. cuts: (axis, dim) pairs. fsdp, replicated: the axes
    that FSDP cuts it over; the axes that it is replicated over. gathered: elements of one layer (without a stack, of
    the parameter) after FSDP's gather. itemsize: bytes per element in the step: of the compute dtype, or of the master
    dtype if FSDP gathers master weights. stack, layers: as in ParamSpec. trained: whether it has a gradient and
    moments.
    """

    path: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    cuts: tuple[tuple[str, int], ...]
    fsdp: tuple[str, ...]
    replicated: tuple[str, ...]
    stack: str
    layers: tuple[int, ...] | None
    gathered: int
    itemsize: int
    trained: bool

    @property
    def elements(self) -> int:
        return math.prod(self.local_shape)

    @property
    def placement(self) -> str:
        return " ".join(f"{axis}:{dim}" for axis, dim in self.cuts) or "replicated"


def leaves(setup: Case) -> tuple[Leaf, ...]:
    """Every parameter, in the order of the forward pass. UserError as sharding.rules.place."""
    placed = rules.place(setup.model, setup.mesh, setup.fsdp)
    specs, out = P.abstract_params(setup.model), []
    trained = optimizer.trainable(setup.hyper, specs)
    for path, spec in specs.items():
        where = placed[path]
        cuts = tuple((axis, where.cuts[axis]) for axis in AXES if axis in where.cuts)
        local = rules.local_shape(spec, where, setup.mesh, setup.cut)
        ranks = math.prod(getattr(setup.mesh, axis) for axis in where.fsdp)
        out.append(
            Leaf(
                path=path,
                shape=spec.shape,
                local_shape=local,
                cuts=cuts,
                fsdp=where.fsdp,
                replicated=rules.replicated_axes(where, setup.mesh),
                stack=spec.stack,
                layers=spec.layers,
                gathered=math.prod(local[1:] if spec.stack else local) * ranks,
                itemsize=setup.master if where.fsdp and setup.reduce == "float32" else setup.itemsize,
                trained=path in trained,
            )
        )
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    parameters, optimizer: the state between steps, exact. copy: parameters in the compute dtype. reference: a frozen
    reference model in the compute dtype. gathered: weights that FSDP has gathered at the same time. gradients: of one
    micro-batch. sums: float32 sums over micro-batches, and the previous micro-batch's gradients. buffers: the
    pipeline's receive buffers. activations: (kind, bytes), over all layers and micro-batches in flight. loss: a chunk
    of logits and the head's gradients. working: temporary memory of a layer in recomputation or backward pass, or of
    gradients that are stacked or summed. peak: the largest total at any time of a step; at: the name of that time.
    """

    parameters: int
    optimizer: int
    copy: int
    reference: int
    gathered: int
    gradients: int
    sums: int
    buffers: int
    activations: tuple[tuple[str, int], ...]
    loss: int
    working: int
    peak: int
    at: str


def state_bytes(setup: Case, table: tuple[Leaf, ...]) -> tuple[int, int]:
    """Bytes of (parameters, moments) on one rank, as qwen3f.train.state.init_state makes them."""
    by_muon = optimizer.by_muon(setup.hyper, P.decays(setup.model))
    moments = sum(leaf.elements * (1 if leaf.path in by_muon else 2) for leaf in table if leaf.trained)
    return setup.master * sum(leaf.elements for leaf in table), setup.master * moments


def layer_activations(setup: Case, sparse: bool, policy: str) -> dict[str, int]:
    """kind -> bytes that one layer saves per micro-batch for its backward pass. policy: gradient_checkpointing."""
    cfg, size = setup.model, setup.itemsize
    n, hidden = setup.tokens, cfg.hidden_size
    q, kv = setup.heads * cfg.head_dim, setup.kv_heads * cfg.head_dim
    stream = setup.tokens_tp * hidden
    wide = torch.promote_types(setup.compute, torch.float32).itemsize
    if policy == "full":
        return {"residual stream": stream * size}
    attention = n * (2 * q + 2 * kv) * size + n * setup.heads * wide  # q, k, v, attention's output and log-sum-exp
    kept = {"residual stream": stream * size}
    rows = setup.expert_rows
    if policy == "none":
        # the residual stream between attention and MLP; the inputs of the column-parallel products
        kept["residual stream"] += (stream + 2 * n * hidden) * size
        kept["attention"] = attention + n * (q + kv) * size  # q and k also after norm and rotation
    else:
        # the output projection's result, before and after the sum over tp; the products' gathered inputs, if kept
        kept["residual stream"] += (n * hidden + (stream if setup.mesh.tp > 1 else 0)) * size
        kept["residual stream"] += 0 if setup.reshard or setup.mesh.tp == 1 else 2 * n * hidden * size
        kept["attention"] = attention
    if sparse:
        exchanged = 2 * rows * hidden if setup.mesh.ep > 1 else 0  # rows received for the experts, and their results
        kept["mlp"] = (2 * rows * setup.expert_width + exchanged) * size
        kept["router"] = n * cfg.num_experts * (size + 2 * wide if policy == "none" else size)
    else:
        kept["mlp"] = (3 if policy == "none" else 2) * n * setup.width * size
    if policy == "selective":  # the last product's output; with ep, the experts' output before it is sent back
        kept["mlp"] += (rows if sparse and setup.mesh.ep > 1 else n) * hidden * size
    return kept


def room(hardware: Hardware) -> float:
    """The largest peak, in bytes, with which a run fits."""
    return FILLED * hardware.memory


def peak(setup: Case, table: tuple[Leaf, ...]) -> int:
    """Peak memory of the fullest rank of pp, in bytes. table: `leaves` of the setup, whatever its microbatches."""
    if setup.mesh.pp == 1:
        return memory(setup, table, 0, 1).peak
    alive = _in_flight(setup.pipeline.schedule, setup.mesh.pp, setup.cut.per_rank, setup.microbatches)
    return max(memory(setup, table, rank, count).peak for rank, count in enumerate(alive))


@functools.cache
def _in_flight(name: str, ranks: int, stages: int, microbatches: int) -> tuple[int, ...]:
    """One number per rank. Cached, because many cases with the same schedule are tried."""
    return tuple(map(schedule.in_flight, schedule.orders(name, ranks, stages, microbatches)))


def memory(setup: Case, table: tuple[Leaf, ...], rank: int, in_flight: int) -> Memory:
    """Memory of a rank of pp. in_flight: the most (stage, micro-batch) pairs with activations in memory at once."""
    own, cfg, size = setup.cut.slices_of(rank), setup.model, setup.itemsize
    first, last, piped = 0 in own, setup.cut.count - 1 in own, setup.mesh.pp > 1
    parameters, moments = state_bytes(setup, table)
    copy = sum(leaf.elements * leaf.itemsize for leaf in table if leaf.itemsize != setup.master)
    reference = size * sum(leaf.elements for leaf in table) if setup.reference else 0
    trained = [leaf for leaf in table if leaf.trained]
    # Without a pipeline, a micro-batch's gradients are stacked when all exist; with several micro-batches they are
    # added to float32 sums, and stay in memory until the next micro-batch's. A pipeline adds them layer by layer.
    gradients = 0 if piped else sum(leaf.elements * leaf.itemsize for leaf in trained)
    sums = sum(leaf.elements for leaf in trained) * setup.master if piped or setup.microbatches > 1 else 0
    before = gradients if setup.microbatches > 1 else 0
    largest = 0 if piped else max(leaf.elements * leaf.itemsize for leaf in trained)  # a stack and its layers coexist
    ends = (stage > 0 for stage in own), (stage < setup.cut.count - 1 for stage in own)
    buffers = sum(map(sum, ends)) * setup.microbatches * setup.tokens_tp * cfg.hidden_size * size
    longest = max((setup.cut.layers_of(stage) for stage in own), key=len)
    gathered = _gathered(setup, table, longest, first, in_flight)
    activations = _activations(setup, longest, in_flight)
    loss = _loss_bytes(setup) if last else 0
    layer = _layer_at_work(setup, table)
    # the embedding's gradient is made last, twice if it is tied to the head; with reduce=float32 it is then widened,
    # together with the parameters outside the layers that were gathered with it
    made = _differentiated(table)
    table_size = setup.vocabulary * cfg.hidden_size * size if any(leaf.path == P.EMBED for leaf in made) else 0
    ending = (2 if P.head_path(cfg) == P.EMBED else 1) * table_size if first else 0
    wide = [leaf for leaf in made if leaf.itemsize > size and not leaf.stack]
    ending += sum(leaf.gathered * leaf.itemsize for leaf in wide) if first else 0
    summing = _summing(setup, trained)

    state, kept = parameters + moments + copy + reference + sums + buffers, sum(activations.values())
    peaks = {
        "the loss": state + gathered + before + kept + loss,
        # in a pipeline other micro-batches are in flight; without one, activations are freed as gradients are made
        "the backward pass": state + gathered + (kept if piped else gradients) + max(layer, ending),
        "the gradients' stacking": state + gradients + largest,
        "the gradients' sum over ranks": state + (0 if sums else gradients) + summing,
    }
    at = max(peaks, key=peaks.__getitem__)
    return Memory(
        parameters=parameters,
        optimizer=moments,
        copy=copy,
        reference=reference,
        gathered=gathered,
        gradients=gradients,
        sums=sums + before,
        buffers=buffers,
        activations=tuple(activations.items()),
        loss=loss,
        working=max(layer, ending, summing, largest),
        peak=peaks[at],
        at=at,
    )


def _gathered(setup: Case, table: tuple[Leaf, ...], layers: Sequence[int], first: bool, in_flight: int) -> int:
    """Bytes of weights that FSDP has gathered.

    They stay until the backward pass, unless that gathers them again: those of `layers`, and on the first stage those
    of the vision tower. Two more copies of one layer's weights count for the gather itself: as received, and joined.
    """
    policy = setup.model.gradient_checkpointing
    stay = policy == "none" or (policy == "selective" and not setup.reshard)

    def there(leaf: Leaf) -> int:
        if not leaf.stack:
            return 1
        own = {*layers} & {*leaf.layers} if leaf.stack == P.LAYERS else leaf.layers if first else ()
        return 2 * (leaf.stack == P.LAYERS) + len(own) * in_flight * stay

    return setup.itemsize * sum(leaf.gathered * there(leaf) for leaf in table if leaf.fsdp)


def _activations(setup: Case, layers: Sequence[int], in_flight: int) -> dict[str, int]:
    """kind -> bytes of all saved activations, for `in_flight` stages with the given layers."""
    out: Counter[str] = Counter()
    for sparse, number in Counter(map(setup.model.is_sparse, layers)).items():
        of_layer = layer_activations(setup, sparse, setup.model.gradient_checkpointing)
        out.update({kind: count * number * in_flight for kind, count in of_layer.items()})
    return dict(out)


def _layer_at_work(setup: Case, table: tuple[Leaf, ...]) -> int:
    """Bytes of one layer's temporaries in the backward pass.

    These are the recomputed activations; temporaries, about half of what a layer saves without recomputation; and its
    weights' gradients before FSDP has cut them, in two copies (flat and per leaf, or in two dtypes).
    """
    kinds = {setup.model.is_sparse(layer) for layer in setup.cut.layers_of(0)}
    whole, kept = (
        max(sum(layer_activations(setup, sparse, policy).values()) for sparse in kinds)
        for policy in ("none", setup.model.gradient_checkpointing)
    )
    piped = setup.mesh.pp > 1  # without a pipeline, `memory` counts uncut gradients as `gradients`
    cut = [leaf for leaf in _differentiated(table) if leaf.stack == P.LAYERS and (leaf.fsdp or piped)]
    return whole - kept + whole // 2 + sum(leaf.gathered * (setup.itemsize + leaf.itemsize) for leaf in cut)


def _differentiated(table: tuple[Leaf, ...]) -> list[Leaf]:
    """The leaves for which the backward pass makes a gradient: trained ones, and those gathered together with one."""
    bundles = {(leaf.stack, leaf.fsdp) for leaf in table if leaf.trained and leaf.fsdp}
    return [leaf for leaf in table if leaf.trained or (leaf.stack, leaf.fsdp) in bundles]


def _summing(setup: Case, trained: Sequence[Leaf]) -> int:
    """Bytes for the sum of replicated gradients: all of them in float32, and the largest set concatenated."""
    sets: Counter[tuple[str, ...]] = Counter()
    for leaf in trained:
        sets[leaf.replicated] += leaf.elements if leaf.replicated else 0
    return (sets.total() + max(sets.values(), default=0)) * setup.master


def _loss_bytes(setup: Case) -> int:
    """Bytes of a chunk of logits, the head's gradient, and hidden states with their gradient (kernels.cross_entropy).
    With a scalar head only the hidden states count."""
    size, hidden = setup.itemsize, setup.model.hidden_size
    if setup.model.scalar_head:
        return 2 * setup.tokens * hidden * size
    chunk = cross_entropy._CHUNK_BYTES // (setup.vocabulary * size)
    chunk = min(1 << (max(chunk, 1).bit_length() - 1), setup.tokens)
    # without tp, the head's gradient is summed over chunks in float32 and rounded at the end
    gradient = size + (setup.master if setup.mesh.tp == 1 and size != setup.master else 0)
    return chunk * setup.vocabulary * size + setup.vocabulary * hidden * gradient + 2 * setup.tokens * hidden * size
