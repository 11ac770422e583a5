r"""Rows of the SFT data sets as chats, in the form of `data/chat/template.py`.

Cold start (a long chain of thought, then the answer). The whole worked solution is the thinking (`reasoning_content`)
and the content is one sentence with the final answer, "The final answer is $\boxed{…}$.":

* nvidia/OpenMathInstruct-2: `problem`, `generated_solution`, `expected_answer`; the answer is `expected_answer`.
* AI-MO/NuminaMath-CoT: `problem`, `solution`; the answer is the solution's last balanced \boxed{…}. A solution without
  one (a proof) is left out and counted as `no_answer`.

Fusion (chats of many turns, answered without thinking; the last user turn gets the switch "/no_think" as in the Qwen3
technical report, section 4.3, so that thinking stays the default):

* HuggingFaceH4/ultrachat_200k, split train_sft: `messages`, a list of {role, content}.
* teknium/OpenHermes-2.5: `conversations`, a list of {from: system | human | gpt, value}; `system_prompt`, used where
  the conversation has no system turn of its own. An empty system turn is dropped.

A chat that does not end with an answer is left out and counted as `unanswered`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qwen3f.data.sources.adapters.answers import last_boxed
from qwen3f.data.sources.adapters.rows import LeftOut, Row, RowFault, check_text, list_of_dicts, text_of

Chat = list[dict[str, str]]

_SPEAKERS = {"system": "system", "human": "user", "gpt": "assistant"}
_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}


def openmathinstruct_2(row: Row) -> Chat:
    """A problem, its solution as thinking, and `expected_answer`. Raises RowFault."""
    answer = text_of(row, "expected_answer")
    return _cold_start(text_of(row, "problem"), text_of(row, "generated_solution"), answer)


def numinamath_cot(row: Row) -> Chat:
    """A problem, its solution as thinking, and the boxed answer. Raises RowFault, LeftOut."""
    solution = text_of(row, "solution")
    answer = last_boxed(solution)
    if answer is None:
        raise LeftOut("no_answer")
    return _cold_start(text_of(row, "problem"), solution, answer)


def ultrachat(row: Row) -> Chat:
    """The messages. Raises RowFault, LeftOut."""
    return _without_thinking(turns(row, "messages", "role", "content", _ROLES))


def openhermes_2_5(row: Row) -> Chat:
    """The conversation, with the system prompt. Raises RowFault, LeftOut."""
    chat = turns(row, "conversations", "from", "value", _SPEAKERS)
    system = row.values.get("system_prompt")
    if system and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": check_text(system, row.name, "system_prompt")})
    return _without_thinking(chat)


def turns(row: Row, column: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> Chat:
    """A column of {role_key, text_key} records as messages; `roles` translates. Raises RowFault, LeftOut."""
    chat = []
    for i, turn in enumerate(list_of_dicts(row, column)):
        where = f"{row.name}, turn {i + 1} of {column!r},"
        written = turn.get(role_key)
        role = roles.get(written) if isinstance(written, str) else None
        if role is None:
            raise RowFault("invalid_rows", f"{where} has {role_key}={written!r:.80}: write one of {', '.join(roles)}.")
        content = check_text(turn.get(text_key), where, text_key, may_be_empty=role == "system")
        if content.strip():
            chat.append({"role": role, "content": content})
    if not chat or chat[-1]["role"] != "assistant":
        raise LeftOut("unanswered")
    return chat


def _cold_start(problem: str, solution: str, answer: str) -> Chat:
    return [
        {"role": "user", "content": problem},
        {
            "role": "assistant",
            "reasoning_content": solution.strip(),
            "content": f"The final answer is $\\boxed{{{answer.strip()}}}$.",
        },
    ]


def _without_thinking(chat: Chat) -> Chat:
    last = max((i for i, message in enumerate(chat) if message["role"] == "user"), default=None)
    if last is None:
        raise LeftOut("unanswered")
    asked = {**chat[last], "content": f"{chat[last]['content']} /no_think"}
    return [*chat[:last], asked, *chat[last + 1 :]]


ADAPTERS: dict[str, Callable[[Row], Any]] = {
    "openmathinstruct-2": openmathinstruct_2,
    "numinamath-cot": numinamath_cot,
    "ultrachat": ultrachat,
    "openhermes-2.5": openhermes_2_5,
}

VARIANTS = {"cold_start": "openmathinstruct-2,numinamath-cot", "fusion": "ultrachat,openhermes-2.5"}
"""The data sets of each variant of SFT, in equal parts."""
