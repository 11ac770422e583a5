"""What a process of `killable` runs: calls in, results out, a JSON line each, until the pipe closes."""

import contextlib
import importlib
import json
import os
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

INSIDE = "QWEN3F_KILLABLE"  # set in such a process: whoever would start one for a call need not
MEMORY_BYTES = 8 << 30


def find(name: str) -> Any:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _load(name: str, modules: Sequence[str]) -> Callable[..., Any]:
    """`find`, with what the function may need in memory. What is not there fails where it is needed."""
    for module in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    return find(name)


def main() -> None:
    os.environ[INSIDE] = "1"
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a function prints is no answer
    for line in sys.stdin:
        name, modules, arguments = json.loads(line)
        ready = _outcome(_load, name, modules)
        print(file=answers, flush=True)  # from here on the deadline counts
        found = ready if "failure" in ready else _outcome(ready["value"], **arguments)
        try:
            text = json.dumps(found)
        except (TypeError, ValueError) as error:
            text = json.dumps({"failure": f"its result is no JSON: {error}"})
        print(text, file=answers, flush=True)


def _outcome(work: Callable[..., Any], *arguments: Any, **named: Any) -> dict[str, Any]:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return {"value": work(*arguments, **named)}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return {"failure": f"{type(error).__name__}: {str(error)[:300]}"}


if __name__ == "__main__":
    main()
