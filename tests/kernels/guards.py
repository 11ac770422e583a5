"""Guards around the tensors of kernels: bytes in front of a tensor and behind it that no kernel may write to.

The bytes are 255, which is NaN in every floating dtype and −1 in integers. So a value that is read outside of an input,
or an output that is not written, shows in the results.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

BYTES = 1 << 16  # in front and behind; more than any tile that a test uses


@contextlib.contextmanager
def guarded() -> Iterator[Callable[[Tensor], Tensor]]:
    """Within it, tensors from new_empty and empty_like have guards. It gives a function that copies an input likewise.

    AssertionError at the end if a byte of a guard or of an input has changed.
    """
    known: list[tuple[Tensor, Tensor]] = []  # bytes, and a copy of them
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def place(like: Tensor) -> tuple[Tensor, Tensor]:
        size = like.numel() * like.element_size()
        memory = torch.full((size + 2 * BYTES,), 255, dtype=torch.uint8)
        inside = memory[BYTES : BYTES + size]
        return memory, inside.view(like.dtype).view(like.shape)

    def output(like: Tensor) -> Tensor:
        memory, inside = place(like)
        known.extend((part, part.clone()) for part in (memory[:BYTES], memory[-BYTES:]))
        return inside

    def copied(x: Tensor) -> Tensor:
        memory, inside = place(x)
        inside.copy_(x)
        known.append((memory, memory.clone()))
        return inside

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", lambda *args, **options: output(new_empty(*args, **options)))
        patched.setattr(torch, "empty_like", lambda *args, **options: output(empty_like(*args, **options)))
        yield copied
    assert all(torch.equal(memory, before) for memory, before in known)
