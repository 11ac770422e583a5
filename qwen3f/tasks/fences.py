"""The Python in an answer's fenced blocks, however a model writes the fences."""

import re

_PYTHON = re.compile(r"(?:py(?:thon)?[\d.]*)?", re.IGNORECASE)  # the tag of a block that may hold Python; "" is none

# Each part gives nothing back (`*+`), so that no text takes more than a pass over it.
_FENCED = re.compile(
    r"""
    (?:
      (?P<indent> ^[ \t]*+(?P<quote>(?:>[ \t]*+)++)?+ )(?=[`~])     # on a line of its own, which may be quoted
      | (?<!`)(?=`)                                                 # behind other text: "in a ```python block" is none
    )
    (?P<marks> `{3,}+ | ~{3,}+ )
    (?(indent)[ \t]*+)(?P<tag>[\w+.-]*+)(?(indent)[^\n`]*+|[ \t\r]*+)\n  # on its own line words may follow the tag
    (?P<body>.*?)
    (?P<end>
      ^(?(quote)[ \t>]*+|[ \t]*+)(?P=marks)[`~]*+                   # as many marks as it began with, or more
      | (?<!`)(?=`)(?P=marks)`*+(?=[ \t\r]*+$)                      # within a line of code a fence is text
      | \Z
    )
    | (?<!`)`{3,}+[^`\n]++`{3,}+                                    # begun and ended in one line: no block
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)


def python_blocks(text: str, unclosed: bool = False) -> list[str]:
    """The contents of blocks without a tag, or with a tag such as python, py, Python3 or python3.11; in order.

    A fence is three or more backticks or tildes. If it is quoted or indented, the same is removed from its block's
    lines. unclosed: whether a last block without an end counts.
    """
    blocks = []
    for found in _FENCED.finditer(text):
        if found["body"] is None or not (found["end"] or unclosed):
            continue
        if _PYTHON.fullmatch(found["tag"]):
            blocks.append(_outdented(found["body"], found["indent"] or ""))
    return blocks


def program(text: str, name: str, unclosed: bool = False) -> str | None:
    """The code of an answer: the last of `python_blocks` that defines `name` at a line's beginning.

    If there is none, the last one that defines it indented, as in a class; else the last block; None without blocks. So
    an example of its use after the code, or what that prints, is not taken for the code.
    """
    blocks = python_blocks(text, unclosed)
    for indented in (False, True):
        for block in reversed(blocks):
            if defines(block, name, indented):
                return block
    return blocks[-1] if blocks else None


def defines(code: str, name: str, indented: bool = True) -> bool:
    """Whether lines of Python define `name`, as a function or by an assignment. indented: True: at any indentation;
    False: only at a line's beginning."""
    own, indent = re.escape(name), r"[ \t]*" if indented else ""
    definition = rf"^{indent}(?:(?:async[ \t]+)?def[ \t]+{own}\b|{own}[ \t]*(?::[^=\n]+)?=(?!=))"
    return re.search(definition, code, re.MULTILINE) is not None


def _outdented(body: str, indent: str) -> str:
    *quotes, blanks = indent.split(">")
    before = rf"(?:[ \t]*>){{1,{len(quotes)}}}" if quotes else ""
    return re.sub(rf"^{before}[ \t]{{0,{len(blanks)}}}", "", body, flags=re.MULTILINE) if indent else body
