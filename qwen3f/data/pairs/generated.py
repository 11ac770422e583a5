r"""Pairs of generated problems whose better answer is better by a rule that a program can check. No network is needed.

    right-or-wrong    the right answer, against the same working with another answer in the box
    boxed-or-not      the answer in \boxed{…}, against the same answer without the box
    short-or-padded   the right answer, against the same answer with sentences that say nothing

With "-plain" after the name the answers are the conclusion alone, without the working as a thought. A question that is
held out here is held out in all stages (`documents.HOLDOUT`).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from qwen3f.data.chat.kinds import HYBRID, TemplateKind
from qwen3f.data.pairs.pair import Pair, make_pair
from qwen3f.data.sources.documents import Split
from qwen3f.data.sources.random_choices import Draws
from qwen3f.data.sources.reasoning import ReasoningSource, chat_messages
from qwen3f.data.sources.reasoning.draft import NAMES
from qwen3f.data.sources.reasoning.problem import Problem

_OPPOSITES = {"knight": "knave", "knave": "knight", "true": "false", "false": "true"}
_PADDING = (
    "Let me say that once more.",
    "This is what was asked.",
    "I have thought about it with care.",
    "It is good to be sure of such things.",
    "There is nothing else to add.",
    "As was said before, that is the answer.",
)
_PLAIN = "-plain"


@dataclass(frozen=True)
class GeneratedPairs:
    """One of the module's kinds; see `pairs.sources.PairRows`."""

    kind: str
    problems: ReasoningSource

    def read(self, split: Split, counts: Counter[str] | None) -> Iterator[Callable[[TemplateKind], Pair]]:
        """A function for each problem, which makes its pair."""
        for number, item in enumerate(self.problems.problems(split, counts), start=1):
            name = f"{self.kind}, {item.kind} {item.difficulty}, {split}:{number}"
            yield lambda template, item=item, name=name: generated_pair(self.kind, item, name, template)

    def fingerprint(self, split: Split) -> str:
        """Changes when the pairs may have changed."""
        return f"{self.problems.fingerprint(split)} {self.kind}"


def generated_pair(kind: str, item: Problem, name: str, template: TemplateKind = HYBRID) -> Pair:
    """The pair that a kind makes of a problem."""
    rule = kind.removesuffix(_PLAIN)
    user, right = chat_messages(item, thinking=not kind.endswith(_PLAIN))
    draws = Draws(rule, item.question)
    worse = {**right, **_RULES[rule](right, item, draws)}
    return make_pair([user, right], [user, worse], name, template=template)


def wrong_answer(item: Problem, draws: Draws) -> str:
    """An answer near the right one that is not it: another number, or another word that the question allows."""
    if item.answer in _OPPOSITES:
        return _OPPOSITES[item.answer]
    if item.answer in NAMES:
        others = [word for word in re.findall(r"[A-Z][a-z]+", item.question) if word in NAMES and word != item.answer]
        return draws.choice(sorted(set(others)))
    return str(Fraction(item.answer) + draws.nonzero(-9, 9))


def _wrong(right: dict[str, str], item: Problem, draws: Draws) -> dict[str, str]:
    wrong = wrong_answer(item, draws)
    return {"content": right["content"].replace(f"\\boxed{{{item.answer}}}", f"\\boxed{{{wrong}}}")}


def _unboxed(right: dict[str, str], item: Problem, draws: Draws) -> dict[str, str]:
    return {"content": right["content"].replace(f"\\boxed{{{item.answer}}}", item.answer)}


def _padded(right: dict[str, str], item: Problem, draws: Draws) -> dict[str, str]:
    more = draws.sample(_PADDING, draws.between(1, 3))
    if "reasoning_content" not in right:
        return {"content": " ".join([*more, right["content"]])}
    return {"reasoning_content": "\n".join([right["reasoning_content"], *more])}


_RULES: dict[str, Callable[[dict[str, str], Problem, Draws], dict[str, str]]] = {
    "right-or-wrong": _wrong,
    "boxed-or-not": _unboxed,
    "short-or-padded": _padded,
}

GENERATED = (*_RULES, *(f"{rule}{_PLAIN}" for rule in _RULES))
"""The names of all kinds."""
