"""Generated programming problems: worked answers are right, others are not, and questions stay in their split."""

import json
import time
from itertools import islice

import pytest

from qwen3f.sandbox.tiers import why_not
from qwen3f.tasks.code import CodeTask, code_of
from qwen3f.tasks.fences import python_blocks
from qwen3f.tasks.registry import open_task

RUNS = pytest.mark.skipif(
    bool(why_not("bubblewrap") and why_not("landlock")), reason=f"no sandbox here: {why_not('bubblewrap')}"
)


def table(gold):
    """Code that knows the tests: it looks its result up in a table of their arguments."""
    tests = json.loads(gold)
    known = {json.dumps(arguments[0]): expected for arguments, expected in tests["cases"]}
    return f"import json\nKNOWN = {known!r}\ndef {tests['entry_point']}(x):\n    return KNOWN[json.dumps(x)]"


@pytest.mark.parametrize(
    "other", ["class Solution:\n    def solve(self, xs):\n        return 1", "for x in (1, 2):\n    solve = x"]
)
def test_a_function_counts_more_than_a_name_further_in(other):
    own = "from typing import Any\nsolve: Any = lambda xs: 1"
    assert code_of(f"```python\n{own}\n```\nor\n```python\n{other}\n```", "solve") == own
    assert code_of(f"```python\n{other}\n```\nand\n```python\nprint(2)\n```", "solve") == other


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


CODE = "def solve(xs):\n    return xs"
PYTHON = f"```python\n{CODE}\n```"
ANSWERS = {
    "a text before": f"For example:\n```text\n[1, 2]\n```\nSo:\n{PYTHON}",
    "bash before and after": f"```bash\npip list\n```\n{PYTHON}\nRun it:\n```bash\npython solve.py\n```",
    "json after": f"{PYTHON}\nThe tests:\n```json\n[1]\n```\nDone.",
    "python3 and words": f"```python3\n{CODE}\n```\nThis returns the list.",
    "a name behind the tag": f"``` Python title=solve.py\n{CODE}\n```",
    "CRLF": PYTHON.replace("\n", "\r\n") + "\r\nDone.\r\n",
    "no tag": f"```\n{CODE}\n```",
    "no block": CODE,
    "four marks": f"````python\n{CODE}\n````",
    "six marks": f"``````py\n{CODE}\n``````",
    "tildes": f"~~~python\n{CODE}\n~~~",
    "py3": f"```py3\n{CODE}\n```",
    "a version": f"```Python3.11\n{CODE}\n```",
    "quoted": "So:\n> " + PYTHON.replace("\n", "\n> ") + "\nDone.",
    "quoted twice without blanks": ">>" + PYTHON.replace("\n", "\n>>"),
    "quoted and indented": " >  " + PYTHON.replace("\n", "\n >  "),
    "a fence behind other text": f"Here: ```python\n{CODE} ```\nDone.",
    "in a list": "1. So:\n   " + PYTHON.replace("\n", "\n   "),
    "the question's words": f"I answer in a ```python block.\n{PYTHON}",
    "its use after": f"{PYTHON}\nExample:\n```python\nprint(solve([1]))\nsolve == 1\n```",
    "what it prints after": f"{PYTHON}\nOutput:\n```\n[1]\n```",
    "a first attempt before": f"```python\ndef solve(xs):\n    return 0\n```\nNo:\n{PYTHON}\n```\n[1]\n```",
    "code within a line": f"A call is ```solve([1])```\n{PYTHON}",
}


def as_python(code):
    return code.replace("\r\n", "\n").strip()


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_the_last_block_that_defines_the_function_is_the_code_however_it_is_fenced(answer):
    assert as_python(code_of(answer, "solve")) == CODE


def test_fences_within_a_line_of_code_are_text():
    code = "TICKS = '```python'  # three\nx = f('```')"
    assert code_of(f"```python\n{code}\n```", "solve") == code


@pytest.mark.parametrize("fence, within", [("``````", "```"), ("````", "```py"), ("~~~", "```"), ("```", "~~~")])
def test_a_block_ends_with_the_marks_that_it_began_with(fence, within):
    code = f'TEXT = """\n{within}\n"""'
    assert code_of(f"{fence}python\n{code}\n{fence}\nDone.", "solve") == code


def test_a_block_that_does_not_end_counts_where_that_is_asked_for():
    text = f"```python\na\n```\n```python\n{CODE}"
    assert code_of(text, "solve") == "a"
    assert python_blocks(text) == ["a\n"]
    assert python_blocks(text, unclosed=True) == ["a\n", CODE]
    assert code_of(f"```python\n{CODE}", "solve") == f"```python\n{CODE}"


@pytest.mark.parametrize("part", ["`", "```", "``` ", "```a", "```\n ", " \n", "a`", "```a b", "~~~", "> ```\n",
                                  "> \n", ">", "````\n```\n"])  # fmt: skip
def test_no_text_takes_long(part):
    begun = time.perf_counter()
    for text in (part * 100_000, "```" + part * 100_000, "```python\n" + part * 100_000 + "`"):
        python_blocks(text, unclosed=True)
    assert time.perf_counter() - begun < 10


@RUNS
def test_code_between_other_lines_ends_is_run():
    gold = json.dumps({"entry_point": "solve", "cases": [[[[1, 2]], [1, 2]]]})
    assert CodeTask().judge(ANSWERS["CRLF"], gold) == 1.0


def test_the_code_of_an_answer():
    assert code_of("```python\na\n```\ntext\n```\nb\n```", "solve") == "b"
    assert code_of("x = 1", "solve") == "x = 1"
    assert code_of("<think>x", "solve") is None
    assert code_of("y" * 30_000, "solve") is None
