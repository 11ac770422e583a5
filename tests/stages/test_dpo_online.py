"""Online DPO: any mesh writes the same answers and learns the same; a killed run resumes; ties are counted."""

import functools
from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict

from qwen3f.data.sources.reasoning import ReasoningSource
from qwen3f.errors import UserError
from qwen3f.preference.online_rows import NewPair, Written, best_and_worst, pack
from qwen3f.preference.wins import win_rate
from qwen3f.processes.world import open_world
from qwen3f.stages import dpo_online
from qwen3f.train import loop
from sharding.mesh import parse_mesh
from tests.sharding.worlds import run_processes
from tests.stages import toy_pairs
from tests.stages.test_sft import Killed, watched
from tests.train.runs import assert_same_bits, final_state, metrics

NUMBERS = (
    "loss", "grad_norm", "kl", "chosen_log_prob", "rejected_log_prob", "accuracy", "asked", "ties", "reward", "ended",
    "answer_tokens", "tokens_seen",
)  # fmt: skip
RUNS = {2: {"cp2": "reward", "pp2": "dense"}, 4: {"dp2,tp2": "reward"}}  # ranks -> the model on each mesh
MORE = {2: {"dp2": "reward", "tp2": "dense", "ep2": "moe"}, 4: {"cp2,tp2": "dense"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("online")
    toy_pairs.write_data(place)
    return place


def configured(root, kind="dense", **changes):
    """kind "reward": the dense model's answers, ranked by a reward model."""
    if kind == "reward":
        changes = {"online.judge": "reward_model", "online.reward_model": str(root / "reward"), **changes}
    return toy_pairs.online_config(root, kind.replace("reward", "dense"), **changes)


@pytest.fixture(scope="module")
def alone(root):
    """kind -> the numbers of one device."""

    @functools.cache
    def found(kind):
        loop.run(configured(root, kind), root / "alone" / kind, progress=False)
        return learned(root / "alone" / kind)

    return found


def learned(workdir):
    return [[line[n] for n in (*NUMBERS, *(k for k in line if k.startswith("val_")))] for line in metrics(workdir)]


def same(got, expected, what):
    """To 1e-10: float64, and only sums are in another order; the answers are the same ones."""
    assert len(got[-1]) == len(NUMBERS) + 4
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-10, abs=1e-10), what


def on_ranks(rank, meshes, root, folder):
    for mesh, kind in meshes.items():
        config = configured(Path(root), kind, mesh=mesh, steps=2, **{"checkpoint.every": 0})
        loop.run(ConfigDict(config), Path(folder) / mesh, False, open_world(parse_mesh(mesh), "cpu", rank))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("runs", [RUNS, pytest.param(MORE, marks=pytest.mark.nightly)], ids=["usual", "more"])
def test_every_mesh(runs, ranks, root, alone, tmp_path):
    run_processes(on_ranks, ranks, runs[ranks], str(root), str(tmp_path))
    for mesh, kind in runs[ranks].items():
        same(learned(tmp_path / mesh), alone(kind)[:2], mesh)


def test_any_cut_into_micro_batches(root, alone, tmp_path):
    loop.run(configured(root, microbatches=4), tmp_path, progress=False)
    same(learned(tmp_path), alone("dense"), 4)


def test_a_killed_run_goes_on_with_the_same_answers_and_numbers(root, alone, tmp_path):
    """The run dies before step 4 and resumes from the checkpoint of step 2, bit for bit like an uninterrupted run.
    Steps ask more prompts than the batch size, because of ties."""
    config, whole, first, second = configured(root, **{"online.fill": 1.0}), {}, {}, {}
    loop.run(config, tmp_path / "whole", False, make_step=watched(whole))
    with pytest.raises(Killed):
        loop.run(config, tmp_path / "cut", False, make_step=watched(first, 4))
    loop.run(config, tmp_path / "cut", False, make_step=watched(second))
    assert (list(first), list(second), list(whole)) == ([1, 2, 3], [3, 4], [1, 2, 3, 4])
    for number, batch in (*first.items(), *second.items()):
        assert batch.keys() == whole[number].keys()
        assert all(torch.equal(value, whole[number][key]) for key, value in batch.items()), number
    last = final_state(config, tmp_path / "whole", 4)
    assert_same_bits(final_state(config, tmp_path / "cut", 4), last)
    lines = metrics(tmp_path / "whole")
    asked = [line["asked"] for line in lines]
    assert int(last.position) == sum(asked) > 4 * config.batch_size
    assert all(round((1 - line["ties"]) * line["asked"]) >= config.batch_size for line in lines)
    again = {line["step"]: line for line in metrics(tmp_path / "cut")}
    for line in lines:
        assert all(again[line["step"]][name] == line[name] for name in NUMBERS)


# -- the pairs that are trained on -------------------------------------------------------------------------------------


def written(text, ended=True):
    return Written(tuple(map(ord, text)), text, ended)


@pytest.mark.parametrize(
    "answers, rewards, expected",
    [
        ("ab", [0.0, 1.0], (1, 0)),
        ("abc", [0.5, 0.9, 0.1], (1, 2)),
        ("ab", [1.0, 1.0], None),
        ("abc", [1.0, 1.0, 0.0], (0, 2)),  # the first of equal ones
        ("abc", [None, 1.0, None], None),
        ("abc", [None, 1.0, 0.0], (1, 2)),
        ("ab", [None, None], None),
        ("aB", [0.0, 1.0], (0, 1)),  # B has not ended: it is worse, whatever its reward
        ("AB", [0.0, 1.0], None),
        ("aa", [0.0, 1.0], None),  # the same ids
    ],
)
def test_the_best_and_the_worst_answer(answers, rewards, expected):
    """Answers in small letters have ended, those in capitals have not."""
    assert best_and_worst([written(x, x.islower()) for x in answers], rewards) == expected


def test_rows_hold_the_pairs_and_only_answers_count():
    pairs = [NewPair((1, 2, 3), (4, 5), (6,)), NewPair((7, 8), (9,), (10, 11, 12)), NewPair((1,) * 9, (2,), (3,))]
    batch = pack(pairs, 20, 4, pad_id=0)
    assert batch["tokens"].shape == (4, 20)
    found = []
    for row in range(4):
        for segment in range(1, int(batch["segments"][row].max()) + 1):
            here = batch["segments"][row] == segment
            ids = [*batch["tokens"][row][here].tolist(), int(batch["targets"][row][here][-1])]
            found.append((ids, int(batch["loss_weights"][row][here].sum())))
            assert batch["positions"][row][here].tolist() == list(range(len(ids) - 1))
    expected = [([*p.prompt, *answer], len(answer)) for p in pairs for answer in p[1:]]
    assert sorted(found) == sorted(expected)
    assert [a[0][:2] == b[0][:2] for a, b in zip(found[::2], found[1::2])] == [True] * 3  # adjacent
    with pytest.raises(ValueError, match="1 of 3 pairs do not fit into 17 places"):
        pack(pairs, 17, 1, 0)


def test_the_share_of_wins_counts_equals_half():
    own = [(1.0, True, -3), (0.0, True, -9), (1.0, True, -4)]
    assert win_rate(own, [(1.0, True, -5), (1.0, False, -2), (1.0, True, -4)]) == 0.5


def test_prompts_are_the_training_questions_in_a_shuffled_order(root):
    questions = tuple(ReasoningSource(num_problems=50).problems("train"))
    prompts = dpo_online.Prompts(questions)
    places = torch.arange(2 * len(prompts)).numpy()
    order = prompts.order(places, 1)
    once = list(range(len(prompts)))
    for epoch in (order[: len(prompts)], order[len(prompts) :]):
        assert sorted(epoch) == once
        assert list(epoch) != once
    assert list(prompts.order(places, 2)) != list(order)


def test_the_logged_reward_is_the_mean_of_what_the_judge_says_where_it_can_tell(root, tmp_path, monkeypatch):
    told = []

    def judge(questions, prompts, answers):
        told.extend([None, *(float(len(a.ids) + i) for i, a in enumerate(own[1:]))] for own in answers)
        return told[-len(answers) :]

    monkeypatch.setattr(dpo_online, "_judge", lambda run, task: judge)
    loop.run(configured(root, steps=1, **{"online.samples": 4}), tmp_path, False)
    (line,) = metrics(tmp_path)
    rewards = [reward for own in told for reward in own[1:]]
    assert len(told) == line["asked"]
    assert line["reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-12)


# -- what cannot run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"online.judge": "me"}, "config.online.judge='me' is unknown; use one of task, rule, reward_model"),
        ({"online.judge": "reward_model"}, "needs a reward model: write --config.online.reward_model=W"),
        ({"online.reward_model": "W"}, "online.reward_model=W: --config.online.judge=.* does not use it; write"),
        ({"online.samples": 1}, "config.online.samples must be at least 2"),
        ({"online.temperature": 0.0}, "online.temperature=0.0: write a number from 0.001 to 1000"),
        ({"online.fill": 0.0}, "online.fill=0.0"),
        ({"online.task": "x"}, "config.online.task=x: there is no such task"),
        ({"online.task": "visual"}, "config.online.task=visual asks about pictures"),
        ({"online.max_new_tokens": 128}, "seq_len=256 has no room for a prompt and two answers"),
        ({"online.max_new_tokens": 127}, "none of .* prompts fits; raise --config.seq_len"),
        ({"online.cache_tokens": 16}, "config.online.cache_tokens=16 has no room for the longest prompt"),
        ({"online.rows": 0}, "online.rows must be at least 1, got 0"),
        ({"data.kinds": "poetry"}, "config.data.kinds is 'poetry'"),
        ({"init_from": ""}, "write --config.init_from=W"),
    ],
)
def test_values_that_cannot_work_are_refused(changes, words, root, tmp_path):
    with pytest.raises(UserError, match=words):
        loop.run(configured(root, **changes), tmp_path, False)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_model_of_text_is_no_reward_model(root, tmp_path):
    with pytest.raises(UserError, match="is not a reward model with a vocabulary of 300: train"):
        loop.run(configured(root, "reward", **{"online.reward_model": str(root / "dense")}), tmp_path, False)


def test_a_step_of_nothing_but_ties_is_an_error_that_says_what_to_do(root, tmp_path):
    """Random weights write one token per answer. No answer ends, and the task judges all of them wrong."""
    config = configured(root, batch_size=2, microbatches=1)
    config.online.update(judge="task", max_new_tokens=1, rounds=2, samples=2)
    with pytest.raises(UserError, match="step 1: --config.online.judge=task ranks all answers equal for each of 4 "):
        loop.run(config, tmp_path, False)
