"""Where a run's numbers go: metrics.jsonl, TensorBoard, a progress bar, and Weights & Biases on request."""

import contextlib
import functools
import json
import math
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

from torch import Tensor
from tqdm import tqdm

from qwen3f.errors import UserError
from qwen3f.terminal import printable
from qwen3f.train.answers_folder import AnswersFolder
from qwen3f.train.event_file import EventFile
from qwen3f.train.patient_file import PatientFile

WANDB_MODES = ("off", "offline", "online")
BAR_FORMAT = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]"


class Logger(Protocol):
    """The interface between the training loop and a logger; see MetricLogger."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def advance(self, step: int, loss: float | None = None, tokens_per_sec: float | None = None) -> None: ...
    def text(self, step: int, tag: str, text: str) -> None: ...
    def image(self, step: int, tag: str, picture: Tensor) -> None: ...
    def answers(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None: ...
    def write(self, line: str) -> None: ...


class SilentLogger:
    """The logger of all ranks but rank 0: it does nothing, because rank 0 logs the same values."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def advance(self, step: int, loss: float | None = None, tokens_per_sec: float | None = None) -> None:
        pass

    def text(self, step: int, tag: str, text: str) -> None:
        pass

    def image(self, step: int, tag: str, picture: Tensor) -> None:
        pass

    def answers(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        pass

    def write(self, line: str) -> None:
        pass


class MetricLogger:
    """Writes the metrics of one run; a context manager.

    workdir: gets `metrics.jsonl` (one JSON object per logged step), `tensorboard/` and, with wandb, `wandb/`.
    total_steps: steps that the run has in the end. start_step: steps already done (0 for a new run). Entries of later
        steps, from before the run went back, are dropped from metrics.jsonl and hidden in TensorBoard.
    wandb_mode: "off", "offline" (written into workdir, nothing sent) or "online".
    run_config: the resolved configuration, JSON-like, shown by wandb.
    progress: whether to draw the bar on stderr.

    A full disk does not end the run: lines and events wait in memory until they can be written, and a line says so
    (`PatientFile`). Raises UserError for an unknown `wandb_mode`, wandb not installed or not logged in, or a
    metrics.jsonl in `workdir` that this class didn't write.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        total_steps: int,
        start_step: int,
        wandb_mode: str = "off",
        run_config: Mapping[str, Any],
        progress: bool,
    ) -> None:
        wandb = _import_wandb(wandb_mode)
        workdir = Path(workdir)
        path = workdir / "metrics.jsonl"
        kept, self._last_step = _kept(path, start_step)
        workdir.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:  # if one fails to open, those already open are closed
            # wandb first, because it may fail: then nothing of an older run has been dropped
            self._wandb_run: Any = None
            if wandb is not None:
                self._wandb_run = stack.enter_context(_wandb_run(wandb, workdir, wandb_mode, run_config))
            _cut(path, kept)
            self._bar = stack.enter_context(_progress_bar(total_steps, start_step, progress))
            self._file = stack.enter_context(PatientFile(path, self.write))
            self._tensorboard = stack.enter_context(EventFile(workdir / "tensorboard", start_step, self.write))
            self._answers = AnswersFolder(workdir, start_step, self.write)
            self._shown: dict[str, str] = {}
            self._open = stack.pop_all()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of the state after `step` steps everywhere but in the bar.

        metrics.jsonl gets the line `{"step": step, ...}` at once. JSON has no NaN or infinity: such a value is written
        as null; TensorBoard and wandb show it as it is. Raises ValueError unless `step` is later than the last one
        logged: one call a step, with all of its metrics.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} is logged after step {self._last_step}: log each step once, in order")
        self._last_step = step
        values = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        line = json.dumps({"step": step} | {name: _finite(value) for name, value in values.items()})
        self._file.write(f"{line}\n".encode())
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()
        if self._wandb_run is not None:
            self._wandb_run.log({"step": step} | values)

    def advance(self, step: int, loss: float | None = None, tokens_per_sec: float | None = None) -> None:
        """Moves the bar to `step` steps done, and shows the given values; a value of None keeps the last one."""
        if loss is not None:
            self._shown["loss"] = f"loss {loss:.4f}"
        if tokens_per_sec is not None:
            self._shown["speed"] = f"{_short(tokens_per_sec)} tokens/s"
        with _console():
            self._bar.set_postfix_str(", ".join(self._shown.values()), refresh=False)
            self._bar.update(step - self._bar.n)

    def text(self, step: int, tag: str, text: str) -> None:
        """Records a text, such as a sample, in TensorBoard, with its line breaks; the caller prints it."""
        # Four spaces make it preformatted: TensorBoard reads Markdown.
        self._tensorboard.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)
        self._tensorboard.flush()

    def image(self, step: int, tag: str, picture: Tensor) -> None:
        """Records a picture, uint8 [height, width, 3] on the CPU, in TensorBoard."""
        self._tensorboard.add_image(tag, picture, step)
        self._tensorboard.flush()

    def answers(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Saves an evaluation's questions and answers in answers/; see AnswersFolder."""
        self._answers.write(step, answers)

    def write(self, line: str) -> None:
        """Prints a line, or a text that a model wrote, to stdout without breaking the bar."""
        with _console():
            tqdm.write(printable(line), file=sys.stdout)

    def close(self) -> None:
        """Flushes and closes all files; later calls do nothing."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)  # so that wandb learns whether the run failed


def _kept(path: Path, start_step: int) -> tuple[int, int]:
    """(bytes, last step) of the lines of metrics.jsonl that a run from `start_step` keeps; (0, −1) if it keeps none.

    A new run (start_step 0) keeps none. A last line without a newline, from a killed process, is dropped. Only one line
    is in memory at a time.
    """
    size, last, keeps = 0, -1, start_step > 0
    if not path.exists():
        return size, last
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode()
                if not text.endswith("\n"):
                    break
                step = _step_of(text, f"{path}, line {number}")
                keeps = keeps and step <= start_step
                if keeps:
                    size, last = size + len(line), step
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a text file that a run wrote ({error}): move it away") from error
    return size, last


def _cut(path: Path, size: int) -> None:
    """Truncate the file to its first `size` bytes, in place: that works on a full disk."""
    if path.exists() and size < path.stat().st_size:
        os.truncate(path, size)


def _step_of(line: str, where: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f'{where} is not a JSON object with a "step": move the file away, or mend the line') from error


@contextlib.contextmanager
def _console() -> Iterator[None]:
    """A context for printing: ignores a full disk behind stdout or stderr, but not a closed pipe (BrokenPipeError)."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        pass


def _import_wandb(mode: str) -> ModuleType | None:
    if mode not in WANDB_MODES:
        raise UserError(f"config.wandb is {mode!r}: write one of {', '.join(WANDB_MODES)}")
    if mode == "off":
        return None
    if mode == "offline":
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # read on import; without it wandb's telemetry uses the network
    try:
        import wandb
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
        raise UserError(f"config.wandb is {mode!r}, but wandb is not installed: pip install wandb") from error
    return wandb


@contextlib.contextmanager
def _wandb_run(wandb: ModuleType, workdir: Path, mode: str, run_config: Mapping[str, Any]) -> Iterator[Any]:
    run_id = workdir / "wandb_run_id"  # a resumed run continues the same curve
    if not run_id.exists():
        run_id.write_text(uuid.uuid4().hex[:12])
    try:
        run = wandb.init(
            project="qwen3f",
            name=workdir.absolute().name,
            id=run_id.read_text(),
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(workdir),
            config=dict(run_config),
            settings=wandb.Settings(silent=True, console="off"),  # stdout and stderr stay the run's own
        )
    except wandb.errors.UsageError as error:
        raise UserError(f"config.wandb is {mode!r}, but wandb can't start ({error}): run `wandb login`") from error
    # wandb's own counter refuses to go back, which resuming from an earlier step does.
    run.define_metric("*", step_metric="step")
    exit_code = 1
    try:
        yield run
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)


@contextlib.contextmanager
def _progress_bar(total_steps: int, start_step: int, progress: bool) -> Iterator[tqdm]:
    make = functools.partial(
        tqdm,
        total=total_steps,
        initial=start_step,
        file=sys.stderr,
        dynamic_ncols=True,
        bar_format=BAR_FORMAT,
        # in a file every update is a new line, so update only twice a minute there
        mininterval=0.1 if sys.stderr.isatty() else 30.0,
        miniters=1,
    )
    bar = make(disable=True)
    with _console():
        bar = make(disable=not progress)
    try:
        yield bar
    finally:
        with _console():
            bar.close()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
