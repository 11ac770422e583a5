"""What of a model's own answers to a question is worth training on: right ones as chats, or a better and a worse one.

A chat is {"messages": […], "answer": the right final answer}, as `data.chat.conversation` reads it; a pair is
{"chosen": […], "rejected": […]}, as `data.pairs.pair` does. Thoughts stand under reasoning_content.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qwen3f.data.chat.template import split_thought
from qwen3f.eval.answers import Answer
from qwen3f.tasks.answer_text import is_well_formed
from qwen3f.tasks.task import Question, Task

COUNTS = (
    "questions", "solved", "asked",
    "right", "wrong", "not_ended", "unjudged",
    "kept", "repeated", "surplus", "malformed",
)  # fmt: skip
"""What is counted of answers: questions (1), solved (1 if a row is kept), asked = right + wrong + not_ended + unjudged,
kept rows. The others are each chooser's own."""

Chosen = tuple[list[dict[str, Any]], Counter[str]]


def right_chats(task: Task, keep: int, question: Question, answers: Sequence[Answer]) -> Chosen:
    """The chats of a question's answers that are right, well formed and differ; and what became of all of them.

    keep: chats at most, the first ones; 0: all. Answers that differ in blanks alone are the same.
    Counts: right = kept + repeated + surplus (beyond `keep`) + malformed (without a thought, or with more than one).
    """
    counts, chats, seen = Counter(questions=1, asked=len(answers)), [], set()
    for given, verdict in _judged(task, question, answers, counts):
        if verdict != 1.0:
            continue
        if not is_well_formed(given.text, thinking=True):
            counts["malformed"] += 1
            continue
        written = _turn(given)
        words = tuple(f"{written['reasoning_content']} </think> {written['content']}".split())
        if words in seen:
            counts["repeated"] += 1
        elif keep and len(chats) == keep:
            counts["surplus"] += 1
        else:
            chats.append({"messages": [_asked(question), written], "answer": question.gold})
        seen.add(words)
    counts["kept"], counts["solved"] = len(chats), int(bool(chats))
    return chats, counts


def ranked_pair(task: Task, keep: int, question: Question, answers: Sequence[Answer]) -> Chosen:
    """The best and the worst of a question's answers as a pair, where one is better: right, or as right and shorter.

    Only answers that ended, have their form and can be judged are looked at; lengths are in characters. Of equals the
    first counts. keep: of no meaning here.
    Counts: malformed (right or wrong) are in no pair; kept = solved.
    """
    counts, ranked = Counter(questions=1, asked=len(answers)), []
    for given, verdict in _judged(task, question, answers, counts):
        if verdict is None or not given.ended:
            continue
        if is_well_formed(given.text, thinking=True):
            ranked.append(((verdict, -len(given.text)), given))
        else:
            counts["malformed"] += 1
    pairs = []
    if ranked:
        best, worst = (pick(ranked, key=lambda one: one[0]) for pick in (max, min))
        if best[0] > worst[0]:
            chosen, rejected = ([_asked(question), _turn(one)] for _, one in (best, worst))
            pairs.append({"chosen": chosen, "rejected": rejected})
    counts["kept"] = counts["solved"] = len(pairs)
    return pairs, counts


CHOOSERS: dict[str, Callable[[Task, int, Question, Sequence[Answer]], Chosen]] = {
    "chats": right_chats,
    "pairs": ranked_pair,
}


def _judged(
    task: Task, question: Question, answers: Sequence[Answer], counts: Counter[str]
) -> Iterator[tuple[Answer, float | None]]:
    """Each answer with its verdict, 0 of one that did not end; counts which are right, wrong, not ended, unjudged."""
    for given in answers:
        verdict = task.judge(given.text, question.gold) if given.ended else 0.0
        right = "unjudged" if verdict is None else "right" if verdict == 1.0 else "wrong"
        counts[right if given.ended else "not_ended"] += 1
        yield given, verdict


def _asked(question: Question) -> dict[str, str]:
    return {"role": "user", "content": question.prompt}


def _turn(given: Answer) -> dict[str, str]:
    thought, content = split_thought({"content": given.text})
    return {"role": "assistant", "reasoning_content": thought, "content": content}
