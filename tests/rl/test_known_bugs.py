"""Bugs that users of other frameworks reported, one test each; a test's name has the number of the issue or PR. More
are in the tests of advantages, rewards and packing, and in those of runs (tests/stages/test_grpo_runs.py)."""

import math

import numpy as np
import pytest
import torch

from qwen3f import params
from qwen3f.data.mixture import make_mixture
from qwen3f.infer.sampling import SamplingParams
from qwen3f.model import EAGER
from qwen3f.processes.world import ALONE
from qwen3f.rl import prepare as R
from qwen3f.rl.policy import GRPO, policy_loss
from qwen3f.rl.questions import Numbers
from qwen3f.rl.rollout import RolloutOptions, Sampler
from qwen3f.rl.surrogates import sequence_ratio
from qwen3f.train.outputs import make_outputs
from tests.rl.formulas import batch_of, by_hand, tensors
from tests.rl.groups import Here, Said, asked, batch, length, options, rollout, tools
from tests.rl.test_policy_loss import ours
from tests.sharding.steps import config


def test_trl_5619_and_ms_swift_10117_the_loss_does_not_depend_on_accumulation():
    """DAPO's loss was divided by the number of accumulation steps. The parts of a batch, each weighted by its share of
    tokens, must sum to the loss of the whole batch."""
    x = tensors()
    whole, grad = ours(x, GRPO())
    total, n = 0, x["mask"].sum()
    for b in range(6):
        part = {k: v[b : b + 1] for k, v in x.items()}
        loss, own = ours(part, GRPO())
        share = part["mask"].sum() / n
        total = total + loss * share
        assert (own * share - grad[b]).abs().max() <= 1e-12
    assert abs(total - whole) <= 1e-12


def test_trl_pr_6439_and_verl_4852_one_mask_for_numerator_and_denominator():
    x = tensors()
    fewer = {**x, "mask": x["mask"].clone()}
    fewer["mask"][0] = 0
    without = {key: value[1:] for key, value in x.items()}
    assert abs(ours(fewer, GRPO())[0] - ours(without, GRPO())[0]) <= 1e-12


def test_roll_pr_444_masked_tokens_have_no_gradient():
    x = tensors()
    for name in ("dapo", "grpo", "gspo"):
        assert (ours(x, GRPO(loss=name, kl_coef=0.1))[1][x["mask"] == 0] == 0).all()


def test_verl_3741_and_7321_dr_grpos_divisor_is_a_constant():
    """It is neither the sum of lengths nor a number of the micro-batch: with half of the tokens the loss is half."""
    x, hyper = tensors(spread=0.0), GRPO(loss="dr_grpo", longest=100)
    loss, _ = ours(x, hyper)
    expected = -(x["advantages"] * x["mask"].sum(1)).sum() / (6 * 100)
    assert abs(loss - expected) <= 1e-12


def test_trl_4159_log_probs_are_of_the_distribution_that_was_sampled_from():
    """At temperature 0.7 the sampler's log-probabilities are the trainer's at 0.7, and not those at 1.0. 1e-5, since
    the engine computes in float32."""
    cfg = config()
    p = params.init_params(cfg, 0)
    sampler = Sampler(cfg, _Ids(cfg.vocab_size), EAGER, ALONE, RolloutOptions(2, 6, 0.7, 8, 0))
    sampler.update(p)
    groups = sampler([[3, 4, 5], [7, 8]], [0, 1])
    ratio = {}
    for temperature in (0.7, 1.0):
        found = []
        for prompt, group in zip(([3, 4, 5], [7, 8]), groups):
            for one in group:
                ids = torch.tensor([[*prompt, *one.ids]])
                rows = {
                    "tokens": ids[:, :-1],
                    "targets": ids[:, 1:],
                    "loss_weights": torch.ones(ids.shape[1] - 1)[None],
                }
                rows["temperature"] = torch.full_like(rows["loss_weights"], temperature)
                mine = make_outputs(cfg)(p, rows)[0, len(prompt) - 1 :]
                found.append((mine - torch.tensor(one.logprobs)).abs().max().item())
        ratio[temperature] = max(found)
    assert ratio[0.7] <= 1e-5
    assert ratio[1.0] > 1e-2


class _Ids:
    def __init__(self, size):
        self.vocab_size, self.stop_ids, self.pad_id = size, (), 0


def test_trl_6789_filters_of_the_sampler_do_not_exist():
    """With top-p or top-k the trainer must know which tokens could be drawn. So only the temperature can be set."""
    from qwen3f.stages.configs import grpo_config

    assert not {"top_k", "top_p", "min_p", "presence_penalty"} & set(grpo_config("nano").rollout)
    assert SamplingParams(temperature=1.0) == SamplingParams(1.0, 0, 1.0, 0.0, 0.0)


def test_trl_4772_a_sequences_ratio_does_not_grow_with_its_length():
    """A log-ratio of 0.012 per token multiplies to a ratio of 3.3 after 100 tokens. Divided by the length, it gives
    1.012 for any length."""
    assert math.exp(0.012 * 100) > 3.3
    for n in (1, 100, 10_000):
        ratio = sequence_ratio(torch.tensor(0.012 * n, dtype=torch.float64), torch.tensor(float(n)))
        assert ratio.item() == pytest.approx(math.exp(0.012), rel=1e-12)


def test_trl_5224_ids_are_trained_as_they_were_sampled():
    """The text of a completion might be encoded to other ids, but it is never encoded again."""

    class Lossy(Said):
        def __call__(self, prompts, places, pictures):
            return [[rollout("\x07\x07"), rollout("q")] for _ in prompts]

    found = R.draw(batch(0), None, asked("a"), tools(Lossy({}), Here(length=length)), options())
    ids = [document.ids for document in R.documents(found.trained, False)[0]]
    assert ids == [(7, 7, 1), (ord("q"), 1)]


def test_unsloth_zoo_832_the_sampled_stop_id_is_trained_and_nothing_after_it():
    found = R.draw(batch(0), None, asked("ab"), tools(Said({"ab": ["x"]}), Here(length=length)), options())
    rows = R.make_rows(found.trained, 0, tools(None, None).axes, options(), 1.0)
    assert rows["targets"][0][rows["loss_weights"][0] > 0].tolist() == [ord("x"), 1]
    assert found.groups[0].samples[0].text == "x"


def test_r1_v_67_a_completion_stays_with_its_prompt():
    """In any order of prompts, a completion has the reward, the advantage and the row of its own group."""
    texts = {"a": ["x", "xx"], "b": ["yyy", "y"], "c": ["z", "zzzz"]}
    expected = None
    for numbers in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        found = R.draw(batch(*numbers), None, asked(*texts), tools(Said(texts), Here(length=length)), options())
        told = {
            (document.prompt, document.ids): document.advantage
            for group in R.documents(found.trained, False)
            for document in group
        }
        assert told == (expected or told)
        expected = told
    assert expected[((ord("b"),), (*map(ord, "yyy"), 1))] == 1.0


def test_trl_3675_and_4531_each_prompt_comes_once_a_pass():
    order = make_mixture([Numbers(0, 37)], [1.0])
    for seed in range(3):
        for epoch in range(2):
            places = np.arange(37 * epoch, 37 * (epoch + 1))
            assert sorted(order[i]["question"].item() for i in order.order(places, seed)) == list(range(37))


def test_trl_5588_the_kl_holds_in_groups_without_a_difference():
    """In groups of equal rewards advantages are 0. The KL term must still pull the policy towards the reference."""
    x = tensors()
    x["advantages"] = torch.zeros(6, dtype=torch.float64)
    hyper = GRPO(kl_coef=0.1)
    loss, grad = ours(x, hyper)
    assert abs(loss - by_hand(x, hyper)) <= 1e-12
    assert (grad[x["mask"] > 0] != 0).all()
    assert (ours(x, GRPO())[1] == 0).all()


def test_liger_pr_1088_the_correction_is_in_loss_and_gradient():
    """The correction was ignored, and gradients were 100 times too large. Weights that multiply the advantages must act
    as weights of the tokens' costs."""
    x = tensors()
    weights = torch.rand(6, 9, generator=torch.Generator().manual_seed(3)).double() * 2
    given = batch_of(x)
    given["advantages"] = given["advantages"] * weights
    for name in ("dapo", "cispo", "grpo", "sapo"):
        got, grad = ours(x, GRPO(loss=name), given)
        leaf = x["logp"].clone().requires_grad_()
        total = 0
        for b in range(6):
            for t in range(9):
                if x["mask"][b, t]:
                    one = {k: v[b : b + 1, t : t + 1] if v.dim() == 2 else v[b : b + 1] for k, v in x.items()}
                    cost = policy_loss(leaf[b : b + 1, t : t + 1], batch_of(one), GRPO(loss=name))[0] * weights[b, t]
                    total = total + (
                        cost / x["mask"][b].sum() / 6 if name in ("grpo", "sapo") else cost / x["mask"].sum()
                    )
        (expected,) = torch.autograd.grad(total, leaf)
        assert abs(got - total) <= 1e-12, name
        assert (grad - expected).abs().max() <= 1e-12, name
