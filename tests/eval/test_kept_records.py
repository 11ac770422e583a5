"""Records of an evaluation: a question keeps its number, and records of other models or questions are refused."""

import json
import shutil
import tracemalloc

import pytest

from qwen3f import params
from qwen3f.errors import UserError
from qwen3f.eval import Evaluator, measure, run
from qwen3f.eval.benchmarks import registry
from qwen3f.eval.benchmarks.items import load
from qwen3f.eval.benchmarks.tasks import task_benchmark
from qwen3f.eval.compare import compare
from qwen3f.eval.generation import Written
from qwen3f.interop import hf
from qwen3f.tasks.reasoning import ReasoningTask
from tests.eval import benchmark_rows, tiny_model
from tests.eval.eval_runs import configure


def evaluate(place, workdir, **changes):
    return run.evaluate(configure(place, **changes), workdir, progress=False)["benchmarks"]


def copy_of(name, directory, change=lambda row: row):
    """Write a local copy of a benchmark's rows, each changed by `change`. Return the name that opens it."""
    directory.mkdir(exist_ok=True)
    for split, rows in benchmark_rows.SPLITS[name].items():
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(change(row)) + "\n" for row in rows))
    return f"{name}@{directory}"


@pytest.mark.parametrize("name, changes", [
    ("gsm8k", {"samples": 2, "temperature": 1.0}),
    ("mmlu", {"shots": 0}),
    ("reasoning", {"data.problems": 600, "data.difficulties": "1", "max_new_tokens": 3, "temperature": 1.0}),
])  # fmt: skip
def test_a_larger_limit_adds_to_what_is_there(place, tmp_path, name, changes):
    """Also with groups: what is sampled depends on a question's number, and no limit changes that number."""
    whole = evaluate(place, tmp_path / "whole", benchmarks=name, **changes)[name]["samples"]
    assert [one["number"] for one in whole] == list(range(len(whole)))
    for limit in (1, 3, 0):
        found = evaluate(place, tmp_path / "e", benchmarks=name, limit=limit, **changes)[name]["samples"]
        groups = [one["group"] for one in whole]
        kept = [i for i, group in enumerate(groups) if not limit or groups[:i].count(group) < limit]
        for one, other in zip(found, (whole[i] for i in kept), strict=True):
            logs = [x.pop("loglikelihoods", []) for x in (one, dict(other))]
            assert logs[0] == pytest.approx(logs[1], rel=1e-6)
            assert one == {key: value for key, value in other.items() if key != "loglikelihoods"}


def test_results_of_other_limits_are_compared_by_question(place, tmp_path):
    """Results with other examples or in chats are compared too: their questions are still the same."""
    few = run.evaluate(configure(place, benchmarks="mmlu", limit=1), tmp_path / "a", progress=False)
    more = configure(place, benchmarks="mmlu", limit=2, shots=0, prompt="chat")
    found = compare(few, run.evaluate(more, tmp_path / "b", progress=False))["mmlu", "acc"]
    assert found.all.n == len(benchmark_rows.SUBJECTS)


@pytest.mark.parametrize("settings", [{"shots": 1}, {"prompt": "chat"}, {"init_from": "moved"}, {"dtype": "float64"}])
def test_records_of_other_settings_are_not_mixed(place, tmp_path, settings):
    evaluate(place, tmp_path / "e", benchmarks="arc_challenge", limit=1)
    if "init_from" in settings:
        tiny_model.export(tmp_path / "moved")
        settings = {"init_from": str(tmp_path / "moved")}
    with pytest.raises(UserError, match="holds answers by other settings"):
        evaluate(place, tmp_path / "e", benchmarks="arc_challenge", **settings)


def test_records_of_a_model_that_was_written_over_are_not_mixed(place, tmp_path):
    """The same holds for its tokenizer. With a copy of the same files the evaluation continues."""
    there = tmp_path / "hf"
    changes = {"init_from": str(there), "benchmarks": "arc_challenge", "limit": 1}

    def written(model, change=lambda text: text):
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(model, there)
        (there / "tokenizer.json").write_text(change((there / "tokenizer.json").read_text()))

    written(place / "hf")
    evaluate(place, tmp_path / "e", **changes)
    written(place / "hf")
    evaluate(place, tmp_path / "e", **changes)
    tokenizer = tiny_model.tokenizer(tmp_path / "tok")
    hf.save_pretrained(tmp_path / "other", tiny_model.CFG, params.init_params(tiny_model.CFG, 8), tokenizer)
    written(tmp_path / "other")
    with pytest.raises(UserError, match="holds answers by other settings: weights was '.*' and is now '.*'"):
        evaluate(place, tmp_path / "e", **changes)
    written(place / "hf", lambda text: text.replace("<think>", "<thank>"))
    with pytest.raises(UserError, match="holds answers by other settings: tokenizer was '.*' and is now '.*'"):
        evaluate(place, tmp_path / "e", **changes)


CHANGED = {
    "question": ("arc_challenge", lambda row: row | {"question": f"{row['question']} Or not?"}),
    "gold": ("hellaswag", lambda row: row | {"label": str((int(row["label"]) + 1) % 4)}),
    "choices": ("hellaswag", lambda row: row | {"endings": [f"{one} again" for one in row["endings"]]}),
    "continuations": ("winogrande", lambda row: row | {"sentence": row["sentence"] + " Not so"}),
    "aliases": ("triviaqa", lambda row: row | {"answer": {"aliases": ["Paris", "London"]}}),
}


@pytest.mark.parametrize("what", CHANGED)
def test_records_of_other_questions_are_not_mixed(place, tmp_path, what):
    name, change = CHANGED[what]
    config = {"benchmarks": copy_of(name, tmp_path / "rows"), "shots": 0}
    evaluate(place, tmp_path / "e", **config)
    evaluate(place, tmp_path / "e", **config)
    copy_of(name, tmp_path / "rows", change)
    words = f"question 0 of {name}, .*, has another {'gold' if what == 'aliases' else what} than its record; choose"
    with pytest.raises(UserError, match=words):
        evaluate(place, tmp_path / "e", **config)


def test_records_that_are_none_are_refused(place, tmp_path):
    evaluate(place, tmp_path / "e", benchmarks="arc_challenge", limit=1)
    file = tmp_path / "e" / "records" / "arc_challenge.jsonl"
    head, record, _ = file.read_text().split("\n")
    changed = [
        f"{head}\n{json.dumps({**json.loads(record), **change})}\n"
        for change in ({"metrics": None}, {"metrics": {}}, {"metrics": {"accuracy": None}}, {"truncated": "yes"})
    ]
    foreign = ["[]\n{}\n", f"[]\n{record}\n", f"null\n{record}\n", f'{head}\n{{"number": 0}}\n', f"{head}\n5\n"]
    for lines in (*foreign, *changed):
        file.write_text(lines)
        with pytest.raises(UserError, match="is not what this program writes"):
            evaluate(place, tmp_path / "e", benchmarks="arc_challenge", limit=1)


def test_of_several_answers_to_a_question_the_mean_counts(tmp_path, monkeypatch):
    """An answer that did not end is wrong for a task; for gsm8k it is judged like others."""
    ev = Evaluator(tiny_model.CFG, tiny_model.weights(), tiny_model.tokenizer(tmp_path))
    ((gsm8k, _),) = registry.parse_benchmarks(copy_of("gsm8k", tmp_path / "rows"), "x")
    task = task_benchmark(ReasoningTask(num_problems=600))
    for benchmark, place, expected in ((gsm8k, str(tmp_path / "rows"), 0.75), (task, "", 0.5)):
        (asked,) = load(benchmark, place, 0, 1)[:1]
        right = asked.item.gold if benchmark is gsm8k else f"\\boxed{{{asked.item.gold}}}"
        given = [Written("no", True, False), *[Written(right, ended, False) for ended in (True, False, True)]]
        monkeypatch.setattr(measure, "write", lambda *_, given=given: [given])
        (record,) = measure.measure(ev, benchmark, [asked], measure.Settings(samples=4, temperature=1.0))
        assert set(record["metrics"].values()) == {expected}


def test_an_answer_to_a_task_that_did_not_end_is_wrong_as_in_the_stages(tmp_path, monkeypatch):
    """A benchmark of the harness, here gsm8k, judges the text of an answer that did not end."""
    ev = Evaluator(tiny_model.CFG, tiny_model.weights(), tiny_model.tokenizer(tmp_path))
    benchmark = task_benchmark(ReasoningTask(num_problems=600))
    asked = load(benchmark, "", 0, 1)[:2]

    def marks(benchmark, asked, texts):
        def given(*_):
            return [[Written(text, ended, False)] for text, ended in zip(texts, (True, False))]

        monkeypatch.setattr(measure, "write", given)
        return [list(one["metrics"].values()) for one in measure.measure(ev, benchmark, asked, measure.Settings())]

    assert marks(benchmark, asked, [f"\\boxed{{{one.item.gold}}}" for one in asked]) == [[1.0], [0.0]]
    ((gsm8k, _),) = registry.parse_benchmarks(copy_of("gsm8k", tmp_path / "rows"), "x")
    asked = load(gsm8k, str(tmp_path / "rows"), 0, 2)
    assert marks(gsm8k, asked, [one.item.gold for one in asked]) == [[1.0, 1.0], [1.0, 1.0]]


def test_a_question_that_its_examples_hold_too_often_is_said(tmp_path):
    """Two of the three examples are the question itself, so one is left."""
    rows = benchmark_rows.SPLITS["winogrande"]
    asked, other = rows["validation"][0], rows["train"][0]
    for split, some in (("validation", [asked]), ("train", [asked, asked, other])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    ((benchmark, _),) = registry.parse_benchmarks("winogrande", "x")
    assert len(load(benchmark, str(tmp_path), 1, 0)[0].examples) == 1
    with pytest.raises(UserError, match="has 1 examples in the split 'train' beside the question .*; write fewer"):
        load(benchmark, str(tmp_path), 2, 0)


def test_results_are_written_without_a_copy_of_them_in_memory(tmp_path):
    """VQAv2 has 214,354 records. As one text joined from parts, they would take seven times the size of their file."""
    results = {"model": "w", "samples": [{"number": n, "gold": [{"answer": "ja é"}] * 10} for n in range(3000)]}
    tracemalloc.start()
    try:
        run.write_results(tmp_path / "r.json", results)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    content = (tmp_path / "r.json").read_bytes()
    assert content == (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode()
    assert peak < len(content) / 4
