r"""Where Qwen's pre-tokeniser cuts ASCII text, for a whole buffer at once in numpy.

`bpe_files.PATTERN` matches from left to right, but what it does at a place depends on few characters around it. With
the kinds letter, digit, newline (\r \n), blank (space \t \v \f) and other (all else):

* a digit is a piece;
* letters join into one piece, with one blank, or one other that stands alone, before them;
* others join into one piece, with one space before them and the newlines after them;
* in the rest of a run of blanks and newlines, all up to the last newline is a piece; of the blanks after that newline,
  the last one belongs to what follows (or stands alone), and those before it are a piece;
* an apostrophe that begins a piece, and s, t, m, d, re, ve or ll after it, are a piece.

The tests compare this with the pattern itself.
"""

import string

import numpy as np

MARK = 0xFF
"""A byte that is no ASCII: it stands for the end of a text and is a piece of its own."""

# The order matters: blanks are at most TAB, white space at most NEWLINE.
SPACE, TAB, NEWLINE, LETTER, DIGIT, OTHER, END = range(7)

_KINDS = np.full(256, OTHER, np.uint8)
_KINDS[128:] = END
_KINDS[list(b" ")] = SPACE
_KINDS[list(b"\t\v\f")] = TAB
_KINDS[list(b"\r\n")] = NEWLINE
_KINDS[list(string.ascii_letters.encode())] = LETTER
_KINDS[list(string.digits.encode())] = DIGIT


def piece_starts(text: np.ndarray) -> np.ndarray:
    """Places in `text` where pieces begin, rising.

    Args:
        text: uint8 [N], ASCII and MARK; the last byte is MARK.

    Returns:
        int64 [pieces]; the first is 0, and every MARK is among them.
    """
    kinds = np.full(len(text) + 3, END, np.uint8)
    kinds[2:-1] = _KINDS[text]
    before2, before, here, after = kinds[:-3], kinds[1:-2], kinds[2:-1], kinds[3:]

    starts = (here == DIGIT) | (here == END)
    lone = (before == OTHER) & (before2 != OTHER) & (before2 != SPACE)
    starts |= (here == LETTER) & (before != LETTER) & (before > TAB) & ~lone
    others = (here == OTHER) & (before != OTHER) & (before != SPACE)
    starts |= others
    starts |= (here <= NEWLINE) & (before > NEWLINE)
    starts |= (here <= TAB) & (after > NEWLINE) & (after != END)

    _cut_at_newlines(starts, here, after, np.flatnonzero(here == NEWLINE))
    _cut_contractions(starts, text, kinds, np.flatnonzero(others & (after == LETTER) & (text == ord("'"))))
    return np.flatnonzero(starts)


def _cut_at_newlines(starts: np.ndarray, here: np.ndarray, after: np.ndarray, newlines: np.ndarray) -> None:
    """Join newlines to the characters of kind "other" before them. Begin a piece at blanks after such newlines, and at
    blanks after the last newline of a stretch of white space."""
    if not newlines.size:
        return
    first = np.diff(newlines, prepend=-2) != 1  # of a run of newlines
    heads = newlines[first]
    owned_runs = here[np.maximum(heads - 1, 0)] == OTHER
    owned = owned_runs[np.cumsum(first) - 1]
    starts[newlines[owned]] = False

    ends = after[newlines] != NEWLINE  # the last of a run; there is a byte behind it, since MARK is the text's last
    behind = newlines[ends] + 1
    blank = here[behind] <= TAB
    behind, of_other = behind[blank], owned[ends][blank]
    last_blanks = np.flatnonzero((here <= TAB) & (after > TAB))
    follower = after[last_blanks[np.searchsorted(last_blanks, behind)]]
    starts[behind[of_other | (follower != NEWLINE)]] = True


def _cut_contractions(starts: np.ndarray, text: np.ndarray, kinds: np.ndarray, quotes: np.ndarray) -> None:
    """Begin a piece after 's, 't, 'm, 'd, 're, 've and 'll. quotes: apostrophes that begin a piece, before a letter."""
    if not quotes.size:
        return
    one = text[quotes + 1] | 0x20  # a letter: lower case
    two = text[np.minimum(quotes + 2, len(text) - 1)] | 0x20
    short = np.isin(one, list(b"stmd"))
    long = (((one == ord("r")) | (one == ord("v"))) & (two == ord("e"))) | ((one == ord("l")) & (two == ord("l")))
    long &= kinds[quotes + 4] == LETTER  # kinds begins two places earlier
    starts[quotes[short] + 2] = True
    starts[quotes[long] + 3] = True
