"""Pipeline schedules as data: each rank's actions in order, their times, and the bubble.

The orders are those of torch.distributed.pipelining (Narayanan et al. 2021, arXiv:2104.04473, for 1f1b and interleaved;
Qi et al. 2023, arXiv:2401.10241, and 2024, arXiv:2405.15362, for zero_bubble and zbv); a test compares them with torch.
`simulate` computes times from the durations of the model's stages, which differ because of padding and the head.

p ranks · v stages per rank, as sharding.pipeline.cut places them · m micro-batches
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Action:
    """One stage's work on one micro-batch. kind: F forward, B whole backward, I gradient of the input, W of weights."""

    kind: str
    stage: int
    microbatch: int


@dataclasses.dataclass(frozen=True)
class Slot:
    """An action with its times, in seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """ranks: per rank its slots in order. in_flight: per rank the most activations (of one stage and micro-batch) in
    memory at once."""

    ranks: tuple[tuple[Slot, ...], ...]
    in_flight: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return max((slots[-1].end for slots in self.ranks if slots), default=0.0)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time that they spend waiting."""
        busy = sum(slot.end - slot.start for slots in self.ranks for slot in slots)
        return 1.0 - busy / (self.seconds * len(self.ranks)) if self.seconds else 0.0


def orders(schedule: str, ranks: int, stages: int, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """rank -> its actions in order. stages: per rank. sharding.pipeline.schedule.check refuses what cannot run."""
    if schedule == "1f1b":
        return tuple(_one_f_one_b(rank, ranks, microbatches) for rank in range(ranks))
    if schedule == "zbv":
        return tuple(_v_shaped(rank, ranks, microbatches) for rank in range(ranks))
    return tuple(_interleaved(schedule, rank, ranks, stages, microbatches) for rank in range(ranks))


def _one_f_one_b(rank: int, ranks: int, microbatches: int) -> tuple[Action, ...]:
    warm = min(ranks - rank, microbatches)  # forwards before the first backward
    out = [Action("F", rank, i) for i in range(warm)]
    for i in range(microbatches):
        out.append(Action("B", rank, i))
        if warm + i < microbatches:
            out.append(Action("F", rank, warm + i))
    return tuple(out)


def _interleaved(schedule: str, rank: int, ranks: int, stages: int, microbatches: int) -> tuple[Action, ...]:
    zero_bubble = schedule == "zero_bubble"
    total = stages * microbatches
    group = microbatches // max(1, microbatches // ranks)  # micro-batches that a stage runs before the rank's next one
    hop = 1 if zero_bubble else 2  # additional warm-up forwards per rank of distance from the last rank
    warm = min((stages - 1) * group + hop * (ranks - 1 - rank), total)

    def turn(count: int, backward: bool) -> tuple[int, int]:
        """(stage, micro-batch) of a rank's count-th forward or backward."""
        round_, place = divmod(count, stages * group)
        local, within = divmod(place, group)
        local = stages - 1 - local if backward else local
        return local * ranks + rank, round_ * group + within

    forwards = [Action("F", *turn(i, False)) for i in range(total)]
    backwards = [turn(i, True) for i in range(total)]
    out = forwards[:warm]
    lag = rank  # zero bubble: weights' gradients are computed this many backwards later, so they fill the end
    done = 0
    for i, at in enumerate(backwards):
        if warm + i < total:
            out.append(forwards[warm + i])
        out.append(Action("I" if zero_bubble else "B", *at))
        if zero_bubble and i >= lag:
            out.append(Action("W", *backwards[done]))
            done += 1
    return tuple(out + [Action("W", *at) for at in (backwards[done:] if zero_bubble else [])])


def _v_shaped(rank: int, ranks: int, microbatches: int) -> tuple[Action, ...]:
    """zbv: two stages per rank, one on the way down the ranks (0 to p − 1), one on the way back up."""
    steps = max(2 * ranks - 1, microbatches)  # the pattern needs this many micro-batches; surplus ones are removed
    down, up, left = rank, 2 * ranks - 1 - rank, ranks - rank
    pattern = [("F", down)] * (2 * left - 1) + [("F", up), ("F", down)] * rank
    pattern += [("F", up), ("I", up), ("W", up)] * left
    for i in range(steps - ranks):
        pattern += [("F", down)] if i < steps - (2 * ranks - 1 - rank) else []
        pattern += [("I", down), ("W", down), ("F", up), ("I", up), ("W", up)]
    pattern += [("I", down), ("I", up)] * rank + [("I", down), ("W", down)] * left
    pattern += [("W", up)] * rank + [("W", down)] * rank
    seen: Counter[tuple[str, int]] = Counter()
    out = []
    for kind, stage in pattern:
        out.append(Action(kind, stage, seen[kind, stage]))
        seen[kind, stage] += 1
    return tuple(action for action in out if action.microbatch < microbatches)


def simulate(
    order: Sequence[Sequence[Action]],
    forward: Sequence[float],
    backward_input: Sequence[float],
    backward_weight: Sequence[float],
    send: float = 0.0,
) -> Timeline:
    """The times of all actions: each starts as soon as its rank is free and its input has arrived.

    forward, backward_input, backward_weight: stage -> seconds of one micro-batch; a whole backward (B) takes the sum of
    the last two. send: seconds for sending a result to another rank. Raises ValueError for orders that deadlock.
    """
    last = len(forward) - 1
    ranks = len(order)
    home = {action.stage: rank for rank, actions in enumerate(order) for action in actions}
    seconds = {
        "F": forward,
        "I": backward_input,
        "W": backward_weight,
        "B": [i + w for i, w in zip(backward_input, backward_weight)],
    }
    done: dict[tuple[str, int, int], float] = {}  # ("F" or "B", stage, micro-batch) -> end
    free, place = [0.0] * ranks, [0] * ranks
    slots: list[list[Slot]] = [[] for _ in range(ranks)]

    def ready(action: Action) -> float | None:
        stage, microbatch = action.stage, action.microbatch
        if action.kind == "F":
            needs = [("F", stage - 1, microbatch)] if stage else []
        elif action.kind == "W":
            needs = [("B", stage, microbatch)]
        else:
            needs = [("F", stage, microbatch)] + ([("B", stage + 1, microbatch)] if stage < last else [])
        if not all(need in done for need in needs):
            return None
        return max((done[need] + send * (home[need[1]] != home[stage]) for need in needs), default=0.0)

    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while place[rank] < len(order[rank]):
                action = order[rank][place[rank]]
                at = ready(action)
                if at is None:
                    break
                start = max(at, free[rank])
                free[rank] = end = start + seconds[action.kind][action.stage]
                if action.kind != "W":
                    done["F" if action.kind == "F" else "B", action.stage, action.microbatch] = end
                slots[rank].append(Slot(action, start, end))
                place[rank] += 1
                moved = True
    if any(place[rank] < len(order[rank]) for rank in range(ranks)):
        raise ValueError(f"a pipeline order deadlocks: the ranks wait at their actions number {place}")
    return Timeline(tuple(map(tuple, slots)), tuple(in_flight(actions) for actions in order))


def in_flight(actions: Sequence[Action]) -> int:
    """The largest number of forwards whose activations are in memory at once: until their B, or W if it is split."""
    alive = most = 0
    for action in actions:
        alive += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
        most = max(most, alive)
    return most


def ideal_bubble(
    schedule: str, ranks: int, stages: int, microbatches: int, forward: float, backward_input: float, weight: float
) -> float:
    """The bubble's share of a rank's time by the papers' formulas, for equal stages. forward, backward_input, weight:
    seconds of one micro-batch on all stages of a rank (F, I, W below).

    Bubble in seconds: 1F1B (p−1)(F+I+W); interleaved that / v; zero bubble (ZB-H1 for v=1) (p−1)(F+I−W) / v; zbv 0,
    which holds if F, I and W are equal.
    """
    whole = forward + backward_input + weight
    left = {"zero_bubble": max(0.0, forward + backward_input - weight), "zbv": 0.0}.get(schedule, whole)
    wait = (ranks - 1) * left / stages
    return wait / (microbatches * whole + wait) if whole else 0.0
