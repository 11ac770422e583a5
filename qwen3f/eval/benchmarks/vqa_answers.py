"""Short answers to questions about images: the texts that count as the same, and the share of people who agree.

The soft accuracy of VQA (Antol et al. 2015, arXiv:1505.00468; Goyal et al. 2017, arXiv:1612.00837) in the form of
lmms-eval 0.7.3 (lmms_eval/tasks/_task_utils/vqa_eval_metric.py), which is the EvalAI server's normalisation.
"""

import re
from collections.abc import Sequence

_MARKS = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
# A known error of the server: "(?!<=\d)" forbids the text "<=" and a digit, where "(?<!\d)" was meant; so "3." too
# loses its point.
_POINT = re.compile(r"(?!<=\d)(\.)(?!\d)")
_POINTS = 32  # points removed from a text at most: the server passes re.UNICODE, which is 32, as the count
_THOUSANDS = re.compile(r"(?<=\d)(\,)+(?=\d)")
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED.split())}
_ARTICLES = ("a", "an", "the")

# Words that may be written without their apostrophe
_ONE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've
who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
# and those that may be written without either of their two
_TWO = """couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'll"""
_THREE = {"yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've"}
_AT = {"ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"}


def _without(word: str, number: int) -> str:
    """The word without its apostrophe number `number`, counted from 0."""
    parts = word.split("'")
    return "'".join(parts[: number + 1]) + "'".join(["", *parts[number + 1 :]])[1:]


_CONTRACTIONS = {
    **{word.replace("'", ""): word for word in _ONE.split()},
    **{_without(word, number): word for word in _TWO.split() for number in (0, 1)},
    **_THREE,
    **_AT,
    "somebody'd": "somebodyd",  # as the server has it
}


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalised(text: str) -> str:
    """Without marks, points and articles; number words as digits, contractions with their apostrophe; small letters.

    Where a mark stands beside a blank anywhere in the text, or the text has a number with commas, the mark vanishes;
    elsewhere it becomes a blank.
    """
    out, gone = text, _THOUSANDS.search(text) is not None
    for mark in _MARKS:
        out = out.replace(mark, "" if gone or f"{mark} " in text or f" {mark}" in text else " ")
    words = _POINT.sub("", out, count=_POINTS).lower().split()
    digits = (_NUMBERS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in digits if word not in _ARTICLES)


def words_first(text: str) -> str:
    """What TextVQA does first: small letters, no commas and question marks, a blank before "'s"."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def soft_accuracy(answer: str, given: Sequence[str], others: Sequence[Sequence[int]]) -> float:
    """The mean of min(1, matches / 3) over the people, each left out in turn.

    given: what people answered; others[i]: the places that remain when person i is left out.
    """
    return sum(min(1.0, sum(given[j] == answer for j in rest) / 3) for rest in others) / len(others)
