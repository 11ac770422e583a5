"""Generated programming problems: worked answers are right, others are not, and questions stay in their split."""

import json
from itertools import islice

import pytest

from qwen3f.sandbox.tiers import why_not
from qwen3f.tasks.code import CodeTask, code_of
from qwen3f.tasks.registry import open_task

RUNS = pytest.mark.skipif(
    bool(why_not("bubblewrap") and why_not("landlock")), reason=f"no sandbox here: {why_not('bubblewrap')}"
)


def table(gold):
    """An answer that knows the tests: what it gives for each argument."""
    tests = json.loads(gold)
    known = {json.dumps(arguments[0]): expected for arguments, expected in tests["cases"]}
    return f"import json\nKNOWN = {known!r}\ndef {tests['entry_point']}(x):\n    return KNOWN[json.dumps(x)]"


@RUNS
def test_right_code_is_right_and_wrong_code_is_not():
    task = open_task("code", "--config.tasks")
    for question in islice(task.questions("train"), 4):
        right = table(question.gold)
        assert task.judge(f"<think>\nhm\n</think>\n\nSo:\n```python\n{right}\n```", question.gold) == 1.0
        assert task.judge(right, question.gold) == 1.0
        assert task.judge(f"<think>\n```python\n{right}\n```", question.gold) == 0.0
        wrong = right.replace("return KNOWN[json.dumps(x)]", "return 4711")
        assert task.judge(f"```python\n{wrong}\n```", question.gold) == 0.0
        assert task.judge("", question.gold) == task.judge("I do not know.", question.gold) == 0.0


@RUNS
def test_a_question_that_is_solved_by_hand():
    gold = json.dumps({"entry_point": "solve", "cases": [[[[1, 2, 3]], 14], [[[]], 0], [[[-4]], 16]]})
    answer = "```python\ndef solve(xs):\n    return sum(x * x for x in xs)\n```"
    assert CodeTask().judge(answer, gold) == 1.0
    assert CodeTask().judge(answer.replace("x * x", "x"), gold) == 0.0


def test_questions_are_distinct_and_split_by_their_text():
    task = CodeTask(num_problems=1500)
    train, heldout = (list(task.questions(split)) for split in ("train", "heldout"))
    assert train == list(task.questions("train"))
    prompts = [question.prompt for question in (*train, *heldout)]
    assert len(set(prompts)) == len(prompts) > 800
    assert 0.02 < len(heldout) / len(prompts) < 0.09
    assert all(len({json.dumps(case[1]) for case in json.loads(q.gold)["cases"]}) >= 5 for q in train)


def test_the_code_of_an_answer():
    assert code_of("```python\na\n```\ntext\n```\nb\n```") == "b"
    assert code_of("x = 1") == "x = 1"
    assert code_of("<think>x") is None
    assert code_of("y" * 30_000) is None
