"""When a run writes its report, and what it must not cost: little of the run's time, and never the run."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from qwen3f.train.run_record import RunRecord, facts
from qwen3f.train.stage import Run, Stage

_SHARE = 1 / 20  # of a run's time that its reports may take, the last one aside
_FIRST = 5.0  # seconds of a run before there is anything to look at


class ReportWriter:
    """report.html of a directory. Whatever is wrong with it is said once, and what it tells of goes on.

    share: of the time, at most, that reports take which are written when `due`. after: seconds until the first one is.
    """

    def __init__(self, directory: Path, share: float, say: Callable[[str], None], after: float = 0.0) -> None:
        self._directory, self._share, self._say, self._failed = directory, share, say, False
        self._next = time.perf_counter() + after

    @property
    def due(self) -> bool:
        return time.perf_counter() >= self._next

    def write(self) -> Path | None:
        """None where it cannot be written."""
        began = time.perf_counter()
        try:
            from qwen3f.report.write import write_report  # matplotlib takes a while to import

            return write_report(self._directory)
        except Exception as error:
            if not self._failed:
                self._failed = True
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                self._say(f"the report cannot be written ({reason}); the run goes on without")
            return None
        finally:
            now = time.perf_counter()
            self._next = now + (now - began) / self._share


class Reporting:
    """run.json and report.html of a run, on rank 0 and with config.report; else its methods do nothing."""

    def __init__(self, run: Run, stage: Stage, start: int, say: Callable[[str], None]) -> None:
        self._report = ReportWriter(run.workdir, _SHARE, say, _FIRST)
        self._record = None
        if run.world.main and run.setup.config.report:
            self._record = RunRecord(run.workdir, facts(run.setup, stage.lines), start, say)
            self._record.save(start)

    def evaluated(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """After an evaluation, and after its numbers are logged."""
        if self._record is None:
            return
        self._record.save(step, metrics.get("expert_load"))
        if self._report.due:
            self._report.write()

    def ended(self, step: int) -> list[str]:
        """At the end of a run, or where a signal stopped it: lines that say where the report is."""
        if self._record is None:
            return []
        self._record.save(step)
        path = self._report.write()
        return [f"report: {path}"] if path else []
