"""What runs in a sandbox: the code that is judged, which answers calls; or the tests, which make them.

These are two processes, each in a sandbox of its own. Both talk only to the parent, in lines of JSON. So the code never
sees the tests, and what it returns reaches them as plain values. This file needs only the standard library, and runs on
any Python from 3.8 on.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
import types
from collections.abc import Callable
from typing import IO, Any

from qwen3f.sandbox.confine import die_in_time, no_new_rights, only_calls, only_read, set_limits
from qwen3f.sandbox.values import pack, unpack

Say = Callable[[Any], None]


def main() -> None:
    """Reads {"role", "confine", …} and serves until the pipe closes."""
    lines, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", 0)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    sys.stdin = os.fdopen(null, closefd=False)
    order = json.loads(lines.readline())

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message).encode() + b"\n")

    try:
        _confine(**order["confine"])
    except OSError as error:
        say({"unconfined": str(error)})
        return
    say({"up": True})
    (answer_calls if order["role"] == "code" else run_tests)(order, lines, say)


def _confine(limits: dict[str, int], seconds: float, parent: int, read: list[str], filtered: bool) -> None:
    no_new_rights()
    die_in_time(seconds, parent)
    set_limits(**limits)
    if read:
        only_read(read, ["/etc/ld.so.cache", "/dev/urandom", "/dev/zero"])
    if filtered:
        only_calls()


def answer_calls(order: dict[str, Any], lines: IO[bytes], say: Say) -> None:
    """Runs the code, then its functions as they are called."""
    space = _module("solution")
    sys.modules.pop("__main__", None)
    try:
        _execute(order["code"], "<code>", space)
        say({"ready": True})
    except BaseException as error:
        say(_told(error))
        return
    for line in lines:
        call = json.loads(line)
        try:
            function = space[call["name"]]
            result = function(*unpack(call["arguments"]), **unpack(call["named"]))
            text = json.dumps({"value": pack(result)})
        except BaseException as error:
            text = json.dumps(_told(error))
        say(json.loads(text))


def _module(name: str) -> dict[str, Any]:
    """The namespace of a new module, which is in sys.modules: a dataclass looks up its own module there."""
    module = sys.modules[name] = types.ModuleType(name)
    return module.__dict__


def _execute(text: str, name: str, space: dict[str, Any]) -> None:
    exec(compile(text, name, "exec", dont_inherit=True), space)  # this file's __future__ is not the text's


def _told(error: BaseException) -> dict[str, str]:
    try:
        words = str(error)[:300]
    except BaseException:
        words = ""
    return {"error": type(error).__name__[:100], "words": words}


def run_tests(order: dict[str, Any], lines: IO[bytes], say: Say) -> None:
    """Runs the tests against stand-ins that call the code, and says {"passed": …}."""

    def stand_in(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            say({"name": name, "arguments": pack(list(arguments)), "named": pack(named)})
            answer = json.loads(lines.readline())
            if "error" in answer:
                raise _error(answer)
            return unpack(answer["value"])

        return call

    space = _module("tests")
    try:
        _execute(order["setup"], "<setup>", space)
        candidate = stand_in(order["entry_point"])
        space.update({name: stand_in(name) for name in _unknown(order["tests"], space)})
        space.update({order["entry_point"]: candidate, "candidate": candidate})
        others = space.get("check")  # a stand-in, or a helper of the setup: not the tests' own
        _execute(order["tests"], "<tests>", space)
        check = space.get("check")
        if callable(check) and check is not others:
            check(candidate)
    except BaseException as error:
        say({"passed": False, **_told(error)})
    else:
        say({"passed": True})


def _error(answer: dict[str, Any]) -> Exception:
    """The exception that the code raised, if it is one of Python's built-in ones; else a RuntimeError. An exception
    that would silently end a loop in the tests, as StopIteration ends map's, becomes a RuntimeError too."""
    kind = getattr(builtins, str(answer["error"]), RuntimeError)
    silent = (StopIteration, StopAsyncIteration)
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, silent):
        kind = RuntimeError
    try:
        return kind(str(answer.get("words", "")))
    except TypeError:
        return RuntimeError(str(answer["error"]))


def _unknown(text: str, space: dict[str, Any]) -> list[str]:
    """Names that the tests use and that neither they nor the setup define: they are helpers in the judged code."""
    read, written = set(), set(space) | set(dir(builtins))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else written).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            written.add(node.name)
        elif isinstance(node, ast.arg):
            written.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            written.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            written.add(node.name)
    return sorted(read - written)
