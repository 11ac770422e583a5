"""The kernels of decoding give the same bits with and without dependent launch, also in a CUDA graph."""

import contextlib

import pytest
import torch

from kernels import dependent_launch
from kernels.decode_ends import pack, start
from kernels.head_sample import head_sample
from kernels.linear_residual import linear_residual
from kernels.norm_linear import norm_linear
from kernels.norm_swiglu import norm_swiglu
from kernels.paged_attention import paged_attention
from kernels.residual_norm import residual_norm

EPS, HEADS, K, d, D, WIDTH, VOCAB, PAGE, LAYERS = 1e-6, 8, 4, 64, 512, 1536, 4000, 16, 6


def test_never_on_a_cpu():
    with dependent_launch.chain():
        assert not dependent_launch.on(torch.zeros(1))


@pytest.mark.gpu
def test_only_within_a_chain():
    x = torch.zeros(1, device="cuda")
    assert not dependent_launch.on(x)
    with dependent_launch.chain():
        assert dependent_launch.on(x) == (torch.cuda.get_device_capability() >= (9, 0))
    assert not dependent_launch.on(x)


def randn(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[-1] ** 0.5


def arguments(rows, context):
    """(x, norm, layers, head, what attention needs beside q, k and v), for step. Each layer has pages of its own."""
    torch.manual_seed(0)
    ones, pages = torch.ones(D, device="cuda", dtype=torch.bfloat16), context // PAGE + 1
    layers = [
        {
            "qkv": (randn(HEADS * d, D), randn(K * d, D), randn(K * d, D)),
            "o": randn(D, HEADS * d), "gate": randn(WIDTH, D), "up": randn(WIDTH, D), "down": randn(D, WIDTH),
            "k": randn(rows * pages, K, PAGE, d), "v": randn(rows * pages, K, PAGE, d),
        }
        for _ in range(LAYERS)
    ]  # fmt: skip
    table = torch.randperm(rows * pages, device="cuda").view(rows, pages).int()
    lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
    tables = [randn(rows, d // 2) for _ in range(2)]
    return randn(rows, D) * 20, ones, layers, randn(VOCAB, D), (tables, table, lengths)


def step(x, ones, layers, head, attention):
    (cos, sin), table, lengths = attention
    norm = ones[:d]
    for w in layers:
        qkv = norm_linear(x, ones, EPS, w["qkv"])
        h = paged_attention(qkv, norm, norm, EPS, cos, sin, w["k"], w["v"], table, lengths)
        if len(x) > 1:  # as the engine does
            x, normed = residual_norm(h, w["o"], x, ones, EPS)
            x, _ = residual_norm(norm_swiglu(normed, None, EPS, w["gate"], w["up"]), w["down"], x, ones, EPS)
        else:
            x = linear_residual(h, w["o"], x)
            x = linear_residual(norm_swiglu(x, ones, EPS, w["gate"], w["up"]), w["down"], x)
    inverse, uniform = (torch.full((len(x),), y, device="cuda") for y in (1.0, 0.3))
    out = head_sample(x, ones, EPS, head, VOCAB - 5, inverse, uniform)
    places = torch.zeros_like(out[0])
    return *out, pack(*(out[i] for i in (0, 1, 3))), *start(-1 - places, out[0], places, places, head, cos, sin)


@pytest.mark.gpu
@pytest.mark.parametrize("rows, context", [(1, 40), (1, 3000), (16, 500), (64, 200), (256, 40)])
def test_the_same_bits_in_a_graph(rows, context):
    inputs = arguments(rows, context)
    expected = step(*inputs)
    for chain in (contextlib.nullcontext, dependent_launch.chain):
        with chain():
            step(*inputs)  # compiles
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = step(*inputs)
        for _ in range(20):
            for y in out:
                y.zero_()
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(out, expected))
