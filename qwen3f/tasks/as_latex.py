r"""Final answers as LaTeX that math-verify reads: Unicode signs, repeating decimals, mixed numbers, units, percents.

Units are removed here alone: math-verify would take the last letter of "2 + 3m", or any \text{…} at the end, for one.
"""

import re

_SIGNS = {
    "°": r"^\circ ", "∞": r"\infty ", "·": r"\cdot ", "⋅": r"\cdot ", "⁄": "/", "∅": r"\emptyset ",
    r"\varnothing": r"\emptyset", "≤": r"\le ", "≥": r"\ge ", "$": "", "€": "", "£": "",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
}  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_POWER = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|\w))")

_BLANK = r"(?:\s|\\[ ,;:!]|\\quad|~)"
_REPEATING = re.compile(r"(?<![\d.])(?<!\d,)(\d+)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}", re.ASCII)
_MIXED = re.compile(rf"(?<![\w.^}}/])(\d+){_BLANK}+(\d+)\s*/\s*(\d+)(?![\d./^])", re.ASCII)

_NUMBER = r"[-+]?\s*(?:(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?|\d*\\[dt]?frac\{\d+\}\{\d+\})"
_TEXT = r"\\(?:text|mathrm|textrm|textbf|mbox)\s*\{((?:[^{}]|\^\{-?\d\})*)\}"
_RAISE = r"(?:\^(?:\d|\{-?\d\}))?"
_COUNTED = re.compile(rf"((?:[A-Za-z()]+\s*=\s*)?{_NUMBER})({_BLANK}*)([A-Za-z][A-Za-z /^{{}}\d-]*)", re.ASCII)
_SIGNED = re.compile(r"(.*\S)\s+([A-Za-z]{2,}[A-Za-z/^{}\d]*)", re.DOTALL | re.ASCII)
_IN_TEXT = re.compile(rf"(.*?[^\s~\\]){_BLANK}*({_TEXT}{_RAISE}(?:\s*/\s*{_TEXT}{_RAISE})?)", re.DOTALL | re.ASCII)

_SYMBOLS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "mg": "milligram", "g": "gram", "kg": "kilogram",
    "lb": "pound", "oz": "ounce", "s": "sec second", "min": "minute", "h": "hr hour", "ml": "milliliter millilitre",
    "l": "L liter litre", "gal": "gallon", "ton": "tonne", "day": "", "week": "", "month": "", "year": "", "cent": "",
    "dollar": "", "mi/h": "mph",
}  # fmt: skip
_MEASURES = {name: symbol for symbol, names in _SYMBOLS.items() for name in (symbol, *names.split())}
_POWERS = ((re.compile(r"\b(?:square|sq\.?) ([A-Za-z]+)"), 2), (re.compile(r"\b(?:cubic|cu\.?) ([A-Za-z]+)"), 3))
_OTHERS = ("st", "nd", "rd", "th", "C", "F", "N", "J", "W", "V", "Hz", "Pa")  # only in \text{…}
_WORDS = re.compile(r"(?:[a-z]{3,}|sq\.?|cu\.?)(?:[ -][a-z]+\.?){0,3}(?: (?:an?|of|per) [a-z]+)?(?:\^[23])?")
_SCALES = {"dozen": "12"} | {
    word: f"10^{{{power}}}"
    for word, power in (("hundred", 2), ("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12))
}
# These are no unit: words that change the number before them, and names of numbers or functions.
_NO_UNIT = re.compile(
    r"\b(?:and|or|to|plus|minus|times(?! as\b|$)|over|mod|remainder|percent|pi|sqrt|log|sin|cos|tan|squared|cubed|"
    r"factorial|more|less|fewer|least|most|many|about|below|decrease|loss|mil|lakh|crore|gross|score|noon|"
    r"half|halves|(?:third|fourth|quarter|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s?)\b"
)
_PERCENT = re.compile(r"(.*?\S)\s*(?:\\?%|\\text\{\s*percent\s*\}|\bpercent)", re.DOTALL)
_BASED = re.compile(r"(-?)\(?([0-9A-F.]*\d[0-9A-F.]*)\)?_(?:(\d)|\{\(?([^{}()]+)\)?\})", re.ASCII)


def as_latex(answer: str) -> str:
    r"""A final answer in a form that math-verify reads rightly. Bases, units and percents are for the functions below.

    Unicode signs become LaTeX, 0.\overline{3} a fraction, "1 1/2" 1\frac{1}{2}; signs of currencies and a full stop at
    the end go. All else stays as it is.
    """
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2] or found[3]}}}", answer.strip().replace(r"\$", ""))
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    text = _POWER.sub(lambda found: f"^{{{found[0].translate(_RAISED)}}}", text)
    text = _REPEATING.sub(lambda found: _fraction(*found.groups()), text)
    return re.sub(r"(?<!\.)\.$", "", _MIXED.sub(r"\1\\frac{\2}{\3}", text).strip())


def without_unit(answer: str) -> tuple[str, str]:
    r"""(the answer without the unit at its end, the unit's symbol, such as "km/h" or "cm2").

    The symbol is "" without a unit, and for other words: "72 clips" gives ("72", ""). "5 million" becomes the product.
    A single letter without a blank before it is a variable.
    """
    text = answer.rstrip(". ")
    counted = _COUNTED.fullmatch(text)
    found = counted or _IN_TEXT.fullmatch(text)
    if found is None:
        signed = _SIGNED.fullmatch(text)
        symbol = _symbol(signed[2]) if signed else ""
        return (signed[1], symbol) if symbol else (answer, "")
    words = found[3] if counted else re.sub(_TEXT, r"\1", found[2]).replace("~", " ").strip(". ")
    apart = not counted or bool(found[2])
    symbol = _symbol(words)
    if (symbol and (apart or len(words) > 1)) or (not counted and words in _OTHERS):
        return found[1], symbol
    words = words.lower()
    if not apart or not _WORDS.fullmatch(words) or _NO_UNIT.search(words):
        return answer, ""
    scales = [_SCALES.get(word.removesuffix("s")) for word in re.split("[ -]", words)]
    return r" \cdot ".join([found[1], *filter(None, scales)]), ""


def without_base(answer: str) -> tuple[str, str]:
    """("101", "2") of 101_2 or (101)_{2}; (the answer, "") of what is no numeral with a base."""
    found = _BASED.fullmatch(re.sub(rf"{_TEXT}|\s|\\[,!]|\{{,\}}", r"\1", answer))
    return (found[1] + found[2], found[3] or found[4]) if found else (answer, "")


def without_percent(answer: str) -> tuple[str, bool]:
    """(the answer without a percent sign or word at its end, whether it had one)."""
    found = _PERCENT.fullmatch(answer)
    return (found[1], True) if found else (answer, False)


def _fraction(whole: str, once: str, again: str) -> str:
    """The repeating decimal whole.once(again) as a fraction: 0.1(6) is (16 - 1) / 90."""
    before = int(whole + once)
    top = int(whole + once + again) - before
    return rf"\frac{{{top}}}{{{(10 ** len(again) - 1) * 10 ** len(once)}}}"


def _symbol(words: str) -> str:
    """ "km/h" of "km/hr", "cm2" of "cm^2" and of "square cm"; "" unless each part is a measure."""
    for word, power in _POWERS:
        words = word.sub(rf"\1^{power}", words)
    parts = [re.fullmatch(r"([A-Za-z]+)([23]?)", part) for part in re.sub(r"[\s^{}]", "", words).split("/")]
    names = [_measure(part[1]) if part else "" for part in parts]
    return "/".join(name + part[2] for name, part in zip(names, parts)) if all(names) and len(parts) < 3 else ""


def _measure(word: str) -> str:
    """The symbol of a measure's name or symbol; "" of other words. "M" is no "m"."""
    word = word.lower() if len(word) > 1 else word
    return _MEASURES.get(word) or _MEASURES.get(word.removesuffix("s"), "")
