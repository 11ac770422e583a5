r"""Final answers inside worked solutions: after GSM8K's "####", or in MATH's last \boxed{…}."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s$\\{}]+)")


def after_hashes(solution: str) -> str | None:
    """What follows the last "####" on its line, without the commas between thousands; None if there is nothing."""
    _, marker, rest = solution.rpartition("####")
    answer = rest.strip().split("\n")[0].strip()
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer) or None if marker else None


def last_boxed(solution: str) -> str | None:
    r"""The content of the last \boxed{…} or \fbox{…} whose braces balance; None if there is none or it is empty.

    Escaped braces (\{ and \}) do not count. "\boxed 5" without braces gives "5".
    """
    for box in reversed(list(_BOX.finditer(solution))):
        content = _balanced(solution, box.end())
        if content is not None:
            return content.strip() or None
    bare = _BARE_BOX.findall(solution)
    return bare[-1] if bare else None


def _balanced(text: str, start: int) -> str | None:
    """The inside of the braces that open at `start`, or None if they never close."""
    depth, place = 0, start
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        if text[place] == "{":
            depth += 1
        elif text[place] == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : place]
        place += 1
    return None
