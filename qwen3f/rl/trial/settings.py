"""The settings of a trial, and the configurations of its runs: the project's experiments with changes."""

import ast
import dataclasses
from collections.abc import Sequence

from ml_collections import ConfigDict

from qwen3f import cli, presets, usage
from qwen3f.data.sources.reasoning import DIFFICULTIES, PROCEDURES
from qwen3f.errors import UserError

ARMS = ("grpo", "more_sft", "rejection")
FORMS = ("base", "start", "sft", "grpo", "sample")  # configurations whose keys the command line can set
BASE = {"nano": "demo.py", "debug": "pretrain_s1.py:debug"}
TASK = "procedures"
GENTLER = 0.3  # rate of later fine-tuning over the first rate; each further rate of a cold start is again this much
ROW = 448  # tokens of a row: enough for three worked sortings of five numbers
WARMUP = 5  # warmup steps of a run with a constant rate
ENDLESS = 1_000_000  # steps of a run that ends by its time


_POSITIVE = (
    *("base_seconds", "minutes", "solutions", "questions", "tests", "start_steps", "start_rates", "start_every"),
    *("patience", "round_questions", "round_steps"),
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """The settings of a trial.

    Attributes:
      preset: nano or debug.
      device: auto, cpu or cuda.
      seeds: of cold starts and arms, such as 0,1,2.
      out: directory of all runs and of the result.
      base: a pretrained workdir; "": pretrain one in `out`, once for all seeds.
      base_seconds: seconds of pretraining, at most.
      minutes: time of each arm, from the start of its process to its last step.
      kinds, difficulties: of the questions.
      solutions: number of worked solutions for the cold start and more_sft.
      questions: number of questions for GRPO and rejection sampling, both splits together.
      tests: number of new questions at the end.
      new_tokens: length of an answer, at most, in all runs.
      start_steps: steps of the cold start at each of its rates, at most.
      start_rates: number of these rates; each is GENTLER times the one before.
      start_every: steps between two evaluations of the cold start. patience: a rate ends after this many evaluations
        without a better one.
      round_questions, round_steps: questions and training steps of a round of rejection sampling.
      together: run the arms of all seeds at the same time, else one after the other.
      arms: which arms to run; arms= only makes and measures the cold starts.
      changes: keys of single configurations, such as ("grpo", "schedule.peak_lr", 3e-4); on the command line
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
    known = [name for name in fields if name != "changes"]  # which the keys of configurations make
    given: dict[str, object] = {}
    changes = []
    for word in words:
        name, equals, text = word.partition("=")
        form, dot, key = name.partition(".")
        if not equals or (name not in known and not (dot and form in FORMS)):
            raise UserError(
                f"{word!r}: write key=value, where key is one of {', '.join(known)}, or a key of a configuration, "
                "such as grpo.schedule.peak_lr"
            )
        if dot:
            changes.append((form, key, _literal(text)))
        else:
            given[name] = _value(word, text, fields[name].default)
    trial = Trial(**given, changes=tuple(changes))
    start_config(trial, "W", trial.seeds[0], 0)  # so that its errors come before anything is trained
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
        raise UserError(f"{word}: {text!r} is not of the type {kind.__name__}") from None


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# -- configurations ----------------------------------------------------------------------------------------------------


def base_config(trial: Trial) -> ConfigDict:
    """Pretraining, on texts that are not of the trial's task."""
    config = _load(BASE[trial.preset], trial, "base")
    config.data.mixture = "embedded=0.2,reasoning=0.8"
    config.model.vocab_size = 1024 if trial.preset == "nano" else presets.get(trial.preset).vocab_size
    config.eval.every = config.checkpoint.every = 0
    config.sample.prompts = ()
    if trial.preset == "debug":
        config.seq_len, config.batch_size, config.steps = 512, 64, 2000
    return _changed(config, trial, "base")


def start_config(trial: Trial, weights: str, seed: int, number: int) -> ConfigDict:
    """The cold start on few worked solutions. number: 0 for the first rate, and so on."""
    config = _sft(trial, weights, seed + 100 * number)
    config.steps = trial.start_steps
    _hold(config, GENTLER**number)
    _watch(config, trial.start_every)
    config = _changed(config, trial, "start")
    if config.steps <= config.schedule.warmup:
        raise UserError(f"start_steps={config.steps}: write more than the {config.schedule.warmup:g} steps of warmup")
    return config


def more_sft_config(trial: Trial, start: str, seed: int) -> ConfigDict:
    """More fine-tuning on the same solutions until the time is over; keeps the best checkpoint by held-out accuracy."""
    config = _sft(trial, start, seed + 1000)
    config.steps = ENDLESS
    _hold(config, GENTLER)
    _watch(config, trial.start_every)
    return _changed(config, trial, "sft")


def round_config(trial: Trial, weights: str, chats: str, seed: int) -> ConfigDict:
    """Fine-tuning on the answers of a round of rejection sampling and on the worked solutions. The rate falls to 0, as
    in experiments/sft_cold_start.py."""
    config = _sft(trial, weights, seed)
    config.data.mixture = f"chats@{chats}=0.8,{TASK}=0.2"
    config.steps = trial.round_steps
    config.schedule.peak_lr *= GENTLER
    _watch(config, trial.round_steps)
    return _changed(config, trial, "sft")


def _hold(config: ConfigDict, share: float) -> None:
    """Sets a constant rate, `share` of the experiment's: a run that may end at any step cannot plan a decay."""
    config.schedule.kind, config.schedule.warmup = "constant", WARMUP
    config.schedule.peak_lr *= share


def _watch(config: ConfigDict, every: int) -> None:
    """Evaluates and saves every `every` steps, and keeps the best checkpoint."""
    config.eval.every = config.checkpoint.every = every
    config.eval.max_rows = 16  # few, to leave the time for training
    config.checkpoint.keep, config.checkpoint.keep_best = 1, 1
    config.checkpoint.best_metric, config.checkpoint.best_mode = "val_accuracy", "max"


def grpo_config(trial: Trial, start: str, seed: int) -> ConfigDict:
    """Reinforcement on many questions, with known answers only. Half of the reward is for the parts of an answer that
    are right, so that fewer groups have equal rewards."""
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
        config.rollout.old_logprobs = "sampler"  # float32 and one update per step: sampler and trainer agree
    return _changed(config, trial, "grpo")


def sample_config(trial: Trial, weights: str, out: str, seed: int, first: int) -> ConfigDict:
    """A round of rejection sampling. first: the number of the round; each round asks other questions."""
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
        config.compile = "off"  # compiling would take much of the time of such short runs
    return config


def _changed(config: ConfigDict, trial: Trial, form: str) -> ConfigDict:
    """Applies the trial's changes for this form. Raises UserError for a key that does not exist."""
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
