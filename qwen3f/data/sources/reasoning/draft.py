"""What a generator of one kind returns, and how numbers, signs and polynomials are written.

Solutions keep one rule so that they can be checked by machine: a line with " = " is one chain of equal expressions, and
a line that begins with "= " continues the chain of the line before. Words stand on lines without " = ".
Multiplication is `*`, division `/`, powers `^`; `a mod m` binds like `*`, from the left.
"""

from fractions import Fraction
from typing import NamedTuple

NAMES = (
    *("Ada", "Agnes", "Ali", "Amir", "Ana", "Anton", "Asha", "Bashir", "Ben", "Bianca", "Bruno", "Cara", "Carl"),
    *("Cecilia", "Chen", "Clara", "Dan", "Dmitri", "Dora", "Elena", "Emil", "Esther", "Eva", "Farid", "Fatima"),
    *("Felix", "Finn", "Gina", "Gustav", "Hana", "Helena", "Hugo", "Ibrahim", "Ida", "Igor", "Ines", "Ivan", "Jana"),
    *("Jon", "Joseph", "Julia", "Karim", "Kenji", "Kim", "Kofi", "Lara", "Lena", "Leo", "Linnea", "Luis", "Malik"),
    *("Marco", "Maria", "Mei", "Mia", "Milo", "Nadia", "Naomi", "Nina", "Noah", "Olga", "Omar", "Oscar", "Paula"),
    *("Pedro", "Priya", "Rafael", "Ravi", "Rosa", "Samir", "Sara", "Sofia", "Stefan", "Tara", "Tariq", "Thandi"),
    *("Tom", "Uma", "Vera", "Victor", "Wanda", "Yara", "Yusuf", "Zoe"),
)
"""People in logic and word problems."""


class Draft(NamedTuple):
    """A problem before it is rendered.

    Attributes:
        question: the whole text of the question.
        steps: lines of the derivation, from the question to the answer.
        answer: a number, or a word.
    """

    question: str
    steps: list[str]
    answer: int | Fraction | str


def operand(value: int | Fraction) -> str:
    """`value` as it may stand beside any operator: in parentheses if it has a sign or a fraction bar."""
    text = str(value)
    return text if text.isdigit() else f"({text})"


def linear(terms: list[tuple[int, str]]) -> str:
    """A sum of terms (coefficient, variable or "") such as 3*x - y + 2, without those that are zero; "0" if all are."""
    text = ""
    for coefficient, variable in terms:
        if coefficient == 0:
            continue
        size = abs(coefficient)
        body = str(size) if not variable else variable if size == 1 else f"{size}*{variable}"
        if not text:
            text = body if coefficient > 0 else f"-{body}"
        else:
            text += f" + {body}" if coefficient > 0 else f" - {body}"
    return text or "0"


def listed(phrases: list[str]) -> str:
    """At least one phrase as English lists them: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]]) if len(phrases) > 1 else phrases[0]
