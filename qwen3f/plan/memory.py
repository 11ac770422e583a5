"""What one rank holds: parameters, optimizer and gradients exactly; activations by kind, from what autograd keeps.

N tokens of a rank's micro-batch · D hidden · I, F widths · R rows of experts · V vocabulary; sizes after tp
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

# Of a card's memory, what a step may fill by this model. The rest is CUDA's, NCCL's and the gaps between blocks, and
# what measured peaks were above the model's (tests/plan/test_plan_measured.py: up to 4%).
FILLED = 0.95


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter on a mesh. local_shape: every rank's, a stage's padding included. cuts: (axis, dim) pairs.

    gathered: elements of one layer of it (of all of it, when it is not stacked) once FSDP has gathered it. itemsize:
    bytes of an element as the step differentiates by it: of the compute dtype, or of a master weight that FSDP gathers.
    stack, layers: as ParamSpec's. trained: whether it has a gradient and moments.
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
    """Every parameter, in the order of the forward pass. UserError of sharding.rules for what does not divide."""
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
    """Bytes of one rank. parameters and optimizer: the state between steps, exact. copy: parameters in the compute
    dtype. reference: another model's, frozen, in that dtype. gathered: layers that FSDP has whole at once. gradients:
    of one micro-batch, what is trained. sums: float32 sums over micro-batches, with the gradients of the one before.
    buffers: what the pipeline receives into. activations: (kind, bytes) of all layers and micro-batches in flight.
    loss: logits of a chunk and the head's gradients. working: of a layer that is being recomputed or differentiated, of
    gradients being stacked or summed. peak: the most at any time of a step; at: which time that is.
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
    """(parameters, moments) of one rank, as qwen3f.train.state.init_state makes them."""
    by_muon = optimizer.by_muon(setup.hyper, P.decays(setup.model))
    moments = sum(leaf.elements * (1 if leaf.path in by_muon else 2) for leaf in table if leaf.trained)
    return setup.master * sum(leaf.elements for leaf in table), setup.master * moments


def layer_activations(setup: Case, sparse: bool, policy: str) -> dict[str, int]:
    """kind -> bytes that one layer keeps of one micro-batch for its backward pass. policy: gradient_checkpointing."""
    cfg, size = setup.model, setup.itemsize
    n, hidden = setup.tokens, cfg.hidden_size
    q, kv = setup.heads * cfg.head_dim, setup.kv_heads * cfg.head_dim
    stream = setup.tokens_tp * hidden
    wide = torch.promote_types(setup.compute, torch.float32).itemsize
    if policy == "full":
        return {"residual stream": stream * size}
    attention = n * (2 * q + 2 * kv) * size + n * setup.heads * wide  # q, k, v, what attention gives, its log-sum-exp
    kept = {"residual stream": stream * size}
    rows = setup.expert_rows
    if policy == "none":
        kept["residual stream"] += (stream + 2 * n * hidden) * size  # the sum between; what the products read
        kept["attention"] = attention + n * (q + kv) * size  # normalised and rotated
    else:
        # what the output projection gives, before and after the sum over tp; what the products read, if that stays
        kept["residual stream"] += (n * hidden + (stream if setup.mesh.tp > 1 else 0)) * size
        kept["residual stream"] += 0 if setup.reshard or setup.mesh.tp == 1 else 2 * n * hidden * size
        kept["attention"] = attention
    if sparse:
        travelled = 2 * rows * hidden if setup.mesh.ep > 1 else 0  # rows that came for the experts, and went back
        kept["mlp"] = (2 * rows * setup.expert_width + travelled) * size
        kept["router"] = n * cfg.num_experts * (size + 2 * wide if policy == "none" else size)
    else:
        kept["mlp"] = (3 if policy == "none" else 2) * n * setup.width * size
    if policy == "selective":  # what comes out of the last product; of experts elsewhere, before it travels back
        kept["mlp"] += (rows if sparse and setup.mesh.ep > 1 else n) * hidden * size
    return kept


def room(hardware: Hardware) -> float:
    """Bytes that a rank's peak may reach if the run is to fit."""
    return FILLED * hardware.memory


def peak(setup: Case, table: tuple[Leaf, ...]) -> int:
    """Bytes of the fullest rank of pp at its fullest. table: `leaves` of the setup, whatever its micro-batches are."""
    if setup.mesh.pp == 1:
        return memory(setup, table, 0, 1).peak
    alive = _in_flight(setup.pipeline.schedule, setup.mesh.pp, setup.cut.per_rank, setup.microbatches)
    return max(memory(setup, table, rank, count).peak for rank, count in enumerate(alive))


@functools.cache
def _in_flight(name: str, ranks: int, stages: int, microbatches: int) -> tuple[int, ...]:
    """By rank; kept, as many cases are tried with the same schedule."""
    return tuple(map(schedule.in_flight, schedule.orders(name, ranks, stages, microbatches)))


def memory(setup: Case, table: tuple[Leaf, ...], rank: int, in_flight: int) -> Memory:
    """Memory of a rank of pp. in_flight: most pairs of stage and micro-batch whose activations are alive at once."""
    own, cfg, size = setup.cut.slices_of(rank), setup.model, setup.itemsize
    first, last, piped = 0 in own, setup.cut.count - 1 in own, setup.mesh.pp > 1
    parameters, moments = state_bytes(setup, table)
    copy = sum(leaf.elements * leaf.itemsize for leaf in table if leaf.itemsize != setup.master)
    reference = size * sum(leaf.elements for leaf in table) if setup.reference else 0
    trained = [leaf for leaf in table if leaf.trained]
    # Gradients of the layers are stacked when all are there; a pipeline, or a further micro-batch, adds them to float32
    # sums. A pipeline does so layer by layer; without one, those of the micro-batch before live until the next ones.
    gradients = 0 if piped else sum(leaf.elements * leaf.itemsize for leaf in trained)
    sums = sum(leaf.elements for leaf in trained) * setup.master if piped or setup.microbatches > 1 else 0
    before = gradients if setup.microbatches > 1 else 0
    largest = 0 if piped else max(leaf.elements * leaf.itemsize for leaf in trained)  # a stack beside its layers
    ends = (stage > 0 for stage in own), (stage < setup.cut.count - 1 for stage in own)
    buffers = sum(map(sum, ends)) * setup.microbatches * setup.tokens_tp * cfg.hidden_size * size
    longest = max((setup.cut.layers_of(stage) for stage in own), key=len)
    gathered = _gathered(setup, table, longest, first, in_flight)
    activations = _activations(setup, longest, in_flight)
    loss = _loss_bytes(setup) if last else 0
    layer = _layer_at_work(setup, table)
    # the embedding's gradient comes last, twice where it is tied; then, if so summed, widened with what was gathered
    # beside it
    made = _differentiated(table)
    table_size = setup.vocabulary * cfg.hidden_size * size if any(leaf.path == P.EMBED for leaf in made) else 0
    ending = (2 if P.head_path(cfg) == P.EMBED else 1) * table_size if first else 0
    wide = [leaf for leaf in made if leaf.itemsize > size and not leaf.stack]
    ending += sum(leaf.gathered * leaf.itemsize for leaf in wide) if first else 0
    summing = _summing(setup, trained)

    state, kept = parameters + moments + copy + reference + sums + buffers, sum(activations.values())
    peaks = {
        "the loss": state + gathered + before + kept + loss,
        # in a pipeline other micro-batches are in flight; without one, gradients take the activations' place
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
    """Weights that FSDP has whole. They stay until the backward pass, of these layers and on the first stage of the
    tower's, unless that gathers them again; beside them those of a layer as they came, and joined where that takes a
    copy.
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
    """kind -> bytes of all that is kept, of stages like that of these layers."""
    out: Counter[str] = Counter()
    for layer in layers:
        out.update(layer_activations(setup, setup.model.is_sparse(layer), setup.model.gradient_checkpointing))
    return {kind: count * in_flight for kind, count in out.items()}


def _layer_at_work(setup: Case, table: tuple[Leaf, ...]) -> int:
    """A layer's own temporaries in the backward pass: about half of what it keeps without recomputation, beside what
    was recomputed; and its gradients before FSDP has cut them, flat and by leaf, or flat in two dtypes.
    """
    kinds = {setup.model.is_sparse(layer) for layer in setup.cut.layers_of(0)}
    whole, kept = (
        max(sum(layer_activations(setup, sparse, policy).values()) for sparse in kinds)
        for policy in ("none", setup.model.gradient_checkpointing)
    )
    piped = setup.mesh.pp > 1  # there all of a layer's gradients come and go; else `gradients` counts those not cut
    cut = [leaf for leaf in _differentiated(table) if leaf.stack == P.LAYERS and (leaf.fsdp or piped)]
    return whole - kept + whole // 2 + sum(leaf.gathered * (setup.itemsize + leaf.itemsize) for leaf in cut)


def _differentiated(table: tuple[Leaf, ...]) -> list[Leaf]:
    """The leaves for which the backward pass makes a gradient: those trained, and those that FSDP gathers with one."""
    bundles = {(leaf.stack, leaf.fsdp) for leaf in table if leaf.trained and leaf.fsdp}
    return [leaf for leaf in table if leaf.trained or (leaf.stack, leaf.fsdp) in bundles]


def _summing(setup: Case, trained: Sequence[Leaf]) -> int:
    """Gradients that are summed over ranks, widened to float32, and the largest set of them joined."""
    sets: Counter[tuple[str, ...]] = Counter()
    for leaf in trained:
        sets[leaf.replicated] += leaf.elements if leaf.replicated else 0
    return (sets.total() + max(sets.values(), default=0)) * setup.master


def _loss_bytes(setup: Case) -> int:
    """A chunk of logits, the head's gradient, and the hidden states with theirs; see kernels.cross_entropy. A scalar
    head has the last alone that counts."""
    size, hidden = setup.itemsize, setup.model.hidden_size
    if setup.model.scalar_head:
        return 2 * setup.tokens * hidden * size
    chunk = cross_entropy._CHUNK_BYTES // (setup.vocabulary * size)
    chunk = min(1 << (max(chunk, 1).bit_length() - 1), setup.tokens)
    # over a whole vocabulary the gradient is summed over chunks in float32 and rounded at the end
    gradient = size + (setup.master if setup.mesh.tp == 1 and size != setup.master else 0)
    return chunk * setup.vocabulary * size + setup.vocabulary * hidden * gradient + 2 * setup.tokens * hidden * size
