"""When checkpoints are saved, what goes into them, and what happens when one cannot be written."""

from collections.abc import Callable
from typing import Any

from qwen3f.checkpoint.checkpointer import Checkpointer, CheckpointWriteError, StuckWrite
from qwen3f.checkpoint.commit import OldCheckpointStays
from qwen3f.train.logger import Logger
from qwen3f.train.state import TrainState


class Saver:
    """Saves a run's checkpoints, and applies config.checkpoint.on_failure to failed saves ("the policy" below).

    meta: () -> what is saved beside the state. saved: the step of the last save, 0 for none or once it has failed.
    """

    def __init__(
        self, checkpoints: Checkpointer, on_failure: str, meta: Callable[[], dict[str, Any]], logger: Logger
    ) -> None:
        self._checkpoints, self._on_failure, self._meta, self._logger = checkpoints, on_failure, meta, logger
        self.saved = 0

    def due(self, step: int, last: bool) -> bool:
        return self._checkpoints.should_save(step, last)

    def __call__(self, step: int, state: TrainState, values: dict[str, float], last: bool) -> None:
        """Start to save. If an earlier write hangs, only the last step is saved. Raises CheckpointWriteError, by the
        policy."""
        stuck = self.wait()
        if stuck and not last:
            return
        try:
            self._checkpoints.save(step, state, self._meta(), values, overlap=True)
            self.saved = step
        except CheckpointWriteError as error:
            if isinstance(error, OldCheckpointStays) and not stuck:  # if stuck, the error may be the earlier save's
                self.saved = step
            elif last:
                raise
            self.failed(error)

    def wait(self) -> bool:
        """Wait for the last save; returns whether its write hangs. Raises CheckpointWriteError, by the policy."""
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
        """Save the state with which a run ends early, unless the last save was of this step and succeeds.

        Raises CheckpointWriteError if the save can't start; later failures by the policy.
        """
        if self.saved == step:
            self.wait()
        if self.saved != step:
            self(step, state, {}, True)

    def finish(self) -> None:
        """Wait for the run's last save. Raises CheckpointWriteError if it failed, whatever the policy.

        By the policy only if the save succeeded, but an old checkpoint could not be deleted (OldCheckpointStays).
        """
        try:
            self._checkpoints.wait()
        except OldCheckpointStays as error:
            self.failed(error)

    def failed(self, error: CheckpointWriteError) -> None:
        """Raise the error if the policy is "stop"; else log it."""
        if self._on_failure == "stop":
            raise error
        self._logger.write(f"{error}; the run continues, because config.checkpoint.on_failure={self._on_failure}")
