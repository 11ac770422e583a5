"""The routers' losses against loops over tokens and against transformers, and what they do in training.

float64 to 1e-12, the rounding of another order of sums, unless a test says otherwise.
"""

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from qwen3f import params
from qwen3f.model.moe import SparseMLP
from qwen3f.stages.configs import pretrain_config
from qwen3f.stages.pretrain import make_train_step
from qwen3f.train import balance, losses, state
from qwen3f.train.loop import run as train
from qwen3f.train.objective import MicroBatch
from qwen3f.train.optimizer import AdamW
from qwen3f.train.schedule import Schedule
from qwen3f.transforms import grad_and_value
from sharding.axes import ONE
from tests.batches import random_batch
from tests.model.hf_params import Widen, from_hf, hf_model, small_config

MODES = ("global", "global_exact", "micro", "hf")
SCHEDULE = Schedule("constant", 1e-3, 100, 0)
HYPER = AdamW(eps=1e-3, clip_norm=0.0)
ROWS, LENGTH = 4, 12


@pytest.fixture(scope="module")
def hf_case():
    """A model of two sparse layers among four, a padded batch, and transformers' router logits [2][ROWS, LENGTH, E]."""
    cfg = small_config(
        num_hidden_layers=4, decoder_sparse_step=2, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20
    )
    batch = random_batch(ROWS, LENGTH, cfg.vocab_size)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    mask[0, 7:] = mask[2, 3:] = 0
    batch["targets"][mask == 0] = -100
    batch["positions"] = torch.arange(LENGTH).expand(ROWS, LENGTH)
    batch["segments"] = mask.to(torch.int32)
    with Widen():
        hf = hf_model(cfg, dtype=torch.float64)
        out = hf(batch["tokens"], attention_mask=mask, output_router_logits=True, use_cache=False)
        loss = load_balancing_loss_func(out.router_logits, 5, 2, mask)
        loss.backward()
    grads = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in hf.named_parameters()}
    p = from_hf(cfg, {name: leaf.detach() for name, leaf in hf.named_parameters()})
    logits = [x.detach().view(ROWS, LENGTH, 5) for x in out.router_logits]
    assert len(logits) == 2
    return cfg, p, batch, mask, logits, loss.item(), from_hf(cfg, grads)


def counted(logits, mask, top_k=2):
    """Over the real tokens of one layer, by a loop: choices of each expert, Σ softmax, tokens, Σ logsumexp²."""
    experts = logits.shape[-1]
    choices, sums, tokens, squares = [0] * experts, [0.0] * experts, 0, 0.0
    for row, is_real in zip(logits.flatten(0, 1).tolist(), mask.flatten().tolist(), strict=True):
        if is_real:
            z = math.log(sum(math.exp(v) for v in row))
            tokens, squares = tokens + 1, squares + z * z
            for e in range(experts):
                sums[e] += math.exp(row[e] - z)
            for e in sorted(range(experts), key=lambda e: -row[e])[:top_k]:
                choices[e] += 1
    return choices, sums, tokens, squares


def dot(f, p):
    return len(f) * sum(a * b for a, b in zip(f, p, strict=True))


def by_hand(mode, logits, mask, parts):
    """A step's balancing loss: each micro-batch's own loss, weighted by its share of the real tokens."""
    cut = [[counted(x, m) for x, m in zip(layer.chunk(parts), mask.chunk(parts))] for layer in logits]
    total, everyone = 0.0, int(mask.sum())
    for part in range(parts):
        layers = [layer[part] for layer in cut]
        n = layers[0][2]
        mean = [[s / n for s in sums] for _, sums, _, _ in layers]
        if mode == "hf":
            f = [sum(choices[e] for choices, *_ in layers) / (n * len(layers)) for e in range(5)]
            p = [sum(x[e] for x in mean) / len(layers) for e in range(5)]
            loss = dot(f, p)
        else:
            known = {"micro": range(part, part + 1), "global": range(part + 1), "global_exact": range(parts)}[mode]
            loss = 0.0
            for layer, p in zip(cut, mean, strict=True):
                seen = [layer[i] for i in known]
                f = [sum(c[0][e] for c in seen) / sum(c[2] for c in seen) for e in range(5)]
                loss += dot(f, p) / len(cut)
        total += loss * n / everyone
    return total


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_a_steps_loss_is_the_one_counted_by_hand(hf_case, mode, parts):
    cfg, p, batch, mask, logits, _, _ = hf_case
    cfg = cfg.replace(router_balance=mode)
    step = make_train_step(cfg, HYPER, SCHEDULE, microbatches=parts)
    _, metrics = step(state.from_params(cfg, p, 0, HYPER), batch)
    assert metrics["aux_loss"].item() == pytest.approx(by_hand(mode, logits, mask, parts), rel=1e-12)
    layers = [counted(x, mask) for x in logits]
    z = sum(squares / n for _, _, n, squares in layers) / len(layers)
    assert metrics["router_z_loss"].item() == pytest.approx(z, rel=1e-12)
    load = torch.tensor([[c / sum(choices) for c in choices] for choices, *_ in layers])
    torch.testing.assert_close(metrics["expert_load"], load, rtol=1e-6, atol=0)


def test_the_modes_differ(hf_case):
    *_, mask, logits, _, _ = hf_case
    values = [by_hand(mode, logits, mask, 2) for mode in MODES]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-3


def gradients(cfg, p, batch):
    both = grad_and_value(losses.make_differentiated(cfg), has_aux=True)
    return both(p, {}, MicroBatch(batch, batch), losses.sum_totals(cfg, batch, ONE))


def assert_close(got, expected, tolerance):
    for path in expected:
        assert (got[path] - expected[path]).norm() <= tolerance * max(expected[path].norm(), 1.0), path


def test_hf_equals_transformers_in_value_and_gradient(hf_case):
    """For the gradient of every parameter: that of both losses together minus that of the next-token loss alone."""
    cfg, p, batch, _, _, expected, expected_grads = hf_case
    both, (total, terms) = gradients(cfg.replace(router_balance="hf", router_aux_loss_coef=0.5), p, batch)
    alone, (loss, _) = gradients(cfg.replace(router_aux_loss_coef=0.0), p, batch)
    assert terms.aux_loss.item() == pytest.approx(expected, rel=1e-12)
    assert (total - loss).item() == pytest.approx(0.5 * expected, rel=1e-12)
    assert terms.loss == loss
    assert_close({k: (both[k] - alone[k]) / 0.5 for k in both}, expected_grads, 1e-11)  # a difference loses a digit
    assert expected_grads["model.layers.mlp.gate.weight"].norm() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_gradient_in_the_router_is_the_formulas(mode):
    """Both losses, each times a coefficient, with counts of other micro-batches: against autograd of the formula."""
    g = torch.Generator().manual_seed(0)
    x, others_x = torch.randn(2, 3, 1, 11, 8, generator=g, dtype=torch.float64)  # three layers
    gates = torch.randn(3, 6, 8, generator=g, dtype=torch.float64, requires_grad=True)
    cfg = small_config(
        hidden_size=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=4, router_z_loss_coef=1
    )
    expert = {f"experts.{n}_proj.weight": torch.randn(6, *s, dtype=torch.float64) for n, s in EXPERT.items()}

    def stats(x):
        return stack([run(cfg, {"gate.weight": w, **expert}, part) for w, part in zip(gates, x)])

    own, rest = stats(x), balance.load_of(stats(others_x))
    given = {"global": rest, "global_exact": balance.add(rest, balance.load_of(own))}.get(mode)
    total = torch.tensor(40)
    value = 0.3 * balance.balance_loss(mode, own, balance.load_of(own), given, total) + 0.2 * balance.z_loss(own, total)
    (got,) = torch.autograd.grad(value, gates)

    everything = torch.cat((x, others_x), 2) if mode.startswith("global") else x
    loss, f_all, p_all = 0.0, [], []
    for layer in range(3):
        logits = x[layer, 0] @ gates[layer].T
        chosen = (everything[layer, 0] @ gates[layer].T).topk(2).indices.flatten().tolist()
        f = torch.tensor([chosen.count(e) / (len(chosen) / 2) for e in range(6)], dtype=torch.float64)
        p = (logits.exp() / logits.exp().sum(1, keepdim=True)).sum(0) / 40
        f_all, p_all = [*f_all, f], [*p_all, p]
        loss = loss + 0.2 * logits.exp().sum(1).log().square().sum() / 40 / 3
        loss = loss + (0.0 if mode == "hf" else 0.3 * 6 * (f * p).sum() / 3)
    if mode == "hf":
        loss = loss + 0.3 * 6 * (sum(f_all) / 3 * sum(p_all) / 3).sum()
    (expected,) = torch.autograd.grad(loss, gates)
    torch.testing.assert_close(value, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


EXPERT = {"gate": (4, 8), "up": (4, 8), "down": (8, 4)}


def run(cfg, weights, x):
    with torch.device("meta"):
        skeleton = SparseMLP(cfg, "grouped")
    return torch.func.functional_call(skeleton, weights, (x,), strict=True)[1]


def stack(stats):
    return type(stats[0])(*(torch.stack(field) for field in zip(*stats)))


def test_an_even_load_costs_top_k():
    even = torch.full((2, 8), 5, dtype=torch.int64)
    tokens = torch.tensor([20, 20])
    stats = balance.RouterStats(even, even / 2.0, tokens, tokens * 1.0, torch.zeros_like(tokens))  # top 2 of 8
    for mode in MODES:
        assert balance.balance_loss(mode, stats, balance.load_of(stats), None, tokens[0]) == 2


@pytest.mark.parametrize("tokens", [0, 1])
def test_one_real_token_and_none(tokens):
    """Of a token the losses are its own; without tokens they are 0."""
    counts, probs = torch.tensor([[1, 0, 0, 0]]), torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    number = torch.tensor([tokens])
    stats = balance.RouterStats(tokens * counts, tokens * probs, number, tokens * torch.tensor([9.0]), number)
    for mode in MODES:
        assert balance.balance_loss(mode, stats, balance.load_of(stats), None, number[0]) == 4 * 0.5 * tokens
    assert balance.z_loss(stats, number[0]) == 9 * tokens
    assert balance.load_metrics(balance.load_of(stats))["dropped_share"] == tokens


@pytest.mark.parametrize("changes", [{}, {"router_z_loss_coef": 0.05, "gradient_checkpointing": "selective"}])
def test_exact_counts_do_not_care_how_the_batch_is_cut(hf_case, changes):
    """Loss and gradients are the same for 1, 2 and 4 parts; one row is padding. With running counts they differ."""
    cfg, p, batch, *_ = hf_case
    cfg = cfg.replace(router_aux_loss_coef=0.5, **changes)
    batch = {k: v.clone() for k, v in batch.items()}
    batch["segments"][3], batch["targets"][3] = 0, -100

    def step(mode, parts):
        c = cfg.replace(router_balance=mode)
        return make_train_step(c, HYPER, SCHEDULE, microbatches=parts)(state.from_params(c, p, 0, HYPER), batch)

    whole, metrics = step("global_exact", 1)
    running, running_metrics = step("global", 1)
    assert all(torch.equal(running.opt.m[k], whole.opt.m[k]) for k in whole.opt.m)
    assert running_metrics["aux_loss"] == metrics["aux_loss"]
    for parts in (2, 4):
        cut, cut_metrics = step("global_exact", parts)
        for name in ("loss", "aux_loss", "router_z_loss", "grad_norm"):
            torch.testing.assert_close(cut_metrics[name], metrics[name], rtol=1e-12, atol=0)
        assert torch.equal(cut_metrics["expert_load"], metrics["expert_load"])
        assert_close(cut.opt.m, whole.opt.m, 1e-12)
        assert (step("global", parts)[1]["aux_loss"] - metrics["aux_loss"]).abs() > 1e-4


def test_exact_counts_see_the_same_dropout(hf_case):
    """The choices counted before the step are those that the step makes, also with dropout."""
    cfg, p, batch, *_ = hf_case
    cfg = cfg.replace(router_balance="global_exact", attention_dropout=0.3)
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
    count, both = losses.make_load(cfg, dropout=True), losses.make_differentiated(cfg, dropout=True)
    totals = losses.sum_totals(cfg, batch, ONE)
    for i, part in enumerate(parts):
        first = count(p, part, torch.tensor(i))
        later = both(p, {}, MicroBatch(part, part), totals, None, torch.tensor(i))[1].load
        assert all(torch.equal(a, b) for a, b in zip(first, later, strict=True))


def test_padding_stays_uncounted_when_attention_crosses_documents(hf_case):
    cfg, p, batch, *_ = hf_case
    step = make_train_step(cfg, HYPER, SCHEDULE, cross_documents=True)
    start = state.from_params(cfg, p, 0, HYPER)
    (_, crossing), (_, apart) = step(start, batch), make_train_step(cfg, HYPER, SCHEDULE)(start, batch)
    torch.testing.assert_close(crossing["aux_loss"], apart["aux_loss"], rtol=1e-12, atol=0)  # one document a row


def test_load_metrics():
    counts = torch.tensor([[4, 0, 4], [1, 1, 6]])
    load = balance.Load(counts, torch.tensor([4, 4]), torch.tensor([1, 3]))
    got = balance.load_metrics(load)
    torch.testing.assert_close(got["expert_load"], counts / 8.0)
    entropy = (math.log(2) + (2 / 8 * math.log(8) + 6 / 8 * math.log(8 / 6))) / 2
    assert got["load_entropy"].item() == pytest.approx(entropy, rel=1e-6)
    assert got["load_max_violation"].item() == pytest.approx(6 / (8 / 3) - 1, rel=1e-6)
    assert got["load_mean_violation"].item() == pytest.approx((0.5 + 1 + 0.5 + 0.625 + 0.625 + 1.25) / 6, rel=1e-6)
    assert got["dropped_share"] == 4 / 16
    nothing = balance.load_metrics(balance.Load(*(torch.zeros_like(x) for x in load)))
    assert all(torch.isfinite(x).all() for x in nothing.values())


def test_heat_map_colours():
    picture = balance.heat_map(torch.tensor([[0.25, 0.0, 0.75, 0.0], [0.25, 0.25, 0.125, 0.375]]), cell=2)
    assert (picture.shape, picture.dtype) == ((4, 8, 3), torch.uint8)
    white, red, blue = [255, 255, 255], [255, 0, 0], [0, 0, 255]
    assert picture[0, ::2].tolist() == [white, blue, red, blue]
    assert picture[3, 1::2].tolist() == [white, white, [128, 128, 255], [255, 128, 128]]


def skewed_run(coefficient, steps=40):
    """(load_max_violation, loss) before and after, of a model whose routers start out preferring two experts."""
    cfg = small_config(
        num_hidden_layers=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24,
        router_aux_loss_coef=coefficient,
    )  # fmt: skip
    start = state.init_state(cfg, 0)
    direction = torch.randn(cfg.hidden_size, generator=torch.Generator().manual_seed(1))
    start.params[params.EMBED] += 0.05 * direction
    start.params["model.layers.mlp.gate.weight"][:, :2] += 0.05 * direction
    step = make_train_step(cfg, AdamW(), Schedule("constant", 3e-3, steps, 0), microbatches=2)
    now, history = start, []
    for number in range(steps):
        now, metrics = step(now, random_batch(8, 16, cfg.vocab_size, seed=number % 4))
        history.append((metrics["load_max_violation"].item(), metrics["loss"].item()))
    return history[0], history[-1]


def test_a_skewed_router_becomes_balanced():
    """Without the balancing loss it stays skewed. If two of eight experts take all the load, the violation is 3."""
    before, after = skewed_run(0.01)
    control_before, control_after = skewed_run(0.0)
    assert before[0] == control_before[0] > 2.5
    assert after[0] < 1.0
    assert control_after[0] > 2.0
    assert after[1] < before[1] - 0.5  # and it learns


def test_a_run_shows_how_its_experts_are_used(tmp_path):
    """Scalars in metrics.jsonl and TensorBoard; at each evaluation a picture of layers × experts."""
    rows = [{"text": " ".join(f"{i * j * 7919:x}" for j in range(1, 40))} for i in range(200)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = pretrain_config("nano")
    config.device = "cpu"
    config.data.mixture, config.data.cache = f"files@{tmp_path / 'text'}", str(tmp_path / "cache")
    config.model.update(vocab_size=320, num_hidden_layers=2, hidden_size=32, intermediate_size=48, head_dim=16)
    config.model.update(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    config.model.update(moe_drop_tokens=True, moe_capacity_factor=0.5)
    config.update(steps=4, batch_size=4, microbatches=2, seq_len=32, log_every=1)
    config.eval.update(every=2, batch_size=4)
    config.sample.tokens = 0
    train(config, tmp_path / "w", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    events = EventAccumulator(str(tmp_path / "w" / "tensorboard")).Reload()
    for name in ("aux_loss", "router_z_loss", "load_entropy", "load_max_violation", "load_mean_violation"):
        assert [e.value for e in events.Scalars(name)] == [pytest.approx(line[name], rel=1e-6) for line in lines]
    # capacity for half of the choices: at least that share is dropped
    assert all(0.5 <= line["dropped_share"] < 0.8 and line["load_entropy"] <= math.log(4) for line in lines)
    pictures = events.Images("expert_load")
    assert [(e.step, e.height, e.width) for e in pictures] == [(2, 16, 32), (4, 16, 32)]
