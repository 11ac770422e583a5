"""Attention that is computed document by document, against attention with a dense mask."""

import itertools

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import document_attention as D
from kernels.key_ranges import dense_mask, document_ranges

lengths_of_a_row = st.lists(st.integers(1, 9), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(lengths_of_a_row, min_size=1, max_size=4), causal=st.booleans(), seed=st.integers(0, 9))
def test_equals_the_dense_mask(rows, causal, seed):
    """Values and gradients in float64, to its rounding: 1e-12."""
    width = max(map(sum, rows))
    rows = [[*row, width - sum(row)] if sum(row) < width else row for row in rows]
    starts, ends = (torch.empty(len(rows), width, dtype=torch.int64) for _ in range(2))
    for i, row in enumerate(rows):
        edges = [sum(row[:n]) for n in range(len(row) + 1)]
        for start, end in itertools.pairwise(edges):
            starts[i, start:end], ends[i, start:end] = start, end
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, len(rows), width, 2, 4, generator=generator, dtype=torch.float64).transpose(2, 3)
    mask = dense_mask(document_ranges(starts, ends, causal))

    def with_mask(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def by_document(q, k, v):
        return D.attend(q, k, v, D.runs_of(starts), causal)

    results = []
    for attend in (with_mask, by_document):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        results.append([out, *torch.autograd.grad((out * torch.arange(4.0)).sum(), inputs, materialize_grads=True)])
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_neighbours_of_one_length_are_one_run_also_across_rows():
    starts = torch.tensor([[0, 0, 2, 2, 4, 5], [0, 0, 2, 2, 4, 4]])
    assert D.runs_of(starts) == (D.Run(2, 2), D.Run(2, 1), D.Run(3, 2))


def test_values_are_read_of_plain_tensors_on_the_cpu_alone():
    assert D.can(torch.ones(2))
    assert not D.can(torch.ones(2, device="meta"))
    assert not D.can(torch.nn.Parameter(torch.ones(2)))
