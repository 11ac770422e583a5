"""Final answers: cases a person would read the same way, and boxes of random balanced content."""

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


@pytest.mark.parametrize(
    "solution, answer",
    [
        ("so\n#### 42", "42"),
        ("#### 1\n#### 2", "2"),
        ("#### 1,234,567", "1234567"),
        ("#### -3,000.5 \nmore", "-3000.5"),
        ("#### 1,2", "1,2"),
        ("#### $70,000", "$70000"),
        ("####", None),
        ("none", None),
    ],
)
def test_after_hashes(solution, answer):
    assert after_hashes(solution) == answer
