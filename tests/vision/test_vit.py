"""The tower's MLP on a GPU, where without gradients its first product and GELU are one kernel."""

import pytest
import torch
import torch.nn.functional as F

from qwen3f import presets
from qwen3f.vision.vit import MLP


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(1, 1), (1, 7), (2, 1000)])
def test_without_gradients_the_mlp_equals_the_formula(rows, dtype, compiled):
    """In float64 to 1e-5 in float32 (the two forms of GELU differ by 1e-4); else at most 1.1 times as far as with
    gradients, where product and GELU round apart."""
    torch.manual_seed(0)
    mlp = MLP(presets.get("qwen3-vl-2b")).to("cuda", dtype)
    x = torch.randn(*rows, mlp.linear_fc1.in_features, device="cuda", dtype=dtype) * 3
    first, second = mlp.linear_fc1, mlp.linear_fc2
    wide = [y.double() for y in (x, first.weight, first.bias, second.weight, second.bias)]
    exact = F.linear(F.gelu(F.linear(*wide[:3]), approximate="tanh"), *wide[3:])
    run = torch.compile(mlp, dynamic=False) if compiled else mlp
    with torch.no_grad():
        out = run(x)
    off, apart = ((y.double() - exact).norm() / exact.norm() for y in (out, mlp(x)))
    print(f"\n{rows} {dtype}: {off:.2e}, apart {apart:.2e}")
    assert off < 1e-5 if dtype == torch.float32 else off < 1.1 * apart
