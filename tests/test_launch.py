"""launch.py as users run it: errors of one line with exit code 2, and the contract's command on real text."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

import launch as launch_module
from qwen3f import cli, flag_hints
from qwen3f.errors import UserError
from sharding.mesh import MeshShape, parse_mesh


def launch(*arguments):
    return subprocess.run(
        [sys.executable, "launch.py", *arguments], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--config", "experiments/demo.py", "--config.stepz=3"), "did you mean config.steps?"),
        (("--config", "experiments/demo.py", "--config.lr=3"), "did you mean config.schedule.peak_lr?"),
        (("--config", "experiments/demo.py", "--config.checkpoints.every=3"), "did you mean config.checkpoint.every?"),
        (("--config", "experiments/demo.py", "--config.steps.x=3"), "unknown key --config.steps.x"),
        (
            ("--config", "experiments/demo.py", "--config.model.rope_scaling.factor=4"),
            "config.model.rope_scaling is one value: write --config.model.rope_scaling=",
        ),
        (("--config", "experiments/demo.py", "--config.optimizer=muon"), "did you mean config.optimizer.kind?"),
        (("--config", "experiments/demo.py", "--config.n_layers=3"), "did you mean config.model.num_hidden_layers?"),
        (
            ("--config", "experiments/demo.py", "--config.model.n_layer=3"),
            "did you mean config.model.num_hidden_layers?",
        ),
        (("--config", "experiments/demo.py", "--config.learning_rate=3"), "did you mean config.schedule.peak_lr?"),
        (("--config", "experiments/demo.py", "--config.max_grad_norm=3"), "did you mean config.optimizer.clip_norm?"),
        (("--config", "experiments/demo.py", "--config.optimizer.zzz=3"), "known there: config.optimizer.b1, "),
        (("--config", "experiments/demo.py", "--config.steps=abc"), "--config.steps=abc: write a whole number"),
        (("--config", "experiments/demo.py", "--config.steps", "1.5"), "--config.steps=1.5: write a whole number"),
        (("--config", "experiments/demo.py", "--config.schedule.peak_lr=x"), "peak_lr=x: write a number"),
        (("--config", "experiments/demo.py", "--config.data.streaming=maybe"), "streaming=maybe: write True or False"),
        (
            ("--config", "experiments/demo.py", "--config.model=nano"),
            "config.model is a section; it has config.model.a",
        ),
        (("--config=experiments/demoo.py",), "did you mean experiments/demo.py?"),
        (("--config=experiments/demo",), "there is no file 'experiments/demo'; did you mean experiments/demo.py?"),
        (("--config=experiments/demo.py:big",), "takes no ':big'"),
        (("--config=experiments/pretrain_s1.py:nan",), "did you mean 'nano'?"),
        (("--config=",), "--config names no file; write e.g. --config experiments/demo.py"),
        (("--config",), "--config names no file"),
        (("--config", "x" * 300), "there is no file 'xxxx"),
        (("--config", "experiments/pipeline.py", "--config.stage=grpo"), "did you mean --config.stages=grpo?"),
        (
            ("--config", "experiments/pipeline.py", "--config.chain=3"),
            "did you mean --config.stages, or --config.skip?",
        ),
        (("--config", "experiments/pipeline.py", "--config.set.grpo.stage=dpo"), "is for the stage 'grpo'"),
        (
            ("--config", "experiments/demo.py", "--config.stage", "eval"),
            "give --config an experiment for 'eval', or leave",
        ),
        (("--config", "experiments/eval.py", "--config.stage=a.stage"), "is for the stage 'eval'"),
        (("--config", "experiments/demo.py", "--noconfig.stepz"), "did you mean config.steps?"),
        (("--config", "experiments/demo.py", "-noconfig.steps"), "True or False; write --config.steps=VALUE"),
        (("--config.steps=3",), "--config is missing; write e.g. --config experiments/demo.py"),
    ],
)
def test_command_lines_are_checked_before_anything_runs(arguments, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?").replace(".", r"\.")):
        cli._check_overrides(["launch.py", *arguments])


OWN = {
    "def get_config(x): return x": "own.py needs an argument; write --config .*own.py:ARGUMENT",
    "def get_config(): return None": "must return a ConfigDict with a stage",
    "def get_config(): return {'stage': 'pretrain'}": "must return a ConfigDict with a stage",
    "from ml_collections import ConfigDict as get_config": "must return a ConfigDict with a stage",
    "def get_config():\n    return (": "own.py, line 2: '.' was never closed",
}


@pytest.mark.parametrize("text", OWN)
def test_an_experiment_of_one_s_own_that_is_none(text, tmp_path):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError, match=OWN[text]):
        cli.load_experiment(str(tmp_path / "own.py"))


def test_flags_of_a_file_are_checked_as_the_command_line_s(tmp_path, capsys):
    (tmp_path / "flags").write_text("# of a colleague\n--config.stepz=3\n")
    argv = cli.with_flag_files(["launch.py", "--config", "experiments/demo.py", f"--flagfile={tmp_path / 'flags'}"])
    with pytest.raises(UserError, match="did you mean config.steps"):
        cli._check_overrides(argv)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for wrong in ("=/nope", f"={tmp_path}", f"={tmp_path / 'binary'}", ""):
        with pytest.raises(SystemExit, match="2"):
            cli.with_flag_files(["launch.py", f"--flagfile{wrong}"])
        assert capsys.readouterr().err.endswith("write --flagfile=FILE, a text with a flag on each line\n")


def test_a_flag_that_is_unknown_is_told_those_of_launch_py(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.parse_flags(["launch.py", "--zzz=3"])
    assert "known: config, workdir, progress, verbosity, help, flagfile\n" in capsys.readouterr().err


def test_a_stage_of_one_s_own_may_be_written():
    cli._check_overrides(["launch.py", "--config", "experiments/demo.py", "--config.stage=my.module"])
    cli._check_overrides(["launch.py", "--config", "experiments/demo.py", "--config.stage=pretrain"])


def test_hints_are_short_and_name_keys_of_ours():
    known = sorted(f"config.{key}" for key in cli._keys(cli.load_experiment("experiments/pretrain_s1.py:nano")))
    for name in ("config.zzzz", "config.qqq", "config.model.zzzz", "config.model"):
        assert len(flag_hints.hint(name, known)) < 700
    assert flag_hints.hint("config.zzzz", known).endswith(" more (--help lists all)")
    assert set(flag_hints.ALIASES) <= {key.removeprefix("config.") for key in known}


def test_keys_are_named_as_flags():
    keys = cli._keys(cli.load_experiment("experiments/demo.py"))
    for text, named in (
        ("data.packing is 'x', config.steps=3 too", "--config.data.packing is 'x', --config.steps=3 too"),
        ("write data.streaming=False.", "write --config.data.streaming=False."),
        ("--config.data.cache of /tmp/data.cache", "--config.data.cache of /tmp/data.cache"),
        ("model.layers.self_attn and config.json", "model.layers.self_attn and config.json"),
        ("the steps and config.data", "the steps and config.data"),
    ):
        assert flag_hints.as_flags(text, keys) == named


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--config", "experiments/demo.py", "--config.steps=many"), "write a whole number"),
        (("--config", "experiments/demo.py", "--confg.steps=3"), "unknown flag --confg.steps"),
        (("--config", "experiments/demo.py", "--config.data.mixture=files@/no/such/dir"), "/no/such/dir"),
        (
            ("--config", "experiments/pipeline.py", "--config=experiments/demo.py"),
            "--config is given 2 times, experiments/pipeline.py and experiments/demo.py; write one of them",
        ),
        (("--config", "x" * 300, "--help"), "there is no file 'xxxx"),
        (("--config", "experiments/demo.py", "--noconfig.report=1"), "does not take an argument"),
    ],
)
def test_errors_are_one_line_and_exit_2(tmp_path, arguments, words):
    done = launch(*arguments, "--workdir", str(tmp_path / "w"))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_contract_command_trains_on_the_embedded_corpus(tmp_path):
    """The command that others build on, on the text of Python's standard library. The second time it ends at once."""
    command = [
        "--config", "experiments/pretrain_s1.py:nano", "--config.data.mixture=embedded", "--config.steps=30",
        "--config.batch_size=8", "--config.seq_len=128", f"--workdir={tmp_path / 'w'}", "--config.eval.max_docs=2",
    ]  # fmt: skip
    done = launch(*command)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 10, 20, 30]
    wanted = {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "grad_norm_clipped",
        "tokens_per_sec",
        "mfu",
        "tokens_seen",
    }
    assert all(wanted <= line.keys() for line in lines)
    assert "aux_loss" not in lines[0]  # the model has no experts
    assert lines[0]["loss"] == pytest.approx(8.84, abs=0.2)  # ln 4096 + D·σ²/2, the spread of random logits
    assert lines[-1]["loss"] < 7.0
    assert lines[-1]["val_bpb"] < 8.0
    assert "step 30/30" in done.stderr
    assert "sample 0" in done.stdout
    assert f"done at step 30; in {tmp_path / 'w'}: checkpoints/30, metrics.jsonl" in done.stdout
    assert f"--config.init_from={tmp_path / 'w'} --config.chat=False" in done.stdout.partition("what next:")[2]
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "report.html", "run.json", "tensorboard", "tokenizer",
    ]  # fmt: skip

    again = launch(*command, "--noprogress")
    assert again.returncode == 0, again.stderr
    assert "nothing left to train" in again.stdout
    assert again.stderr == ""  # no bar, and no log line below a warning

    # The answers may go to a program that ends early, as in "… | head".
    generate = ["--config=experiments/generate.py", f"--config.init_from={tmp_path / 'w'}", "--config.prompt=import"]
    command = [sys.executable, "launch.py", *generate, "--config.chat=False", "--config.max_new_tokens=8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141, errors
    assert "Traceback" not in errors


def test_what_an_error_quotes_of_a_file_does_nothing_to_a_terminal(capsys):
    assert cli.report(UserError("model_type is \x1b[2J\x1b]52;c;AAAA\x07 or \x9b1m\nnext"), 2) == 2
    assert capsys.readouterr().err == "error: model_type is \\x1b[2J\\x1b]52;c;AAAA\\x07 or \\x9b1m next\n"
    cli.report(UserError("x" * 10**6), 2)
    assert capsys.readouterr().err == f"error: {'x' * 10_000} … (990,000 characters more)\n"


@pytest.mark.parametrize("user", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_yield_while_they_wait_unless_the_user_chose(user):
    program = "import os, runpy, sys; sys.argv = ['launch.py', '--help']\n"
    program += "try: runpy.run_path('launch.py', run_name='__main__')\n"
    program += "finally: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules, file=sys.stderr)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))} | user
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    wanted = "3000" if not user else user.get("GOMP_SPINCOUNT")
    assert done.stderr.split() == [str(wanted), "False"]  # in time: torch has not been imported


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_without_room_is_one_line(number, tmp_path, monkeypatch, capsys):
    def fail(argv):
        raise OSError(number, os.strerror(number), str(tmp_path / "cache"))

    monkeypatch.setattr(launch_module, "main", fail)
    with pytest.raises(SystemExit, match="1"):
        launch_module.guarded([])
    said = capsys.readouterr().err
    assert said.startswith(f"error: {os.strerror(number)} (writing {tmp_path / 'cache'}): make room")
    assert said.count("\n") == 1
    number = errno.EPERM
    with pytest.raises(PermissionError):  # an error of ours keeps its traceback
        launch_module.guarded([])


def workdir_of(monkeypatch, *arguments):
    """The workdir that launch.py would use."""
    asked = []
    monkeypatch.setattr(cli, "run_stage", lambda config, workdir, progress, chosen: asked.append(workdir))
    with flagsaver.flagsaver():
        flags.FLAGS(["launch.py", "--config=experiments/demo.py", *arguments])
        launch_module.main([])
    return asked[0]


def test_a_workdir_may_begin_with_a_home_and_is_never_empty(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert workdir_of(monkeypatch) == Path("runs/demo")
    assert workdir_of(monkeypatch, "--workdir=~/W") == Path("/home/me/W")
    with pytest.raises(UserError, match="--workdir is empty; write a directory, or leave it out for runs/demo"):
        workdir_of(monkeypatch, "--workdir", "")
    with pytest.raises(UserError, match="--workdir: there is no home directory for ~nobody-of-that-name; write"):
        workdir_of(monkeypatch, "--workdir=~nobody-of-that-name/W")


def test_meshes_are_parsed():
    assert parse_mesh("dp8,tp2,pp4") == MeshShape(dp=8, tp=2, pp=4)
    assert parse_mesh("dp8,tp2,pp4").size == 64
    assert parse_mesh("").size == 1
    for text, words in (
        ("db8", "did you mean 'dp'"),
        ("dp", "an axis and a size"),
        ("dp2,dp4", "stands twice"),
        ("dp0", "at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            parse_mesh(text)
