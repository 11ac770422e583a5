r"""Final answers as LaTeX that math-verify reads: Unicode signs, words after a number, percent signs.

Without this, math-verify reads "5\text{ million}" as 5, and each letter of a word outside \text as a variable.
"""

import re

_SIGNS = {"°": r"^\circ ", "∞": r"\infty ", "²": "^2", "³": "^3"}
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|\w))")

_NUMBER = r"[-+]?\s*(?:\\?\$)?\s*(?:[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?|\\[dt]?frac\{\d+\}\{\d+\})"
# Shorter words may be variables, and math-verify knows cm and kg.
_WORDS = r"[A-Za-z]{3,}(?:[ -][A-Za-z]+)?(?: (?:an?|of|per) [A-Za-z]+)?"
_COUNTED = re.compile(rf"({_NUMBER})\$?(?:\s+({_WORDS})|\s*\\(?:text|mathrm)\{{\s*({_WORDS})\s*\}})", re.ASCII)
_SEVERAL = re.compile(rf"{_NUMBER}\s*\\text\{{\s*(?!and\b|or\b){_WORDS}\s*\}}\s*\d", re.ASCII)
_SCALES = {"dozen": "12"} | {
    word: f"10^{{{power}}}"
    for word, power in (("hundred", 2), ("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12))
}
# These are no unit: words that change the number before them, and names of numbers or functions.
_NO_UNIT = re.compile(
    r"\b(?:and|or|to|plus|minus|times|over|mod|remainder|percent|pi|sqrt|log|sin|cos|tan|squared|cubed|factorial|"
    r"half|halves|(?:third|fourth|quarter|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s?)\b"
)
_PERCENT = re.compile(r"(.*?\S)\s*(?:\\?%|\\text\{\s*percent\s*\}|\bpercent)", re.DOTALL)


def as_latex(answer: str) -> str:
    r"""A final answer in a form that math-verify reads rightly.

    Unicode signs become LaTeX. A number with a unit in words, such as "72 clips", becomes the number, and "5 million"
    the product. "5\text{ hours }30\text{ minutes}" loses \text, so that it is not read as 5. All else stays as it is.
    """
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2] or found[3]}}}", answer.strip())
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    if _SEVERAL.match(text):
        return re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    found = _COUNTED.fullmatch(text.rstrip("."))
    if found is None:
        return text
    words = (found[2] or found[3]).lower()
    if _NO_UNIT.search(words):
        return text
    scales = [_SCALES.get(word.removesuffix("s")) for word in re.split("[ -]", words)]
    return r" \cdot ".join([found[1].replace("\\$", "").replace("$", ""), *filter(None, scales)])


def without_percent(answer: str) -> tuple[str, bool]:
    """(the answer without a percent sign or word at its end, whether it had one)."""
    found = _PERCENT.fullmatch(answer)
    return (found[1], True) if found else (answer, False)
