"""The stage eval: its files, resuming by sample, ranks, bad rows, and the errors before anything runs."""

import importlib.metadata
import json
import math
import shutil
import sys

import pytest

from qwen3f.data.chat.template import render
from qwen3f.data.sources.reasoning import FAMILIES
from qwen3f.errors import UserError
from qwen3f.eval import Evaluator, run
from qwen3f.eval.benchmarks import registry
from qwen3f.eval.benchmarks.items import load, place_of
from qwen3f.eval.benchmarks.tasks import task_benchmark
from qwen3f.eval.measure import Settings, measure
from qwen3f.eval.records import Records
from qwen3f.processes.world import World
from qwen3f.tasks.reasoning import ReasoningTask
from tests.data.chat.references import REFERENCES
from tests.eval import benchmark_rows, tiny_model
from tests.eval.eval_runs import configure
from tests.sharding.worlds import run_processes


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    return run.evaluate(configure(place), tmp_path_factory.mktemp("whole") / "e", progress=False)


def same(a, b):
    """Assert that two results of the same questions are equal. Log-likelihoods may differ by 1e-6, for rounding."""
    assert a["benchmarks"].keys() == b["benchmarks"].keys()
    for name in a["benchmarks"]:
        for one, other in zip(a["benchmarks"][name]["samples"], b["benchmarks"][name]["samples"], strict=True):
            one, other = dict(one), dict(other)
            logs = [x.pop("loglikelihoods", []) for x in (one, other)]
            assert logs[0] == pytest.approx(logs[1], rel=1e-6)
            assert one == other
        assert a["benchmarks"][name]["metrics"] == b["benchmarks"][name]["metrics"]


def test_generated_problems_are_asked_of_the_kinds_and_difficulties_that_are_named(place, tmp_path):
    changes = {"benchmarks": "reasoning", "limit": 2, "data.difficulties": "1", "data.problems": 2000}
    config = configure(place, **changes | {"data.kinds": "sequence,number_theory"})
    found = run.evaluate(config, tmp_path / "e", progress=False)["benchmarks"]["reasoning"]
    task = ReasoningTask(kinds=("sequence", "number_theory"), difficulties=(1,), num_problems=2000)
    questions = list(task.questions("heldout"))
    assert set(found["groups"]) == {"sequence", "number_theory"}
    for record in found["samples"]:
        (same,) = (one for one in questions if one.prompt in record["prompt"])
        assert (record["gold"], record["group"]) == (same.gold, same.group[0])
    with pytest.raises(UserError, match="kinds was 'sequence,number_theory' and is now 'sequence'"):
        run.evaluate(configure(place, **changes | {"data.kinds": "sequence"}), tmp_path / "e", progress=False)
    with pytest.raises(UserError, match="--config.data.kinds is 'sequences': write different ones of"):
        run.check(configure(place, **changes | {"data.kinds": "sequences"}))
    with pytest.raises(UserError, match="has letters, which nothing here reads"):
        run.check(configure(place, **changes | {"data.kinds": "sequence,letters"}))


@pytest.mark.parametrize("name, kinds", FAMILIES.items())
def test_a_family_of_generated_problems_is_asked_for_its_own_kinds(place, name, kinds):
    ((benchmark, _),) = run.check(configure(place, benchmarks=name))
    assert benchmark.task.kinds == kinds


def test_results_hold_every_question_and_the_settings_that_decide(place, whole, tmp_path, capsys):
    out = run.evaluate(configure(place, limit=2, shots=2, benchmarks="mmlu,gsm8k"), tmp_path / "e", progress=False)
    assert json.loads((tmp_path / "e" / "results.json").read_text()) == out
    mmlu = out["benchmarks"]["mmlu"]
    assert (mmlu["questions"], set(mmlu["groups"])) == (4, set(benchmark_rows.SUBJECTS))
    assert mmlu["settings"]["shots"] == 2 < whole["benchmarks"]["mmlu"]["settings"]["shots"] == 5
    sample = mmlu["samples"][0]
    assert sample["prompt"].count("Answer:") == 3
    assert len(sample["loglikelihoods"]) == 4
    text = (tmp_path / "e" / "results.md").read_text()
    assert "| mmlu | acc | " in text
    assert "- mmlu: 2 shots, raw prompt, test of " in text
    assert "the first 2 questions of each subject" in text
    assert "at most 6 new tokens, greedy, " in text
    config = configure(place, limit=1, benchmarks="gsm8k", metrics="official")
    run.evaluate(config, tmp_path / "official", progress=False)  # gsm8k has the harness's definition only
    assert "metrics of harness" in (tmp_path / "official" / "results.md").read_text()
    printed = capsys.readouterr().out
    assert text in printed
    assert "tokens computed on this rank" in printed


def test_a_run_that_was_cut_off_goes_on_by_sample(place, whole, tmp_path, monkeypatch):
    """The run breaks off after ten writes and leaves half a line. Resumed, it asks only questions without a record."""
    config, asked, writes = configure(place, chunk=1), [], []
    measure, add = run.measure, Records.add

    def counted(ev, benchmark, questions, settings):
        asked.extend((benchmark.name, one.number) for one in questions)
        return measure(ev, benchmark, questions, settings)

    def broken(self, records):
        if len(writes) == 10:
            with self._path.open("ab") as file:
                file.write(b'{"number": 3, "na')
            raise KeyboardInterrupt
        add(self, records)
        writes.append(records)

    monkeypatch.setattr(run, "measure", counted)
    monkeypatch.setattr(Records, "add", broken)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(config, tmp_path / "e", progress=False)
    assert not (tmp_path / "e" / "results.json").exists()
    monkeypatch.setattr(Records, "add", add)
    asked.pop()  # its answer was computed but not written: it is asked again
    found = run.evaluate(config, tmp_path / "e", progress=False)
    assert len(asked) == len(set(asked)) == sum(x["questions"] for x in whole["benchmarks"].values())
    same(found, whole)
    again = len(asked)
    same(run.evaluate(config, tmp_path / "e", progress=False), whole)
    assert len(asked) == again


def rank_of(rank, place, workdir):
    import torch.distributed as dist

    world = World(rank, 2, rank, group=dist.group.WORLD)
    return run.evaluate(configure(place, chunk=2, benchmarks="mmlu,gsm8k,winogrande"), workdir, False, world)


def test_two_ranks_find_what_one_finds(place, whole, tmp_path):
    first, second = run_processes(rank_of, 2, place, tmp_path / "e")
    assert second == {}
    same(first, {"benchmarks": {name: whole["benchmarks"][name] for name in first["benchmarks"]}})
    assert len(first["benchmarks"]) == 3


def test_a_batch_size_changes_nothing(place, whole, tmp_path):
    same(run.evaluate(configure(place, batch_tokens=700, chunk=3), tmp_path / "e", progress=False), whole)


@pytest.mark.parametrize("changes, words", [
    ({"init_from": ""}, "--config.init_from is missing"),
    ({"init_from": "nowhere"}, "nowhere"),
    ({"benchmarks": ""}, "--config.benchmarks is empty; write one or more of mmlu"),
    ({"benchmarks": "gsm8"}, "no benchmark 'gsm8'; did you mean gsm8k?"),
    ({"benchmarks": "gsm8k,mmlu,gsm8k"}, "names gsm8k twice"),
    ({"benchmarks": "gsm8k@"}, "names no directory after the @; write gsm8k@DIR"),
    ({"benchmarks": "gsm8k@nowhere"}, "There is no directory nowhere for gsm8k"),
    ({"benchmarks": "reasoning@x"}, "--config.benchmarks=reasoning@x: reasoning is generated and reads no directory"),
    ({"benchmarks": "docvqa@x"}, "docvqa asks about images"),
    ({"prompt": "raw", "thinking": True}, "--config.thinking=True needs --config.prompt=chat"),
    ({"prompt": "chat", "thinking": True}, "mmlu scores choices right after the prompt"),
    (
        {"benchmarks": "gsm8k", "prompt": "chat", "thinking": True, "chat_template": "instruct-2507", "mesh": "dp9"},
        "never thinks: write --config.thinking=False",
    ),
    ({"prompt": "spoken"}, "--config.prompt='spoken': write raw or chat"),
    ({"shots": 6}, "mmlu, abstract_algebra, has 5 examples in the split 'dev', and --config.shots=6 needs 6"),
    ({"shots": -1}, "--config.shots=-1: write at least 0"),
    ({"benchmarks": "math", "shots": 5}, "--config.shots=5: math has 4 examples at most"),
    ({"benchmarks": "gsm8k", "max_new_tokens": 4096}, "leaves no room for a prompt in the model's 4096 positions"),
    ({"samples": 4}, "would all be the same: write --config.temperature"),
    ({"mesh": "tp2"}, "--config.mesh=tp2: questions are shared out by dp alone"),
    ({"limit": -1}, "--config.limit=-1: write at least 0"),
    ({"metrics": "mine"}, "--config.metrics='mine': write harness or official"),
    ({"attention": "flash", "benchmarks": "gsm8k"}, "head_dim is 16; write --config.attention=auto"),
])  # fmt: skip
def test_what_cannot_run_is_one_line(place, tmp_path, changes, words, monkeypatch):
    monkeypatch.setattr("qwen3f.processes.ranks.local_devices", lambda device: 8)
    monkeypatch.setattr("kernels.flash_attention.fits", lambda head_dim: head_dim > 16)
    with pytest.raises(UserError) as caught:
        run.run(configure(place, **changes), tmp_path / "e", progress=False)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "e" / "results.json").exists()


def test_examples_that_are_not_there_name_the_flag_that_asks_for_them(place, tmp_path):
    copy = shutil.copytree(place / "rows" / "gsm8k", tmp_path / "gsm8k")
    for file in [path for path in copy.rglob("*train*") if path.is_file()]:
        file.unlink()
    for shots in (None, 2):
        with pytest.raises(UserError, match="'train'.*: gsm8k's examples, .*; put it there, or write --config.shots=0"):
            load(registry.TEXT[1], str(copy), shots, 0)


def test_a_data_set_that_is_not_there_says_where_to_put_it(place, tmp_path, monkeypatch):
    words = "has no directory mmlu: put the files of cais/mmlu into .*mmlu, or write mmlu@DIR"
    with pytest.raises(UserError, match=words):
        run.run(configure(place, **{"data.root": str(tmp_path), "benchmarks": "mmlu,gsm8k"}), tmp_path / "e")

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("qwen3f.data.sources.adapters.hub._load", offline)
    with pytest.raises(UserError, match="cannot be read from the Hub.*write gsm8k@DIR, or --config.data.root=DIR"):
        run.run(configure(place, **{"data.root": "", "benchmarks": "gsm8k"}), tmp_path / "e")


@pytest.mark.parametrize("version, words", [("4.13.2", "not 4.13.2; write pip install"), (None, "not installed")])
def test_what_a_score_needs_is_asked_for_before_anything_is_computed(place, tmp_path, version, words, monkeypatch):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(UserError, match=words):
        run.run(configure(place, benchmarks="math"), tmp_path / "e", progress=False)
    monkeypatch.setitem(sys.modules, "qwen3f.sandbox", None)
    with pytest.raises(UserError, match="humaneval runs programs in qwen3f.sandbox, which cannot be imported"):
        run.run(configure(place, benchmarks="humaneval"), tmp_path / "e", progress=False)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


BAD_ROWS = {
    "mmlu": [
        ("answer", 4),
        ("answer", "x"),
        ("answer", None),
        ("answer", True),
        ("answer", 1.9),
        ("answer", math.inf),
        ("choices", ["a", "b"]),
        ("subject", ""),
    ],
    "gsm8k": [("question", None), ("answer", 5)],
    "arc_challenge": [("answerKey", "Z"), ("choices", {"text": ["a"], "label": ["A"]}), ("choices", "a")],
    "hellaswag": [("label", ""), ("label", "4"), ("endings", []), ("ctx_b", None)],
    "winogrande": [("answer", "3"), ("answer", ""), ("sentence", "no gap"), ("option1", None)],
    "triviaqa": [("answer", {"value": "x"}), ("answer", {"aliases": []}), ("question", "")],
    "math": [("solution", "no box"), ("problem", None), ("type", None)],
    "humaneval": [("entry_point", None), ("test", "")],
}


@pytest.mark.parametrize("name, column, value", [(n, c, v) for n, pairs in BAD_ROWS.items() for c, v in pairs])
def test_a_bad_row_is_named_by_file_and_row(name, column, value, tmp_path):
    split = "validation" if "validation" in benchmark_rows.SPLITS[name] else "test"
    rows = [dict(row) for row in benchmark_rows.SPLITS[name][split][:3]]
    rows[1][column] = value
    write(tmp_path / f"{split}.jsonl", rows)
    ((benchmark, _),) = registry.parse_benchmarks(name, "--config.benchmarks")
    with pytest.raises(UserError, match=rf"{split}.jsonl:2 .*{column.split('.')[0][:6]}|{split}.jsonl:2 has"):
        load(benchmark, str(tmp_path), 0, 0)
    del rows[1][column]
    write(tmp_path / f"{split}.jsonl", rows)
    with pytest.raises(UserError, match=rf"{split}.jsonl:2 has no column '{column}'"):
        load(benchmark, str(tmp_path), 0, 0)
    write(tmp_path / f"{split}.jsonl", [])
    with pytest.raises(UserError, match="holds no row"):
        load(benchmark, str(tmp_path), 0, 0)


def test_one_benchmark_may_lie_in_the_root_itself(tmp_path):
    ((benchmark, _),) = registry.parse_benchmarks("gsm8k", "x")
    assert place_of(benchmark, "", str(tmp_path), alone=True) == str(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    assert place_of(benchmark, "", str(tmp_path), alone=True) == str(tmp_path / "gsm8k")
    assert place_of(benchmark, "there", str(tmp_path), alone=True) == "there"


def test_a_task_is_asked_in_chats_and_judged_by_itself(tmp_path):
    """Right answers count; one whose thought does not end does not. The prompt is that of the chat template."""
    benchmark = task_benchmark(ReasoningTask(num_problems=600))
    asked = load(benchmark, "", None, 0)
    questions = list(ReasoningTask(num_problems=600).questions("heldout"))
    assert [one.item.gold for one in asked] == [one.gold for group in dict.fromkeys(q.group[0] for q in questions)
                                                for one in questions if one.group[0] == group]  # fmt: skip
    texts = [f"<think>\nso\n</think>\n\n\\boxed{{{one.item.gold}}}" for one in asked]
    assert [benchmark.score(one.item, [text])["accuracy"] for one, text in zip(asked, texts)] == [1.0] * len(asked)
    assert benchmark.score(asked[0].item, ["<think>\nnever ends"]) == {"accuracy": 0.0}
    ev = Evaluator(tiny_model.CFG, tiny_model.weights(), tiny_model.tokenizer(tmp_path))
    (record,) = measure(ev, benchmark, asked[1:2], Settings(max_new_tokens=4, thinking=True))
    assert record["prompt"] == render(
        [{"role": "user", "content": asked[1].item.prompt}], add_generation_prompt=True, enable_thinking=True
    )


@pytest.mark.parametrize("kind", ["instruct-2507", "thinking-2507"])
def test_a_model_is_asked_in_its_own_kind_of_chats(place, tmp_path, kind):
    """The settings name the kind; a mode that it lacks is refused; a thought that the prompt opens is in the answer."""
    shutil.copytree(place / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(REFERENCES[kind])
    thinks = kind == "thinking-2507"
    changes = {"init_from": str(tmp_path / "hf"), "benchmarks": "gsm8k", "prompt": "chat", "shots": 0, "limit": 2}
    with pytest.raises(
        UserError, match=f"{kind}, which {'always' if thinks else 'never'} thinks: write --config.thinking={thinks}, or"
    ):
        run.evaluate(configure(place, thinking=not thinks, **changes), tmp_path / "no", progress=False)
    config = configure(place, thinking=thinks, **changes)
    found = run.evaluate(config, tmp_path / "e", progress=False)["benchmarks"]["gsm8k"]
    assert found["settings"]["chat_template"] == kind
    for one in found["samples"]:
        assert one["prompt"].endswith("<|im_start|>assistant\n" + "<think>\n" * thinks)
        assert all(text.startswith("<think>\n") == thinks for text in one["outputs"])
    run.evaluate(config, tmp_path / "e", progress=False)
    config.chat_template = "hybrid"
    with pytest.raises(UserError, match="chat_template"):
        run.evaluate(config, tmp_path / "e", progress=False)


def test_samples_of_a_question_differ_and_do_not_depend_on_company(place, tmp_path):
    config = configure(place, benchmarks="gsm8k", samples=3, temperature=1.0, limit=4)
    first = run.evaluate(config, tmp_path / "a", progress=False)["benchmarks"]["gsm8k"]["samples"]
    outputs = [one["outputs"] for one in first]
    assert all(len(set(texts)) > 1 for texts in outputs)
    config.update(chunk=1, batch_tokens=600)
    second = run.evaluate(config, tmp_path / "b", progress=False)["benchmarks"]["gsm8k"]["samples"]
    assert [one["outputs"] for one in second] == outputs
