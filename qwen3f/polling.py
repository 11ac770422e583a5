"""Waiting for a pipe."""

import math
import select


def ready(descriptor: int, event: int, seconds: float) -> bool:
    """Whether an event (select.POLLIN, POLLOUT), or the end, comes within `seconds`. By poll: select takes no
    descriptor from 1,024 on."""
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(math.ceil(1000 * seconds)))
