"""Rewards of completions by rule, by name. qwen3f/rl/judge.py runs them and counts their failures.

Imports no torch, so that the judging processes start quickly.
"""

import dataclasses
import math
import numbers
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from qwen3f.processes.killable_child import find
from qwen3f.tasks.answer_text import boxed_answer, is_well_formed, normalised
from qwen3f.tasks.equivalence import math_reward
from qwen3f.tasks.registry import open_task
from qwen3f.tasks.word_problems import WordProblems

BOUND = 1000.0  # largest size of a reward; a larger one is taken for a mistake, and would outweigh all others
OVERLONG_SHARE = 0.25  # `overlong` falls over this last share of the longest possible completion


@dataclasses.dataclass(frozen=True)
class Sample:
    """A completion as rewards see it; plain values, which JSON can hold.

    Attributes:
      task, prompt, gold: of the question.
      text: what the model wrote, without <|im_end|>. ended: whether it wrote <|im_end|>; else it was cut off.
      thinking: whether the prompt let it think.
      tokens: number of tokens that it wrote. longest: number that it could have written.
    """

    task: str
    prompt: str
    gold: str
    text: str
    ended: bool
    thinking: bool
    tokens: int
    longest: int


def correct(sample: Sample) -> float | None:
    """The verdict of the sample's task; 0 for a completion that did not end."""
    return open_task(sample.task, "--config.tasks").judge(sample.text, sample.gold) if sample.ended else 0.0


def mathematics(sample: Sample) -> float | None:
    """Whether the final answer means the same as gold, whatever the task; 0 for a completion that did not end."""
    return math_reward(sample.text, sample.gold) if sample.ended else 0.0


def places(sample: Sample) -> float:
    """The share of gold's parts, separated by blanks, that the final answer has in the right place; 0 for a completion
    that did not end. Helps where whole answers are seldom right: four right numbers of five give 0.8."""
    answer = boxed_answer(sample.text) if sample.ended else None
    given, wanted = (answer or "").split(), normalised(sample.gold).split()
    return sum(a == b for a, b in zip(given, wanted)) / max(len(given), len(wanted), 1)


def form(sample: Sample) -> float:
    """1 if the completion ended and has the requested form: a thinking block and an answer, or only an answer."""
    return float(sample.ended and is_well_formed(sample.text, sample.thinking, block_in_prompt=not sample.thinking))


def length(sample: Sample) -> float:
    """Minus the completion's length, as a share of the longest possible one."""
    return -sample.tokens / sample.longest


def overlong(sample: Sample) -> float:
    """0 up to a length, then falling linearly to −1 at the longest (DAPO, arXiv:2503.14476, equation 13)."""
    room = max(1, round(OVERLONG_SHARE * sample.longest))
    return -max(0.0, min(1.0, (sample.tokens - (sample.longest - room)) / room))


def language(sample: Sample) -> float:
    """The share of the completion's letters in the prompt's most frequent script; 1 if one of both has no letter.

    DeepSeek-R1 (arXiv:2501.12948, §2.3.2) takes the share of words.
    """
    asked = Counter(filter(None, map(_script, sample.prompt)))
    given = Counter(filter(None, map(_script, sample.text)))
    if not asked or not given:
        return 1.0
    return given[asked.most_common(1)[0][0]] / given.total()


def _script(letter: str) -> str:
    """The first word of a letter's Unicode name, such as LATIN; "" for other characters. Kana count as CJK."""
    if not letter.isalpha():
        return ""
    word = unicodedata.name(letter, "").partition(" ")[0]
    return "CJK" if word in ("HIRAGANA", "KATAKANA") else word


REWARDS: dict[str, Callable[[Sample], float | None]] = {
    "correct": correct,
    "math": mathematics,
    "places": places,
    "format": form,
    "length": length,
    "overlong": overlong,
    "language": language,
}
# The highest value that a completion can get. For other rewards, the highest value of a step is taken.
HIGHEST = {"correct": 1.0, "math": 1.0, "places": 1.0, "format": 1.0, "overlong": 0.0, "language": 1.0}


def modules_for(names: Iterable[str], tasks: Iterable[str]) -> tuple[str, ...]:
    """Modules that these rewards need for samples of these tasks and that take long to import. They are imported before
    the deadline of a sample begins."""
    names = set(names)
    asks = names & {"math"} or (
        "correct" in names and any(isinstance(open_task(task, "--config.tasks"), WordProblems) for task in tasks)
    )
    return ("qwen3f.tasks.verifier",) if asks else ()


def run_reward(name: str, sample: dict[str, Any]) -> float | None:
    """One reward of one sample; the judging processes call this. Raises ValueError for a result that is no reward."""
    reward = REWARDS.get(name) or find(name)
    value = reward(Sample(**sample))
    if value is None:
        return None
    if not isinstance(value, numbers.Real):  # numpy's numbers are numbers.Real too
        raise ValueError(f"it gave {value!r:.80}, which is no number")
    if not math.isfinite(value) or abs(value) > BOUND:
        raise ValueError(f"it gave {value}, which is not within ±{BOUND:g}")
    return float(value)
