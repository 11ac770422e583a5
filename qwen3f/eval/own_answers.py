"""Choose what to train on among a model's own answers: right answers as chats, or a better and a worse one as a pair.

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
"""Keys of a chooser's counts. For each question: questions (1), solved (1 if a row is kept), asked (answers: right +
wrong + not_ended + unjudged), kept (rows). Each chooser's docstring explains the others."""

Chosen = tuple[list[dict[str, Any]], Counter[str]]


def right_chats(task: Task, keep: int, question: Question, answers: Sequence[Answer]) -> Chosen:
    """(chats, counts): a chat for each answer that is right, well formed and differs from those before it.

    keep: at most this many chats, the first ones; 0: all. Answers that differ only in blanks are the same.
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
    """(pairs, counts): the best and the worst answer as one pair; no pair if all answers are equally good.

    A right answer is better than a wrong one; of two right or two wrong ones the shorter (in characters) is better; of
    equal answers the first is taken. Answers that did not end, are malformed or cannot be judged are not in a pair.
    keep: not used.
    Counts: malformed answers are right or wrong too; kept = solved.
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
