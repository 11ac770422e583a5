"""Unicode's composed form (NFC) as Qwen's tokenizer sees it, the same under every Python.

The tokenizers library that runs Qwen's released tokenizer.json normalises with the tables of Unicode 9. Python's are
those of its own release (3.11: Unicode 14), which reorder or compose marks that Unicode 9 did not know. Those
characters are listed here; each is left where it is, as a character without properties is, and the text between them
is normalised.
For all other text (anything but some scripts encoded since 2017) this is plain NFC.
"""

import re
import unicodedata

# Combining since Unicode 10 (canonical combining class not 0), up to Unicode 17.
_NEW_MARKS = (
    "\u05c8\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa\ua82c"
    "\U00010d24-\U00010d27\U00010d69-\U00010d6d\U00010eab\U00010eac\U00010ecb-\U00010ecf\U00010ef0-\U00010efb"
    "\U00010efd-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b\U000113ce-\U000113d0\U0001145e"
    "\U00011839\U0001183a\U0001193d\U0001193e\U00011943\U000119e0\U00011a34\U00011a47\U00011a99\U00011d42\U00011d44"
    "\U00011d45\U00011d97\U00011f41\U00011f42\U0001612f\U00016ff0\U00016ff1\U0001d127\U0001d128\U0001d250-\U0001d252"
    "\U0001d25b\U0001d25c\U0001d25f\U0001d280\U0001d281\U0001e08f\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef"
    "\U0001e4ec-\U0001e4ef\U0001e5ee\U0001e5ef\U0001e6e3\U0001e6e6\U0001e6ee\U0001e6ef\U0001e6f5"
)
# One half of every pair that composes since Unicode 13 (Dives Akuru, Todhri, Tulu-Tigalari, Gurung Khema, Kirat Rai).
_NEW_PAIRS = (
    "\U00011930\U000105d2\U000105da\U000113b8\U000113bb\U000113c2\U000113c9\U0001611e-\U00016120\U00016129\U00016d67"
)
_UNKNOWN = re.compile(f"([{_NEW_MARKS}{_NEW_PAIRS}])")


def nfc(text: str) -> str:
    """The NFC form of `text` by the tables of Unicode 9."""
    # Text that is in NFC by Python's tables is so by Unicode 9's: its parts are substrings, and these are in NFC too.
    if text.isascii() or unicodedata.is_normalized("NFC", text):
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in _UNKNOWN.split(text))
