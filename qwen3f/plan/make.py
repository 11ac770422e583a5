"""Makes the plan of one mesh: all predictions about a step, as one frozen record."""

import dataclasses
import math

from qwen3f.config import REMAT_POLICIES
from qwen3f.errors import UserError
from qwen3f.plan import schedule as S
from qwen3f.plan import work
from qwen3f.plan.case import Case
from qwen3f.plan.memory import Leaf, Memory, leaves, memory, room
from qwen3f.plan.traffic import Collective, collectives, layers_per_rank, seconds
from qwen3f.train.metrics import flops_per_token
from qwen3f.train.microbatches import choose_for
from sharding.pipeline.cut import heights

WORTH_TELLING = 0.02  # suggest another cut only if it saves this share of a step; the plan's own error is about that
MOST_CUTS = 64  # values of config.pipeline.layers that are tried


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a step, on the busiest rank.

    compute: forward and backward pass. exposed: collectives that do not overlap with computation. waiting: the
    pipeline's bubble. update: the optimizer and everything else that happens once a step. mfu: model FLOPs (as in
    qwen3f.train.metrics) / (step · peak FLOP/s of all devices, from the datasheet).
    """

    step: float
    compute: float
    exposed: float
    waiting: float
    update: float
    tokens_per_second: float
    mfu: float


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """A plan.

    memory: one entry per rank of pp. stages: for each stage, seconds of one micro-batch, forward and backward, with
    exposed collectives. ideal_bubble: share of time by the papers' formula, for equal stages. timeline.bubble: the
    share for this model, whose stages are not equal.
    """

    setup: Case
    leaves: tuple[Leaf, ...]
    memory: tuple[Memory, ...]
    collectives: tuple[Collective, ...]
    stages: tuple[float, ...]
    timeline: S.Timeline
    ideal_bubble: float
    time: Time

    @property
    def fits(self) -> bool:
        """Whether a run's peak memory fits on every rank."""
        return self.peak <= room(self.setup.hardware)

    @property
    def peak(self) -> int:
        """Peak memory of the fullest rank, in bytes."""
        return max(rank.peak for rank in self.memory)


def make(setup: Case) -> MeshPlan:
    """The plan of a Case, by pure arithmetic. Raises UserError for a mesh on which the model cannot be placed."""
    table = leaves(setup)
    lines = collectives(setup, table)
    schedule = (
        setup.pipeline.schedule if setup.mesh.pp > 1 else "1f1b",
        setup.mesh.pp,
        setup.cut.per_rank,
        setup.microbatches,
    )
    order = S.orders(*schedule)
    stages = [_stage(setup, lines, stage) for stage in range(setup.cut.count)]
    sends = [line for line in lines if line.when == "pipeline"]
    send = max((seconds(line, setup.mesh, setup.hardware) / line.calls for line in sends), default=0.0)
    timeline = S.simulate(
        order,
        [s.forward for s in stages],
        [s.backward_input for s in stages],
        [s.backward_weight for s in stages],
        send,
    )
    ranks = tuple(memory(setup, table, rank, timeline.in_flight[rank]) for rank in range(setup.mesh.pp))
    typical = (stages[0].forward, stages[0].backward_input, stages[0].backward_weight)
    ideal = S.ideal_bubble(*schedule, *(x * setup.cut.per_rank for x in typical))
    time = _time(setup, table, lines, stages, timeline)
    return MeshPlan(setup, table, ranks, lines, tuple(stage.total for stage in stages), timeline, ideal, time)


def by_policy(setup: Case) -> dict[str, MeshPlan]:
    """gradient_checkpointing -> the plan with that policy, for policies that can run.

    If the number of micro-batches was chosen automatically, it is chosen anew for every policy.
    """
    cases = {}
    for policy in REMAT_POLICIES:
        try:
            cases[policy] = dataclasses.replace(setup, model=setup.model.replace(gradient_checkpointing=policy))
        except UserError:  # the policy can't run with this pipeline schedule or compilation mode
            continue
    return {policy: make(choose_for(case) if case.automatic else case) for policy, case in cases.items()}


def faster_cut(plan: MeshPlan) -> MeshPlan | None:
    """The fastest plan that fits, with another config.pipeline.layers; None if it saves less than WORTH_TELLING.

    Of more than MOST_CUTS values it tries evenly spaced ones: the time of one is linear in the layers.
    """
    if plan.setup.mesh.pp == 1:
        return None
    others, values = [], heights(plan.setup.model.num_hidden_layers, plan.setup.cut.count)
    for layers in values[:: math.ceil(len(values) / MOST_CUTS)]:
        pipeline = dataclasses.replace(plan.setup.pipeline, layers=layers)
        try:
            others.append(make(dataclasses.replace(plan.setup, pipeline=pipeline)))
        except UserError:  # stages with unequal numbers of dense or sparse layers
            continue
    best = min((other for other in others if other.fits), key=lambda other: other.time.step, default=plan)
    return best if best.time.step <= plan.time.step * (1 - WORTH_TELLING) else None


@dataclasses.dataclass(frozen=True)
class _Stage:
    """Seconds of one micro-batch on one stage. exposed: the part of the other three that waits for collectives."""

    forward: float
    backward_input: float
    backward_weight: float
    exposed: float

    @property
    def total(self) -> float:
        return self.forward + self.backward_input + self.backward_weight


def _stage(setup: Case, lines: tuple[Collective, ...], stage: int) -> _Stage:
    """The times of a stage: its layers, on the first stage also the embedding, on the last also the head.

    Collectives that overlap with computation cost only the time by which they exceed it; the others cost all of theirs.
    """
    hardware, layers = setup.hardware, setup.cut.layers_of(stage)
    sparse = [setup.model.is_sparse(layer) for layer in layers]
    of_kind = {kind: work.layer(setup, kind) for kind in set(sparse)}  # equal for all layers of a kind
    parts, here = [of_kind[kind] for kind in sparse], {"layer"}
    if stage == 0:
        parts.append(work.embedding(setup))
        here.add("first")
    if stage == setup.cut.count - 1:
        parts.append(work.head(setup))
        here.add("last")
    forward, back, weight = (
        sum(getattr(part, name).seconds(hardware) for part in parts)
        for name in ("forward", "backward_input", "backward_weight")
    )
    share = len(layers) / (layers_per_rank(setup) * setup.microbatches)

    def waits(direction: str, computing: float) -> float:
        hidden = shown = 0.0
        for line in lines:
            where, _, when = line.when.partition(" ")
            if when != direction or where not in here:
                continue
            cost = seconds(line, setup.mesh, hardware) * (share if where == "layer" else 1 / setup.microbatches)
            hidden, shown = (hidden + cost, shown) if line.overlaps else (hidden, shown + cost)
        return shown + max(0.0, hidden - computing)

    in_forward, in_backward = waits("forward", forward), waits("backward", back + weight)
    return _Stage(forward + in_forward, back + in_backward, weight, in_forward + in_backward)


def _time(
    setup: Case,
    table: tuple[Leaf, ...],
    lines: tuple[Collective, ...],
    stages: list[_Stage],
    timeline: S.Timeline,
) -> Time:
    hardware, mesh = setup.hardware, setup.mesh
    update = work.update(setup, table).seconds(hardware)
    update += sum(seconds(line, mesh, hardware) for line in lines if line.when == "step")
    step = timeline.seconds + update
    by_rank = [[stages[stage] for stage in setup.cut.slices_of(rank)] for rank in range(mesh.pp)]
    busiest = max(by_rank, key=lambda own: sum(stage.total for stage in own))
    busy = sum(stage.total for stage in busiest) * setup.microbatches
    exposed = sum(stage.exposed for stage in busiest) * setup.microbatches
    tokens = setup.batch_size * setup.seq_len
    flops = tokens * flops_per_token(setup.model, setup.seq_len)
    return Time(
        step=step,
        compute=busy - exposed,
        exposed=exposed,
        waiting=max(0.0, timeline.seconds - busy),
        update=update,
        tokens_per_second=tokens / step,
        mfu=flops / (step * mesh.size * hardware.peak),
    )
