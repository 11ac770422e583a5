"""Python's garbage collector, kept from walking through what lives as long as the run.

Now and then it goes through all objects: with a compiled step half a million, 0.3 s (two shared cores, torch 2.13), in
which this rank queues nothing and all others wait for it.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def short_pauses() -> Iterator[Callable[[], None]]:
    """Yields settle(), to be called once the steps are compiled: what is garbage then goes, what is not is left out of
    later collections, until the context ends."""

    def settle() -> None:
        gc.collect()
        gc.freeze()

    try:
        yield settle
    finally:
        gc.unfreeze()
