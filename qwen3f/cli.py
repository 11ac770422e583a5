"""The code of launch.py: parses flags, with errors that say what to write, and runs the stage."""

import errno
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Collection, MutableMapping
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags.config_flags import UnsupportedOperationError

from qwen3f import stages, usage
from qwen3f.errors import TrainingError, UserError
from qwen3f.files import is_file
from qwen3f.flag_hints import as_flags, check_value, hint
from qwen3f.terminal import printable
from qwen3f.train import checks

# config.stage -> the module whose run(config, workdir, progress) does it; all other stages train
TOOLS = {
    "eval": "qwen3f.eval.run",
    "export_hf": "qwen3f.interop.export",
    "generate": "qwen3f.infer.run",
    "inspect": "qwen3f.checkpoint.inspect",
    "pipeline": "qwen3f.pipeline.run",
    "rejection_sample": "qwen3f.eval.rejection",
}
TRAIN = "qwen3f.train.launch"
INHERIT = "qwen3f.train.inherit"
PLAN = "qwen3f.plan.run"  # replaces TRAIN if config.plan is set: prints what the mesh would do
OWN_FLAGS = ("config", "workdir", "progress", "verbosity", "help", "flagfile")  # ours, and the useful ones of absl
LONGEST_ERROR = 10_000  # characters of a message that are printed
NO_CONFIG = "--config is missing; write e.g. --config experiments/demo.py"

# How many times a waiting thread of libgomp (torch's OpenMP library on Linux) spins before it sleeps. libgomp's default
# is 300,000. On a machine with more work than processors, the spinning thread then takes the processor from the thread
# that it waits for: a step of the demo's model on two cores took 3.3 to 7.2 s at a load of 7 to 12, and 0.8 to 0.9 s
# with 1,000 spins; OMP_WAIT_POLICY=passive 0.4 to 1.0 s, but 0.25 s for 0.20 s with the cores to itself. Too few spins
# make the many small operators of decoding slow. Two runs each with 1,000, 3,000 and 10,000 spins, in tokens/s:
#   the demo trains: 12,461 and 11,924; 11,709 and 11,683; 11,811 and 12,239; beside two busy processes 4,123 and 4,312;
#     4,304 and 4,107; 3,170 and 3,612
#   nano draws (64 rows): 7,589 and 8,480; 9,193 and 9,427; 8,643 and 8,371
_SPINS = "3000"


def yield_while_waiting(environment: MutableMapping[str, str]) -> None:
    """Set how torch's threads wait for each other, unless the user has. Call this before torch is imported."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = _SPINS


def with_flag_files(argv: list[str]) -> list[str]:
    """The command line, where the lines of each --flagfile replace it.

    If a file cannot be read, prints one line on stderr and exits with code 2.
    """
    try:
        return [*argv[:1], *flags.FLAGS.read_flags_from_files(argv[1:])]
    except (flags.Error, ValueError) as error:
        problem = f"{error.__context__ or error}; write --flagfile=FILE, a text with a flag on each line"
        sys.exit(report(UserError(problem), 2))


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flags parser, for app.run. If parsing fails, prints one line on stderr and exits with code 2.

    An experiment that is not in the current directory is searched beside launch.py. --help prints the help and exits
    with code 0.
    """
    try:
        argv = usage.locate(argv)
        names = usage.given(argv)
        if len(names) > 1:
            raise UserError(f"--config is given {len(names)} times, {' and '.join(names)}; write one of them")
        if usage.asked(argv):
            name = "".join(names)
            print(usage.of_experiment(name, load_experiment(name)) if name else usage.overview())
            sys.exit(0)
        _check_overrides(argv)
        return _parsed(argv)
    except flags.UnrecognizedFlagError as error:
        problem: Exception = UserError(f"unknown flag --{error.flagname}; {hint(error.flagname, OWN_FLAGS)}")
    except (flags.Error, UnsupportedOperationError, UserError) as error:
        problem = error
    sys.exit(report(problem, 2))


def run_stage(config: ConfigDict, workdir: Path, progress: bool, chosen: Collection[str] = ()) -> None:
    """Run the stage that `config.stage` names, or with config.plan its plan. Raises UserError for an unknown stage.

    chosen: keys that the user has set, such as "model.rope_theta". A run that starts from weights takes the weights'
      model except for these keys (see qwen3f.train.inherit). In a pipeline, values of the whole pipeline do not replace
      these keys of a stage.
    """
    known = [*stages.names(), *TOOLS]
    if config.stage not in known and "." not in config.stage:  # with a dot: the import path of the user's own stage
        raise UserError(f"config.stage={config.stage!r} is unknown; use one of {', '.join(known)}")
    if not progress and not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    if config.stage not in TOOLS:
        checks.check_workdir(workdir)
    checks.check(config, workdir)
    # imports torch, so it comes after all checks that do not need torch
    stage = importlib.import_module(TOOLS.get(config.stage) or (PLAN if config.get("plan") else TRAIN))
    if config.stage not in TOOLS:
        config = importlib.import_module(INHERIT).inherit_model(config, workdir, chosen)
    if config.stage == "pipeline":
        stage.run(config, workdir, progress, chosen)
    else:
        stage.run(config, workdir, progress)


def full_disk(error: OSError) -> TrainingError | None:
    """The error to report if `error` was caused by a full disk; None for other errors."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    where = f" (writing {error.filename})" if error.filename else ""
    return TrainingError(
        f"{error.strerror}{where}: make room on the disk of --workdir and --config.data.cache, or choose another one; "
        "the same command then resumes from the last checkpoint"
    )


def report(error: Exception, code: int, config: ConfigDict | None = None) -> int:
    """Print an error on one line, where flags replace the keys of `config`. Returns the exit code.

    A message may quote a file. So control characters are escaped, and at most LONGEST_ERROR characters are printed.
    """
    text = printable(" ".join(str(error).split()))
    if len(text) > LONGEST_ERROR:
        text = f"{text[:LONGEST_ERROR]} … ({len(text) - LONGEST_ERROR:,} characters more)"
    print(f"error: {as_flags(text, _keys(config)) if config is not None else text}", file=sys.stderr, flush=True)
    return code


def _parsed(argv: list[str]) -> list[str]:
    """The arguments that remain after absl has parsed the flags. Raises absl's errors, and UserError for those of
    ml_collections."""
    try:
        return flags.FLAGS(argv)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_overrides(argv: list[str]) -> None:
    """Raises UserError for a --config.key that the experiment does not have, or a value of another type.

    ml_collections would raise errors with a traceback.
    """
    experiment, overrides = next(iter(usage.given(argv)), None), []
    for i, argument in enumerate(argv[1:], 1):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith(("--config.", "-config.")):
            apart = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("-") else None
            overrides.append((flag, value if equals else apart))
        elif argument.startswith(("--noconfig.", "-noconfig.")):
            overrides.append((flag, None))
    if experiment is None:
        if overrides:
            raise UserError(NO_CONFIG)
        return
    config = load_experiment(experiment)
    known = {f"config.{key}" for key in _keys(config)}
    for flag, value in overrides:
        name = flag.removeprefix("no")
        if name not in known:
            raise UserError(f"unknown key --{name}; {hint(name, sorted(known))}")
        *sections, last = name.removeprefix("config.").split(".")
        section = functools.reduce(lambda section, key: section[key], sections, config)
        if flag != name and section.get_type(last) is not bool:
            raise UserError(f"--{flag}: the form --noKEY is only for keys that are True or False; write --{name}=VALUE")
        if value is not None:
            check_value(name, value, section.get_type(last))
            _check_fixed(name, value, section[last])


def _check_fixed(name: str, value: str, there: object) -> None:
    """Raises UserError for keys that the command line cannot change: the stage, and values without a text form.

    there: the key's value in the experiment.
    """
    if not usage.can_be_written(there):
        raise UserError(f"--{name} cannot be set; did you mean --config.stages, or --config.skip?")
    if name.rpartition(".")[2] != "stage" or value == there or ("." in value and there not in TOOLS):
        return  # with a dot: the import path of the user's own stage
    if there == "pipeline":
        raise UserError(f"--{name}={value}: this experiment is a pipeline; did you mean --config.stages={value}?")
    raise UserError(
        f"--{name}={value}: this experiment is for the stage {there!r}; give --config an experiment for {value!r}, or "
        f"leave --{name} out"
    )


def load_experiment(experiment: str) -> ConfigDict:
    """The configuration of `experiments/X.py[:argument]`, as its get_config returns it."""
    file, colon, argument = experiment.partition(":")
    if not file:
        raise UserError("--config names no file; write e.g. --config experiments/demo.py")
    if not is_file(file):
        there = sorted(str(p) for p in Path("experiments").glob("*.py")) or list(usage.experiments())
        meant = f"did you mean {file}.py?" if f"{file}.py" in there else hint(file, there)
        raise UserError(f"--config: there is no file '{file}'; {meant}")
    spec = importlib.util.spec_from_file_location("experiment", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"--config: {error.filename}, line {error.lineno}: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"--config: {file} has no get_config(); see experiments/demo.py")
    arguments = (argument,) if colon else ()
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError:
        what, write = (f"takes no ':{argument}'", file) if colon else ("needs an argument", f"{file}:ARGUMENT")
        raise UserError(f"--config: {file} {what}; write --config {write}") from None
    config = module.get_config(*arguments)
    if not isinstance(config, ConfigDict) or not isinstance(config.get("stage"), str):
        raise UserError(
            f"--config: get_config() of {file} must return a ConfigDict with a stage, such as config.stage='pretrain'; "
            "see experiments/demo.py"
        )
    return config


def _keys(config: ConfigDict) -> list[str]:
    out: list[str] = []
    for key, value in config.items():
        out += [f"{key}.{below}" for below in _keys(value)] if isinstance(value, ConfigDict) else [key]
    return out
