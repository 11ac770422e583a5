"""When a run writes its report, and what it must not cost: little of the run's time, and never the run."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from qwen3f.train.run_record import RunRecord, facts
from qwen3f.train.stage import Run, Stage

_SHARE = 1 / 20  # of a run's time that its reports may take, the last one aside
_FIRST = 5.0  # seconds of a run before there is anything to look at


class Reporting:
    """run.json and report.html of a run, on rank 0 and with config.report; else its methods do nothing."""

    def __init__(self, run: Run, stage: Stage, start: int, say: Callable[[str], None]) -> None:
        self._workdir, self._say, self._failed = run.workdir, say, False
        self._record = None
        if run.world.main and run.setup.config.report:
            self._record = RunRecord(run.workdir, facts(run.setup, stage.lines), start, say)
            self._record.save(start)
        self._next = time.perf_counter() + _FIRST

    def evaluated(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """After an evaluation, and after its numbers are logged."""
        if self._record is None:
            return
        self._record.save(step, metrics.get("expert_load"))
        if time.perf_counter() >= self._next:
            self._write()

    def ended(self, step: int) -> list[str]:
        """At the end of a run, or where a signal stopped it: lines that say where the report is."""
        if self._record is None:
            return []
        self._record.save(step)
        path = self._write()
        return [f"report: {path}"] if path else []

    def _write(self) -> Path | None:
        """None where it cannot be written: whatever is wrong with a report, a run goes on."""
        began = time.perf_counter()
        try:
            from qwen3f.report.write import write_report  # matplotlib takes a while to import

            return write_report(self._workdir)
        except Exception as error:
            if not self._failed:
                self._failed = True
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                self._say(f"the report cannot be written ({reason}); the run goes on without")
            return None
        finally:
            now = time.perf_counter()
            self._next = now + (now - began) / _SHARE
