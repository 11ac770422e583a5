"""Final answers written as LaTeX: what each notation means is kept."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.tasks.as_latex import as_latex, without_base, without_unit

DIGITS = st.text("0123456789", max_size=6)


def value(latex):
    """What "2\\frac{1}{3}" is."""
    whole, _, rest = latex.partition(r"\frac{")
    top, bottom = rest.removesuffix("}").split("}{")
    return int(whole or 0) + Fraction(int(top), int(bottom))


@given(st.integers(0, 999), DIGITS, DIGITS.filter(bool), st.sampled_from(["overline", "bar"]))
def test_a_repeating_decimal_is_its_fraction(whole, once, again, command):
    found = value(as_latex(rf"{whole}.{once}\{command}{{{again}}}"))
    # ten thousand repetitions are nearer to it than any other fraction of that size
    digits = once + again * 10_000
    assert abs(found - Fraction(int(f"{whole}{digits[:400]}"), 10 ** len(digits[:400]))) <= Fraction(1, 10**400)


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 99), st.sampled_from([" ", r"\ ", r"\,", "~"]))
def test_a_mixed_number_is_a_sum(whole, top, bottom, blank):
    assert value(as_latex(f"{whole}{blank}{top}/{bottom}")) == whole + Fraction(top, bottom)


@given(
    st.integers(0, 10**6), st.sampled_from(["x", "d", "m", "xy", "^2", "!", "/7", "_3", r"\pi", " + 2t", ", 3", "i"])
)
def test_what_is_no_unit_stays(number, behind):
    assert without_unit(f"{number}{behind}") == (f"{number}{behind}", "")


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("5 km/h", ("5", "km/h")),
        (r"5\text{ km/hr}", ("5", "km/h")),
        ("5cm", ("5", "cm")),
        ("5 m", ("5", "m")),
        (r"2\pi\,\mathrm{cm^{2}}", (r"2\pi", "cm2")),
        ("72 clips", ("72", "")),
        ("5 million", (r"5 \cdot 10^{6}", "")),
        (r"5\text{ squared}", (r"5\text{ squared}", "")),
        (r"\text{5 people}", (r"\text{5 people}", "")),
    ],
)
def test_units(answer, expected):
    assert without_unit(answer) == expected


def test_bases():
    assert [without_base(text) for text in ("101_2", "(1A)_{16}", "-1{,}000_{(3)}", "x_1", "101")] == [
        ("101", "2"), ("1A", "16"), ("-1000", "3"), ("x_1", ""), ("101", ""),
    ]  # fmt: skip
