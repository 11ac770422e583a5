"""When checkpoints are saved, what goes into them, and what happens when one cannot be written."""

from collections.abc import Callable
from typing import Any

from qwen3f.checkpoint.checkpointer import Checkpointer, CheckpointWriteError, StuckWrite
from qwen3f.train.logger import Logger
from qwen3f.train.state import TrainState


class Saver:
    """meta: what is saved beside the state, asked for at each save. on_failure: config.checkpoint.on_failure.
    saved: the step of the last save that was begun; 0 for none."""

    def __init__(
        self, checkpoints: Checkpointer, on_failure: str, meta: Callable[[], dict[str, Any]], logger: Logger
    ) -> None:
        self._checkpoints, self._on_failure, self._meta, self._logger = checkpoints, on_failure, meta, logger
        self.saved = 0

    def due(self, step: int, last: bool) -> bool:
        return self._checkpoints.should_save(step, last)

    def __call__(self, step: int, state: TrainState, values: dict[str, float], last: bool) -> None:
        """Begin to save; `last` waits for nothing to come. Raises CheckpointWriteError, by the policy."""
        try:
            self._checkpoints.wait()
        except CheckpointWriteError as error:  # with the save before this one
            self.failed(error)
            if isinstance(error, StuckWrite) and not last:
                return
        self.saved = step
        try:
            self._checkpoints.save(step, state, self._meta(), values, overlap=True)
        except CheckpointWriteError as error:
            if last:
                raise
            self.failed(error)

    def failed(self, error: CheckpointWriteError) -> None:
        """Say that a save failed; or raise it."""
        if self._on_failure == "stop":
            raise error
        self._logger.write(f"{error}; going on, as config.checkpoint.on_failure says")
