"""What a damaged file makes fail is left out, and said; the rest of the page stands."""

from collections.abc import Callable
from typing import TypeVar

from qwen3f.errors import UserError

T = TypeVar("T")
_DAMAGED = (OSError, UserError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def tried(problems: list[str], what: str, make: Callable[[], T], otherwise: T) -> T:
    """What `make` gives; `otherwise`, and a sentence in `problems` that begins with `what`, where a file is damaged."""
    try:
        return make()
    except _DAMAGED as error:
        reason = str(error) if isinstance(error, OSError | UserError) else f"{type(error).__name__}: {error}"
        problems.append(f"{what}: {reason}")
        return otherwise
