"""A MeshPlan as text."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from qwen3f.plan.fit import Change
from qwen3f.plan.make import MeshPlan, faster_cut
from qwen3f.plan.memory import FILLED, Memory
from qwen3f.plan.traffic import seconds
from sharding.mesh import AXES, FSDP

GIB = 2**30


def render(plan: MeshPlan, policies: Mapping[str, MeshPlan], changes: Sequence[Change] | None = None) -> str:
    """The whole text. policies: from make.by_policy. changes: for a plan that does not fit, those of
    fit.smallest_changes; None: no line about changes."""
    parts = [_heading(plan), _parameters(plan), [*_memory(plan), *_changes(plan, changes)], _policies(plan, policies)]
    parts += [_collectives(plan), _pipeline(plan), _time(plan)]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def table(rows: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> list[str]:
    """Lines with aligned columns; columns in `left` are aligned left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    at_left = set(left)
    return [
        "  ".join(c.ljust(w) if i in at_left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]


def bytes_of(count: float) -> str:
    """A number of bytes as text, e.g. 1536 -> 1.5 KiB."""
    unit = 0
    while abs(count) >= 1024 and unit < 5:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.4g} {'KMGTP'[unit - 1]}iB"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _heading(plan: MeshPlan) -> list[str]:
    s, cfg = plan.setup, plan.setup.model
    axes = " · ".join(f"{axis} {getattr(s.mesh, axis)}" for axis in AXES if getattr(s.mesh, axis) > 1) or "one device"
    layers = f"{cfg.num_hidden_layers} layers"
    if s.mesh.pp > 1:
        padding = s.cut.height * s.cut.count - cfg.num_hidden_layers
        layers += f" in {s.cut.count} stages of {s.cut.height}" + (f" ({padding} of them padding)" if padding else "")
    answers = ["planned: one update with a row for every answer, the largest possible; generation is not planned"]
    tower = ["of the vision tower only the parameters are planned, not the memory and time of its patches"]
    return [
        f"plan: {s.mesh.size} × {s.hardware.name}: {axes}",
        f"{cfg.total_params_estimate():,} parameters ({cfg.active_params_estimate():,} a token), {layers}",
        f"step: {s.batch_size} × {s.seq_len} tokens, {s.microbatches} micro-batch{'es' * (s.microbatches > 1)} of "
        f"{s.rows} × {s.seq_len // s.mesh.cp} on a rank{' (config.microbatches=0)' * s.automatic}; "
        f"{str(s.compute).removeprefix('torch.')} over float32, gradient_checkpointing={cfg.gradient_checkpointing}",
        *(answers if s.of_answers else []),
        *(tower if cfg.vision_enabled else []),
    ]


def _parameters(plan: MeshPlan) -> list[str]:
    rows = [("parameter", "global shape", "axis:dimension", "local shape")]
    for leaf in plan.leaves:
        fsdp = f" (fsdp over {' '.join(leaf.fsdp)})" if leaf.fsdp else ""
        rows.append((leaf.path, _shape(leaf.shape), leaf.placement + fsdp, _shape(leaf.local_shape)))
    lines = table(rows, range(4))
    whole = [leaf.path for leaf in plan.leaves if not leaf.fsdp and plan.setup.fsdp and {*leaf.replicated} & {*FSDP}]
    if whole:
        lines.append(f"not cut by fsdp: {', '.join(whole)}")
    return lines


def _memory(plan: MeshPlan) -> list[str]:
    ranks = plan.memory
    kinds = [kind for kind, _ in ranks[0].activations]
    by_kind = [dict(rank.activations) for rank in ranks]

    def row(name: str, values: Iterable[int]) -> tuple[str, ...]:
        return name, *(f"{value / GIB:.2f}" for value in values)

    def field(name: str) -> list[int]:
        return [getattr(rank, name) for rank in ranks]

    stages = [f"pp {i}" for i in range(len(ranks))] if len(ranks) > 1 else ["a rank"]
    rows = [
        ("GiB of a rank", *stages),
        row("parameters, float32", field("parameters")),
        row("optimizer", field("optimizer")),
        row("parameters to compute with", field("copy")),
        *([row("parameters of the reference", field("reference"))] if plan.setup.reference else []),
        row("gathered by fsdp", field("gathered")),
        row("gradients", field("gradients")),
        row("sums over micro-batches", field("sums")),
        row("buffers of the pipeline", field("buffers")),
        *(row(f"activations: {kind}", [kept[kind] for kept in by_kind]) for kind in kinds),
        row("logits of a chunk, head's gradient", field("loss")),
        row("at work", field("working")),
        row("peak", field("peak")),
    ]
    lines = table(rows)
    worst = max(ranks, key=_peak)
    limit = plan.setup.hardware.memory
    verdict = "fits" if plan.fits else f"above the {FILLED:.0%} that a run can fill"
    lines.append(
        f"the peak is at {worst.at}: {worst.peak / GIB:.1f} of {limit / GIB:.1f} GiB on {plan.setup.hardware.name}, "
        f"{verdict}"
    )
    if len(ranks) > 1:
        flights = ", ".join(str(n) for n in plan.timeline.in_flight)
        lines.append(f"activations count the micro-batches in flight: {flights}")
    return lines


def _changes(plan: MeshPlan, changes: Sequence[Change] | None) -> list[str]:
    if changes is None:
        return []
    if not changes:
        return ["does not fit, not even with recomputation, more micro-batches, 64 times the devices or other cards"]

    def described(change: Change) -> str:
        case, what = change.case, []
        if (case.mesh.size, case.hardware.name) != (plan.setup.mesh.size, plan.setup.hardware.name):
            what.append(f"{case.mesh.size} × {case.hardware.name}")
        if case.microbatches != plan.setup.microbatches:
            what.append(f"{case.microbatches} micro-batch{'es' * (case.microbatches > 1)}")
        what.append(f"peak {change.peak / GIB:.1f} of {case.hardware.memory / GIB:.1f} GiB")
        return f"{change.flags} ({', '.join(what)})"

    return [f"does not fit; the smallest change that fits: {', or '.join(map(described, changes))}"]


def _peak(memory: Memory) -> int:
    return memory.peak


def _policies(plan: MeshPlan, policies: Mapping[str, MeshPlan]) -> list[str]:
    rows = [("gradient_checkpointing", "micro-batches", "activations, GiB", "peak, GiB", "step", "MFU", "")]
    for policy, other in policies.items():
        worst = max(other.memory, key=_peak)
        kept = sum(size for _, size in worst.activations)
        sizes = str(other.setup.microbatches), f"{kept / GIB:.2f}", f"{worst.peak / GIB:.2f}"
        here = "this plan" if policy == plan.setup.model.gradient_checkpointing else ""
        mark = ", ".join(filter(None, [here, "" if other.fits else "does not fit"]))
        rows.append((policy, *sizes, _seconds(other.time.step), f"{other.time.mfu:.1%}", mark))
    return table(rows, (0, 6))


def _collectives(plan: MeshPlan) -> list[str]:
    if not plan.collectives:
        return ["collectives: none"]
    rows = [("collectives of a step and rank", "operation", "over", "calls", "bytes", "sent", "takes", "")]
    for line in plan.collectives:
        cost = seconds(line, plan.setup.mesh, plan.setup.hardware)
        hides = "overlaps" if line.overlaps else ""
        over = " ".join(line.axes)
        sizes = bytes_of(line.bytes), bytes_of(line.sent)
        rows.append((line.what, line.op, over, f"{line.calls:,}", *sizes, _seconds(cost), hides))
    return table(rows, (0, 1, 2, 7))


def _pipeline(plan: MeshPlan) -> list[str]:
    s = plan.setup
    if s.mesh.pp == 1:
        return ["pipeline: one stage, no bubble"]
    stages = f"{s.mesh.pp} ranks × {s.cut.per_rank} stage{'s' * (s.cut.per_rank > 1)}"
    lines = [
        f"pipeline: {s.pipeline.schedule}, {stages}, {s.microbatches} micro-batches; bubble {plan.timeline.bubble:.1%} "
        f"of all ranks' time ({plan.ideal_bubble:.1%} by the formula for equal stages)",
        f"forward and backward of a micro-batch take {_runs(plan.stages)}",
    ]
    if (other := faster_cut(plan)) is not None:
        cut = other.setup.cut
        left = len(cut.layers_of(cut.count - 1))
        lines.append(
            f"config.pipeline.layers={cut.height}, which leaves {left} for the last stage, would be faster: "
            f"{_seconds(other.time.step)} a step"
        )
    return lines


def _runs(times: Sequence[float]) -> str:
    """Times by stage as text, with equal ones grouped: 9.1 ms on stages 0 to 2, 13.2 ms on stage 3."""
    out = []
    for text, run in itertools.groupby(enumerate(map(_seconds, times)), key=lambda place: place[1]):
        (first, _), *more = run
        out.append(f"{text} on stage{f's {first} to {more[-1][0]}' if more else f' {first}'}")
    return ", ".join(out)


def _time(plan: MeshPlan) -> list[str]:
    t, hardware = plan.time, plan.setup.hardware
    lines = [
        f"a step takes {_seconds(t.step)}: {_seconds(t.compute)} computing, {_seconds(t.exposed)} in collectives "
        f"that it does not hide, {_seconds(t.waiting)} in the bubble, {_seconds(t.update)} in the update",
        f"{t.tokens_per_second:,.0f} tokens/s, {t.mfu:.1%} MFU of {hardware.peak / 1e12:.4g} TFLOP/s",
    ]
    if plan.setup.mesh.size > 1:
        lines.append(
            "assumed, not measured: collectives marked as overlapping take no time while there is computation; the "
            "network's rate and latency"
        )
    return lines
