"""Benchmarks while a stage trains: config.eval.benchmarks, asked whenever the stage's evaluations run.

It is one more evaluator of the stage, named "bench", so scores are logged as bench_NAME/METRIC. On a mesh, while the
benchmarks run, each rank holds the whole model in the compute dtype and answers its share of the questions.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from ml_collections import ConfigDict

from qwen3f.errors import UserError
from qwen3f.eval.benchmarks.benchmark import Benchmark
from qwen3f.eval.benchmarks.items import Asked, load, place_of
from qwen3f.eval.benchmarks.registry import parse_benchmarks
from qwen3f.eval.evaluator import Evaluator
from qwen3f.eval.measure import Record, Settings, estimates, measure
from qwen3f.eval.prompts import FORMS, template_of
from qwen3f.params import Params
from qwen3f.train import stage as S
from qwen3f.train.setup import Setup, at_least
from sharding.state import whole_params

NAME = "bench"
CHUNK = 64  # questions of each rank between two checks whether the run should stop


class Exam(NamedTuple):
    """A benchmark, those of its questions that are asked, and the settings."""

    benchmark: Benchmark
    questions: list[Asked]
    settings: Settings


def check(setup: Setup) -> None:
    """Raises UserError if config.eval.benchmarks cannot run in this stage. Reads no data."""
    config = setup.config
    if not config.eval.benchmarks:
        return
    if setup.model.scalar_head:
        raise UserError(f"--config.eval.benchmarks={config.eval.benchmarks}: a reward model answers no questions; "
                        "leave the flag out")  # fmt: skip
    at_least(config, "eval.benchmark_questions", 1)
    at_least(config, "eval.benchmark_tokens", 0)
    if config.eval.benchmark_prompt not in FORMS:
        raise UserError(f"--config.eval.benchmark_prompt={config.eval.benchmark_prompt!r}: write {' or '.join(FORMS)}")
    settings, positions = _settings(config), setup.model.max_position_embeddings
    for benchmark, _ in _named(config):
        if benchmark.vision:
            raise UserError(
                f"--config.eval.benchmarks={config.eval.benchmarks}: {benchmark.name} asks about images, and a stage "
                "asks in words alone; leave it out, and ask it of a checkpoint by experiments/eval.py"
            )
        settings.check(benchmark)
        if (tokens := settings.tokens(benchmark)) >= positions:
            raise UserError(
                f"--config.eval.benchmark_tokens={config.eval.benchmark_tokens}: {tokens} new tokens for "
                f"{benchmark.name} leave no room for a prompt in the model's {positions} positions; write fewer"
            )


def with_benchmarks(run: S.Run, stage: S.Stage) -> S.Stage:
    """The stage with an evaluator for config.eval.benchmarks; the stage unchanged if that is empty.

    The questions are read here. Raises UserError as items.load and prompts.template_of do.
    """
    config = run.setup.config
    if not config.eval.benchmarks:
        return stage
    named, settings = _named(config), _settings(config)
    asked = []
    for benchmark, directory in named:
        place = place_of(benchmark, directory, config.eval.benchmark_root, len(named) == 1, "eval.benchmark_root")
        questions = _spread(load(benchmark, place, None, 0), config.eval.benchmark_questions)
        # a model that always thinks does so here too; others answer at once
        always = template_of(benchmark, settings.prompt, stage.tokenizer).always and benchmark.generation is not None
        asked.append(Exam(benchmark, questions, dataclasses.replace(settings, thinking=always)))
    evaluator = S.Evaluator(config.eval.every, _make(run, stage, asked), _say(asked))
    return dataclasses.replace(stage, evaluators={**stage.evaluators, NAME: evaluator})


def _named(config: ConfigDict) -> list[tuple[Benchmark, str]]:
    return parse_benchmarks(config.eval.benchmarks, "--config.eval.benchmarks")


def _settings(config: ConfigDict) -> Settings:
    return Settings(prompt=config.eval.benchmark_prompt, max_new_tokens=config.eval.benchmark_tokens)


def _spread(asked: Sequence[Asked], most: int) -> list[Asked]:
    """At most `most` questions, evenly spaced over all of them, so that every subject has its share."""
    count = min(most, len(asked))
    return [asked[i * len(asked) // count] for i in range(count)]


def _make(run: S.Run, stage: S.Stage, asked: Sequence[Exam]) -> Callable[[Params], dict[str, float]]:
    setup = run.setup
    cfg = setup.model.replace(gradient_checkpointing="none")
    execution = dataclasses.replace(setup.execution, compile="off")  # batches differ in shape

    world = run.world

    def own(part: Sequence[Asked]) -> Sequence[Asked]:
        return part[len(part) * world.rank // world.size : len(part) * (world.rank + 1) // world.size]

    def ask(params: Params) -> dict[str, float]:
        whole = whole_params(setup.model, params, setup.layout, setup.compute_dtype)
        ev = Evaluator(cfg, whole, stage.tokenizer, execution=execution)
        values: dict[str, float] = {}
        for benchmark, questions, settings in asked:
            found: list[Record] = []
            for first in range(0, len(questions), CHUNK * world.size):
                if run.stopping():
                    raise S.Interrupted
                part = questions[first : first + CHUNK * world.size]
                records = world.together(partial(measure, ev, benchmark, own(part), settings), UserError)
                marks = [{"metrics": record["metrics"]} for record in records]
                found += [mark for some in world.gather(marks) for mark in some]
            values |= {f"{benchmark.name}/{metric}": one.value for metric, one in estimates(found).items()}
        return values

    return ask


def _say(asked: Sequence[Exam]) -> Callable[[Mapping[str, float]], str]:
    counts = {benchmark.name: len(questions) for benchmark, questions, _ in asked}

    def say(values: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {100 * x:.1f}% of {counts[name.partition('/')[0]]}" for name, x in values.items())

    return say
