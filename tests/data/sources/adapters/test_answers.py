"""Final answers are read from solutions as a person would read them; also boxes of random balanced content."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.data.sources.adapters.answers import after_hashes, last_boxed


@pytest.mark.parametrize(
    "solution, answer",
    [
        (r"so $\boxed{5}$.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"$\boxed{\frac{1}{2}}$ and {more}", r"\frac{1}{2}"),
        (r"\boxed{ a{b}{c{d}} }", "a{b}{c{d}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed {7}", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed 9$", "9"),
        (r"\boxed{ok} and \boxed{never closed", "ok"),
        (r"\boxed{\text{a }b}", r"\text{a }b"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", None),
        ("no box", None),
        (r"\boxed{open", None),
        ("", None),
    ],
)
def test_boxed(solution, answer):
    assert last_boxed(solution) == answer


def _wrapped(inner):
    return st.tuples(inner, inner).map(lambda pair: f"{pair[0]}{{{pair[1]}}}")


CONTENT = st.recursive(
    st.text("ab1+ ^\\,", max_size=4).map(lambda s: s.replace("\\", r"\{\pi\}")), _wrapped, max_leaves=6
)


@given(CONTENT, st.text("xy {}$.", max_size=8))
def test_any_balanced_content_comes_back(content, after):
    assert last_boxed(rf"\boxed{{0}} text $\boxed{{{content}}}$" + after) == (content.strip() or None)


PARTS = ("\\", "{", "}", "\\boxed{", "\\boxed ", "\\fbox", "a", " ")


@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join))
def test_braces_are_found_as_by_counting_from_each_box(text):
    assert last_boxed(text) == _counted(text)


def _counted(text):
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*(?=\{)", text))):
        depth, place = 0, box.end()
        while place < len(text):
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return text[box.end() + 1 : place].strip() or None
            place += 2 if text[place] == "\\" else 1
    bare = re.findall(r"\\(?:boxed|fbox)\s+([^\s$\\{}]+)", text)
    return bare[-1] if bare else None


def test_boxes_that_never_close_take_no_time():
    begin = time.process_time()
    assert last_boxed("\\boxed{" * 100_000) is None
    assert last_boxed("\\boxed{5}" + "\\boxed{" * 100_000) == "5"
    assert time.process_time() - begin < 10  # following each box to the end would take minutes


@pytest.mark.parametrize(
    "solution, answer",
    [
        ("so\n#### 42", "42"),
        ("#### 1\n#### 2", "2"),
        ("#### 1,234,567", "1234567"),
        ("#### -3,000.5 \nmore", "-3000.5"),
        ("#### 1,2", "1,2"),
        ("#### $70,000", "$70000"),
        ("#### 12,500%", "12500%"),
        ("#### (1,200)", "(1,200)"),
        ("#### 1,200, 300", "1,200, 300"),
        ("#### 1,2,300", "1,2,300"),
        ("#### 0,123", "0,123"),
        ("####", None),
        ("none", None),
    ],
)
def test_after_hashes(solution, answer):
    assert after_hashes(solution) == answer
