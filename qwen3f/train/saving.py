"""When checkpoints are saved, what goes into them, and what happens when one cannot be written."""

from collections.abc import Callable
from typing import Any

from qwen3f.checkpoint.checkpointer import Checkpointer, CheckpointWriteError, StuckWrite
from qwen3f.checkpoint.commit import OldCheckpointStays
from qwen3f.train.logger import Logger
from qwen3f.train.state import TrainState


class Saver:
    """meta: what is saved beside the state, asked for at each save. on_failure: config.checkpoint.on_failure.
    saved: the step of the last save, until it is known to have failed; 0 for none."""

    def __init__(
        self, checkpoints: Checkpointer, on_failure: str, meta: Callable[[], dict[str, Any]], logger: Logger
    ) -> None:
        self._checkpoints, self._on_failure, self._meta, self._logger = checkpoints, on_failure, meta, logger
        self.saved = 0

    def due(self, step: int, last: bool) -> bool:
        return self._checkpoints.should_save(step, last)

    def __call__(self, step: int, state: TrainState, values: dict[str, float], last: bool) -> None:
        """Begin to save; `last` waits for nothing to come. Raises CheckpointWriteError, by the policy."""
        stuck = self.wait()
        if stuck and not last:
            return
        try:
            self._checkpoints.save(step, state, self._meta(), values, overlap=True)
            self.saved = step
        except CheckpointWriteError as error:
            if isinstance(error, OldCheckpointStays) and not stuck:  # else it may be of the save before this one
                self.saved = step
            elif last:
                raise
            self.failed(error)

    def wait(self) -> bool:
        """Wait for the last save; whether it hangs. Raises CheckpointWriteError, by the policy."""
        try:
            self._checkpoints.wait()
        except CheckpointWriteError as error:
            stuck = isinstance(error, StuckWrite)
            if not stuck and not isinstance(error, OldCheckpointStays):
                self.saved = 0
            self.failed(error)
            return stuck
        return False

    def keep(self, step: int, state: TrainState) -> None:
        """Save the state with which a run ends early, unless the last save is of this step and comes to the disk.

        Raises CheckpointWriteError: when the save can't begin, else by the policy.
        """
        if self.saved == step:
            self.wait()
        if self.saved != step:
            self(step, state, {}, True)

    def finish(self) -> None:
        """Wait for the last save of a run. Raises CheckpointWriteError, whatever the policy, where it has failed."""
        try:
            self._checkpoints.wait()
        except OldCheckpointStays as error:
            self.failed(error)

    def failed(self, error: CheckpointWriteError) -> None:
        """Say that a save failed; or raise it."""
        if self._on_failure == "stop":
            raise error
        self._logger.write(f"{error}; going on, as config.checkpoint.on_failure says")
