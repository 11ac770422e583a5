"""The stage generate: questions from the configuration, a file or a chat; answers on stdout or in a file."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from qwen3f import terminal
from qwen3f.config import ModelConfig
from qwen3f.data.chat.kinds import check_thinking
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.multimodal.samples import check_tokenizer
from qwen3f.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError
from qwen3f.files import user_path
from qwen3f.infer import tensor_parallel
from qwen3f.infer.batch_file import AnswerFile, Ask, BadRow, prompt_asks, read_asks, survey
from qwen3f.infer.chat import run_chat
from qwen3f.infer.engine import EngineOptions
from qwen3f.infer.prompts import Shown, read_images, read_tools, read_video
from qwen3f.infer.request import Request
from qwen3f.infer.text_generator import Answer, TextGenerator, raise_error
from qwen3f.infer.text_request import FIELDS, TextOptions, check_kind, make_request
from qwen3f.interop import source
from qwen3f.interop.history import never_saw_chats, pretrained_only
from qwen3f.processes import ranks
from qwen3f.processes.world import ALONE, World
from qwen3f.train.choices import find_device, find_dtype
from qwen3f.vision.preprocess import check_limits, token_side
from sharding.mesh import MeshShape, parse_mesh

ON_BAD_ROW = ("error", "skip")


@dataclasses.dataclass
class Summary:
    """Counts and times of a run.

    answered: rows with an answer, failed ones included. failed: rows whose answer is an error; the next run with the
    same file computes them again. bad: rows that cannot be used. done: rows that an earlier run answered. begin, first,
    end: seconds of a clock.
    """

    answered: int = 0
    failed: int = 0
    bad: int = 0
    done: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    begin: float = 0.0
    first: float = 0.0  # the time of the first token
    end: float = 0.0

    def add(self, answer: Answer) -> None:
        self.answered += 1
        self.failed += answer.finish_reason.startswith("error")
        self.tokens += answer.tokens
        self.prompt_tokens += answer.prompt_tokens

    def text(self) -> str:
        failed = "failed; the same command computes them again"
        counts = {"answered before": self.done, "bad rows left out": self.bad, failed: self.failed}
        rest = "".join(f"; {count} {name}" for name, count in counts.items() if count)
        if not self.tokens:
            return f"{self.tokens} new tokens{rest}"
        later = self.tokens - self.answered
        speed = f", then {later / (self.end - self.first):.1f} tokens/s" if later > 0 and self.end > self.first else ""
        out = f"{self.tokens} new tokens: the first after {self.first - self.begin:.2f} s "
        out += f"({self.prompt_tokens} prompt tokens){speed}"
        return out + rest


def run(config: ConfigDict, workdir: Path, progress: bool = True) -> Summary | None:
    """Answer config.prompt, each of config.prompts or each row of config.input, and print the speed on stderr.

    Without any of these: a chat over stdin. The workdir is not used. With config.mesh=tpN the model is split over N
    devices; this process is then one of the ranks, or starts them. Ctrl-C ends the process with code 130.

    Raises UserError before any token is generated or any process starts: for keys that are missing or do not go
    together, for malformed rows, and as qwen3f.interop.source and ranks.decide do. Only a row that is too long raises
    later, when its turn comes, after the answers to the rows before it.
    """
    check(config)
    device = find_device(config.device).type
    shape = find_mesh(config, ranks.all_devices(os.environ, device))
    decision = ranks.decide(os.environ, shape.size, ranks.local_devices(device), device, sys.argv)
    if decision.mode == "single":
        return answer_all(config, progress)
    tensor_parallel.check(source.read_model_config(config.init_from), shape.tp)
    if decision.mode == "start":
        if code := ranks.start(decision, sys.argv):
            sys.exit(code)
        return None
    with ranks.joined(decision, shape, timeout=config.collective_timeout) as world:
        summary = answer_all(config, progress, world)
        gc.collect()  # NCCL only ends when no CUDA graph that contains its kernels is left
        return summary


def find_mesh(config: ConfigDict, devices: int) -> MeshShape:
    """The mesh of config.mesh. Raises UserError for axes other than tp, and for a chat on several devices."""
    shape = parse_mesh(config.mesh, devices)
    if shape.size != shape.tp:
        raise UserError(f"config.mesh={config.mesh}: generation has only tp; write --config.mesh=tp{shape.size}")
    if shape.size > 1 and _is_chat(config):
        raise UserError(
            f"config.mesh={config.mesh}: a chat over stdin runs on one device; leave out config.mesh, or give "
            '--config.prompt="…" or --config.input=FILE'
        )
    return shape


def answer_all(config: ConfigDict, progress: bool = True, world: World = ALONE) -> Summary | None:
    """As `run`, on the devices of `world`. All ranks call this together; rank 0 writes."""
    options = check(config)
    device = find_device(config.device)
    dtype = find_dtype(config.dtype, device)
    place = world.first(world.together(lambda: source.pinned(config.init_from), UserError))
    cfg = source.read_model_config(place)
    tokenizer = load_tokenizer(source.tokenizer_path(place), config.chat_template)
    _check_kind(tokenizer, options)
    shown = _shown(config, cfg, tokenizer)
    summary = Summary()
    count = world.together(lambda: survey(_rows(config, options), config.on_bad_row), UserError)
    rows, summary.bad = world.first(count)
    asks = functools.partial(_asks, config, options, rows)
    if not config.input:
        for ask in asks():
            _request(cfg, tokenizer, ask, shown)
    if config.chat and never_saw_chats(place) and world.main:
        hint = f"{pretrained_only(config.init_from)}; to let it continue a text write --config.chat=False"
        print(hint, file=sys.stderr, flush=True)

    def generator() -> TextGenerator:
        tp = world.axes.tp
        layout = tensor_parallel.generation_layout(cfg, tp)
        params = source.read_params(place, cfg, device, dtype, layout=layout, world=world)
        engine = EngineOptions(rows=config.batch_size, tp=tp, room="config.max_tokens")
        return TextGenerator(cfg, params, tokenizer, max_tokens=config.max_tokens, options=engine)

    try:
        if _is_chat(config):
            return run_chat(generator(), options)
        if config.out:
            with _answer_file(config, place, tokenizer, rows, world) as file:
                done = _answered(world, file, asks)
                if not all(done(ask) for ask in asks()):
                    left = (ask for ask in asks() if not done(ask))
                    _write(_passes(config, generator(), left, summary, shown), file, rows, progress)
                summary.done = file.count if file else 0
        else:
            _print(_passes(config, generator(), asks(), summary, shown), several=rows > 1)
    except KeyboardInterrupt:
        if world.main:
            print("stopped" + ("; the same command resumes" if config.out else ""), file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    if world.main:
        print(summary.text(), file=sys.stderr, flush=True)
    return summary


@contextlib.contextmanager
def _answer_file(
    config: ConfigDict, place: str, tokenizer: Tokenizer, rows: int, world: World
) -> Iterator[AnswerFile | None]:
    """The file of the answers on rank 0, None on other ranks. If it cannot be opened, all ranks raise the error."""
    with contextlib.ExitStack() as stack:

        def opened() -> AnswerFile | None:
            if not world.main:
                return None
            path = user_path(config.out, "config.out")
            return stack.enter_context(AnswerFile(path, _model_name(config, place, tokenizer), rows))

        yield world.together(opened, UserError)


def _answered(world: World, file: AnswerFile | None, asks: Callable[[], Iterator[Ask]]) -> Callable[[Ask], bool]:
    """A function that tells whether the file has the answer to a row. Rank 0 reads the file for all ranks."""
    if world.size == 1:
        return file.has

    def numbers() -> list[int]:
        return [ask.number for ask in asks() if file.has(ask)] if file else []

    known = set(world.first(world.together(numbers, UserError)))
    return lambda ask: ask.number in known


def _is_chat(config: ConfigDict) -> bool:
    return not (config.prompt or config.prompts or config.input)


def _model_name(config: ConfigDict, place: str, tokenizer: Tokenizer) -> str:
    """A name for everything that an answer depends on besides the row and its options: the model, and if set, the chat
    template, images and video. Reads all weights of a Hugging Face directory."""
    names = ("chat_template", "images", "video", "video_fps")
    given = {name: config[name] for name in names if config[name] not in ("", None)}
    if config.images:
        given |= {name: config[name] for name in ("min_pixels", "max_pixels")}
    return json.dumps([source.weights_digest(place), tokenizer.fingerprint, given], sort_keys=True)


def _check_kind(tokenizer: Tokenizer, options: TextOptions) -> None:
    """Raises UserError for options that the kind of the model's chat template does not have."""
    try:
        if options.chat:
            check_thinking(kind_of(tokenizer), options.thinking, "--config.thinking")
            check_kind(tokenizer, options)
    except UserError as error:
        raise UserError(f"config.{error}" if str(error).startswith(FIELDS) else str(error)) from error


def check_shown(config: ConfigDict, cfg: ModelConfig) -> None:
    """Raises UserError if the settings of images and video do not go together; does not read the files."""
    if config.video_fps is not None and not config.video:
        raise UserError(
            f"config.video_fps={config.video_fps} goes with config.video: write --config.video=DIR, or leave it out"
        )
    if not (config.images or config.video):
        return
    if not (config.prompt or config.prompts):
        raise UserError(
            'config.images and config.video go with --config.prompt="…" or --config.prompts, not with config.input or '
            "a chat over stdin; leave them out, or give a prompt"
        )
    if not (config.chat and cfg.vision_enabled):
        raise UserError(
            "config.images and config.video need a model with a vision tower, and config.chat=True; leave them out"
        )
    check_limits(token_side(cfg), config.min_pixels, config.max_pixels, "--config.")


def _shown(config: ConfigDict, cfg: ModelConfig, tokenizer: Tokenizer) -> list[Shown]:
    """The images and the video for every prompt. Raises UserError as check_shown, and for unreadable files."""
    check_shown(config, cfg)
    if not (config.images or config.video):
        return []
    check_tokenizer(tokenizer, cfg)
    limits = config.min_pixels, config.max_pixels
    shown = read_images(config.images, cfg, *limits)
    return [*shown, read_video(config.video, config.video_fps, cfg, *limits)] if config.video else shown


def check(config: ConfigDict) -> TextOptions:
    """The options for answers in the configuration. Raises UserError for keys that are missing or do not go together,
    and for files that do not exist; does not read the model."""
    if not config.init_from:
        raise UserError(
            "config.init_from is missing; write --config.init_from=DIR, a Hugging Face directory, a workdir or its "
            "checkpoints/N"
        )
    if sum(map(bool, (config.prompt, config.prompts, config.input))) > 1:
        raise UserError(
            "give --config.prompt=\"…\", --config.prompts=\"('…', '…')\" or --config.input=FILE, only one of them"
        )
    if _is_chat(config):
        if not (config.chat and not config.out):
            raise UserError(
                'config.chat=False and config.out need questions; give --config.prompt="…" or --config.input=FILE'
            )
        if not _stdin_is_given():
            raise UserError(
                "give --config.prompt=\"…\", --config.prompts=\"('…', '…')\" or --config.input=FILE, or for a chat a "
                "terminal, a pipe or a file on stdin"
            )
    if config.input and not user_path(config.input, "config.input").is_file():
        raise UserError(f"config.input={config.input}: there is no such file; name a .jsonl file")
    if config.out:
        out = user_path(config.out, "config.out")
        if not out.absolute().parent.is_dir():
            raise UserError(f"config.out={out}: there is no directory {out.parent}; make it first")
        if config.input and out.exists() and out.samefile(user_path(config.input, "config.input")):
            raise UserError(f"config.out={out} is config.input; choose another file for the answers")
    if config.on_bad_row not in ON_BAD_ROW:
        raise UserError(f"config.on_bad_row={config.on_bad_row!r}: write {' or '.join(ON_BAD_ROW)}")
    for name, low in (("batch_size", 1), ("max_tokens", 0)):
        if config[name] < low:
            raise UserError(f"config.{name} must be at least {low}, got {config[name]}")
    tools = read_tools(config.tools)
    try:
        return TextOptions(**{name: config[name] for name in FIELDS} | {"tools": tools})
    except UserError as error:
        raise UserError(f"config.{error}") from error


def _stdin_is_given() -> bool:
    """Whether stdin is a terminal, a pipe, a socket or a file, not /dev/null as in services."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
        return sys.stdin.isatty() or stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)
    except (AttributeError, OSError, ValueError):  # closed, or no file at all
        return False


def _asks(config: ConfigDict, options: TextOptions, rows: int) -> Iterator[Ask]:
    """The usable ones of the first `rows` rows. Rows that are appended meanwhile are left to the next run."""
    return (ask for ask in itertools.islice(_rows(config, options), rows) if not isinstance(ask, BadRow))


def _rows(config: ConfigDict, options: TextOptions) -> Iterator[Ask | BadRow]:
    if config.input:
        return read_asks(user_path(config.input, "config.input"), options)
    return prompt_asks(config.prompt or list(config.prompts), options)


def _request(cfg: ModelConfig, tokenizer: Tokenizer, ask: Ask, shown: Sequence[Shown]) -> Request:
    try:
        return make_request(cfg, tokenizer, ask.content, ask.options, ask.stream, shown)
    except UserError as error:
        key = "config." if ask.place.startswith("config.prompt") and str(error).startswith(FIELDS) else ""
        raise BadRow(f"{ask.place}: {key}{error}") from error


def _passes(
    config: ConfigDict, generator: TextGenerator, asks: Iterable[Ask], summary: Summary, shown: Sequence[Shown]
) -> Iterator[list[tuple[Ask, Answer]]]:
    """Yields after each pass the unfinished rows and those that it finished. Counts in `summary`."""
    asked: dict[int, Ask] = {}

    def requests() -> Iterator[Request]:
        for ask in asks:
            try:
                request = _request(generator.cfg, generator.tokenizer, ask, shown)
            except BadRow:
                if config.on_bad_row != "skip":
                    raise
                summary.bad += 1
                continue
            asked[id(request)] = ask
            yield request

    summary.begin = summary.first = time.perf_counter()
    started = False
    for answers in generator.answer(requests()):
        if not started and any(answer.tokens for answer in answers):
            summary.first, started = time.perf_counter(), True
        yield [(asked[id(answer.row.request)], answer) for answer in answers]
        for answer in answers:
            if answer.finish_reason:
                summary.add(answer)
                del asked[id(answer.row.request)]
    summary.end = time.perf_counter()


def _write(passes: Iterator[list[tuple[Ask, Answer]]], file: AnswerFile | None, rows: int, progress: bool) -> None:
    """Write answers to the file in the order in which they end. Ranks without a file only compute them."""
    start, hidden = (file.count, not progress) if file else (0, True)
    with tqdm(desc="answers", total=rows, initial=start, file=sys.stderr, disable=hidden) as bar:
        for pairs in passes:
            for ask, answer in pairs:
                if answer.finish_reason and file:
                    answer.read()
                    file.write(ask, answer)
                    bar.update()


def _print(passes: Iterator[list[tuple[Ask, Answer]]], several: bool) -> None:
    """Print answers to stdout while they grow, in the order of the rows. If there are several, print prompts above."""
    waiting: dict[int, tuple[Ask, Answer]] = {}
    begun = False
    for pairs in passes:
        waiting.update((ask.number, (ask, answer)) for ask, answer in pairs)
        while waiting:
            ask, answer = next(iter(waiting.values()))
            piece = answer.read()
            if several and not begun and (piece or answer.finish_reason):
                prompt = ask.content if isinstance(ask.content, str) else ask.content[-1]["content"]
                print(f"--- {terminal.shown(prompt, sys.stdout)}")
                begun = True
            print(terminal.shown(piece, sys.stdout), end="", flush=True)
            if not answer.finish_reason:
                break
            raise_error(answer)
            print(flush=True)
            del waiting[ask.number]
            begun = False
