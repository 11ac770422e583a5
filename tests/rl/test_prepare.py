"""The groups of a step, without a model: dynamic sampling, completions that cannot be judged, metrics and samples that
are logged, and the rows for the loss."""

import math

import pytest
import torch

from qwen3f.errors import UserError
from qwen3f.params import EMBED
from qwen3f.rl import prepare as R
from tests.rl.groups import Here, Said, asked, batch, length, options, rollout, tools

TEXTS = {"a": ["x", "xx"], "b": ["y", "y"], "c": ["zz", "z"], "d": ["w", "www"], "e": ["q", "q"]}


def drawn(batches, **changes):
    said, here = Said(TEXTS), Here(length=length)
    rest = iter(batches[1:])
    return R.draw(batches[0], lambda: next(rest), asked(*TEXTS), tools(said, here), options(**changes)), said, here


def test_a_batch_is_asked_by_place_and_judged_once():
    found, said, here = drawn([batch(2, 0)])
    assert said.asked == [((ord("c"),), 0), ((ord("a"),), 1)]
    assert [group.advantages.tolist() for group in found.groups] == [[0.5, -0.5], [-0.5, 0.5]]
    assert [sample.text for sample in here.seen] == ["zz", "z", "x", "xx"]
    assert found.trained == found.groups


def test_groups_that_tell_nothing_are_replaced_and_counted():
    """DAPO's dynamic sampling: batches are drawn until enough groups have different rewards. Each such group is
    trained, and no prompt is lost."""
    found, _, _ = drawn([batch(0, 1), batch(2, 4, first=2), batch(3, 3, first=4)], draws=5)
    assert (found.draws, len(found.groups)) == (2, 4)
    assert [group.place for group in found.trained] == [0, 2]
    figures = R.figures(found)
    assert (figures["groups"], figures["groups_wasted"], figures["draws"]) == (4.0, 0.5, 2.0)


def test_there_is_an_end_to_drawing():
    found, _, _ = drawn([batch(1, 4), batch(1, 4, first=2)], draws=2)
    assert found.draws == 2
    assert found.trained == found.groups  # all rewards are equal, so all groups are trained
    assert all(group.advantages.tolist() == [0.0, 0.0] for group in found.groups)
    rows = R.make_rows(found.trained, 0, tools(None, None).axes, options(), 1.0)
    assert rows["loss_weights"].sum() > 0
    assert not rows["advantages"].any()


def test_without_dynamic_sampling_all_is_trained_on():
    found, _, _ = drawn([batch(0, 1)])
    assert len(found.trained) == 2


def test_what_cannot_be_judged_is_left_out_and_counted():
    here = Here(length=lambda s: None if s.text == "x" else length(s))
    found = R.draw(batch(0, 2), None, asked(*TEXTS), tools(Said(TEXTS), here), options())
    assert found.failures == {"length: cannot be judged": 1}
    assert found.groups[0].total.isnan().tolist() == [True, False]
    assert found.groups[0].advantages.tolist() == [0.0, 0.0]
    assert found.groups[1].advantages.tolist() == [0.5, -0.5]
    assert R.figures(found)["unjudged"] == 0.25
    assert R.figures(found)["reward"] == pytest.approx(5 / 3)


def test_a_run_whose_rewards_all_fail_stops():
    with pytest.raises(UserError, match=r"none of 4 completions could be judged.*length: cannot be judged \(4 times\)"):
        R.draw(batch(0, 2), None, asked(*TEXTS), tools(Said(TEXTS), Here(length=lambda s: None)), options())


def test_truncated_completions_count_in_their_group_and_in_no_loss():
    """Overlong masking: the rewards of truncated completions count in the group's mean. In the loss the same mask
    leaves them out of numerator and denominator."""

    class Cut(Said):
        def __call__(self, prompts, places, pictures):
            return [[rollout("xx"), rollout("x" * 9, ended=False)] for _ in prompts]

    found = R.draw(batch(0), None, asked("a"), tools(Cut({}), Here(length=length)), options(mask_truncated=True))
    assert found.groups[0].advantages.tolist() == [-3.5, 3.5]
    rows = R.make_rows(found.trained, 0, tools(None, None).axes, options(mask_truncated=True), 1.0)
    assert rows["loss_weights"].sum() == 3  # only the completion that ended, with its stop id
    rows = R.make_rows(found.trained, 0, tools(None, None).axes, options(), 1.0)
    assert rows["loss_weights"].sum() == 12
    assert R.figures(found)["truncated"] == 0.5


def test_a_group_of_one_is_defined():
    texts = {"a": ["x"], "b": ["yy"]}
    found = R.draw(batch(0, 1), None, asked(*texts), tools(Said(texts), Here(length=length)), options())
    assert [group.advantages.tolist() for group in found.groups] == [[0.0], [0.0]]
    assert R.figures(found)["groups_wasted"] == 1.0
    batchwise = R.draw(
        batch(0, 1), None, asked(*texts), tools(Said(texts), Here(length=length)), options(scale="batch")
    )
    assert [group.advantages.tolist() for group in batchwise.groups] == [[0.0], [0.0]]


def test_empty_completions_are_one_token():
    texts = {"a": ["", "xx"]}
    found = R.draw(batch(0), None, asked(*texts), tools(Said(texts), Here(length=length)), options())
    rows = R.make_rows(found.trained, 0, tools(None, None).axes, options(), 1.0)
    assert rows["loss_weights"].sum() == 1 + 3
    assert found.groups[0].samples[0].text == ""


def test_several_rewards_are_logged_apart():
    here = Here(length=length, one=lambda s: 1.0)
    found = R.draw(batch(0, 2), None, asked(*TEXTS), tools(Said(TEXTS), here), options())
    figures = R.figures(found)
    assert (figures["reward"], figures["reward/length"], figures["reward/one"]) == (2.5, 1.5, 1.0)
    lines = R.lines(7, found)
    assert [line["rewards"] for line in lines[:2]] == [{"length": 1.0, "one": 1.0}, {"length": 2.0, "one": 1.0}]
    assert lines[0].keys() >= {"step", "place", "sample", "prompt", "gold", "text", "reward", "advantage", "trained"}
    assert [line["advantage"] for line in lines] == [-0.5, 0.5, 0.5, -0.5]


def log_probs(trainer, reference=None, entropy=None):
    return R.LogProbs(lambda p, rows: trainer, None if reference is None else lambda rows: reference, entropy)


def rows_of(shape=(2, 6)):
    weights = torch.ones(shape)
    weights[0, :2] = 0
    sampler = torch.full(shape, -1.0, dtype=torch.float64)
    return {
        "loss_weights": weights,
        "segments": torch.ones(shape, dtype=torch.int32),
        "advantages": torch.ones(shape),
        "sampler_logprobs": sampler,
    }


def test_old_log_probs_are_the_trainers_or_the_samplers():
    trainer = torch.full((2, 6), -1.0) + torch.tensor(math.log(2.5))
    rows = rows_of()
    gaps = R.compare(rows, {}, log_probs(trainer), tools(None, None), options())
    assert "sampler_logprobs" not in rows
    assert torch.equal(rows["old_logprobs"], torch.where(rows["loss_weights"] != 0, trainer, 0.0))
    assert gaps["sampler_gap"] == pytest.approx(math.log(2.5), rel=1e-6)
    assert gaps["sampler_kl"] == pytest.approx(2.5 - math.log(2.5) - 1, rel=1e-6)
    assert gaps["correction"] == 1.0
    rows = rows_of()
    given = {EMBED: torch.zeros(1)}
    gaps = R.compare(rows, given, log_probs(trainer), tools(None, None), options(trust_sampler=True))
    assert rows["old_logprobs"][1].tolist() == [-1.0] * 6
    assert gaps == {}


def test_corrections_and_the_entropy_filter_go_into_the_advantages():
    trainer = torch.full((2, 6), -1.0) + torch.tensor(math.log(2.5))
    entropy = torch.arange(12.0).view(2, 6)
    rows = rows_of()
    given = options(correction="token_truncate", high=2.0, top_entropy=0.3)
    gaps = R.compare(rows, {}, log_probs(trainer, entropy=lambda p, r: entropy), tools(None, None), given)
    assert rows["advantages"].tolist() == [[0.0] * 6, [0.0, 0.0, 0.0, 2.0, 2.0, 2.0]]
    assert gaps["correction"] == pytest.approx(0.6)


def test_the_reference_is_asked_where_there_is_one():
    rows = rows_of()
    R.compare(rows, {}, log_probs(rows_of()["advantages"], torch.full((2, 6), -3.0)), tools(None, None), options())
    assert rows["ref_logprobs"][1].tolist() == [-3.0] * 6
    assert rows["ref_logprobs"][0, :2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "texts, share",
    [
        ({"a": ["y", "y"], "b": ["y", "y"]}, 0.0),  # all are wrong, so none has the highest reward
        ({"a": ["x", "x"], "b": ["x", "x"]}, 1.0),
        ({"a": ["x"] * 7, "b": ["x"] * 6 + ["y"]}, 0.5),  # the mean of seven equal rewards is rounded down
    ],
)
def test_a_group_is_all_best_where_all_its_rewards_are_the_highest(texts, share):
    here = Here(correct=lambda s: float(s.text == "x"), format=lambda s: float(s.text == "x"))
    here.weights = (0.6, 0.2)
    found = R.draw(batch(0, 1), None, asked(*texts), tools(Said(texts), here), options())
    assert R.figures(found)["groups_all_best"] == share


def test_a_group_that_nothing_could_judge_is_not_all_best():
    here = Here(correct=lambda s: None if s.text == "y" else 1.0)
    texts = {"a": ["y", "y"], "b": ["x", "y"]}
    found = R.draw(batch(0, 1), None, asked(*texts), tools(Said(texts), here), options())
    assert R.figures(found)["groups_all_best"] == 0.5
