"""How a pipeline cuts the model: which layers a stage holds, and in which order the ranks of pp store them.

The layers are cut into `count` stages of equal height. The last stage may have fewer layers: because the layers don't
divide, or by choice, since it computes the head and the loss too. Its missing rows are padding: stored, never computed.
A rank with several stages stores them one after another, so its part of a stack is one block of rows, and pp cuts a
stack that is stored in this order into equal blocks.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch

from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from sharding.mesh import nearest
from sharding.ring import Traffic

SCHEDULES = ("1f1b", "interleaved", "zero_bubble", "zbv")


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A schedule of torch.distributed.pipelining: 1F1B and interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473),
    interleaved zero bubble and ZBV (Qi et al. 2023, arXiv:2401.10241).

    stages: stages per rank; 1f1b has one, zbv two. layers: layers of every stage but the last, which holds the rest; 0:
    as equal as possible. Raises UserError for another number of stages, or an unknown schedule.
    """

    schedule: str = "1f1b"
    stages: int = 1
    layers: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"config.pipeline.schedule={self.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}")
        wanted = {"1f1b": 1, "zbv": 2}.get(self.schedule, max(1, self.stages))
        if self.stages != wanted:
            raise UserError(
                f"config.pipeline.schedule={self.schedule} can't have config.pipeline.stages={self.stages}; "
                f"write config.pipeline.stages={wanted}"
            )

    @property
    def splits(self) -> bool:
        """Whether the schedule computes weights' gradients later than the gradients of a stage's input."""
        return self.schedule in ("zero_bubble", "zbv")

    def check(self, ranks: int, microbatches: int) -> None:
        """UserError for a number of micro-batches that the schedule cannot run on `ranks` ranks of pp."""
        if self.schedule == "1f1b" and microbatches < ranks:
            raise UserError(
                f"config.microbatches={microbatches} leaves ranks of pp{ranks} without work; write at least {ranks}"
            )
        rounds = max(1, microbatches // ranks)
        if self.schedule in ("interleaved", "zero_bubble") and microbatches % rounds:
            raise UserError(
                f"config.microbatches={microbatches} is not a multiple of {rounds} rounds of pp{ranks}; write "
                f"{rounds * ranks} or {(rounds + 1) * ranks}"
            )


def make_slices(cfg: ModelConfig, pipeline: Pipeline, ranks: int) -> "Slices":
    """Which stage and rank holds which layers. With one rank there is one stage, and `pipeline` is ignored.

    Raises UserError for an empty stage; for DeepStack taps outside the first stage, which has the vision tower; and
    unless all stages have the same number of dense and of sparse layers, so that both kinds of stacks are cut into
    equal blocks (padding counts as either kind).
    """
    if ranks == 1:
        return Slices(cfg.num_hidden_layers)
    stages = Slices(cfg.num_hidden_layers, ranks, pipeline.stages, pipeline.schedule == "zbv", pipeline.layers)
    _check_kinds(cfg, stages)
    _check_taps(cfg, stages)
    return stages


def heights(layers: int, count: int) -> range:
    """The possible numbers of layers per stage, for all `count` stages but the last, which holds the rest.

    The last stage must get at least one layer and no more than the others. The first number gives the most equal
    stages. The range is empty if the most equal stages would leave one empty.
    """
    return range(math.ceil(layers / count), (layers - 1) // (count - 1) + 1 if count > 1 else layers + 1)


@dataclasses.dataclass(frozen=True)
class Slices:
    """How the layers are cut into stages, and which rank holds each stage.

    Attributes:
      layers: number of layers of the model. ranks: size of pp. per_rank: stages per rank.
      folded: the second half of the stages is assigned to the ranks in reverse order (a V), so that rank 0 has the
        first and the last stage. Otherwise stage s is on rank s mod ranks. Needs two stages per rank.
      each: layers of every stage but the last, one of `heights`; 0: the first of `heights`.

    Raises UserError when a stage would be empty or the last one the longest, ValueError for folded stages with
    per_rank other than 2.
    """

    layers: int
    ranks: int = 1
    per_rank: int = 1
    folded: bool = False
    each: int = 0

    def __post_init__(self) -> None:
        if self.folded and self.per_rank != 2:
            raise ValueError(f"folded stages need 2 stages a rank, got per_rank={self.per_rank}")
        possible = heights(self.layers, self.count)
        if not possible:
            others = (n for n in range(1, self.layers + 1) if heights(self.layers, n * self.per_rank))
            raise UserError(
                f"model.num_hidden_layers={self.layers} leaves a stage empty: pp={self.ranks} with {self.per_rank} "
                f"stages per rank makes {self.count} stages of {possible.start} layers; {_advice(self.ranks, others)}"
            )
        if self.height not in possible:
            values = f"{possible[0]} to {possible[-1]}" if len(possible) > 1 else possible[0]
            raise UserError(
                f"config.pipeline.layers={self.each} can't cut model.num_hidden_layers={self.layers} into {self.count} "
                "stages, the last of which has at least one layer and no more than the others; write 0, for equal "
                f"stages, or {values}"
            )

    @property
    def count(self) -> int:
        return self.ranks * self.per_rank

    @property
    def height(self) -> int:
        """Rows of a stage, padding included."""
        return self.each or heights(self.layers, self.count).start

    def rank_of(self, stage: int) -> int:
        turn, place = divmod(stage, self.ranks)
        return self.ranks - 1 - place if self.folded and turn else place

    def slices_of(self, rank: int) -> tuple[int, ...]:
        """A rank's stages in the model's order. The rank stores their rows in this order."""
        return tuple(stage for stage in range(self.count) if self.rank_of(stage) == rank)

    def layers_of(self, stage: int) -> tuple[int, ...]:
        """The layers that a stage computes."""
        first = stage * self.height
        return tuple(range(first, min(first + self.height, self.layers)))

    def place_of(self, layer: int) -> tuple[int, int]:
        """(stage, row of the stage) of a layer."""
        return divmod(layer, self.height)

    def layer_at(self, stage: int, row: int) -> int | None:
        """The inverse of place_of; None for padding."""
        layer = stage * self.height + row
        return layer if layer < self.layers else None

    def layer_order(self, kind: Sequence[int] | None = None) -> tuple[int | None, ...]:
        """The layer in each stored row of a stack, None for padding; rows of all ranks, rank after rank.

        kind: the layers that the stack contains (ParamSpec.layers), rising; None for all. Every stage gets as many rows
        as the stage with the most of these layers.
        """
        members = set(range(self.layers) if kind is None else kind)
        by_stage = [[layer for layer in self.layers_of(stage) if layer in members] for stage in range(self.count)]
        height = max(map(len, by_stage))
        order: list[int | None] = []
        for rank in range(self.ranks):
            for stage in self.slices_of(rank):
                order += [*by_stage[stage], *[None] * (height - len(by_stage[stage]))]
        return tuple(order)

    def layer_order_of(self, rank: int, kind: Sequence[int] | None = None) -> tuple[int | None, ...]:
        """A rank's part of layer_order."""
        size = self.rows(kind)
        return self.layer_order(kind)[rank * size : (rank + 1) * size]

    def rows(self, kind: Sequence[int] | None = None) -> int:
        """How many rows of a stack a rank stores, padding included; kind: as for layer_order."""
        return len(self.layer_order(kind)) // self.ranks


def _check_kinds(cfg: ModelConfig, stages: Slices) -> None:
    wanted = sum(map(cfg.is_sparse, stages.layers_of(0)))
    for stage in range(1, stages.count):
        own = stages.layers_of(stage)
        sparse, padding = sum(map(cfg.is_sparse, own)), stages.height - len(own)
        if not sparse <= wanted <= sparse + padding:
            raise UserError(
                f"stage {stage} of {stages.count} has {sparse} sparse and {len(own) - sparse} dense layers, stage 0 "
                f"{wanted} and {stages.height - wanted}; every stage needs the same number of each: choose another pp, "
                "model.decoder_sparse_step or model.mlp_only_layers"
            )


def _check_taps(cfg: ModelConfig, stages: Slices) -> None:
    first, taps = len(stages.layers_of(0)), cfg.injected_taps
    if taps > first:
        possible = {n: heights(stages.layers, n * stages.per_rank) for n in range(1, stages.ranks)}
        fitting = [n for n, each in possible.items() if each and each.start >= taps]
        raise UserError(
            f"model.vision_deepstack_layers has {taps} taps, which are added behind the first layers, but stage 0 of "
            f"{stages.count}, which has the vision tower, holds only {first}; {_advice(stages.ranks, fitting)}"
        )


def _advice(ranks: int, possible: Iterable[int]) -> str:
    """The end of an error message: what to write instead of pp=`ranks`, given the sizes of pp that are possible.

    If no size is possible, the rank must have several stages, so the message says to lower their number.
    """
    if sizes := nearest("pp", ranks, possible):
        return f"write in config.mesh {sizes}"
    return "lower config.pipeline.stages, or write config.pipeline.schedule=1f1b with config.pipeline.stages=1"


def store(cfg: ModelConfig, params: P.Params, stages: Slices) -> P.Params:
    """Reorder stacks from the model's order to the order in which all ranks store them; padding rows are zero.

    Other parameters stay.
    """
    out = dict(params)
    for path, order, kind in _stacks(cfg, params, stages):
        rows = [row for row, layer in enumerate(order) if layer is not None]
        out[path] = params[path].new_zeros((len(order), *params[path].shape[1:]))
        out[path][rows] = params[path][[kind[order[row]] for row in rows]]
    return out


def restore(cfg: ModelConfig, params: P.Params, stages: Slices) -> P.Params:
    """The inverse of store: stacks in the model's order, without padding."""
    out = dict(params)
    for path, order, kind in _stacks(cfg, params, stages):
        rows = {layer: row for row, layer in enumerate(order)}
        out[path] = params[path][[rows[layer] for layer in kind]]
    return out


def _stacks(
    cfg: ModelConfig, params: P.Params, stages: Slices
) -> list[tuple[str, tuple[int | None, ...], dict[int, int]]]:
    """For every parameter in params that pp cuts: (path, its layer_order, layer -> row in the model's order)."""
    table = P.abstract_params(cfg)
    kinds = {path: table[path].layers for path in params if table[path].pipelined}
    return [(p, stages.layer_order(kind), {layer: i for i, layer in enumerate(kind)}) for p, kind in kinds.items()]


def pipeline_traffic(
    stages: Slices, rank: int, microbatches: int, tokens: int, hidden: int, dtype: torch.dtype
) -> tuple[Traffic, Traffic]:
    """What a rank sends in a step: (hidden states to next stages, their gradients to previous stages).

    tokens: tokens of a rank's micro-batch, after the cut over cp and tp. hidden: the hidden size. Between two stages of
    the same rank nothing is sent.
    """

    def sent(step: int) -> Traffic:
        neighbours = [stage + step for stage in stages.slices_of(rank) if 0 <= stage + step < stages.count]
        messages = microbatches * sum(stages.rank_of(stage) != rank for stage in neighbours)
        return Traffic(messages, messages * tokens * hidden * dtype.itemsize)

    return sent(1), sent(-1)
