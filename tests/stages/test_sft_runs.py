"""Fine-tuning as users run it: the commands of the contract, questions in both modes, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest

from qwen3f import cli
from qwen3f.data.chat.template import last_switch, split_thought
from qwen3f.errors import UserError
from qwen3f.eval.answers import Answer
from qwen3f.processes.world import ALONE
from qwen3f.stages import sft
from qwen3f.tasks.reasoning import ReasoningTask
from qwen3f.train import loop
from qwen3f.train.setup import make_setup
from qwen3f.train.stage import Run
from tests.data.chat.conversations import answer, call, user
from tests.data.sources.adapters.real_rows import write
from tests.stages import toy_chats
from tests.train.runs import metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("sft_runs")
    toy_chats.write_data(place)
    toy_chats.write_weights(place / "nano", {})
    return place


# -- the commands ------------------------------------------------------------------------------------------------------


def launch(root, experiment, init_from, workdir):
    """Run the contract's command with few steps on few problems. Returns what it printed."""
    command = [
        sys.executable, "launch.py", "--config", f"experiments/{experiment}.py:nano", f"--config.init_from={init_from}",
        "--workdir", str(workdir), f"--config.data.cache={root}/cache", "--config.data.problems=400",
        "--config.steps=2", "--config.eval.questions=6", "--config.eval.max_new_tokens=4", "--config.eval.max_rows=2",
        "--config.eval.batch_size=2", "--config.batch_size=2", "--config.device=cpu",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cold_start_then_rejection_sampling_then_fusion(root, tmp_path, capsys):
    said = launch(root, "sft_cold_start", root / "nano", tmp_path / "W2")
    assert "data: reasoning, " in said
    assert said.count("⟦") == 3  # samples, with what is trained marked
    assert "⟦<think>\n" in said
    line = metrics(tmp_path / "W2")[-1]
    asked = {name for name in line if name.startswith("val_")}
    groups = ("difficulty 1", "number_theory", "sequence")
    assert asked == {"val_loss", "val_accuracy", "val_well_formed", *(f"val_accuracy/{group}" for group in groups)}
    assert 0 < line["val_loss"] < 12
    assert 0 < line["supervised"] < 1 - line["padding"]

    config = cli.load_experiment("experiments/rejection_sample.py")
    config.update(init_from=str(tmp_path / "W2"), out=str(tmp_path / "new"), device="cpu", questions=2, samples=2)
    config.update(max_new_tokens=4)
    cli.run_stage(config, tmp_path / "unused", False)
    assert "4 answers to 2 questions: 0 right" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "rejection_summary.json").read_text())["settings"]["init_from"] == str(
        tmp_path / "W2" / "checkpoints" / "2"
    )

    said = launch(root, "sft_fusion", tmp_path / "W2", tmp_path / "W3")
    assert "reasoning (70.00% of the rows)" in said
    assert "reasoning-plain (30.00% of the rows)" in said
    found = {name for name in metrics(tmp_path / "W3")[-1] if name.startswith("val_")}
    plain = {"val_loss/reasoning", "val_loss/reasoning-plain", "val_accuracy_plain", "val_well_formed_plain"}
    assert found == asked | plain | {f"val_accuracy_plain/{group}" for group in groups}


# -- fusion ------------------------------------------------------------------------------------------------------------


def fusion(root, **changes):
    config = cli.load_experiment("experiments/sft_fusion.py:nano")
    config.update(init_from=str(root / "nano"), device="cpu", steps=1, batch_size=2, show_samples=0)
    config.data.update(problems=400, cache=str(root / "cache"), num_threads=1)
    config.eval.update(questions=30, max_rows=2, batch_size=2)
    config.update_from_flattened_dict(changes)
    return config


def test_the_mixture_of_fusion(root, tmp_path):
    """Shares of the rows are exact. A sample has a thought if its mode has one. About half of them have a switch."""
    setup = make_setup(fusion(root))
    made = sft.make(Run(setup, tmp_path, ALONE, False, lambda: False))
    ends = np.cumsum([0, *map(len, made.dataset.parts)])
    order = made.dataset.order(np.arange(10_000), 0)
    assert [int(((order >= a) & (order < b)).sum()) for a, b in pairwise(ends)] == [7000, 3000]
    corpus = sft.prepare_chats(sft._data_config(setup), setup.config.seq_len, made.tokenizer, False)
    for name, thinks in (("reasoning", True), ("reasoning-plain", False)):
        samples = list(corpus.sources[name].documents("train"))
        assert all(bool(split_thought(sample.messages[-1])[0]) == thinks for sample in samples)
        says = Counter(last_switch(sample.messages[:-1]) for sample in samples)
        assert set(says) == {thinks, None}
        assert 0.4 < says[thinks] / len(samples) < 0.6  # 370 samples: by chance it fails once in 10,000
        both = [s for s in samples if "/think" in s.messages[0]["content"] and "/no_think" in s.messages[0]["content"]]
        assert both


def test_fusion_takes_chats_that_have_no_right_answer(root, tmp_path):
    config = fusion(root, **{"data.mixture": f"chats@{root}/thinking=0.7,chats@{root}/plain=0.3"})
    made = sft.make(Run(make_setup(config), tmp_path, ALONE, False, lambda: False))
    assert len(made.dataset.parts) == 2
    assert not any("left out" in line for line in made.lines)


def test_both_modes_are_asked_of_held_out_questions(root, tmp_path, monkeypatch):
    """A script gives the answers. With thinking all are right. Without thinking those to one kind of question are
    right, and the others never end."""
    task = ReasoningTask(("number_theory", "sequence"), (1,))
    golds = {question.prompt: question for question in islice(task.questions("heldout"), 30)}
    asked = []

    def said(prompt, thinking):
        box = rf"\boxed{{{golds[prompt].gold}}}"
        return Answer(
            f"<think>\nt\n</think>\n\n{box}" if thinking else box, thinking or "sequence" in golds[prompt].group
        )

    def scripted(world, cfg, params, tokenizer, prompts, thinking, options, between):
        asked.append((thinking, list(prompts)))
        assert options.temperature == 0
        return [said(prompt, thinking) for prompt in prompts]

    monkeypatch.setattr(sft, "answer_on_ranks", scripted)
    values = loop.run(fusion(root, **{"eval.every": 0}), tmp_path, progress=False)
    assert [thinking for thinking, _ in asked] == [True, False]
    assert asked[0][1] == asked[1][1]
    assert len(asked[0][1]) == 30
    trained = {q.prompt for seed in (0, 1) for q in ReasoningTask(seed=seed, num_problems=3000).questions("train")}
    assert not trained & set(asked[0][1])
    share = sum("sequence" in golds[prompt].group for prompt in asked[0][1]) / 30
    assert 0.3 < share < 0.7
    assert {name: value for name, value in values.items() if "loss" not in name} == {
        **dict.fromkeys(["val_accuracy", "val_well_formed", "val_accuracy/difficulty 1"], 1.0),
        **dict.fromkeys(["val_accuracy/sequence", "val_accuracy/number_theory"], 1.0),
        **dict.fromkeys(["val_accuracy_plain", "val_well_formed_plain", "val_accuracy_plain/difficulty 1"], share),
        **{"val_accuracy_plain/sequence": 1.0, "val_accuracy_plain/number_theory": 0.0},
    }


# -- what is refused ---------------------------------------------------------------------------------------------------

GOOD = {"messages": [user("q"), answer("a", "t")]}
ROWS = {
    "roles out of order": ([user("q"), user("r"), answer("a")], r"Message 1 has the role 'user' after 'user'"),
    "no answer": ([user("q")], r"has no assistant's turn: write the answer"),
    "content null": ([user("q"), answer(None)], r"Message 1.* content"),
    "content a list": ([user("q"), answer([{"type": "text", "text": "a"}])], r"Message 1.* content"),
    "arguments as text": (
        [user("q"), answer("", "t", [call("f", '{"x": 1}')])],
        r"Message 1 has arguments as text in tool call 0",
    ),
    "a thought elsewhere": (
        [user("q"), {**answer("a"), "thought": "t"}],
        r"Message 1 has the key 'thought', .* rename it to reasoning_content",
    ),
}


def refused(config, workdir, words):
    """Assert that the run ends with an error of one line, and that the workdir is as it was."""
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=words) as caught:
        loop.run(config, workdir, progress=False)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    assert workdir.exists() == bool(before)


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_named_or_counted(case, root, tmp_path, capsys):
    messages, words = ROWS[case]
    good = [{"messages": [user(f"q{n}"), answer("a", "t")]} for n in range(40)]
    write([*good[:20], {"messages": messages}, *good[20:]], tmp_path / "data" / "x.jsonl")
    changes = {"data.mixture": f"chats@{tmp_path}/data", "data.max_heldout": 5, "steps": 1}
    refused(toy_chats.make_config(root, **changes), tmp_path / "w", rf"x\.jsonl:21:? {words}")
    loop.run(toy_chats.make_config(root, **changes, **{"data.on_bad_row": "skip"}), tmp_path / "w", progress=False)
    assert "left out while reading both splits: " in capsys.readouterr().out


def change_tokenizer(place):
    (place / "tokenizer.json").write_text((place / "tokenizer.json").read_text().replace("<think>", "<thank>"))


def change_template(place):
    (place / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


@pytest.mark.parametrize(
    "change, words",
    [
        (change_tokenizer, r"has no token <think>, which Qwen3's chats need: give --config\.data\.tokenizer"),
        (change_template, r"The chat template in .*chat_template\.jinja is of no kind that is known"),
    ],
)
def test_tokenizers_that_cannot_write_chats(change, words, root, tmp_path):
    shutil.copytree(root / "dense", tmp_path / "hf")
    change(tmp_path / "hf")
    refused(toy_chats.make_config(root, init_from=str(tmp_path / "hf")), tmp_path / "w", words)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"seq_len": 16},
            r"thinking: None of the corpus's 121 documents fits into seq_len=16 .* raise --config.seq",
        ),
        ({"data.long_chats": "error"}, r"x\.jsonl:61 has 2\d\d tokens, more than seq_len=128 takes"),
        ({"data.judge": "reasoning"}, r"has no sample to train on \(left out: .* no_answer\).*--config.data.judge=''"),
        ({"data.judge": "maths"}, r"--config\.data\.judge=maths: there is no such task"),
        ({"data.max_epochs": "1", "steps": 40}, r"--config\.data\.max_epochs leaves \d+ rows and the run needs 320 "),
        ({"eval.task": "maths"}, r"--config\.eval\.task=maths: there is no such task; write one of reasoning"),
        ({"eval.task": "visual"}, r"--config\.eval\.task=visual asks about pictures"),
        ({"eval.modes": "fast"}, r"--config\.eval\.modes='fast': write thinking, plain"),
        ({"eval.questions": -1}, r"config\.eval\.questions must be at least 0"),
        (
            {"eval.task": "reasoning", "eval.questions": 2, "eval.max_new_tokens": 10**6},
            r"config\.eval\.max_new_tokens=1000000 after a prompt of \d+ tokens exceeds the model's",
        ),
        ({"eval.max_new_tokens": 0}, r"config\.eval\.max_new_tokens must be at least 1"),
        ({"show_samples": -1}, r"config\.show_samples must be at least 0"),
        ({"init_from": ""}, r"needs the tokenizer that the model was pretrained with: write --config\.init_from=W"),
        ({"init_from": "/no/such"}, r"config\.init_from=/no/such: there is no"),
    ],
)
def test_settings_that_cannot_work(changes, words, root, tmp_path):
    refused(toy_chats.make_config(root, **changes), tmp_path / "w", words)


def test_max_epochs_counts_what_a_resumed_run_still_needs(root, tmp_path):
    """With another batch size the rows that were read count as they were read."""
    few = {"data.max_epochs": "1", "batch_size": 4, "microbatches": 1}
    loop.run(toy_chats.make_config(root, steps=2, **few), tmp_path / "w", progress=False)
    words = r"leaves (\d+) rows and the run needs 20008 up to its last step"
    refused(toy_chats.make_config(root, steps=5003, **few), tmp_path / "x", words.replace("20008", "20012"))
    refused(toy_chats.make_config(root, steps=2502, **{**few, "batch_size": 8}), tmp_path / "w", words)


def test_a_run_whose_samples_all_fall_out_leaves_what_was_trained(root, tmp_path):
    """Resuming with rows that are too short for every sample ends before anything is written."""
    loop.run(toy_chats.make_config(root, steps=1), tmp_path / "w", progress=False)
    words = r"None of the corpus's 121 documents fits into seq_len=16 \(121 are longer\)"
    refused(toy_chats.make_config(root, steps=2, seq_len=16), tmp_path / "w", words)
    refused(toy_chats.make_config(root, steps=2, **{"data.root": "/x"}), tmp_path / "w", "root is the directory of one")
