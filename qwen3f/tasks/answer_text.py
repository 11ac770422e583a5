r"""The parts of what a model writes: thinking, answer, the final answer in \boxed{…}; and whether it has the required
form."""

import re

from qwen3f.data.sources.adapters.answers import last_boxed, without_thousands

READ = 4_000  # characters at the end of an answer; those before are not read
LONGEST = 500  # characters of a final answer; a longer one is wrong

_THINK, _END = "<think>", "</think>"
_FRACTION = re.compile(r"(-?)\\[dt]?frac(?:\{(-?\d+)\}|\s*(\d))(?:\{(\d+)\}|\s*(\d))", re.ASCII)
# Blanks around a sign mean nothing, except before the sign of a number in a list, as in "3 -5".
_SIGN = re.compile(r"(?<=[\w)}])\s+-(?=\S)|\s*([/+*=-])\s*")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_NUMBER = re.compile(r"([+-]?)0*(0|[1-9]\d*)", re.ASCII)


def after_thinking(text: str) -> str | None:
    """The answer: all after the last "</think>"; None if thinking began and did not end.

    A text with neither tag is the whole answer: then the prompt held the thinking block.
    """
    _, end, answer = text.rpartition(_END)
    if not end and _THINK in text:
        return None
    return answer


def boxed_answer(text: str) -> str | None:
    r"""What the last \boxed{…} of the answer holds, normalised; None without an answer or a box, or if the box holds
    more than LONGEST characters."""
    answer = after_thinking(text)
    box = None if answer is None else last_boxed(answer[-READ:])
    return None if box is None or len(box) > LONGEST else normalised(box)


def normalised(answer: str) -> str:
    r"""A final answer in a normal form, so that equal answers are equal texts.

    Removed are blanks, dollar signs, a full stop, \text{…} around words, "x =" before a value, commas between the
    thousands of a number, plus signs and leading zeros of an integer. \frac{a}{b} becomes a/b if it is the whole answer
    (so 1\frac{4}{5} is not 14/5), a minus sign "-", letters lower case, digits ASCII. Nothing is computed: 2/4 is not
    1/2.
    """
    text = answer.replace("\u2212", "-").replace("$", "").replace("\\!", "").replace("\\,", "")
    text = _TEXT.sub(r"\1", text).strip().rstrip(".").strip()
    text = re.sub(r"^[A-Za-z]\s*=\s*", "", re.sub(r"\s+", " ", text))
    text = text if text.isascii() else re.sub(r"\d", lambda digit: str(int(digit[0])), text)
    text = without_thousands(_SIGN.sub(lambda found: found[1] or " -", text).replace("{,}", ","))
    if fraction := _FRACTION.fullmatch(text):
        return "{}{}/{}".format(*(part for part in fraction.groups() if part is not None))
    if number := _NUMBER.fullmatch(text):
        return number[2] if number[2] == "0" else number[1].replace("+", "") + number[2]
    return text.lower()


def is_well_formed(text: str, thinking: bool, block_in_prompt: bool = False) -> bool:
    r"""Whether an answer has the required form.

    With thinking: one block, with a thought in it, and an answer after it. Without: an empty block, or none if the
    prompt held it, and an answer.

    Args:
        text: what the model wrote up to <|im_end|>, without that.
        thinking: the mode that was asked for.
        block_in_prompt: the prompt ended with an empty thinking block (enable_thinking=False).
    """
    if block_in_prompt:
        return bool(text.strip()) and _THINK not in text and _END not in text
    begin, thought, answer = _cut(text)
    return begin == "" and bool(answer.strip()) and bool(thought.strip()) == thinking


def _cut(text: str) -> tuple[str | None, str, str]:
    """(the text before the block, the thought, the answer); (None, "", "") unless there is exactly one block."""
    if text.count(_THINK) != 1 or text.count(_END) != 1 or text.index(_THINK) > text.index(_END):
        return None, "", ""
    before, _, rest = text.partition(_THINK)
    thought, _, answer = rest.partition(_END)
    return before, thought, answer
