r"""Whether two final answers are the same mathematics: by text, else by math-verify in a process with a deadline.

math-verify's own limits are signals, which work in no thread and end no C code: "9^{9^9}" would run for ever. So its
process is killed. Nothing of an answer is ever evaluated as Python.
"""

import os
import re

from qwen3f.data.sources.adapters.answers import after_hashes, last_boxed
from qwen3f.processes.killable import Outcome, shared
from qwen3f.processes.killable_child import INSIDE
from qwen3f.tasks.answer_text import LONGEST, READ, after_thinking, normalised

DEADLINE = 5.0  # seconds of a judgement

_ANNOUNCED = re.compile(r"\b(?:answer|result)[\s*]*(?:is\s*:?|=|:)[\s*]*(.+)$", re.IGNORECASE)
_NAMED = re.compile(r"[\s$]*([A-Za-z])\s*=")
_workers = shared(1, DEADLINE)


def final_answer(text: str) -> str | None:
    r"""What the last \boxed{…} holds, else what follows the last "####", else the last line with a
    letter or digit; only after the thinking.

    In a last line such as "… the answer is 5." it is what follows "is" (or "=" or ":"). If that has a digit, it is
    taken even if there is "####", which may begin a heading. None if there is no answer, or if it is longer than
    LONGEST.
    """
    answer = after_thinking(text)
    if answer is None:
        return None
    answer = answer[-READ:]
    found = last_boxed(answer)
    if found is None:
        line = next((line.strip() for line in reversed(answer.splitlines()) if re.search(r"\w", line)), "")
        announced, found = _ANNOUNCED.search(line), after_hashes(answer)
        if found is None or (announced and re.search(r"\d", announced[1])):
            found = (announced[1] if announced else line).rstrip(". ").strip("* ")
    return found if found and len(found) <= LONGEST else None


def judge(answer_text: str, gold: str) -> Outcome:
    """math_reward's result, and why it failed."""
    answer = final_answer(answer_text)
    if not gold.strip() or len(gold) > LONGEST:
        return Outcome(None)
    if answer is None:
        return Outcome(0.0)
    names = {found[1].lower() for found in map(_NAMED.match, (answer, gold)) if found}
    if normalised(answer) == normalised(gold) and len(names) < 2:  # x = 5 is not y = 5
        return Outcome(1.0)
    if os.environ.get(INSIDE):  # this process already has a deadline
        from qwen3f.tasks.verifier import same_mathematics

        return Outcome(same_mathematics(answer, gold))
    return _workers().call("qwen3f.tasks.verifier:same_mathematics", answer=answer, gold=gold)


def math_reward(answer_text: str, gold: str) -> float | None:
    """1.0 if the final answer of what a model wrote is right, 0.0 if it is wrong or missing, None if that cannot be
    told: gold is no mathematics or longer than LONGEST, or the comparison failed or took longer than DEADLINE."""
    return judge(answer_text, gold).value
