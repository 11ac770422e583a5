"""Prepared batches for the loop. All ranks draw a batch together; they exchange one message per step."""

from types import TracebackType
from typing import Self

import torch

from qwen3f.data.loader import Loader
from qwen3f.errors import UserError
from qwen3f.processes.world import World
from qwen3f.train.guards.signals import StopRequest
from qwen3f.train.stage import Batch, Stage
from qwen3f.train.state import TrainState


class Feed:
    """A context manager around a Loader; it keeps track of the run's position in the data.

    Attributes:
      position: index, in the data order, of the last batch's first example. consumed: examples that the batch used.
      state: the loader's state after the last batch; see Loader.
    """

    def __init__(
        self, loader: Loader, batch_size: int, position: int, stage: Stage, stop: StopRequest, world: World
    ) -> None:
        self._loader, self._batch_size, self._stage = loader, batch_size, stage
        self._stop, self._world = stop, world
        self.position, self.consumed, self.state = position, 0, loader.state

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loader.close()

    def next(self, state: TrainState) -> Batch | None:
        """The next step's batch; None if a rank has received a signal to stop. Raises UserError, on all ranks, if the
        data ends or one rank cannot read it."""
        batch, stopping = self._world.agree(lambda: next(self._loader), bool(self._stop.name), UserError)
        if stopping:
            return None
        given = self._batch_size

        def more() -> Batch:
            nonlocal given
            given += self._batch_size
            return self._world.together(lambda: next(self._loader), UserError)

        prepared = self._stage.prepare(state, batch, more)
        consumed = int(prepared.get("consumed", given))
        if not 0 <= consumed <= given:
            raise UserError(
                f"the stage's prepare returned consumed={consumed}; it must lie between 0 and {given}, the number of "
                "examples that it was given"
            )
        self.position += self.consumed
        self.consumed, self.state = consumed, self._loader.state
        if "consumed" in prepared or given > self._batch_size:
            device = prepared["tokens"].device
            prepared = {**prepared, "consumed": torch.tensor(consumed, dtype=torch.int64, device=device)}
        return prepared
