"""Chooses the questions and answers of a run to show: the same questions at its first and last evaluation or step."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3f.finite import as_finite
from qwen3f.report.data import Run
from qwen3f.report.words import figure

MOST_TEXT = 1500  # characters of a prompt or an answer
QUESTIONS = 3
_OPEN, _CLOSE = "<think>", "</think>"
_MODES = {"thinking": "thinking first", "plain": "answering at once"}


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer. when: its step or stage. thought, text: the two parts of it. mark: right, wrong, a reward, or "" if it
    was not judged. note: a further remark."""

    when: str
    thought: str
    text: str
    mark: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A question, with answers from one or several times. pictures: PNG files as data URIs."""

    question: str
    gold: str
    how: str
    replies: tuple[Reply, ...]
    pictures: tuple[str, ...] = ()


def exchanges(run: Run) -> list[Exchange]:
    """A few questions of each mode of the evaluations, with the answers of the first and the last evaluation."""
    if not run.answers:
        return []
    first, last = run.answers[0], run.answers[-1]
    out = []
    for (evaluation, mode), lines in _by_mode(last.lines).items():
        before = {line.get("prompt"): line for line in _by_mode(first.lines).get((evaluation, mode), ())}
        for line in _choice(lines):
            replies = [_reply(line, f"step {last.step:,}")]
            if first.step < last.step and line.get("prompt") in before:
                replies.insert(0, _reply(before[line["prompt"]], f"step {first.step:,}"))
            out.append(_exchange(line, _MODES.get(mode, mode), replies))
    return out


Asked = tuple[str, Sequence[Mapping[str, Any]]]  # a stage's name, and the answers of its model


def of_stages(before: Asked | None, after: Asked) -> list[Exchange]:
    """A few shared questions of a pipeline in each mode, answered by the models before and after a stage."""
    name, lines = after
    out = []
    for (evaluation, mode), own in _by_mode(lines).items():
        old = {line.get("prompt"): line for line in _by_mode(before[1]).get((evaluation, mode), ())} if before else {}
        for line in _choice(own):
            replies = [_reply(line, f"after {name}")]
            if before and line["prompt"] in old:
                replies.insert(0, _reply(old[line["prompt"]], f"after {before[0]}"))
            out.append(_exchange(line, _MODES.get(mode, mode), replies))
    return out


def _by_mode(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in lines:
        if isinstance(line.get("text"), str) and isinstance(line.get("prompt"), str):
            found.setdefault((str(line.get("evaluation", "")), str(line.get("mode", ""))), []).append(line)
    return found


def _choice(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first right answer and the first wrong one, if any, then the first others: no line is picked by hand."""
    picked: list[Mapping[str, Any]] = []
    for wanted in (1.0, 0.0):
        picked += [line for line in lines if line.get("mark") == wanted][:1]
    picked += [line for line in lines if line not in picked]
    return picked[:QUESTIONS]


def rollouts(run: Run) -> list[Exchange]:
    """Reinforcement learning: a question of the first kept step and one of the last, each with its best and its worst
    answer."""
    out = []
    for texts in run.samples:
        groups: dict[Any, list[Mapping[str, Any]]] = {}
        for line in texts.lines:
            if isinstance(line.get("text"), str) and isinstance(line.get("prompt"), str):
                groups.setdefault(str(line.get("place")), []).append(line)
        if groups:
            group = max(groups.values(), key=lambda lines: _reward(_best(lines)) - _reward(_worst(lines)))
            best, worst = _best(group), _worst(group)
            chosen = [best] if best is worst or _reward(best) == _reward(worst) else [best, worst]
            how = "thinking first" if best.get("thinking") else "answering at once"
            replies = [_reply(line, f"step {texts.step:,}", "reward") for line in chosen]
            out.append(_exchange(best, f"step {texts.step:,}, one of {len(group)} tries; {how}", replies))
    return out


def _reward(line: Mapping[str, Any]) -> float:
    return as_finite(line.get("reward")) or 0.0


def _best(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(lines, key=_reward)


def _worst(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return min(lines, key=_reward)


def _exchange(line: Mapping[str, Any], how: str, replies: Sequence[Reply]) -> Exchange:
    pictures = line.get("pictures")
    safe = [p for p in pictures if _is_png(p)] if isinstance(pictures, list) else []
    return Exchange(_cut(line["prompt"]), _cut(str(line.get("gold") or "")), how, tuple(replies), tuple(safe))


def _is_png(picture: object) -> bool:
    """Whether it is a PNG as a data URI, as a run writes it; other addresses are refused."""
    head = "data:image/png;base64,"
    return isinstance(picture, str) and picture.startswith(head) and set(picture[len(head) :]) <= _BASE64


_BASE64 = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")


def _reply(line: Mapping[str, Any], when: str, judged: str = "mark") -> Reply:
    thought, text = apart(line["text"])
    mark, said = as_finite(line.get(judged)), ""
    if mark is not None:
        said = f"reward {figure(mark)}" if judged == "reward" else "right" if mark == 1 else "wrong"
    note = "" if line.get("ended", True) else "cut off at the limit"
    return Reply(when, _cut(thought), _cut(text), said, note)


def apart(text: str) -> tuple[str, str]:
    """(thought, answer). If the thought does not end, the answer is only the text before it."""
    if _OPEN not in text:
        return "", text.strip()
    head, _, rest = text.partition(_OPEN)
    thought, _, answer = rest.partition(_CLOSE)
    return thought.strip(), f"{head.strip()}\n{answer.strip()}".strip()


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} … ({len(text) - MOST_TEXT:,} characters more)"
