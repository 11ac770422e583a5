"""Benchmarks that a stage runs while it trains."""

import shutil

import pytest

from qwen3f.errors import UserError
from qwen3f.eval import hook, run
from qwen3f.eval.measure import measure
from qwen3f.processes.world import open_world
from qwen3f.stages.configs import pretrain_config
from qwen3f.train import loop
from qwen3f.train.setup import make_setup
from sharding.mesh import parse_mesh
from tests.data.chat.references import REFERENCES
from tests.eval import tiny_model
from tests.eval.eval_runs import configure
from tests.sharding.worlds import run_processes
from tests.train.runs import metrics


def training(place, **changes):
    c = pretrain_config("nano")
    c.model.update({key: getattr(tiny_model.CFG, key) for key in
                    ("hidden_size", "intermediate_size", "head_dim", "num_hidden_layers", "vocab_size")})  # fmt: skip
    c.init_from, c.device = str(place / "hf"), "cpu"
    c.data.update(mixture=f"files@{place / 'text'}", holdout=0.3, num_threads=1, cache=str(place / "cache"))
    c.data.tokenizer = str(place / "hf")
    c.update(steps=4, batch_size=2, seq_len=32, log_every=1)
    c.eval.update(every=2, benchmarks="winogrande,gsm8k", benchmark_root=str(place / "rows"))
    c.eval.update(benchmark_questions=6, benchmark_tokens=4)
    c.checkpoint.every = 2
    c.sample.tokens = 0
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """(last metrics, workdir) of a run on one device."""
    (place / "text").mkdir()
    for i in range(30):
        (place / "text" / f"{i}.txt").write_text(f"document {i} with some words of its own, {i * i}. " * 4)
    workdir = tmp_path_factory.mktemp("trained") / "w"
    return loop.run(training(place), workdir, progress=False), workdir


def test_benchmarks_are_asked_while_a_stage_trains(trained):
    found, workdir = trained
    assert {"bench_winogrande/acc", "bench_gsm8k/exact_match_flexible", "val_loss"} <= found.keys()
    rows = metrics(workdir)
    assert [row["step"] for row in rows if "bench_winogrande/acc" in row] == [2, 4]


def test_a_checkpoint_is_evaluated_alone_with_the_same_score(trained, place, tmp_path):
    workdir = trained[1]
    for step in (2, 4):
        config = configure(place, benchmarks="winogrande", init_from=str(workdir / "checkpoints" / str(step)))
        alone = run.evaluate(config, tmp_path / str(step), progress=False)["benchmarks"]["winogrande"]
        (logged,) = (row["bench_winogrande/acc"] for row in metrics(workdir) if row["step"] == step)
        assert alone["metrics"]["acc"]["value"] == logged
        assert alone["settings"]["model"] == str(workdir / "checkpoints" / str(step))


def of_rank(rank, config, workdir):
    return loop.run(config, workdir, False, open_world(parse_mesh(config.mesh), "cpu", rank))


@pytest.mark.parametrize("mesh", ["tp2", pytest.param("dp2", marks=pytest.mark.nightly)])
def test_ranks_share_the_questions_of_a_stage(mesh, trained, place, tmp_path):
    """Metrics equal those of one device exactly: sums differ by rounding in float32, too little to change an answer."""
    both = run_processes(of_rank, 2, training(place, mesh=mesh), tmp_path / "w")
    for found in both:
        assert {k: v for k, v in found.items() if "bench" in k} == {k: v for k, v in trained[0].items() if "bench" in k}


@pytest.mark.parametrize("changes, words", [
    ({"eval.benchmarks": "winogrand"}, "--config.eval.benchmarks: there is no benchmark 'winogrand'"),
    ({"eval.benchmarks": "docvqa"}, "--config.eval.benchmarks=docvqa: docvqa asks about images, and a stage"),
    ({"eval.benchmark_questions": 0}, "eval.benchmark_questions must be at least 1"),
    ({"eval.benchmark_prompt": "x"}, "--config.eval.benchmark_prompt='x': write raw or chat"),
    ({"eval.benchmark_tokens": 2048}, "--config.eval.benchmark_tokens=2048: 2048 new tokens for gsm8k leave no room"),
    ({"eval.benchmark_tokens": 0, "model.max_position_embeddings": 256}, "=0: 256 new tokens for gsm8k"),
    ({"model.scalar_head": True, "stage": "pretrain"}, "a reward model answers no questions"),
])  # fmt: skip
def test_what_a_stage_cannot_ask_is_said_before_it_starts(place, changes, words):
    with pytest.raises(UserError, match=words):
        hook.check(make_setup(training(place, **changes)))


def test_a_data_set_that_is_not_in_the_root_is_said_with_its_flag(trained, place, tmp_path):
    with pytest.raises(UserError, match="--config.eval.benchmark_root=.* has no directory winogrande"):
        loop.run(training(place, **{"eval.benchmark_root": str(tmp_path)}), tmp_path / "w", progress=False)


def test_benchmarks_of_a_run_are_asked_in_its_model_s_kind_of_chats(place, trained, tmp_path):
    directory = tmp_path / "hf"
    shutil.copytree(place / "hf", directory)
    (directory / "chat_template.jinja").write_text(REFERENCES["thinking-2507"])
    config = training(place, steps=1, init_from=str(directory), **{"eval.benchmark_prompt": "chat"})
    config.data.tokenizer = str(directory)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hook, "measure", lambda *given: seen.extend(measure(*given)) or measure(*given))
        loop.run(config, tmp_path / "w", progress=False)
    assert any("outputs" in record for record in seen)
    assert all(record["prompt"].endswith("<think>\n") for record in seen if "outputs" in record)


def test_questions_are_spread_over_all_subjects():
    assert hook._spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert hook._spread([1, 2], 4) == [1, 2]
