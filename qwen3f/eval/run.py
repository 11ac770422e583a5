"""The stage eval: benchmarks asked of a model, on one device or on several that share out the questions."""

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from qwen3f import model
from qwen3f.config import ModelConfig
from qwen3f.data.chat.corpus import ChatDataConfig, generated_problems
from qwen3f.data.chat.kinds import HYBRID, TemplateKind, check_chosen, check_thinking
from qwen3f.data.multimodal.samples import check_tokenizer
from qwen3f.data.sources.reasoning import FAMILIES, ReasoningSource
from qwen3f.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError
from qwen3f.eval.benchmarks.benchmark import Benchmark
from qwen3f.eval.benchmarks.items import Asked, load, place_of
from qwen3f.eval.benchmarks.registry import parse_benchmarks
from qwen3f.eval.benchmarks.tasks import task_benchmark
from qwen3f.eval.evaluator import Evaluator
from qwen3f.eval.measure import PIXELS, Settings, measure, question, summary
from qwen3f.eval.prompts import is_chat, template_of
from qwen3f.eval.records import Records
from qwen3f.eval.report import table
from qwen3f.files import user_path, write_atomically
from qwen3f.interop import source
from qwen3f.model.attention import check_heads
from qwen3f.processes import ranks
from qwen3f.processes.world import ALONE, World
from qwen3f.tasks.registry import open_task
from qwen3f.train.choices import find_device, find_dtype
from qwen3f.train.lock import only_writer
from qwen3f.vision.preprocess import check_limits, token_side
from sharding.mesh import MeshShape, parse_mesh

RESULTS, TABLE = "results.json", "results.md"
_DIGITS = 16  # of a fingerprint, kept and shown
_SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))
_QUESTION = ("group", "question", "prompt", "gold", "choices", "continuations", "image")  # what a score depends on
_PROBLEMS = ("kinds", "difficulties", "problems", "problem_seed")  # of config.data: which generated ones are asked


@dataclasses.dataclass(frozen=True)
class Exam:
    """A benchmark with its questions and settings. values: what its records depend on, plain JSON. kind: of the chat
    template; HYBRID if nothing is asked in chats."""

    benchmark: Benchmark
    asked: Sequence[Asked]
    settings: Settings
    values: Mapping[str, Any]
    kind: TemplateKind = HYBRID


def run(config: ConfigDict, workdir: Path, progress: bool = True) -> None:
    """Evaluate as `config` says, resuming what `workdir` holds. On a mesh: start the ranks, or run as one of them.

    Raises UserError, before any process starts, for what cannot run, and as ranks.decide.
    """
    check(config)
    device = find_device(config.device).type
    shape = find_mesh(config.mesh, ranks.all_devices(os.environ, device))
    decision = ranks.decide(os.environ, shape.size, ranks.local_devices(device), device, sys.argv)
    if decision.mode == "start":
        if code := ranks.start(decision, sys.argv, restarts=0):
            sys.exit(code)
    elif decision.mode == "join":
        with ranks.joined(decision, shape, timeout=config.collective_timeout) as world:
            evaluate(config, workdir, progress, world)
    else:
        evaluate(config, workdir, progress)


def check(config: ConfigDict, cfg: ModelConfig | None = None) -> list[tuple[Benchmark, str]]:
    """The benchmarks and their local copies. Raises UserError for what cannot run; reads only the model's
    configuration.

    cfg: configuration of a model that need not exist yet; by default that of config.init_from.
    """
    if not config.init_from:
        raise UserError("--config.init_from is missing; write --config.init_from=W")
    parsed = parse_benchmarks(config.benchmarks, "--config.benchmarks")
    data = ChatDataConfig(**{key: config.data[key] for key in _PROBLEMS})
    problems = generated_problems(data, [benchmark.name for benchmark, _ in parsed])
    named = [(_narrowed(benchmark, problems), place) for benchmark, place in parsed]
    for key, low in (("limit", 0), ("batch_tokens", 0), ("chunk", 1)):
        if config[key] < low:
            raise UserError(f"--config.{key}={config[key]}: write at least {low}")
    cfg = cfg or source.read_model_config(config.init_from)
    for benchmark, _ in named:
        settings_of(config).check(benchmark, cfg.vision_enabled)
        if is_chat(benchmark, config.prompt):
            mode = config.thinking if benchmark.generation else None
            check_chosen(config.chat_template, [mode], "--config.thinking")
        if benchmark.vision:
            check_limits(token_side(cfg), config.min_pixels, config.max_pixels, "--config.")
    return [(one, place_of(one, place, config.data.root, len(named) == 1)) for one, place in named]


def _narrowed(benchmark: Benchmark, problems: ReasoningSource) -> Benchmark:
    """A benchmark of generated problems, limited to the kinds and difficulties of `problems`; any other benchmark
    unchanged. Raises UserError if none of the kinds is the benchmark's."""
    if benchmark.name not in FAMILIES:
        return benchmark
    return task_benchmark(open_task(benchmark.name, "--config.benchmarks", problems))


def settings_of(config: ConfigDict) -> Settings:
    return Settings(**{name: config[name] for name in _SETTINGS})


def find_mesh(text: str, devices: int) -> MeshShape:
    """The mesh of config.mesh. Raises UserError for axes other than dp."""
    shape = parse_mesh(text, devices)
    if shape.size != shape.dp:
        raise UserError(f"--config.mesh={text}: questions are shared out by dp alone, each rank has the whole model; "
                        f"write dp{shape.size}")  # fmt: skip
    return shape


def evaluate(config: ConfigDict, workdir: Path, progress: bool = True, world: World = ALONE) -> dict[str, Any]:
    """What results.json holds; {} on ranks other than 0. All ranks of `world` call this together; rank 0 writes.

    The same command resumes a stopped evaluation; a larger limit adds to what is there.
    """
    with only_writer(workdir, world):
        exams, place = world.together(lambda: _exams(config, world), UserError)
        files = world.together(lambda: _files(config, workdir, exams, place) if world.main else [], UserError)
        done = world.first([sorted(file.done) for file in files])
        ev: Evaluator | None = None
        for number, exam in enumerate(exams):
            there = set(done[number])
            left = [one for one in exam.asked if one.number not in there]
            if left and ev is None:  # where nothing is left to ask, no model is built
                ev = _open(config, place)
            if left and ev is not None:
                _ask(ev, exam, left, config.chunk, files[number] if files else None, (world, progress))
        if not world.main:
            return {}
        dtype = find_dtype(config.dtype, find_device(config.device))
        results = {"model": place, "dtype": str(dtype).removeprefix("torch."), "benchmarks": {}}
        for exam, file in zip(exams, files):
            records = [file.done[one.number] for one in exam.asked]
            found = {**summary(records), "settings": dict(exam.values) | {"limit": config.limit}}
            results["benchmarks"][exam.benchmark.name] = {**found, "samples": records}
        text = table(results)
        write_results(workdir / RESULTS, results)
        write_atomically(workdir / TABLE, text.encode())
        print(text, flush=True)
        if ev is not None:
            print(_work(ev), flush=True)
        return results


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write `results` as JSON, piece by piece: the whole text would take several times the memory of the records."""
    pieces = json.JSONEncoder(indent=1, ensure_ascii=False).iterencode(results)
    write_atomically(path, (piece.encode() for piece in itertools.chain(pieces, "\n")))


def _exams(config: ConfigDict, world: World) -> tuple[list[Exam], str]:
    """(the benchmarks with their questions, the place of the model)."""
    place, settings, exams = source.pinned(config.init_from), settings_of(config), []
    dtype = str(find_dtype(config.dtype, find_device(config.device))).removeprefix("torch.")
    named = check(config)
    in_chats = any(is_chat(benchmark, settings.prompt) for benchmark, _ in named)
    tokenizer = _tokenizer(config, place) if in_chats else None
    if any(benchmark.vision for benchmark, _ in named):
        check_tokenizer(_tokenizer(config, place), source.read_model_config(place))
    for benchmark, where in named:
        values = dataclasses.asdict(settings) | {
            "shots": benchmark.shots.count if settings.shots is None else settings.shots,
            "max_new_tokens": settings.tokens(benchmark),
            "split": benchmark.split,
            "source": _absolute(where) if where else benchmark.hub_id or benchmark.name,
            "model": place,
            "dtype": dtype,
        }
        if not benchmark.official:
            values |= {"metrics": "harness"}
        if not benchmark.vision:
            values = {key: value for key, value in values.items() if key not in PIXELS}
        if benchmark.task:
            values |= {"prompt": "chat", "metrics": "the task", **{key: config.data[key] for key in _PROBLEMS}}
        kind = HYBRID
        if tokenizer and is_chat(benchmark, settings.prompt):
            kind = template_of(benchmark, settings.prompt, tokenizer)
            values |= {"chat_template": kind.name}
            check_thinking(kind, settings.thinking if benchmark.generation else None, "--config.thinking")
        asked = load(benchmark, where, config.shots, config.limit, world)
        exams.append(Exam(benchmark, asked, settings, values, kind))
    return exams, place


def _absolute(where: str) -> str:
    return str(user_path(where, "config.benchmarks").resolve())


def _files(config: ConfigDict, workdir: Path, exams: Sequence[Exam], place: str) -> list[Records]:
    """The records on disk. Raises UserError if they are of another model, of other questions, or of other right answers
    than there are now: the files in a directory may have changed since."""
    model_of = {
        "weights": source.weights_digest(place)[:_DIGITS],
        "tokenizer": _tokenizer(config, place).fingerprint[:_DIGITS],
    }
    files = []
    for exam in exams:
        file = Records(workdir, exam.benchmark.name, {**exam.values, **model_of})
        for one in exam.asked:
            if record := file.done.get(one.number):
                now = question(exam.benchmark, one, exam.settings, exam.kind)
                if changed := [key for key in _QUESTION if record.get(key) != now.get(key)]:
                    raise UserError(
                        f"--workdir={workdir}: question {one.number} of {exam.benchmark.name}, {record['name']}, has "
                        f"another {changed[0]} than its record; choose another --workdir, or put the data set back"
                    )
        files.append(file)
    return files


def _tokenizer(config: ConfigDict, place: str) -> Tokenizer:
    return load_tokenizer(source.tokenizer_path(place), config.chat_template)


def _open(config: ConfigDict, place: str) -> Evaluator:
    device = find_device(config.device)
    cfg, tokenizer = source.read_model_config(place), _tokenizer(config, place)
    check_heads(cfg, config.attention)
    params = source.read_params(place, cfg, device, find_dtype(config.dtype, device))
    execution = model.Execution(attention=config.attention)
    return Evaluator(cfg, params, tokenizer, batch_tokens=config.batch_tokens, execution=execution)


def _ask(
    ev: Evaluator, exam: Exam, left: Sequence[Asked], chunk: int, file: Records | None, shown: tuple[World, bool]
) -> None:
    """Ask the questions `left`, `chunk` for each rank at a time; rank 0 keeps the records in `file`."""
    world, progress = shown
    total, bar_off = len(exam.asked), not (progress and world.main)
    with tqdm(
        desc=exam.benchmark.name, total=total, initial=total - len(left), file=sys.stderr, disable=bar_off
    ) as bar:
        for first in range(0, len(left), chunk * world.size):
            part = left[first : first + chunk * world.size]
            if exam.benchmark.vision:
                own = [one for one in part if one.of_rank(world)]
            else:
                own = part[len(part) * world.rank // world.size : len(part) * (world.rank + 1) // world.size]
            records = world.together(partial(measure, ev, exam.benchmark, own, exam.settings), UserError)
            together = [record for some in world.gather(records) for record in some]
            if file is not None:
                file.add(together)
            bar.update(len(part))


def _work(ev: Evaluator) -> str:
    """How many tokens of choices this rank computed, and how many there would be without sharing beginnings."""
    counts = ev.counts
    if not counts["computed"]:
        return f"batches of {ev.batch_tokens:,} tokens"
    return (
        f"batches of {ev.batch_tokens:,} tokens; {counts['computed']:,} tokens computed on this rank for choices "
        f"({counts['asked']:,} without sharing beginnings), and {counts['padding']:,} of padding"
    )
