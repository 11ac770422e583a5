"""Reads the pages, which are README.md at the top and in each folder: their blocks, commands and names.

Code is text between backticks, in fences, or indented by four spaces.
"""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = ("experiments", "kernels", "qwen3f", "sharding")
FEW_LINES = 60  # a folder with no more Python than this needs no page; its parent's is enough
PAGES = [ROOT / "README.md", *(page for top in (*CODE, "tests") for page in sorted((ROOT / top).rglob("README.md")))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name_of(page):
    return str(page.relative_to(ROOT))


def folders():
    """Folders of code that need a page."""
    for top in CODE:
        for folder in (ROOT / top, *sorted(path for path in (ROOT / top).rglob("*") if path.is_dir())):
            if sum(len(path.read_text().splitlines()) for path in folder.glob("*.py")) > FEW_LINES:
                yield folder
    yield ROOT / "tests"


def python_blocks(page):
    return [text for language, text in _FENCE.findall(page.read_text()) if language == "python"]


def prose(page):
    """The page without fences and indented lines. Each paragraph and each row of a table is one line."""
    text = re.sub(r"^    .*\n", "", _FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    return re.sub(r"\n(?![\n|#*\d])\s*", " ", text)


def spans(text):
    return re.findall(r"`([^`\n]+)`", text)


def commands(page):
    """The words of each command that begins with python or torchrun. For launch.py, the words from launch.py on."""
    fenced = [text for language, text in _FENCE.findall(page.read_text()) if language in ("bash", "")]
    indented = re.findall(r"^    (.*)$", _FENCE.sub("", re.sub(r"\\\n\s*", "", page.read_text())), re.MULTILINE)
    lines = [line for text in fenced for line in re.sub(r"\\\n\s*", "", text).splitlines()]
    for line in (*lines, *indented, *spans(prose(page))):
        for part in line.split("&&"):
            if re.match(r"(python|torchrun) ", part.strip()):
                words = shlex.split(part.replace("…", ""), comments=True)
                yield words[words.index("launch.py") :] if "launch.py" in words else words


def launches(page):
    """The commands with launch.py and an experiment, each as sys.argv."""
    return [words for words in commands(page) if words[0] == "launch.py" and "--config" in words]


def links(page):
    return re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
