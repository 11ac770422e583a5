"""The Python in an answer's fenced blocks, however a model writes the fences."""

import re

TAGS = ("", "python", "py", "python3")  # of a block that may hold Python; "" is none at all

# Each part gives nothing back (`*+`), so that no text takes more than a pass over it.
_FENCED = re.compile(
    r"""
    (?:
      ^(?P<indent>[ \t]*+)`{3,}+[ \t]*+(?P<tag>[\w+.-]*+)[^\n`]*+   # on a line of its own: words may follow the tag
      | (?<!`)`{3,}+(?P<behind>[\w+.-]*+)[ \t\r]*+                  # behind other text: "in a ```python block" is none
    )\n
    (?P<body>.*?)
    (?P<end> ^[ \t]*+`{3,}+ | (?<!`)`{3,}+(?=[ \t\r]*+$) | \Z )     # within a line of code a fence is text
    | (?<!`)`{3,}+[^`\n]++`{3,}+                                    # begun and ended in one line: no block
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)


def python_blocks(text: str, unclosed: bool = False) -> list[str]:
    """What stands in the blocks whose tag is one of TAGS, in small letters or capitals; in order.

    A fence's indentation is taken from its block's lines. unclosed: whether a last block without an end counts.
    """
    blocks = []
    for found in _FENCED.finditer(text):
        if found["body"] is None or not (found["end"] or unclosed):
            continue
        tag = found["behind"] if found["tag"] is None else found["tag"]
        if tag.lower() in TAGS:
            blocks.append(_outdented(found["body"], len(found["indent"] or "")))
    return blocks


def _outdented(body: str, most: int) -> str:
    return re.sub(rf"^[ \t]{{1,{most}}}", "", body, flags=re.MULTILINE) if most else body
