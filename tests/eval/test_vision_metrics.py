"""Metrics of the vision benchmarks equal recorded scores of lmms_eval 0.7.3; and where official metrics differ."""

import json
from pathlib import Path

import pytest

from qwen3f.data.sources.adapters.rows import Row, RowFault
from qwen3f.eval.benchmarks import registry
from qwen3f.eval.benchmarks.benchmark import Item
from qwen3f.eval.benchmarks.docvqa import edits
from tests.eval import vision_answers

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "lmms_eval.json").read_text())
BENCHMARKS = {one.name: one for one in registry.VISION}


def score(name, gold, answer, official=False):
    one = BENCHMARKS[name]
    return (one.official if official else one.score)(Item("row", "", gold), [answer])[one.metric]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_scores_are_lmms_eval_s(name):
    cases = list(vision_answers.CASES[name]())
    assert len(cases) == len(RECORDED[name]) >= 200
    for (gold, answer), recorded in zip(cases, RECORDED[name]):
        assert score(name, gold, answer) == pytest.approx(recorded, abs=1e-12), (gold, answer)
    assert len(set(RECORDED[name])) > 1


def test_official_vqav2_normalises_only_where_people_disagree():
    agreed = [{"answer": "The Cat", "answer_id": i} for i in range(10)]
    assert (score("vqav2", agreed, "cat"), score("vqav2", agreed, "cat", official=True)) == (1.0, 0.0)
    assert score("vqav2", agreed, "The Cat", official=True) == 1.0
    split = [*agreed[:9], {"answer": "dog", "answer_id": 9}]
    assert score("vqav2", split, "cat") == score("vqav2", split, "cat", official=True) == 1.0


def test_official_anls_is_zero_at_a_half():
    assert (score("docvqa", ["abcd"], "ab"), score("docvqa", ["abcd"], "ab", official=True)) == (0.5, 0.0)
    assert score("docvqa", ["abcd"], "abc", official=True) == score("docvqa", ["abcd"], "abc") == 0.75


def test_people_without_a_number_who_say_the_same_are_left_out_together():
    """As in the harness. With answer_id, people who say the same are told apart, and each is left out alone."""
    same = [{"answer": "cat"} for _ in range(10)]
    assert (
        score("vqav2", same, "cat"),
        score("vqav2", [{**x, "answer_id": i} for i, x in enumerate(same)], "cat"),
    ) == (0, 1)


def test_edits():
    assert [edits(*x) for x in (("", ""), ("", "ab"), ("kitten", "sitting"), ("ab", "ba"))] == [0, 2, 3, 2]


ROWS = {
    "vqav2": {
        "question_id": 1,
        "question": "what is it?",
        "image": b"",
        "answers": [{"answer": "cat", "answer_id": 1}],
    },
    "textvqa": {"question": "WHAT does it say?", "image": b"", "answers": ["a"] * 10},
    "docvqa": {"questionId": 1, "question": "Which year?", "image": b"", "answers": ["1990"]},
    "chartqa": {"type": "human_test", "question": "How many?", "image": b"", "answer": "5"},
}
PROMPTS = {
    "vqav2": "what is it?\nAnswer the question using a single word or phrase.",
    "textvqa": "What does it say?\nAnswer the question using a single word or phrase.",
    "docvqa": "Which year?\nAnswer the question using a single word or phrase.",
    "chartqa": "How many?\nAnswer the question with a single word.",
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_become_the_harness_s_questions(name):
    one = BENCHMARKS[name]
    assert set(one.columns) == set(ROWS[name])
    item = one.read(Row(ROWS[name], "f:1"))
    assert (item.prompt, item.image) == (PROMPTS[name], b"")
    with pytest.raises(RowFault, match="f:1"):
        one.read(Row({**ROWS[name], "question": None}, "f:1"))
    key = "answer" if name == "chartqa" else "answers"
    with pytest.raises(RowFault, match="f:1"):
        one.read(Row({**ROWS[name], key: [{"other": 1}]}, "f:1"))
