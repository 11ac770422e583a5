"""The collectives of one step from the view of one rank: their number, bytes and time.

A Collective stands for all calls of one kind in a step. `bytes` is the size of the whole tensors of these calls
together: the output of a gather, the input of a reduce-scatter or all-reduce, the tensor that an all-to-all or a send
sends. `sent` is what the rank sends with a ring algorithm: (n−1)/n of the bytes, twice that for an all-reduce.

N tokens of a rank's micro-batch · D hidden · m micro-batches
"""

import dataclasses
import math
from collections.abc import Sequence

from qwen3f import params as P
from qwen3f.model.transformer import gathers_ahead
from qwen3f.plan.case import Case
from qwen3f.plan.hardware import Hardware
from qwen3f.plan.memory import Leaf
from qwen3f.train import optimizer
from sharding import rules
from sharding.matrices import matrix_cuts
from sharding.mesh import AXES, DATA, ROWS, MeshShape
from sharding.pipeline.cut import pipeline_traffic
from sharding.ring import ring_traffic


@dataclasses.dataclass(frozen=True)
class Collective:
    """All calls of one kind of collective in a step.

    what: a description. op: gather, reduce_scatter, all_reduce, all_to_all, send or shift. axes: the axes that it runs
    over, as one group. size: ranks of the group. when: "layer forward", "first forward" (on the first stage), "last
    forward", the same with "backward"; "pipeline", between stages; or "step", once a step. calls, bytes: per step, on a
    rank of pp with the most layers. overlaps: whether it overlaps with computation.
    """

    what: str
    op: str
    axes: tuple[str, ...]
    size: int
    when: str
    calls: int
    bytes: int
    overlaps: bool = False

    @property
    def sent(self) -> float:
        if self.op in ("send", "shift"):
            return float(self.bytes)
        return self.bytes * (self.size - 1) / self.size * (2 if self.op == "all_reduce" else 1)


def members(mesh: MeshShape, hardware: Hardware, axes: Sequence[str]) -> tuple[int, int]:
    """(ranks of a group over these axes, how many of them are on one node).

    Ranks are numbered with tp fastest and fill nodes in order. For a group that is spread unevenly over nodes, the
    second number is 1.
    """
    strides, stride = {}, 1
    for axis in reversed(AXES):
        strides[axis] = stride
        stride *= getattr(mesh, axis)
    ranks = {0}
    for axis in axes:
        ranks = {rank + i * strides[axis] for rank in ranks for i in range(getattr(mesh, axis))}
    span = min(strides[axis] * getattr(mesh, axis) for axis in axes)
    near = sum(rank < hardware.node for rank in ranks)
    even = hardware.node % span == 0 or (near == len(ranks) and hardware.node >= mesh.size)
    return len(ranks), near if even or span % hardware.node == 0 else 1


def seconds(collective: Collective, mesh: MeshShape, hardware: Hardware) -> float:
    """The time of all these calls in a step, if nothing else uses the links.

    A ring within a node runs at the link's rate. A ring over several nodes uses the network ports of all its members on
    a node. In an all-to-all, rows for other nodes use the rank's own port, and so does a send to another node.
    """
    count, near = members(mesh, hardware, collective.axes)
    if near == count:
        wire = collective.sent / hardware.link
    elif collective.op == "all_to_all":
        away = collective.bytes * (count - near) / count
        wire = max(away / hardware.network, (collective.sent - away) / hardware.link)
    elif collective.op in ("send", "shift"):
        wire = collective.sent / hardware.network
    else:
        wire = collective.sent / min(hardware.link, hardware.network * near)
    return collective.calls * hardware.latency + wire


def collectives(setup: Case, table: Sequence[Leaf]) -> tuple[Collective, ...]:
    """All collectives of one step, without those over axes of size 1."""
    found = [*_fsdp(setup, table), *_tensor(setup), *_loss(setup), *_ring(setup), *_experts(setup), *_pipeline(setup)]
    return tuple(c for c in [*found, *_once(setup, table), *_muon(setup, table)] if c.size > 1 and c.calls)


def layers_per_rank(setup: Case) -> int:
    """Layers that the busiest rank computes."""
    return len(setup.layers_on(setup.busiest))


def sparse_per_rank(setup: Case) -> int:
    """Layers with experts that the busiest rank computes."""
    return sum(map(setup.model.is_sparse, setup.layers_on(setup.busiest)))


def _size(mesh: MeshShape, axes: Sequence[str]) -> int:
    return math.prod(getattr(mesh, axis) for axis in axes)


def _fsdp(setup: Case, table: Sequence[Leaf]) -> list[Collective]:
    """FSDP's gathers and reduce-scatters. One collective covers all leaves of a layer that are cut over the same axes,
    and one all parameters of a stage outside its layers.

    Schedules that defer the gradients of weights scatter a layer's gradients in two parts: first the norms', then the
    linear layers' (sharding/pipeline/deferred_grads.py). Experts' gradients are not deferred. Only gathers ahead
    (model.transformer) overlap with computation. The vision tower's layers belong to the first stage.
    """
    policy, out = setup.model.gradient_checkpointing, []
    ahead = setup.mesh.pp == 1 and gathers_ahead(setup.model, setup.execution)
    again = policy == "full" or (policy == "selective" and setup.reshard)
    for what, where, leaves in _bundles(setup, table):
        for axes in sorted({leaf.fsdp for leaf in leaves if leaf.fsdp}):
            bundle = [leaf for leaf in leaves if leaf.fsdp == axes]
            rows = [_rows(setup, leaf) for leaf in bundle]
            times, language = setup.microbatches * len(set().union(*rows)), where == "layer"
            elements = [setup.microbatches * len(own) * leaf.gathered for own, leaf in zip(rows, bundle)]
            overlaps = language and ahead
            rest = (times, sum(elements) * setup.itemsize, overlaps)
            put_off = language and any(".experts." not in leaf.path for leaf in bundle)
            parts = 2 if put_off and setup.mesh.pp > 1 and setup.pipeline.splits else 1
            on = (axes, _size(setup.mesh, axes))
            out.append(Collective(f"weights of {what}", "gather", *on, f"{where} forward", *rest))
            if again and bundle[0].stack:
                out.append(Collective(f"weights of {what}, again", "gather", *on, f"{where} backward", *rest))
            size = sum(count * leaf.itemsize for count, leaf in zip(elements, bundle))
            calls = parts * times if any(leaf.trained for leaf in bundle) else 0
            of_gradients = (calls, size, overlaps)
            out.append(Collective(f"gradients of {what}", "reduce_scatter", *on, f"{where} backward", *of_gradients))
    return out


def _bundles(setup: Case, table: Sequence[Leaf]) -> list[tuple[str, str, list[Leaf]]]:
    """(description, "layer" or the stage that has them, leaves) of leaves that are gathered at the same time."""
    stacks: dict[str, list[Leaf]] = {"": []}
    for leaf in table:
        stacks.setdefault(leaf.stack, []).append(leaf)
    outer, layers = stacks.pop(""), stacks.pop(P.LAYERS)
    out = [("a layer", "layer", layers)]
    out += [(f"a layer of {stack.rstrip('.')}", "first", leaves) for stack, leaves in stacks.items()]
    if setup.mesh.pp == 1:
        return [*out, ("embedding, final norm, head", "first", outer)]
    last = [leaf for leaf in outer if leaf.path in (P.FINAL_NORM, P.head_path(setup.model))]
    first = [leaf for leaf in outer if leaf.path == P.EMBED or leaf.path.startswith(P.VISUAL)]
    return [*out, ("embedding", "first", first), ("final norm, head", "last", last)]


def _rows(setup: Case, leaf: Leaf) -> set[int]:
    """The layers of a leaf that the busiest rank computes; {0} for a leaf outside the stacks."""
    if leaf.stack == P.LAYERS:
        return {*leaf.layers} & {*setup.layers_on(setup.busiest)}
    return {*(leaf.layers or [0])}


def _tensor(setup: Case) -> list[Collective]:
    """tp's collectives: the sequence is gathered before attention and MLP, and partial sums are reduce-scattered after
    them; the backward pass does the opposite.

    Recomputation gathers again, unless the gathered tensors are kept. Full recomputation also reduce-scatters again for
    attention and for experts, but not for a dense MLP, whose output no backward pass needs.
    """
    policy = setup.model.gradient_checkpointing
    again = policy == "full" or (policy == "selective" and setup.reshard)
    layers, sparse = (setup.microbatches * n for n in (layers_per_rank(setup), sparse_per_rank(setup)))
    one = setup.tokens * setup.model.hidden_size * setup.itemsize
    out = []
    for when, op, calls in (
        ("forward", "gather", 2 * layers),
        ("forward", "reduce_scatter", 2 * layers),
        ("backward", "gather", 2 * layers + (2 * layers if again else 0)),
        ("backward", "reduce_scatter", 2 * layers + (layers + sparse if policy == "full" else 0)),
    ):
        where = (("tp",), setup.mesh.tp, f"layer {when}")
        out.append(Collective(f"residual stream, {when}", op, *where, calls, calls * one))
    return out


def _loss(setup: Case) -> list[Collective]:
    """tp's collectives outside the layers: the embedding's partial sums, the sequence before the head, and for the loss
    two numbers per token and rank (not with a scalar head)."""
    m, tp = setup.microbatches, (("tp",), setup.mesh.tp)
    stream = m * setup.tokens * setup.model.hidden_size * setup.itemsize
    lines = [
        Collective("embedding", "reduce_scatter", *tp, "first forward", m, stream),
        Collective("embedding's gradient", "gather", *tp, "first backward", m, stream),
        Collective("hidden states before the head", "gather", *tp, "last forward", m, stream),
        Collective("their gradient", "reduce_scatter", *tp, "last backward", m, stream),
    ]
    if setup.model.scalar_head:
        return lines
    numbers = m * 2 * setup.tokens * setup.master * setup.mesh.tp
    return [
        *lines,
        Collective("log-sum-exp and target's logit", "gather", *tp, "last forward", m, numbers),
        Collective("their gradients", "reduce_scatter", *tp, "last backward", m, numbers),
    ]


def _ring(setup: Case) -> list[Collective]:
    cfg, times = setup.model, setup.microbatches * layers_per_rank(setup)
    sizes = setup.mesh.cp, setup.rows, setup.kv_heads, setup.seq_len // setup.mesh.cp, cfg.head_dim, setup.compute
    there, back = ring_traffic(*sizes)
    where, again = (("cp",), setup.mesh.cp), cfg.gradient_checkpointing == "full"
    calls, size = back.messages + again * there.messages, back.bytes + again * there.bytes
    return [
        Collective(
            "ring attention, forward",
            "shift",
            *where,
            "layer forward",
            times * there.messages,
            times * there.bytes,
            True,
        ),
        Collective("ring attention, backward", "shift", *where, "layer backward", times * calls, times * size, True),
    ]


def _experts(setup: Case) -> list[Collective]:
    """ep's collectives, if routing is even: the numbers of rows, then rows to their experts' ranks and back."""
    layers = setup.microbatches * sparse_per_rank(setup)
    rows = setup.expert_rows * setup.model.hidden_size * setup.itemsize
    counts = setup.model.num_experts * 8
    full = setup.model.gradient_checkpointing == "full"  # selective recomputation keeps what was received
    out = []
    for when, times, counted in (("forward", 2, 1), ("backward", 4 if full else 2, 1 if full else 0)):
        where = ("all_to_all", ("ep",), setup.mesh.ep, f"layer {when}")
        out.append(Collective(f"rows of experts, {when}", *where, layers * times, layers * times * rows))
        out.append(Collective(f"counts of experts, {when}", *where, layers * counted, layers * counted * counts))
    return out


def _pipeline(setup: Case) -> list[Collective]:
    """Hidden states to the next stage, and their gradients back, on the rank that sends the most."""
    if setup.mesh.pp == 1:
        return []
    sizes = setup.microbatches, setup.tokens_tp, setup.model.hidden_size, setup.compute
    by_rank = [pipeline_traffic(setup.cut, rank, *sizes) for rank in range(setup.mesh.pp)]
    names = "hidden states between stages", "their gradients, back"
    return [
        Collective(what, "send", ("pp",), setup.mesh.pp, "pipeline", *max(lines), True)
        for what, lines in zip(names, zip(*by_rank))
    ]


def _once(setup: Case, table: Sequence[Leaf]) -> list[Collective]:
    """All-reduces at the start and end of a step: gradients of replicated leaves, in float32, those with the same axes
    together; the squares for the gradient norm; and loss, weights and counts.
    """
    mesh, wide, trained = setup.mesh, setup.master, [leaf for leaf in table if leaf.trained]
    sizes: dict[str, list[tuple[tuple[str, ...], int]]] = {
        "gradients of replicated leaves": [],
        "squares of gradients": [],
    }
    for axes in {leaf.replicated for leaf in trained if leaf.replicated}:
        size = sum(leaf.elements for leaf in trained if leaf.replicated == axes) * wide
        sizes["gradients of replicated leaves"] += [(over, size) for over in _one_by_one(axes)]
    for axes in {tuple(axis for axis in AXES if axis in dict(leaf.cuts)) for leaf in trained}:
        sizes["squares of gradients"] += [(over, wide) for over in _one_by_one(axes)]
    everyone = tuple(axis for axis in AXES if getattr(mesh, axis) > 1)
    data = _one_by_one(tuple(axis for axis in everyone if axis in DATA))
    sizes["losses"] = [(over, 3 * wide) for over in _one_by_one(everyone)]
    sparse = sparse_per_rank(setup)
    rows = _one_by_one(tuple(axis for axis in everyone if axis in ROWS))
    # the loss's weight and the predicted tokens; with experts the real tokens; with a tower whether there are images
    counts = 2 + bool(sparse) + setup.model.vision_enabled
    sizes["weight and tokens of the batch"] = [(over, 8) for over in rows * counts]
    if sparse:
        row = (setup.model.num_experts + 2) * 8
        stages = [setup.cut.layers_of(stage) for stage in setup.cut.slices_of(setup.busiest)]
        loads = [sum(map(setup.model.is_sparse, layers)) * row for layers in stages] * setup.microbatches
        sizes["load of experts"] = [(over, load) for over in data for load in loads if load]
        if mesh.pp > 1:
            sizes["load of experts"].append((("pp",), len(setup.model.sparse_layers) * row))
    out = []
    for what, lines in sizes.items():
        for over in sorted({over for over, _ in lines}):
            mine = [size for at, size in lines if at == over]
            out.append(Collective(what, "all_reduce", over, _size(mesh, over), "step", len(mine), sum(mine)))
    return out


def _muon(setup: Case, table: Sequence[Leaf]) -> list[Collective]:
    """How shards become whole matrices for Muon's update, and then shards again (sharding.matrices)."""
    by_muon, lines = optimizer.by_muon(setup.hyper, P.decays(setup.model)), []
    placed = rules.place(setup.model, setup.mesh, setup.fsdp)
    for leaf in table:
        if leaf.path not in by_muon:
            continue
        shape = list(leaf.local_shape)
        for axes, dim in matrix_cuts(placed[leaf.path], len(shape)):
            ranks = _size(setup.mesh, axes)
            if leaf.stack:  # some layers whole instead of all layers cut, there and back
                shape[0] = -(-shape[0] // ranks) * ranks
                lines += [("all_to_all", axes, math.prod(shape) * setup.master)] * 2
                shape[0] //= ranks
            shape[dim] *= ranks
            if not leaf.stack:
                lines.append(("gather", axes, math.prod(shape) * setup.master))
    out = []
    for op, axes in sorted({line[:2] for line in lines}):
        mine = [size for *at, size in lines if at == [op, axes]]
        out.append(Collective("matrices for Muon", op, axes, _size(setup.mesh, axes), "step", len(mine), sum(mine)))
    return out


def _one_by_one(axes: Sequence[str]) -> list[tuple[str, ...]]:
    """The collectives of one sum over these axes: one for all data axes together, and one each for pp and tp."""
    data = tuple(axis for axis in axes if axis in DATA)
    return [(axis,) for axis in axes if axis not in DATA] + ([data] if data else [])
