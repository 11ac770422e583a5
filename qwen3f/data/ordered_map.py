"""A map over jobs on worker processes: results in the jobs' order, a bounded number of jobs in flight.

The workers are those of `torch.utils.data.DataLoader`, whose sampler may yield any object that can be pickled.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

Job = TypeVar("Job")
Result = TypeVar("Result")

START_METHOD = "spawn"
"""How workers start. A fork is faster, but may hang where JAX's threads run, as they do in a training process."""

_AHEAD = 2  # jobs a worker may have waiting


class _Function(Dataset):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __getitem__(self, job: Any) -> Any:
        return self._function(job)


def ordered_map(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """function(job) of each job, in order. Jobs are taken from `jobs` as results are taken, at most 2 per worker ahead.

    Args:
        function: with 0 workers it is called here, else in the worker processes, for which it is pickled. Tensors come
            back through shared memory.
        jobs: perhaps endless; with workers, objects that can be pickled.
        workers: number of processes.

    Raises:
        What `function` raises, with the worker's traceback in the message; RuntimeError, within seconds, when a worker
        dies. Either ends the iteration.
    """
    if workers == 0:
        yield from map(function, jobs)
        return
    loader = DataLoader(
        _Function(function),
        batch_size=None,
        sampler=jobs,
        num_workers=workers,
        prefetch_factor=_AHEAD,
        collate_fn=_unchanged,
        worker_init_fn=_end_at_once,
        multiprocessing_context=START_METHOD,
        generator=torch.Generator(),  # else it draws from torch's global one
    )
    iterator = iter(loader)
    try:
        yield from iterator
    except (EOFError, ConnectionResetError, ConnectionRefusedError) as error:  # the worker died while handing over
        raise RuntimeError("A DataLoader worker exited unexpectedly while it handed a result over.") from error
    finally:
        iterator._shutdown_workers()  # an exception's traceback keeps the iterator, and so the workers, alive


def _end_at_once(_: int) -> None:
    """Make a worker end without C++ destructors: with torch 2.13 these sometimes abort a worker that has returned."""
    atexit.register(os._exit, 0)


def _unchanged(result: Any) -> Any:
    return result
