"""Prompts, log-likelihoods, answers and scores equal those of lm_eval 0.4.13 (record_lm_eval.py) on the same rows."""

import importlib.metadata
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qwen3f.eval import Evaluator
from qwen3f.eval.benchmarks import math_answers, registry
from qwen3f.eval.benchmarks.benchmark import Item
from qwen3f.eval.benchmarks.items import load
from qwen3f.eval.benchmarks.triviaqa import TRIVIAQA
from qwen3f.eval.generation import Sampling, cut, write
from qwen3f.eval.measure import Settings, measure
from tests.eval import benchmark_rows, given_answers, tiny_model

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "lm_eval.json").read_text())
LAYOUTS = ("jsonl", "parquet", "save_to_disk")
# benchmark -> our metric -> (the harness's filter, its metric)
METRICS = {
    "mmlu": {"acc": ("none", "acc")},
    "arc_challenge": {"acc": ("none", "acc"), "acc_norm": ("none", "acc_norm")},
    "hellaswag": {"acc": ("none", "acc"), "acc_norm": ("none", "acc_norm")},
    "winogrande": {"acc": ("none", "acc")},
    "gsm8k": {
        "exact_match_strict": ("strict-match", "exact_match"),
        "exact_match_flexible": ("flexible-extract", "exact_match"),
    },
    "math": {"exact_match": ("none", "exact_match"), "math_verify": ("none", "math_verify")},
    "triviaqa": {"exact_match": ("remove_whitespace", "exact_match")},
}
CLOSE = 1e-4  # for log-likelihoods in float32, summed in another order


def antlr_is_sympys():
    try:
        return importlib.metadata.version("antlr4-python3-runtime").startswith("4.11")
    except importlib.metadata.PackageNotFoundError:
        return False


reads_latex = pytest.mark.skipif(not antlr_is_sympys(), reason="sympy reads LaTeX by antlr4-python3-runtime 4.11 alone")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Local copies of all data sets, one directory for each layout."""
    place = tmp_path_factory.mktemp("rows")
    for layout in LAYOUTS:
        benchmark_rows.write(place / layout, layout)
    return place


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory):
    return Evaluator(
        tiny_model.CFG, tiny_model.weights(), tiny_model.tokenizer(tmp_path_factory.mktemp("t")), batch_tokens=20_000
    )


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The same model with 24 positions."""
    cfg = tiny_model.CFG.replace(max_position_embeddings=24)
    return Evaluator(cfg, tiny_model.weights(), tiny_model.tokenizer(tmp_path_factory.mktemp("t")))


def asked(name, place, shots):
    ((benchmark, _),) = registry.parse_benchmarks(name, "--config.benchmarks")
    return benchmark, load(benchmark, str(place / name), shots, 0)


def check(benchmark, questions, groups, evaluator, settings):
    """Compare our records with every recorded document, in the order of the groups."""
    records = measure(evaluator, benchmark, questions, settings)
    recorded = [one for documents in groups.values() for one in documents]
    assert len(records) == len(recorded)
    for ours, theirs in zip(records, recorded):
        if benchmark.generation is None:
            prompts = ours["prompt"] if isinstance(ours["prompt"], list) else [ours["prompt"]] * len(ours["choices"])
            assert prompts == [request[0] for request in theirs["requests"]]
            assert ours["loglikelihoods"] == pytest.approx([answer[0] for answer in theirs["answers"]], abs=CLOSE)
        else:
            assert [ours["prompt"]] == theirs["requests"][0]
            assert ours["answers"] == theirs["answers"]
        for name, (filtered, key) in METRICS[benchmark.name].items():
            assert ours["metrics"][name] == theirs["metrics"][filtered][key], (name, ours)


def cases():
    for number, which in enumerate(RECORDED["tasks"]):
        marks = reads_latex if which.startswith("math") else ()
        if not which.startswith("humaneval"):  # its scores need programs to run
            yield pytest.param(which, LAYOUTS[number % len(LAYOUTS)], marks=marks, id=which)


@pytest.mark.parametrize("which, layout", cases())
def test_prompts_answers_and_scores_are_the_harness_s(which, layout, rows, evaluator):
    name, shots = which.split("/")
    benchmark, questions = asked(name, rows / layout, int(shots))
    settings = Settings(max_new_tokens=tiny_model.NEW_TOKENS if benchmark.generation else 0)
    settings.check(benchmark)
    check(benchmark, questions, RECORDED["tasks"][which], evaluator, settings)


@pytest.mark.parametrize("which", RECORDED["chat"])
def test_chats_are_the_harness_s(which, rows, evaluator):
    benchmark, questions = asked(which, rows / "jsonl", 2)
    recorded = RECORDED["chat"][which]
    check(benchmark, questions[: len(recorded)], {"": recorded}, evaluator, Settings(prompt="chat"))


def test_programs_are_the_harness_s(rows, evaluator):
    """Prompts and completions equal the harness's. Completions are cut at its stop texts."""
    benchmark, questions = asked("humaneval", rows / "parquet", 0)
    sampling = Sampling(tiny_model.NEW_TOKENS)
    recorded = RECORDED["tasks"]["humaneval/0"][""]
    prompts = [one.item.prompt for one in questions]
    assert prompts == [one["requests"][0][0] for one in recorded]
    written = write(evaluator, prompts, sampling, range(len(prompts)))
    texts = [cut(one.text, benchmark.generation.until, False) for (one,) in written]
    assert texts == [one["answers"][0] for one in recorded]


@pytest.mark.parametrize("name", [pytest.param(x, marks=reads_latex if x == "math" else ()) for x in RECORDED["given"]])
def test_given_answers_are_judged_as_the_harness_does(name, rows):
    benchmark, questions = asked(name, rows / "jsonl", 0)
    seen = set()
    for question, recorded in zip(questions, RECORDED["given"][name]):
        for one in recorded:
            ours = benchmark.score(question.item, [one["text"]])
            theirs = {key: one["metrics"][filtered][metric] for key, (filtered, metric) in METRICS[name].items()}
            assert ours == theirs, one["text"]
            seen |= set(ours.items())
    assert seen == {(key, mark) for key in METRICS[name] for mark in (0.0, 1.0)}  # each metric has seen right and wrong


@pytest.mark.parametrize("name, part", [
    ("math", "a"), ("math", r"\text{"), ("math", r"\overline{"), ("math", r"\boxed{"), ("math", "sqrt["),
    ("math", "Final Answer: The final answer is"), ("gsm8k", "1"),
])  # fmt: skip
def test_a_long_answer_takes_no_quadratic_time(name, part, rows):
    """Quadratic, an answer of this size would take minutes."""
    begun = time.process_time()
    if name == "math":
        text = part * (200_000 // len(part))
        assert len(math_answers.normalised(text)) > 100_000
        assert math_answers.final_answer(text) == "[invalidanswer]"
    else:
        benchmark, questions = asked(name, rows / "jsonl", 0)
        benchmark.score(questions[0].item, [f"#### {part * 200_000}"])
    assert time.process_time() - begun < 10


def test_letters_that_grow_when_small_are_judged_as_the_harness_does():
    """The marks here are those that exact_match_hf_evaluate gave.

    "İ" has two characters when lowercased, and numpy's char.lower cuts a text to the length of the longest one before.
    """
    cases = (("İ", ["i", "x"], 1.0), ("istanbul", ["İstanbul"], 0.0), ("İstanbul", ["İstanbul", "Constantinople"], 0.0))
    for given, aliases, mark in cases:
        assert TRIVIAQA.score(Item("row", "", aliases), [given]) == {"exact_match": mark}


@pytest.mark.parametrize("kind", ["full", "short"])
def test_log_likelihoods_are_the_harness_s(kind, evaluator, short):
    one = {"full": evaluator, "short": short}[kind]
    before = one.counts["truncated"]
    found = one.loglikelihood(given_answers.PAIRS)
    recorded = RECORDED["pairs"][kind]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in recorded], abs=CLOSE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in recorded]
    assert one.counts["truncated"] - before == {"full": 0, "short": 4}[kind]


def test_documents_in_windows_are_the_harness_s(short):
    assert short.rolling(given_answers.DOCUMENTS) == pytest.approx(RECORDED["rolling"], abs=CLOSE)


@pytest.mark.parametrize("name", benchmark_rows.SPLITS)
def test_every_layout_of_a_local_copy_has_the_same_questions(name, rows):
    first, *others = (asked(name, rows / layout, None)[1] for layout in LAYOUTS)
    for other in others:
        assert [replace(one, item=replace(one.item, name="")) for one in other] == [
            replace(one, item=replace(one.item, name="")) for one in first
        ]
