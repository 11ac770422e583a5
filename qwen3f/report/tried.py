"""Leaves out parts of a page that fail because of a damaged file, and says so; the rest of the page is shown."""

from collections.abc import Callable
from typing import TypeVar

from qwen3f.errors import UserError

T = TypeVar("T")
_DAMAGED = (OSError, UserError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def tried(problems: list[str], what: str, make: Callable[[], T], otherwise: T) -> T:
    """make(). If a damaged file makes it fail: `otherwise`, and `problems` gets a sentence that begins with `what`."""
    try:
        return make()
    except _DAMAGED as error:
        reason = str(error) if isinstance(error, OSError | UserError) else f"{type(error).__name__}: {error}"
        problems.append(f"{what}: {reason}")
        return otherwise
