"""Waiting for a pipe."""

import math
import select


def ready(descriptor: int, event: int, seconds: float) -> bool:
    """Whether an event (select.POLLIN, POLLOUT) or the end of the pipe occurs within `seconds`.

    Uses poll, since select only takes descriptors below 1,024.
    """
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(math.ceil(1000 * seconds)))
