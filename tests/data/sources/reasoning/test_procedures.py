"""Procedures: answers equal an independent computation, workings are checked line by line, questions are many."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.data.sources.reasoning import DIFFICULTIES, PROCEDURES, ReasoningSource, chat_messages, problem
from qwen3f.errors import UserError
from qwen3f.tasks.registry import open_task
from qwen3f.tasks.working import right_working

ITEMS = st.builds(
    problem, st.sampled_from(PROCEDURES), st.sampled_from(DIFFICULTIES), st.integers(), st.integers(-(2**70), 2**70)
)


def step(words, row):
    """The row of letters after one step, computed place by place; the source computes it by slices."""
    name, number = re.fullmatch(r"([a-z ]+?)(?: (\d))?", words).groups()
    n, size = int(number or 0), len(row)
    if name == "reverse":
        return [row[size - 1 - i] for i in range(size)]
    if name == "shift by":
        return [chr((ord(letter) - ord("a") + n) % 26 + ord("a")) for letter in row]
    if name == "rotate by":
        return [row[(i + n) % size] for i in range(size)]
    if name == "swap pairs":
        return [row[i ^ 1] if i ^ 1 < size else row[i] for i in range(size)]
    if name == "drop letter":
        return [letter for i, letter in enumerate(row, start=1) if i != n]
    if name == "double letter":
        return [letter for i, letter in enumerate(row, start=1) for _ in range(2 if i == n else 1)]
    assert name == "sort"
    return [letter for c in range(ord("a"), ord("z") + 1) for letter in row if letter == chr(c)]


def solve(question):
    """The answer, computed with whole integers and places; the source uses columns of digits and slices."""
    if found := re.fullmatch(r"Take the letters (.+), then (.+)\.", question):
        row = found[1].split(" ")
        for words in found[2].split(", "):
            row = step(words, row)
        return " ".join(row)
    if found := re.fullmatch(r"Sort the numbers (.+), the smallest first\.", question):
        numbers = [int(n) for n in found[1].split(" ")]
        ranks = [sum(b < a or (b == a and j < i) for j, b in enumerate(numbers)) for i, a in enumerate(numbers)]
        return " ".join(str(numbers[ranks.index(rank)]) for rank in range(len(numbers)))
    if found := re.fullmatch(r"Add (.+) and (.+)\.", question):
        return " ".join(str(sum(int(n.replace(" ", "")) for n in found.groups())))
    found = re.fullmatch(r"Multiply (.+) by (\d)\.", question)
    return " ".join(str(math.prod(int(n.replace(" ", "")) for n in found.groups())))


def text(item):
    thought = chat_messages(item)[-1]
    return f"<think>\n{thought['reasoning_content']}\n</think>\n\n{thought['content']}"


@settings(max_examples=300, deadline=None)
@given(ITEMS)
def test_answers_are_an_independent_solvers(item):
    assert item.answer == solve(item.question)
    assert item.solution.endswith(f"\nThe answer is \\boxed{{{item.answer}}}.")
    assert len(item.answer.split()) >= 4


@settings(max_examples=200, deadline=None)
@given(ITEMS, st.randoms(use_true_random=False))
def test_the_judge_accepts_the_answer_and_no_other(item, random):
    judge = open_task("procedures", "--config.tasks").judge
    assert judge(text(item), item.answer) == 1.0
    parts = item.answer.split()
    place = random.randrange(len(parts))
    others = [
        parts[:place] + parts[place + 1 :],
        [*parts[:place], parts[place], *parts[place:]],
        [*parts[:place], random.choice([x for x in "abc123" if x != parts[place]]), *parts[place + 1 :]],
        ["".join(parts)],
    ]
    for other in others:
        assert judge(text(item).replace(f"{{{item.answer}}}", f"{{{' '.join(other)}}}"), item.answer) == 0.0
    assert judge(text(item).partition("</think>")[0], item.answer) == 0.0


@settings(max_examples=200, deadline=None)
@given(ITEMS, st.randoms(use_true_random=False))
def test_a_derivation_is_checked_line_by_line(item, random):
    written = text(item)
    assert right_working(item.question, written) == 1.0
    assert right_working(item.question, written.replace("\n", " \n ")) == 1.0
    assert right_working("What is 2 + 3?", written) == 0.0
    lines = written.splitlines()
    place = random.randrange(1, lines.index("</think>"))
    assert right_working(item.question, "\n".join(lines[:place] + lines[place + 1 :])) == 0.0
    last = lines[place][-1]
    changed = lines[place][:-1] + random.choice([x for x in "abc123" if x != last])
    assert right_working(item.question, "\n".join([*lines[:place], changed, *lines[place + 1 :]])) == 0.0
    assert right_working(item.question, written.replace("</think>", "")) == 0.0


@pytest.mark.parametrize("kind", PROCEDURES)
def test_there_are_many_questions_of_each_kind_and_difficulty(kind):
    """There are more than 10⁶ questions.

    Of n drawn among m questions, n²/2m repeat on average: 18 of 6,000 drawn among 10⁶. At most 10 may repeat here.
    """
    for difficulty in DIFFICULTIES:
        asked = [problem(kind, difficulty, 3, index).question for index in range(6000)]
        assert len(asked) - len(set(asked)) <= 10


def test_a_source_has_the_problems_of_its_family():
    both = ReasoningSource(kinds=("sorting", "logic", "letters"), num_problems=60)
    assert both.family("procedures").kinds == ("sorting", "letters")
    assert both.family("reasoning").kinds == ("logic",)
    assert {item.kind for item in both.family("procedures").problems("train")} == {"sorting", "letters"}
    with pytest.raises(UserError, match="kinds=logic has no kind of procedures: write some of letters, sorting"):
        ReasoningSource(kinds=("logic",)).family("procedures")


def test_splits_are_disjoint_over_seeds_and_difficulties():
    heldout = {q.prompt for q in open_task("procedures", "x").questions("heldout")}
    assert len(heldout) > 1000
    for seed in (0, 1):
        other = ReasoningSource(seed=seed, num_problems=8000, kinds=PROCEDURES)
        assert not heldout & {item.question for item in other.problems("train")}
