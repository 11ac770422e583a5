"""When a run writes its report. Reports take only a small share of the time, and their failure never ends the run."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from qwen3f.train.run_record import RunRecord, facts
from qwen3f.train.stage import Run, Stage

_SHARE = 1 / 20  # the largest share of a run's time that reports may take, except the last one
_FIRST = 5.0  # no report in a run's first seconds


class ReportWriter:
    """Writes report.html in a directory. A failure is reported once, by `say`; no error is raised.

    share: if reports are written only when `due`, they take at most this share of the time. after: seconds until the
    first one is due.
    """

    def __init__(self, directory: Path, share: float, say: Callable[[str], None], after: float = 0.0) -> None:
        self._directory, self._share, self._say, self._failed = directory, share, say, False
        self._next = time.perf_counter() + after

    @property
    def due(self) -> bool:
        return time.perf_counter() >= self._next

    def write(self) -> Path | None:
        """Write the report. Returns its path, or None if it cannot be written."""
        began = time.perf_counter()
        try:
            from qwen3f.report.write import write_report  # matplotlib takes a while to import

            return write_report(self._directory)
        except Exception as error:  # a report must never end the run; the reason is printed once
            if not self._failed:
                self._failed = True
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                self._say(f"the report cannot be written ({reason}); the run goes on without")
            return None
        finally:
            now = time.perf_counter()
            self._next = now + (now - began) / self._share


class Reporting:
    """Writes a run's run.json and report.html. Methods do nothing on ranks other than 0 or without config.report."""

    def __init__(self, run: Run, stage: Stage, start: int, say: Callable[[str], None]) -> None:
        self._report = ReportWriter(run.workdir, _SHARE, say, _FIRST)
        self._record = None
        if run.world.main and run.setup.config.report:
            self._record = RunRecord(run.workdir, facts(run.setup, stage.lines), start, say)
            self._record.save(start)

    def evaluated(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """Call it after an evaluation, when its values have been logged."""
        if self._record is None:
            return
        self._record.save(step, metrics.get("expert_load"))
        if self._report.due:
            self._report.write()

    def ended(self, step: int) -> list[str]:
        """Call it at the end of a run, also after a signal. Returns lines to print: where the report is."""
        if self._record is None:
            return []
        self._record.save(step)
        path = self._report.write()
        return [f"report: {path}"] if path else []
