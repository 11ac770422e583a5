"""Rewards of completions by rule, by name. What runs them, and counts their failures, is qwen3f/rl/judge.py.

Imports no torch: the processes that judge have nothing else to load.
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

BOUND = 1000.0  # of a reward; beyond it is a mistake, and would drown all others
OVERLONG_SHARE = 0.25  # of the longest completion, over which `overlong` falls


@dataclasses.dataclass(frozen=True)
class Sample:
    """A completion as rewards see it; plain values, which JSON can hold.

    Attributes:
      task, prompt, gold: of the question.
      text: what the model wrote, without <|im_end|>. ended: it wrote that; else it was cut at `longest` tokens.
      thinking: whether it was asked to think.
      tokens: that it wrote. longest: that it could have written.
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
    """What the sample's task judges; 0 for a completion that did not end."""
    return open_task(sample.task, "--config.tasks").judge(sample.text, sample.gold) if sample.ended else 0.0


def mathematics(sample: Sample) -> float | None:
    """Whether the final answer means the same as gold, whatever the task; 0 for a completion that did not end."""
    return math_reward(sample.text, sample.gold) if sample.ended else 0.0


def places(sample: Sample) -> float:
    """The share of gold's parts, which blanks separate, that the final answer has in their place; 0 for a completion
    that did not end. Something to learn from where answers are seldom right as a whole: of five numbers, four."""
    answer = boxed_answer(sample.text) if sample.ended else None
    given, wanted = (answer or "").split(), normalised(sample.gold).split()
    return sum(a == b for a, b in zip(given, wanted)) / max(len(given), len(wanted), 1)


def form(sample: Sample) -> float:
    """1 if the completion ended and has the form that was asked for, a thinking block and an answer, or an answer."""
    return float(sample.ended and is_well_formed(sample.text, sample.thinking, block_in_prompt=not sample.thinking))


def length(sample: Sample) -> float:
    """Minus the share of the longest completion that was written."""
    return -sample.tokens / sample.longest


def overlong(sample: Sample) -> float:
    """0 up to a length, then falling to −1 at the longest (DAPO, arXiv:2503.14476, equation 13)."""
    room = max(1, round(OVERLONG_SHARE * sample.longest))
    return -max(0.0, min(1.0, (sample.tokens - (sample.longest - room)) / room))


def language(sample: Sample) -> float:
    """The share of letters that are of the prompt's commonest script (DeepSeek-R1, arXiv:2501.12948, §2.3.2, of words);
    1 where the prompt or the completion has no letter."""
    asked = Counter(filter(None, map(_script, sample.prompt)))
    given = Counter(filter(None, map(_script, sample.text)))
    if not asked or not given:
        return 1.0
    return given[asked.most_common(1)[0][0]] / given.total()


def _script(letter: str) -> str:
    """The first word of a letter's name, such as LATIN; "" for what is no letter. Kana count as Chinese characters."""
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
# The highest that a completion can get, where that is known; of the others it is the highest of a step.
HIGHEST = {"correct": 1.0, "math": 1.0, "places": 1.0, "format": 1.0, "overlong": 0.0, "language": 1.0}


def modules_for(names: Iterable[str], tasks: Iterable[str]) -> tuple[str, ...]:
    """What takes long to load and these rewards need for samples of these tasks: no part of a sample's deadline."""
    names = set(names)
    asks = names & {"math"} or (
        "correct" in names and any(isinstance(open_task(task, "--config.tasks"), WordProblems) for task in tasks)
    )
    return ("qwen3f.tasks.verifier",) if asks else ()


def run_reward(name: str, sample: dict[str, Any]) -> float | None:
    """One reward of one sample, as the processes call it. Raises ValueError for what is no reward."""
    reward = REWARDS.get(name) or find(name)
    value = reward(Sample(**sample))
    if value is None:
        return None
    if not isinstance(value, numbers.Real):  # numpy's are
        raise ValueError(f"it gave {value!r:.80}, which is no number")
    if not math.isfinite(value) or abs(value) > BOUND:
        raise ValueError(f"it gave {value}, which is not within ±{BOUND:g}")
    return float(value)
