"""Runs an experiment: python launch.py --config experiments/X.py[:preset] [--workdir DIR] [--config.key=value …].

The same command resumes from the workdir's last checkpoint. Wrong input prints one line and exits with code 2; a run
that fails later exits with code 1.
"""

import os
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from qwen3f import cli
from qwen3f.errors import TrainingError, UserError
from qwen3f.files import user_path

sys.argv = cli.with_flag_files(sys.argv)  # before --config is defined, because ml_collections then reads sys.argv
_CONFIG = config_flags.DEFINE_config_file("config", None, "experiments/X.py[:preset]", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; default: runs/ and the experiment's name.")
_PROGRESS = flags.DEFINE_bool("progress", True, "Show progress bars on stderr.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; overrides are written --config.key=value")
    if _CONFIG.value is None:
        raise UserError(cli.NO_CONFIG)
    name = Path(flags.FLAGS["config"].config_filename.partition(":")[0]).stem
    if _WORKDIR.value == "":
        raise UserError(f"--workdir is empty; write a directory, or leave it out for runs/{name}")
    workdir = user_path(_WORKDIR.value or f"runs/{name}", "--workdir")
    chosen = config_flags.get_override_values(flags.FLAGS["config"])
    cli.run_stage(_CONFIG.value, workdir, _PROGRESS.value, chosen.keys())


def guarded(argv: list[str]) -> None:
    try:
        main(argv)
    except UserError as error:
        sys.exit(cli.report(error, 2, _CONFIG.value))
    except TrainingError as error:
        sys.exit(cli.report(error, 1, _CONFIG.value))
    except BrokenPipeError:  # the reader of stdout has exited, as in "… | head"; else Python also complains at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # the shell's exit code for SIGPIPE
    except OSError as error:
        if (problem := cli.full_disk(error)) is None:
            raise
        sys.exit(cli.report(problem, 1))


if __name__ == "__main__":
    cli.yield_while_waiting(os.environ)
    app.run(guarded, flags_parser=cli.parse_flags)
