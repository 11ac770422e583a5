"""The work of one rank: FLOPs of matrix products, bytes of everything else, and the time that these take.

Products run at the hardware's rates. Everything else (norms, rotations, activations, the softmax of the loss, the
optimizer) moves memory at the copy rate, as fused kernels do: every operand is read or written once.

N tokens of a rank's micro-batch · R rows of its experts · D hidden · H, K heads · d head_dim · I, F widths · V, E
"""

import dataclasses
from collections.abc import Sequence

from qwen3f.plan.case import Case
from qwen3f.plan.hardware import Hardware
from qwen3f.plan.memory import Leaf

BACKWARD_ATTENTION = 2.5  # FLOPs relative to the forward pass: five products instead of two
MERGED = 27.0  # bytes moved per element of attention's output in each step of the ring: casts to float32 and sums


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs by kind of product, and bytes that everything else reads and writes."""

    products: float = 0.0
    grouped: float = 0.0
    attention_forward: float = 0.0
    attention_backward: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(a * factor for a in dataclasses.astuple(self)))

    def seconds(self, hardware: Hardware) -> float:
        return (
            self.products / hardware.products
            + self.grouped / hardware.grouped
            + self.attention_forward / hardware.attention_forward
            + self.attention_backward / hardware.attention_backward
            + self.bytes / hardware.copy
        )


@dataclasses.dataclass(frozen=True)
class Pass:
    """Work of a micro-batch: forward, and the two parts of the backward pass. backward_input includes recomputation."""

    forward: Work
    backward_input: Work
    backward_weight: Work


def layer(setup: Case, sparse: bool) -> Pass:
    """One layer, dense or with experts."""
    cfg, size = setup.model, setup.itemsize
    n, stream = setup.tokens, setup.tokens_tp * cfg.hidden_size
    q, kv = setup.heads * cfg.head_dim, setup.kv_heads * cfg.head_dim
    matrices = cfg.hidden_size * (2 * q + 2 * kv)
    # elements moved in forward and backward: two norms and two sums of the residual stream, norm and rotation of q, k
    elements = [9 * stream + 2 * n * (q + kv), 12 * stream + 3 * n * (q + kv)]
    grouped = 0.0
    if sparse:
        rows, width = setup.expert_rows, setup.expert_width
        grouped = 2.0 * rows * 3 * cfg.hidden_size * width
        matrices += cfg.hidden_size * cfg.num_experts
        routing = n * cfg.num_experts * 8  # the router's softmax and top k, in float32
        elements[0] += 4 * rows * width + 2 * rows * cfg.hidden_size + routing
        elements[1] += 9 * rows * width + 2 * rows * cfg.hidden_size + routing
    else:
        matrices += 3 * cfg.hidden_size * setup.width
        elements[0] += 3 * n * setup.width
        elements[1] += 5 * n * setup.width
    products = Work(products=2.0 * n * matrices, grouped=grouped)
    scores = 2.0 * n * q * setup.seq_len  # two products over all keys, half of them masked
    merging = Work(bytes=MERGED * setup.mesh.cp * n * q if setup.mesh.cp > 1 else 0.0)
    forward = products + merging + Work(attention_forward=scores, bytes=elements[0] * size)
    back = products + merging + Work(attention_backward=BACKWARD_ATTENTION * scores, bytes=elements[1] * size)
    again = {"none": Work(), "selective": Work(bytes=elements[0] * size), "full": forward}
    return Pass(forward, back + again[cfg.gradient_checkpointing], products)


def embedding(setup: Case) -> Pass:
    """The lookup, and the scatter of its gradient into a table of zeros."""
    stream = setup.tokens * setup.model.hidden_size
    table = setup.vocabulary * setup.model.hidden_size
    return Pass(Work(bytes=2.0 * stream * setup.itemsize), Work(), Work(bytes=(2.0 * stream + table) * setup.itemsize))


def head(setup: Case) -> Pass:
    """Final norm, head and loss. Without tp the forward pass computes the gradients too; with tp the logits are
    computed twice. A scalar head is one row, which every rank of tp has."""
    norm = Work(bytes=2.0 * setup.tokens_tp * setup.model.hidden_size * setup.itemsize)
    if setup.model.scalar_head:
        hidden = setup.tokens * setup.model.hidden_size
        product = Work(products=2.0 * hidden, bytes=1.0 * hidden * setup.itemsize)
        return Pass(norm + product, norm * 2 + product, product)
    logits = setup.tokens * setup.vocabulary
    product = Work(products=2.0 * logits * setup.model.hidden_size)
    softmax = Work(bytes=2.0 * logits * setup.itemsize)
    read = Work(bytes=1.0 * logits * setup.itemsize)
    if setup.mesh.tp == 1:
        return Pass(norm + product * 3 + softmax + read, norm * 2, Work())
    return Pass(norm + product + read, norm * 2 + product * 2 + softmax, product)


def update(setup: Case, table: Sequence[Leaf]) -> Work:
    """The work per step on a rank's parameters: casts, sums of gradients, their norm, the optimizer.

    Muon's matrix products are not counted; it counts like AdamW.
    """
    total, master = 0.0, setup.master
    for leaf in table:
        size = leaf.itemsize
        total += leaf.elements * (master + size if size != master else 0)
        if not leaf.trained:
            continue
        if setup.microbatches == 1:
            gradients = 2 * size + 2 * size  # stacked; read for the norm and by the update
        else:
            gradients = setup.microbatches * (2 * master + size) + 2 * master
        total += leaf.elements * (gradients + 6 * master)
    return Work(bytes=total)
