"""How many micro-batches a step's batch is cut into, if config.microbatches=0.

The number depends only on the configuration and, on CUDA, on the kind of card, so that every rank and a plan find the
same number. Predicted peak memory (qwen3f.plan.memory) decides, never the free memory.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from ml_collections import ConfigDict

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.model import Execution
from qwen3f.plan.case import Case, make_case
from qwen3f.plan.hardware import Hardware
from qwen3f.plan.memory import leaves, peak, room
from qwen3f.train.checks import MOST_MICROBATCHES
from qwen3f.train.optimizer import AdamW
from sharding import rules
from sharding.axes import Axes
from sharding.layout import Layout
from sharding.mesh import ROWS, MeshShape, divisors
from sharding.pipeline.cut import Pipeline

FILLING = 4  # micro-batches per rank of pp, for a small bubble (Huang et al. 2019, arXiv:1811.06965, section 3.3)


def resolve(
    config: ConfigDict,
    cfg: ModelConfig,
    hyper: AdamW,
    execution: Execution,
    layout: Layout,
    compute: torch.dtype,
    hardware: Hardware | None,
) -> int:
    """config.microbatches; if that is 0, the number chosen here.

    hardware: the card whose memory limits the choice; None (CPU) ignores memory. Raises UserError for a batch that
    cannot be cut so that every rank has work; with a card also as Case does.
    """
    if config.microbatches:
        return config.microbatches
    shape, pipeline = layout.axes.shape, layout.pipeline
    numbers = candidates(shape, pipeline, config.batch_size, config.seq_len)
    if hardware is None:
        return choose(numbers, shape.pp)
    case = make_case(config, cfg, hyper, execution, layout, compute, hardware, numbers[-1])
    return choose_for(case).microbatches


def choose_for(case: Case) -> Case:
    """`case` with the chosen number of micro-batches. Raises UserError as resolve does."""
    table, limit = leaves(case), room(case.hardware)

    def fits(number: int) -> bool:
        return peak(dataclasses.replace(case, microbatches=number), table) <= limit

    numbers = candidates(case.mesh, case.pipeline, case.batch_size, case.seq_len)
    return dataclasses.replace(case, microbatches=choose(numbers, case.mesh.pp, fits))


def choose(numbers: Sequence[int], pp: int, fits: Callable[[int], bool] = lambda number: True) -> int:
    """The smallest of `numbers` (from `candidates`) that fits; if none fits, the largest.

    With pp only numbers with a small bubble count: at least FILLING per rank of pp; if there is none, the largest. More
    micro-batches would shrink the bubble further, but cost time on the host and one gather of the weights each.
    """
    filling = [number for number in numbers if pp == 1 or number >= FILLING * pp]
    return next(filter(fits, filling), numbers[-1])


def candidates(shape: MeshShape, pipeline: Pipeline, batch_size: int, seq_len: int) -> tuple[int, ...]:
    """The numbers of micro-batches, rising, that are possible: the mesh can cut the batch into equal parts, the
    schedule can run them, every rank of pp has work, and there are at most MOST_MICROBATCHES.

    Raises UserError, with a batch size that would work, if there is no such number.
    """
    sharing = math.prod(getattr(shape, axis) for axis in ROWS)
    rows, rest = divmod(batch_size, sharing)
    possible = [] if rest else [n for n in divisors(rows) if shape.pp <= n <= MOST_MICROBATCHES]
    numbers = [n for n in possible if _runs(pipeline, shape.pp, n)]
    found: list[int] = []
    refused: UserError | None = None
    for number in numbers:
        try:
            rules.check_batch(shape, batch_size, seq_len, number)
            found.append(number)
        except UserError as error:  # seq_len doesn't divide over cp, or a micro-batch's tokens don't over tp
            refused = error
    if found:
        return tuple(found)
    if refused:
        raise refused
    few = f", and each part needs at least {shape.pp} rows, one for every rank of pp{shape.pp}" if shape.pp > 1 else ""
    raise UserError(
        f"config.batch_size={batch_size} can't fill the mesh {shape}: dr, dp and ep cut its rows into {sharing} equal "
        f"parts{few}; write a multiple of {sharing * shape.pp}"
    )


def _runs(pipeline: Pipeline, ranks: int, microbatches: int) -> bool:
    try:
        pipeline.check(ranks, microbatches)
    except UserError:
        return False
    return True


def described(number: int, batch_size: int, axes: Axes) -> str:
    """A line for the run's log: the chosen number."""
    rows = batch_size // (axes.rows[1] * number)
    return f"microbatches: {number}, of {rows} row{'s' * (rows > 1)} each on a rank (config.microbatches=0)"


def check_agreed(numbers: Sequence[int]) -> None:
    """UserError unless all ranks chose the same number. numbers: one per rank."""
    other = next((rank for rank, number in enumerate(numbers) if number != numbers[0]), None)
    if other is not None:
        raise UserError(
            f"config.microbatches=0: rank 0 chose {numbers[0]} and rank {other} {numbers[other]}, because they have "
            f"different cards; write --config.microbatches={max(numbers)}, or the smaller card as --config.hardware"
        )


def evaluation_parts(rows: int, microbatches: int, axes: Axes) -> int:
    """The number of micro-batches for an evaluation's batch of `rows` rows. With pp several, so that all its ranks
    work at the same time; else 1."""
    _, sharing = axes.rows
    return math.gcd(rows // sharing, microbatches) if axes.pp.size > 1 else 1


def check_evaluation(config: ConfigDict, microbatches: int, axes: Axes) -> None:
    """UserError for an evaluation's batch that the mesh cannot cut."""
    rows, (_, sharing) = config.eval.batch_size, axes.rows
    parts = 1 if rows % sharing else evaluation_parts(rows, microbatches, axes)  # check_batch refuses uneven rows
    rules.check_batch(axes.shape, rows, config.seq_len, parts, "config.eval.batch_size")
