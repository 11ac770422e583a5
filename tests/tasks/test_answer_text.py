"""Which part of a text is the answer, how answers are normalised, and when a text is well formed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.tasks.answer_text import after_thinking, boxed_answer, is_well_formed, normalised


@pytest.mark.parametrize(
    "text, answer",
    [
        ("a", "a"),
        ("<think>\nt\n</think>\n\na", "\n\na"),
        ("t</think>a", "a"),
        ("<think>t</think>a</think>b", "b"),
        ("<think>\nnever ended", None),
        ("", ""),
    ],
)
def test_the_answer_stands_behind_the_thinking(text, answer):
    assert after_thinking(text) == answer


@pytest.mark.parametrize(
    "text, boxed",
    [
        (r"<think>\n\boxed{1}</think> The answer is \boxed{2}.", "2"),
        (r"\boxed{1} no, \boxed{ -3 }", "-3"),
        (r"\boxed{\text{knave}}", "knave"),
        (r"<think>\boxed{2}</think> two", None),  # a box in the thought is no answer
        (r"<think>\boxed{2}", None),
        ("2", None),
        (r"\boxed{}", None),
        (r"\boxed{" + "1" * 5000 + "}", None),  # longer than any answer, and more digits than int() takes
        (r"\boxed{" + "1" * 501 + "}", None),
        (r"\boxed{" + "0" * 499 + "1}", "1"),
        ("x " * 3000 + r"\boxed{7}", "7"),
        (r"\boxed{7}" + " x" * 3000, None),  # too far from the end
    ],
)
def test_the_last_box_of_the_answer(text, boxed):
    assert boxed_answer(text) == boxed


@pytest.mark.parametrize(
    "written, same",
    [
        ("7", ["+7", "007", " 7. ", "$7$", "x = 7", "X=7", "\u0667", "\uff17"]),
        ("-7", ["\u22127", "- 7", "-07"]),
        ("0", ["-0", "+0", "000"]),
        ("1234567", ["1,234,567", " 1,234,567.", "1{,}234{,}567"]),
        ("-1234.5", ["-1,234.5"]),
        ("9" * 5000, ["+" + "9" * 5000, "00" + "9" * 5000]),
        ("3/4", [r"\frac{3}{4}", r"\dfrac{3}{4}", "3 / 4", r"\frac34", r"\tfrac 3{4}"]),
        ("-3/4", [r"-\frac{3}{4}", r"\frac{-3}{4}", "\u22123/4", r"-\frac34"]),
        ("3-5", ["3 - 5", "3- 5"]),
        ("3 -5", ["$3 \u22125$", "3  -5"]),
        ("ada", ["Ada", r"\text{Ada}", "ADA."]),
        ("true", ["True"]),
    ],
)
def test_one_way_of_writing(written, same):
    assert normalised(written) == written
    assert [normalised(other) for other in same] == [written] * len(same)


@pytest.mark.parametrize(
    "a, b",
    [
        ("1/2", "2/4"),
        ("1", "1.0"),
        ("12", "1 2"),
        ("3 -5", "3-5"),
        (r"\frac123", "12/3"),
        ("(1{,}200)", "(1200)"),
        ("1,23", "123"),
        ("a", "b"),
        ("7", "-7"),
        ("", "0"),
        ("\u00b2", "2"),
        ("(1,200)", "(1200)"),
        ("1,200, 3", "1200,3"),
        ("1,2,300", "1,2300"),
        ("1,200,30", "1200,30"),
        ("{1,200}", "{1200}"),
        ("0,123", "123"),
        (r"1\frac{4}{5}", "14/5"),
        (r"1\frac{4}{5}", r"\frac{14}{5}"),
        (r"\frac{1}{2}3", "1/23"),
        (r"2^\frac{1}{2}", "2^1/2"),
        (r"\frac{3}{2}^2", "3/2^2"),
        (r"3/\frac{1}{2}", "3/1/2"),
        (r"x\frac{1}{2}", "x1/2"),
    ],
)
def test_what_is_not_equal(a, b):
    assert normalised(a) != normalised(b)


@given(st.integers(-(10**9), 10**9), st.integers(1, 999))
def test_numbers_are_their_own_form(number, bottom):
    for text in (str(number), f"{number}/{bottom}"):
        assert normalised(text) == text
        assert normalised(normalised(text)) == text
    assert normalised(f"{number:,}") == str(number)


@pytest.mark.parametrize(
    "text, with_thought, without, after_block",
    [
        ("<think>\nt\n</think>\n\na", True, False, False),
        ("<think>\n\n</think>\n\na", False, True, False),
        ("a", False, False, True),
        ("", False, False, False),
        ("<think>\nt\n</think>\n\n", False, False, False),
        ("<think>\nt", False, False, False),
        ("t</think>a", False, False, False),
        ("</think><think>a", False, False, False),
        ("<think>\nt\n</think>\n\na</think>", False, False, False),
        ("so <think>\nt\n</think>\n\na", False, False, False),
    ],
)
def test_the_form_of_each_mode(text, with_thought, without, after_block):
    assert is_well_formed(text, thinking=True) is with_thought
    assert is_well_formed(text, thinking=False) is without
    assert is_well_formed(text, thinking=False, block_in_prompt=True) is after_block
