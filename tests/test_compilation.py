"""One process with many models and many shapes: what torch compiles, how often, and that the results are right.

The subject is dynamo's limit on compilations. So graphs are counted after dynamo and run by its eager backend; inductor
would take an hour for as many. test_step.py and test_step_cuda.py compile with inductor.
"""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from qwen3f import compilation, model, params, presets
from qwen3f.compilation import compile_static
from qwen3f.errors import UserError
from qwen3f.model import block
from qwen3f.stages.pretrain import make_train_step
from qwen3f.train import losses, state
from qwen3f.train.optimizer import AdamW
from qwen3f.train.schedule import Schedule
from qwen3f.transforms import grad_and_value, jit
from tests.batches import random_batch

ROOT = Path(__file__).parents[1]
MANY = 20
OVER = 9  # torch._dynamo.config.recompile_limit is 8
SCHEDULE = Schedule("constant", 1e-3, 10)


@pytest.fixture
def counter(monkeypatch):
    """torch.compile with a backend that counts graphs and runs them as they are."""
    graphs, original = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: original(fn, backend=graphs, **options))
    block.block_fn.cache_clear()
    yield graphs
    block.block_fn.cache_clear()


def tiny(number):
    """A tiny model, a different one for each number."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 1}
    return presets.get("nano").replace(hidden_size=8 + number, intermediate_size=16, vocab_size=32, **sizes)


def assert_gradients_of_a_compiled_model(number, length):
    """Gradients with compiled blocks equal those without: the same formula, with another kernel of attention."""
    cfg = tiny(number)
    p, batch = params.init_params(cfg, 0, dtype=torch.float64), random_batch(2, length, cfg.vocab_size)
    ours, theirs = (
        grad_and_value(losses.make_loss(cfg, model.Execution(compile=mode)))(p, batch, 1.0) for mode in ("block", "off")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def models_and_shapes(many):
    """(model, length) pairs: `many` models at one length, then one of them at further lengths, up to `many`."""
    return [(number, 6) for number in range(many)] + [(0, length) for length in range(7, many + 6)]


def test_torch_allows_less():
    """The error that the tests below would get without qwen3f.compilation."""
    assert torch._dynamo.config.recompile_limit == OVER - 1

    def definition(factor):
        return torch.compile(lambda x: factor * x, fullgraph=True, dynamic=False, backend="eager")

    *first, last = (definition(factor) for factor in range(OVER))
    for scaled in first:
        scaled(torch.ones(2))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        last(torch.ones(2))


def test_functions_of_one_definition_at_many_shapes(counter):
    """Each function is compiled once for each shape, and nothing is compiled in the second round. torch.no_grad's
    wrapper is one definition too, which all of them share."""

    def definition(factor):
        @torch.no_grad()
        def scaled(x, *, offset):
            return factor * x + offset

        return compile_static(scaled)

    functions = [definition(factor) for factor in range(OVER)]
    for _ in range(2):
        for factor, scaled in enumerate(functions):
            for size in range(OVER):
                assert scaled(torch.ones(size), offset=1).tolist() == [factor + 1.0] * size
        assert counter.frame_count == OVER * OVER


def test_updates_more_than_torch_allows(counter):
    """The update computes gradients, and its state is donated."""

    def definition(factor):
        def update(s, x):
            grads, value = grad_and_value(lambda s: (factor * s * x).square().sum())(s)
            return s - 0.1 * grads, value

        return jit(update, donate=True)

    updates = [definition(factor) for factor in range(OVER)]
    for factor, size in models_and_shapes(OVER):
        x, s = torch.arange(1.0, size + 1), torch.ones(size)
        new, value = updates[factor](s, x)
        assert new is s
        assert value == factor**2 * x.square().sum()
        torch.testing.assert_close(new, 1 - 0.2 * factor**2 * x.square())
    assert counter.frame_count == len(models_and_shapes(OVER))


def test_models_and_shapes_more_than_torch_allows(counter):
    """torch's limit is set to 2, for time; test_20_models_at_20_shapes leaves it as it is."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for number, length in models_and_shapes(3):
            assert_gradients_of_a_compiled_model(number, length)
    assert counter.frame_count == len(models_and_shapes(3))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_20_models_at_20_shapes(counter):
    for number in range(MANY):
        for length in range(2, MANY + 2):
            assert_gradients_of_a_compiled_model(number, length)
    assert counter.frame_count == MANY * MANY


def test_a_training_run_compiles_a_block_three_times_and_the_update_once(counter):
    """A block is compiled for training with a trained embedding, for training with a frozen one, and for evaluation."""
    cfg = tiny(0).replace(num_hidden_layers=3)
    p, batch = params.init_params(cfg, 0), random_batch(2, 6, cfg.vocab_size)
    loss = losses.make_loss(cfg, model.Execution(compile="block"))
    grad_and_value(loss)(p, batch, 1.0)
    with torch.no_grad():
        loss(p, batch, 1.0)
    assert counter.frame_count == 2
    frozen = {params.EMBED: p[params.EMBED]}
    rest = {path: leaf for path, leaf in p.items() if path not in frozen}
    grad_and_value(lambda trained: loss({**trained, **frozen}, batch, 1.0))(rest)
    assert counter.frame_count == 3


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode, graphs", [("block", 2), ("step", 1)])
def test_whole_steps_of_20_models_and_at_20_shapes(mode, graphs, counter):
    """In mode "block" torch compiles two graphs for each model and shape: a block and the update."""
    for number, length in models_and_shapes(MANY):
        cfg, results = tiny(number), []
        for compiled in (mode, "off"):
            options = {"execution": model.Execution(compile=compiled), "donate": True}
            step = make_train_step(cfg, AdamW(eps=1e-3), SCHEDULE, **options)
            batch = random_batch(2, length, cfg.vocab_size)
            results.append(step(state.init_state(cfg, 0, dtype=torch.float64), batch))
        (ours, metrics), (theirs, expected) = results
        torch.testing.assert_close(metrics["loss"], expected["loss"], rtol=1e-9, atol=0)
        torch.testing.assert_close(ours.params, theirs.params, rtol=1e-9, atol=1e-12)
    assert counter.frame_count == graphs * len(models_and_shapes(MANY))


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


def test_named_tuples_come_out_whole(counter):
    """torch.compile of torch 2.11 alone returns an empty tuple in place of one that _replace has made."""
    out, extra = compile_static(lambda pair: (pair._replace(a=pair.a + 1), {"pair": pair._replace(b=pair.a)}))(
        Pair(torch.ones(2), torch.zeros(2))
    )
    assert isinstance(out, Pair)
    assert (out.a.tolist(), out.b.tolist()) == ([2.0, 2.0], [0.0, 0.0])
    assert (extra["pair"].a.tolist(), extra["pair"].b.tolist()) == ([1.0, 1.0], [1.0, 1.0])


def test_a_shape_too_many_is_the_users_error_and_settings_stay(counter, monkeypatch):
    def double(x):
        return 2 * x

    monkeypatch.setitem(compilation._SETTINGS, "recompile_limit", OVER)
    settings = torch._dynamo.config.get_config_copy()
    compiled = compilation.compile_static(double)
    for size in range(OVER):
        compiled(torch.ones(size))
    with pytest.raises(UserError, match=r"double was called with more than \d+ shapes.*--config.compile=off"):
        compiled(torch.ones(OVER))
    assert compiled(torch.ones(3)).tolist() == [2.0] * 3  # compiled shapes still work
    assert torch._dynamo.config.get_config_copy() == settings


def test_without_fullgraph_the_rest_runs_uncompiled(counter):
    def noisy(x):
        if x.sum() > 0:  # a branch on data
            raise NotImplementedError("positive")
        return x - 1

    compiled = compile_static(noisy, fullgraph=False)
    assert compiled(-torch.ones(2)).tolist() == [-2.0, -2.0]
    with pytest.raises(NotImplementedError, match="positive"):
        compiled(torch.ones(2))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile_static(noisy)(-torch.ones(2))


def test_torch_compile_is_called_in_one_place():
    """Dynamo's settings are used only there, too. Benches are left out, since they compile what they compare with."""
    where = set()
    for path in (
        *(ROOT / "qwen3f").rglob("*.py"),
        *(ROOT / "sharding").rglob("*.py"),
        *(ROOT / "kernels").glob("*.py"),
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.compile", "torch._dynamo.config"):
                where.add(path.relative_to(ROOT).as_posix())
    assert {path for path in where if not path.startswith("qwen3f/bench/")} == {"qwen3f/compilation.py"}
