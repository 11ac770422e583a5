r"""Final answers inside worked solutions: after GSM8K's "####", or in MATH's last \boxed{…}."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s$\\{}]+)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_THOUSANDS = re.compile(r"[+-]?(?:\\?\$)?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?(?:\\?%)?", re.ASCII)


def after_hashes(solution: str) -> str | None:
    """What follows the last "####" on its line, without the commas between thousands; None if there is nothing."""
    _, marker, rest = solution.rpartition("####")
    answer = rest.strip().split("\n")[0].strip()
    return without_thousands(answer) or None if marker else None


def without_thousands(text: str) -> str:
    """A text without the commas between thousands, if it is one number: those of lists and tuples stay."""
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def last_boxed(solution: str) -> str | None:
    r"""The content of the last \boxed{…} or \fbox{…} whose braces balance; None if there is none or it is empty.

    Escaped braces (\{ and \}) do not count. "\boxed 5" without braces gives "5".
    """
    boxes = {box.end() for box in _BOX.finditer(solution)}
    opened, last = list[int](), (-1, -1)
    for found in _BRACE.finditer(solution) if boxes else ():
        if found[0] == "{":
            opened.append(found.start())
        elif found[0] == "}" and opened and (start := opened.pop()) in boxes:
            last = max(last, (start, found.start()))
    if last[0] >= 0:
        return solution[last[0] + 1 : last[1]].strip() or None
    bare = _BARE_BOX.findall(solution)
    return bare[-1] if bare else None
