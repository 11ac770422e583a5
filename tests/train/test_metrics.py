"""FLOPs, peaks and throughput against numbers worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from qwen3f.train import metrics


def config(params):
    return SimpleNamespace(
        num_hidden_layers=28, num_attention_heads=16, head_dim=128, hidden_size=2048, matmul_params=lambda: params
    )


def test_flops_per_token():
    # qwen3-1.7b at 4,096 tokens: 6·N + 6·28·16·128·4096, N without the embedding's lookup, with the tied head.
    layer = 2048 * (16 + 8 + 8) * 128 + 16 * 128 * 2048 + 3 * 2048 * 6144
    n = 28 * layer + 151936 * 2048
    assert n == 1_720_451_072
    assert metrics.flops_per_token(config(n), 4096) == 6 * 1_720_451_072 + 1_409_286_144
    assert metrics.flops_per_token(config(0), 1) == 6 * 28 * 16 * 128
    # The measured row of the design: 37.1k tokens/s on an H100 is 44% of 989 TFLOP/s.
    assert 37_100 * metrics.flops_per_token(config(n), 4096) / 989e12 == pytest.approx(0.44, abs=0.002)


def test_flops_equal_a_counted_forward_and_backward():
    """Against torch's counter, for one attention layer with its projections.

    The counter ignores the causal mask, so the other half of attention is added.
    """
    from torch.utils.flop_counter import FlopCounterMode

    heads, d, hidden, tokens = 2, 8, 16, 32
    x = torch.randn(1, tokens, hidden, requires_grad=True)
    w = torch.randn(4, hidden, hidden, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        q, k, v = ((x @ w[i]).view(1, tokens, heads, d).transpose(1, 2) for i in range(3))
        p = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        (p.transpose(1, 2).reshape(1, tokens, hidden) @ w[3]).sum().backward()
    cfg = SimpleNamespace(
        num_hidden_layers=1, num_attention_heads=heads, head_dim=d, matmul_params=lambda: 4 * hidden * hidden
    )
    causal_half = 6 * heads * d * tokens
    assert counter.get_total_flops() == tokens * (metrics.flops_per_token(cfg, tokens) + causal_half)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_datasheet_peaks(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert metrics.peak_flops(torch.device("cuda")) == peak
    assert metrics.peak_source(torch.device("cuda")) == "datasheet"


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA L40",
        "NVIDIA RTX A1000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ],
)
def test_other_cards_are_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(metrics, "_measured_peak", lambda device: 7e12)
    assert metrics.peak_flops(torch.device("cuda")) == 7e12
    assert metrics.peak_source(torch.device("cuda")) == "measured"


def test_cpu_peak_is_measured_once():
    cpu = torch.device("cpu")
    assert metrics.peak_source(cpu) == "measured"
    peak = metrics.peak_flops(cpu)
    assert 1e9 < peak < 1e14  # between a very slow core and any CPU
    assert metrics.peak_flops(cpu) == peak


def test_throughput():
    mark = metrics.Throughput(tokens=1000, time=10.0)
    rate, mark = mark.advance(3000, 14.0)
    assert rate == 500.0
    assert mark == metrics.Throughput(3000, 14.0)
    assert mark.advance(3000, 15.0)[0] == 0.0
    with pytest.raises(ValueError, match="later time"):
        mark.advance(4000, 14.0)
