"""Rejection sampling: what becomes of each answer, files that fine-tuning reads, and a run that was cut off."""

import json
import shutil
from collections import Counter

import pytest

from experiments.rejection_sample import get_config
from qwen3f.data.chat.sources import open_chats
from qwen3f.data.pairs.sources import open_pairs
from qwen3f.data.sources.reasoning import ReasoningSource
from qwen3f.errors import UserError
from qwen3f.eval import rejection
from qwen3f.eval.answers import Answer
from qwen3f.eval.own_answers import ranked_pair, right_chats
from qwen3f.eval.rejection import SAMPLES, SUMMARY, run
from qwen3f.tasks.reasoning import ReasoningTask
from qwen3f.tasks.task import Question
from qwen3f.train.lock import held
from tests.stages import toy_chats

QUESTION = Question("2 + 2?", "4", ("sums",))


def said(thought, answer=r"\boxed{4}", ended=True):
    return Answer(f"<think>\n{thought}\n</think>\n\n{answer}", ended)


GIVEN = [
    said("one"),
    said("one", r"\boxed{5}"),
    said("two", ended=False),
    said(" one ", "\\boxed{4}\n"),  # blanks alone do not make it a different answer
    said(""),
    Answer(r"\boxed{4}", True),
    said("two"),
    said("three"),
    said("three"),
]


def test_what_becomes_of_each_answer():
    chats, counts = right_chats(ReasoningTask(), 2, QUESTION, GIVEN)
    assert [chat["messages"] for chat in chats] == [
        [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "reasoning_content": thought, "content": r"\boxed{4}"},
        ]
        for thought in ("one", "two")
    ]
    assert all(chat["answer"] == "4" for chat in chats)
    assert +counts == Counter(
        questions=1, solved=1, asked=9, right=7, wrong=1, not_ended=1, kept=2, repeated=2, surplus=1, malformed=2
    )
    chats, counts = right_chats(ReasoningTask(), 0, QUESTION, GIVEN)
    assert (len(chats), counts["surplus"], counts["repeated"]) == (3, 0, 2)
    chats, counts = right_chats(ReasoningTask(), 0, QUESTION, GIVEN[1:3])
    assert (chats, counts["solved"], counts["asked"]) == ([], 0, 2)

    class Undecided(ReasoningTask):
        def judge(self, answer_text, gold):
            return None

    chats, counts = right_chats(Undecided(), 0, QUESTION, GIVEN[:3])
    assert (chats, counts["unjudged"], counts["not_ended"]) == ([], 2, 1)


def test_the_best_and_the_worst_answer_are_a_pair():
    (pair,), counts = ranked_pair(ReasoningTask(), 0, QUESTION, GIVEN)
    turns = [pair[side][1] for side in ("chosen", "rejected")]
    assert [(turn["reasoning_content"], turn["content"]) for turn in turns] == [
        ("one", r"\boxed{4}"),  # the first of the shortest right answers; an empty thought is not well formed
        ("one", r"\boxed{5}"),
    ]
    assert all(pair[side][0] == {"role": "user", "content": "2 + 2?"} for side in pair)
    assert (counts["kept"], counts["solved"], counts["malformed"], counts["asked"]) == (1, 1, 2, 9)

    (pair,), _ = ranked_pair(ReasoningTask(), 0, QUESTION, [said("one"), said("longer")])
    assert [pair[side][1]["reasoning_content"] for side in ("chosen", "rejected")] == ["one", "longer"]
    for alike in (
        [said("one"), said("one")],
        [said("one", ended=False), said("two")],
        [Answer(r"\boxed{4}", True)],
        [],
    ):
        assert ranked_pair(ReasoningTask(), 0, QUESTION, alike)[0] == []


# -- whole runs: a model with random weights, whose answers a script replaces ------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return toy_chats.write_weights(tmp_path_factory.mktemp("weights") / "hf", toy_chats.SMALL)


@pytest.fixture
def configure(weights, tmp_path):
    def config(**changes):
        c = get_config()
        c.update(init_from=weights, out=str(tmp_path / "out"), device="cpu", questions=7, samples=3, batch_size=6)
        c.data.update(problems=60, kinds="arithmetic,sequence", difficulties="1")
        c.update_from_flattened_dict(changes)
        return c

    return config


GOLDS = {q.prompt: q.gold for q in ReasoningTask(("arithmetic", "sequence"), (1,), 0, 60).questions("train")}


@pytest.fixture
def scripted(monkeypatch):
    """Three right answers to every other question, in different words; to the rest one. Returns the prompts that were
    asked, with their random streams."""
    asked = []

    def answers_of(engine, prompts, thinking, options):
        assert thinking
        for row, prompt in enumerate(prompts):
            stream = options.first + row
            asked.append((prompt, stream))
            question, number = divmod(stream, 3)
            right = question % 2 == 0 or number == 0
            yield said(f"thought é {number}", rf"\boxed{{{GOLDS[prompt] if right else 'no'}}}")

    monkeypatch.setattr(rejection, "answers_of", answers_of)
    return asked


def contents(place):
    return {path.name: path.read_bytes() for path in place.iterdir() if path.name != ".lock"}


def test_right_answers_become_chats_that_fine_tuning_reads(configure, scripted, tmp_path, capsys):
    summary = run(configure(), tmp_path / "unused", progress=False)
    assert not (tmp_path / "unused").exists()
    assert json.loads((tmp_path / "out" / SUMMARY).read_text()) == summary
    assert +Counter(summary["counts"]) == Counter(
        questions=7, asked=21, right=15, wrong=6, kept=11, surplus=4, solved=7
    )
    assert {name: found["asked"] for name, found in summary["groups"].items()} == {
        "arithmetic": 12, "sequence": 9, "difficulty 1": 21,
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "21 answers to 7 questions: 15 right, 6 wrong, 0 not ended" in said
    assert "11 kept, to 7 questions; 0 repeated, 4 beyond --config.keep=2" in said
    assert f"chats@{tmp_path / 'out'}" in said

    source = open_chats(f"chats@{tmp_path / 'out'}", "", ReasoningSource(), task=ReasoningTask())
    samples, counts = list(source.documents("train")), Counter()
    assert list(source.documents("heldout", counts)) == []  # no held-out question was asked
    assert not counts  # the judge of fine-tuning leaves nothing out
    assert len(samples) == 11
    assert [sample.messages[0]["content"] for sample in samples] == [prompt for prompt, n in scripted if keeps(n)]
    assert samples[0].messages[1]["reasoning_content"] == "thought é 0"
    heldout = {q.prompt for q in ReasoningTask().questions("heldout")}
    assert not heldout & {prompt for prompt, _ in scripted}


def test_pairs_are_what_dpo_reads(configure, scripted, tmp_path, capsys):
    summary = run(configure(rows="pairs"), tmp_path / "unused", progress=False)
    assert summary["counts"]["kept"] == 3  # those with a wrong answer: right answers of equal length make no pair
    assert (
        f"experiments/dpo.py trains on it by --config.data.mixture=pairs@{tmp_path / 'out'}" in capsys.readouterr().out
    )
    source = open_pairs(f"pairs@{tmp_path / 'out'}", "", ReasoningSource())
    better, worse = list(source.documents("train"))[:2]
    assert better.messages[0] == worse.messages[0]
    assert better.messages[1]["content"] != worse.messages[1]["content"]
    with pytest.raises(UserError, match=r"--config.rows was 'pairs', and is now 'chats'; choose another --config.out"):
        run(configure(), tmp_path, progress=False)


def keeps(stream):
    """Whether the script's answer is among the two that are kept."""
    question, number = divmod(stream, 3)
    return number < (2 if question % 2 == 0 else 1)


class Killed(Exception):
    pass


def test_a_run_that_was_cut_off_goes_on_to_the_same_files(configure, scripted, tmp_path, monkeypatch):
    """The run dies in its third batch of two questions. Half a line after the last recorded sample is removed."""
    run(configure(), tmp_path, progress=False)
    whole = contents(tmp_path / "out")
    assert sorted(whole) == [SUMMARY, SAMPLES]
    asked = list(scripted)
    shutil.rmtree(tmp_path / "out")
    scripted.clear()
    through = rejection.answers_of

    def dies(engine, prompts, thinking, options):
        if options.first == 12:
            raise Killed
        return through(engine, prompts, thinking, options)

    monkeypatch.setattr(rejection, "answers_of", dies)
    with pytest.raises(Killed):
        run(configure(), tmp_path, progress=False)
    assert scripted == asked[:12]
    with (tmp_path / "out" / SAMPLES).open("ab") as file:
        file.write(b'{"messages": [{"ro')
    monkeypatch.setattr(rejection, "answers_of", through)
    run(configure(), tmp_path, progress=False)
    assert scripted == asked
    assert contents(tmp_path / "out") == whole
    run(configure(), tmp_path, progress=False)
    assert (scripted, contents(tmp_path / "out")) == (asked, whole)  # nothing is left to ask


def test_more_questions_and_another_batch_add_to_what_is_there(configure, scripted, tmp_path):
    run(configure(), tmp_path, progress=False)
    few = (tmp_path / "out" / SAMPLES).read_bytes()
    run(configure(questions=12, batch_size=1), tmp_path, progress=False)
    more = contents(tmp_path / "out")
    assert more[SAMPLES].startswith(few)
    shutil.rmtree(tmp_path / "out")
    run(configure(questions=12), tmp_path, progress=False)
    assert contents(tmp_path / "out") == more


def test_with_the_model_itself(configure, tmp_path, capsys):
    """Random weights give no right answer; that is counted, not hidden."""
    summary = run(configure(questions=2, max_new_tokens=4, seed=3), tmp_path, progress=False)
    counts = summary["counts"]
    assert (counts["asked"], counts["wrong"] + counts["not_ended"], counts["kept"]) == (6, 6, 0)
    assert (tmp_path / "out" / SAMPLES).read_bytes() == b""
    assert "samples.jsonl: nothing to train on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"init_from": ""}, "--config.init_from is missing; write --config.init_from=DIR"),
        ({"init_from": "/no/such"}, "config.init_from=/no/such: there is no"),
        ({"out": ""}, "--config.out is missing"),
        ({"rows": "pears"}, "--config.rows=pears: write chats or pairs"),
        ({"samples": 0}, "--config.samples must be at least 1, got 0"),
        ({"samples": 1, "rows": "pairs"}, "--config.samples=1: a pair is of two answers; write 2 or more"),
        ({"temperature": 0.0}, "--config.samples=3 would all be the same: write --config.temperature=0.6"),
        ({"keep": -1}, "--config.keep must be at least 0"),
        ({"temperature": -1.0}, "--config.temperature: temperature must be 0"),
        ({"task": "maths"}, "--config.task=maths: there is no such task; write one of reasoning"),
        ({"task": "visual"}, "--config.task=visual asks about pictures"),
        ({"data.kinds": "maths"}, "--config.data.kinds is 'maths'"),
        ({"data.problems": 0}, "--config.data.problems is 0"),
        ({"max_new_tokens": 2040}, r"--config.max_new_tokens=2040 .* exceeds the model's 2048 positions; write \d+ or"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(configure, changes, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        run(configure(**changes), tmp_path, progress=False)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_directories_of_something_else_stay_as_they_are(configure, scripted, tmp_path):
    out = tmp_path / "out"
    toy_chats.write(toy_chats.plain_rows(), out / "mine.jsonl")

    def refused(words, **changes):
        before = contents(out)
        with pytest.raises(UserError, match=words) as caught:
            run(configure(**changes), tmp_path, progress=False)
        assert "\n" not in str(caught.value)
        assert contents(out) == before

    refused("out holds mine.jsonl, but no rejection_summary.json of a run that could be resumed")
    shutil.rmtree(out)
    run(configure(), tmp_path, progress=False)
    refused("samples by other settings: --config.seed was 0, and is now 1", seed=1)
    refused("--config.data.kinds was 'arithmetic,sequence', and is now 'sequence'", **{"data.kinds": "sequence"})
    with held(out):
        refused("out is in use: .* choose another --config.out")
    text = (out / SUMMARY).read_text()
    (out / SUMMARY).write_text("{}")
    refused("is not what this program writes")
    (out / SUMMARY).write_text(text)
    (out / SAMPLES).write_bytes((out / SAMPLES).read_bytes()[:-1])
    refused("samples.jsonl is shorter than .* says")


def test_samples_of_a_model_that_was_written_over_are_not_mixed(configure, scripted, weights, tmp_path):
    place = tmp_path / "hf"
    shutil.copytree(weights, place)
    run(configure(init_from=str(place)), tmp_path, progress=False)
    run(configure(init_from=str(place)), tmp_path, progress=False)
    shutil.rmtree(place)
    toy_chats.write_weights(place, {**toy_chats.SMALL, "head_dim": 2 * toy_chats.SMALL["head_dim"]})
    with pytest.raises(UserError, match="samples by other settings: weights was '.*', and is now '.*'; choose another"):
        run(configure(init_from=str(place)), tmp_path, progress=False)


def test_a_tokenizer_without_the_chats_tokens(configure, weights, tmp_path):
    place = tmp_path / "hf"
    shutil.copytree(weights, place)
    file = place / "tokenizer.json"
    file.write_text(file.read_text().replace("<think>", "<thank>"))
    with pytest.raises(UserError, match="has no token <think>, which Qwen3's chats need"):
        run(configure(init_from=str(place)), tmp_path, progress=False)
    assert not (tmp_path / "out").exists()
