"""What a trial is told, and the configurations of its runs: the project's own experiments with what is said here."""

import ast
import dataclasses
from collections.abc import Sequence

from ml_collections import ConfigDict

from qwen3f import cli, presets, usage
from qwen3f.data.sources.reasoning import DIFFICULTIES, PROCEDURES
from qwen3f.errors import UserError

ARMS = ("grpo", "more_sft", "rejection")
FORMS = ("base", "start", "sft", "grpo", "sample")  # of configurations, to which single keys may be set
BASE = {"nano": "demo.py", "debug": "pretrain_s1.py:debug"}
TASK = "procedures"
GENTLER = 0.3  # of the cold start's rate, for fine-tuning that goes on from there
ROW = 448  # tokens of a row: three worked sortings of five numbers
WARMUP = 5  # steps of a run without an end
ENDLESS = 1_000_000  # steps of a run that its time ends


_POSITIVE = (
    *("base_seconds", "minutes", "solutions", "questions", "tests", "start_steps", "start_rates", "start_every"),
    *("patience", "round_questions", "round_steps"),
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """
    Attributes:
      preset: nano or debug. device: auto, cpu or cuda. seeds: of cold starts and arms; 0,1,2.
      out: directory of all runs and of the result. base: a pretrained workdir; "": made in out, once for all seeds.
      base_seconds: of pretraining, at most. minutes: of each arm, from the start of its process to its last step.
      kinds, difficulties: of the questions. solutions: worked ones that the cold start and more_sft have.
      questions: that GRPO and rejection sampling may ask, both splits together. tests: fresh questions at the end.
      new_tokens: where an answer is cut off, everywhere.
      start_steps: of the cold start at each of its rates, at most. start_rates: how many, each GENTLER times the one
        before. start_every, patience: steps between two evaluations, and how many of them without a better one end a
        rate.
      round_questions, round_steps: of a round of rejection sampling.
      together: run the arms (of all seeds) at the same time, else one after the other. arms: which of them; arms= makes
        and measures the cold starts alone.
      changes: keys of single configurations, as ("grpo", "schedule.peak_lr", 3e-4); the command line writes
        grpo.schedule.peak_lr=3e-4.
    """

    preset: str = "nano"
    device: str = "auto"
    seeds: tuple[int, ...] = (0,)
    out: str = "runs/trial"
    base: str = ""
    base_seconds: float = 90.0
    minutes: float = 3.0
    kinds: str = "letters"
    difficulties: str = "1"
    solutions: int = 500
    questions: int = 16_000
    tests: int = 500
    new_tokens: int = 128
    start_steps: int = 1000
    start_rates: int = 2
    start_every: int = 50
    patience: int = 3
    round_questions: int = 500
    round_steps: int = 60
    together: bool = False
    arms: tuple[str, ...] = ARMS
    changes: tuple[tuple[str, str, object], ...] = ()

    def __post_init__(self) -> None:
        for name, chosen, known in (
            ("preset", (self.preset,), tuple(BASE)),
            ("arms", self.arms, ARMS),
            ("kinds", self.kinds.split(","), PROCEDURES),
            ("difficulties", self.difficulties.split(","), tuple(map(str, DIFFICULTIES))),
        ):
            if not set(chosen) <= set(known):
                raise UserError(f"{name}={','.join(chosen)}: write {' or '.join(known)}")
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: write a number above 0")
        if not self.seeds:
            raise UserError("seeds= is empty; write such as seeds=0,1,2")


def parse(words: Sequence[str]) -> Trial:
    """key=value words as a Trial. Raises UserError."""
    fields = {field.name: field for field in dataclasses.fields(Trial)}
    given: dict[str, object] = {}
    changes = []
    for word in words:
        name, equals, text = word.partition("=")
        form, dot, key = name.partition(".")
        if not equals or (name not in fields and not (dot and form in FORMS)) or name == "changes":
            raise UserError(
                f"{word!r}: write key=value; keys are {', '.join(fields)}, and such as grpo.schedule.peak_lr"
            )
        if dot:
            changes.append((form, key, _literal(text)))
        else:
            given[name] = _value(word, text, fields[name].default)
    trial = Trial(**given, changes=tuple(changes))
    start_config(trial, "W", trial.seeds[0], 0)  # what it refuses is said before anything is trained
    return trial


def _value(word: str, text: str, default: object) -> object:
    if isinstance(default, tuple):
        kind = type(default[0])
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return tuple(_as(word, part, kind) for part in parts)
    if isinstance(default, bool):
        if text not in ("True", "False"):
            raise UserError(f"{word}: write True or False")
        return text == "True"
    return _as(word, text, type(default))


def _as(word: str, text: str, kind: type) -> object:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{word}: {text!r} is no {kind.__name__}") from None


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# -- configurations ----------------------------------------------------------------------------------------------------


def base_config(trial: Trial) -> ConfigDict:
    """Pretraining on other texts: none of the trial's task."""
    config = _load(BASE[trial.preset], trial, "base")
    config.data.mixture = "embedded=0.2,reasoning=0.8"
    config.model.vocab_size = 1024 if trial.preset == "nano" else presets.get(trial.preset).vocab_size
    config.eval.every = config.checkpoint.every = 0
    config.sample.prompts = ()
    if trial.preset == "debug":
        config.seq_len, config.batch_size, config.steps = 512, 64, 2000
    return _changed(config, trial, "base")


def start_config(trial: Trial, weights: str, seed: int, number: int) -> ConfigDict:
    """The cold start on few worked solutions, at its rate of that number."""
    config = _sft(trial, weights, seed + 100 * number)
    config.steps = trial.start_steps
    _hold(config, GENTLER**number)
    _watch(config, trial.start_every)
    config = _changed(config, trial, "start")
    if config.steps <= config.schedule.warmup:
        raise UserError(f"start_steps={config.steps}: write more than the {config.schedule.warmup:g} steps of warmup")
    return config


def more_sft_config(trial: Trial, start: str, seed: int) -> ConfigDict:
    """The same solutions for as long as the arms have; its best checkpoint by held-out accuracy stays."""
    config = _sft(trial, start, seed + 1000)
    config.steps = ENDLESS
    _hold(config, GENTLER)
    _watch(config, trial.start_every)
    return _changed(config, trial, "sft")


def round_config(trial: Trial, weights: str, chats: str, seed: int) -> ConfigDict:
    """Fine-tuning on what a round of rejection sampling kept, beside the worked solutions, at a rate that falls to 0 as
    the cold start's experiment has it."""
    config = _sft(trial, weights, seed)
    config.data.mixture = f"chats@{chats}=0.8,{TASK}=0.2"
    config.steps = trial.round_steps
    config.schedule.peak_lr *= GENTLER
    _watch(config, trial.round_steps)
    return _changed(config, trial, "sft")


def _hold(config: ConfigDict, share: float) -> None:
    """A constant rate, that share of the experiment's: a run that may end at any step has no time to fall."""
    config.schedule.kind, config.schedule.warmup = "constant", WARMUP
    config.schedule.peak_lr *= share


def _watch(config: ConfigDict, every: int) -> None:
    """Held-out questions and checkpoints each so many steps; the best one stays."""
    config.eval.every = config.checkpoint.every = every
    config.eval.max_rows = 16  # the time is for learning
    config.checkpoint.keep, config.checkpoint.keep_best = 1, 1
    config.checkpoint.best_metric, config.checkpoint.best_mode = "val_accuracy", "max"


def grpo_config(trial: Trial, start: str, seed: int) -> ConfigDict:
    """Reinforcement: many questions, answers only. An answer that is right in part counts in part, so that fewer groups
    are all alike."""
    config = _load("grpo.py", trial, "grpo")
    config.init_from, config.seed = start, seed
    config.tasks = TASK
    _questions(config, trial)
    config.steps, config.schedule.kind = ENDLESS, "constant"
    config.schedule.warmup = WARMUP
    config.seq_len = ROW
    config.rollout.max_new_tokens = config.eval.max_new_tokens = trial.new_tokens
    config.eval.every, config.checkpoint.every = 20, 0
    config.eval.questions = 100
    config.samples.keep = 5
    config.rewards = "correct=0.5,places=0.5"
    config.rollout.draws = 1
    if trial.preset == "nano":
        config.batch_size, config.rollout.samples = 16, 8
        config.rollout.microbatch_rows = 4
        config.rollout.old_logprobs = "sampler"  # in float32, one update of what was just sampled: the ratio is 1
    return _changed(config, trial, "grpo")


def sample_config(trial: Trial, weights: str, out: str, seed: int, first: int) -> ConfigDict:
    """A round of rejection sampling. first: the round's number; each asks other questions."""
    config = _load("rejection_sample.py", trial, "sample")
    config.init_from, config.out, config.seed = weights, out, seed
    config.task = TASK
    config.questions, config.samples, config.keep = trial.round_questions, 4, 2
    _questions(config, trial)
    config.data.problem_seed = first
    config.max_new_tokens, config.temperature = trial.new_tokens, 1.0
    config.batch_size = 256 if trial.preset == "nano" else 1024
    return _changed(config, trial, "sample")


def _sft(trial: Trial, weights: str, seed: int) -> ConfigDict:
    config = _load("sft_cold_start.py", trial, "sft")
    config.init_from, config.seed = weights, seed
    config.data.mixture = config.eval.task = config.data.judge = TASK
    _questions(config, trial)
    config.data.max_samples, config.data.max_heldout = trial.solutions, 200
    config.data.problems = max(2 * trial.solutions, 4000)
    config.seq_len, config.batch_size = ROW, 8 if trial.preset == "nano" else 16
    config.eval.every, config.eval.questions, config.eval.max_new_tokens = 0, 200, trial.new_tokens
    config.show_samples = 1
    return config


def _questions(config: ConfigDict, trial: Trial) -> None:
    config.data.kinds = trial.kinds
    config.data.difficulties = trial.difficulties
    config.data.problems = trial.questions


def _load(file: str, trial: Trial, form: str) -> ConfigDict:
    preset = "" if ":" in file or file in ("demo.py", "rejection_sample.py") else f":{trial.preset}"
    config = cli.load_experiment(f"{usage.ROOT / 'experiments' / file}{preset}")
    config.device = trial.device
    if "compile" in config:
        config.compile = "off"  # what compiling takes is a good part of such short runs
    return config


def _changed(config: ConfigDict, trial: Trial, form: str) -> ConfigDict:
    """With the changes that the trial has for this form. Raises UserError for a key that is not there."""
    for name, key, value in trial.changes:
        if name != form:
            continue
        *sections, last = key.split(".")
        section = config
        for part in sections:
            section = section.get(part) if isinstance(section, ConfigDict) else None
        if not isinstance(section, ConfigDict) or last not in section:
            raise UserError(f"{form}.{key}: there is no such key")
        section[last] = value
    return config
