"""The task judges its own answers right and others wrong, and no stage trains on its held-out questions."""

from collections import Counter
from itertools import islice

import pytest

from qwen3f.data.sources.reasoning import KINDS, ReasoningSource, chat_messages
from qwen3f.data.sources.registry import open_source
from qwen3f.errors import UserError
from qwen3f.tasks.reasoning import ReasoningTask
from qwen3f.tasks.registry import open_task


def test_worked_solutions_and_plain_answers_are_right():
    task = ReasoningTask(num_problems=600)
    items = list(task.source.problems("train"))
    assert len(items) > 500
    for item in items:
        thought, plain = chat_messages(item)[-1], chat_messages(item, thinking=False)[-1]
        text = f"<think>\n{thought['reasoning_content']}\n</think>\n\n{thought['content']}"
        assert task.judge(text, item.answer) == task.judge(plain["content"], item.answer) == 1.0
        assert task.judge(text.replace("\\boxed{", "\\boxed{9"), item.answer) == 0.0
        assert task.judge(f"<think>\n{thought['reasoning_content']}", item.answer) == 0.0
        assert task.judge("", item.answer) == 0.0


@pytest.mark.parametrize(
    "answer",
    ["\\boxed{" + "1" * 4301 + "}", "\\boxed{" * 28_000, "\\boxed{" + "0" * 9_000 + "5}", "\\boxed{5" + "}" * 99_999],
    ids=["digits", "boxes", "zeros", "braces"],
)
def test_any_answer_is_right_or_wrong(answer):
    assert ReasoningTask().judge(f"<think>a</think>{answer}", "6") == 0.0
    assert ReasoningTask().judge(f"{answer} so \\boxed{{6}}", "6") == 1.0


def test_questions_by_kind_and_difficulty():
    task = ReasoningTask(kinds=("algebra", "sequence"), difficulties=(1, 2), num_problems=2000)
    found = {split: list(task.questions(split)) for split in ("train", "heldout")}
    assert found["train"] == list(task.questions("train"))
    groups = Counter(question.group for question in found["train"])
    assert set(groups) == {(kind, f"difficulty {d}") for kind in ("algebra", "sequence") for d in (1, 2)}
    prompts = {split: {question.prompt for question in questions} for split, questions in found.items()}
    assert not prompts["train"] & prompts["heldout"]
    assert 0.03 < len(prompts["heldout"]) / len(prompts["train"]) < 0.08
    assert len(prompts["heldout"]) == len(found["heldout"])


def test_no_stage_trains_on_what_is_held_out():
    heldout = {question.prompt for question in ReasoningTask(num_problems=3000).questions("heldout")}
    assert len(heldout) > 100
    pretraining = islice(open_source("reasoning", holdout=0.01).documents("train"), 3000)
    assert not heldout & {document.text.split("\n\n")[0] for document in pretraining}
    for seed in (0, 1):
        other = ReasoningTask(seed=seed, num_problems=3000, kinds=KINDS[:2], difficulties=(1,))
        assert not heldout & {question.prompt for question in other.questions("train")}
    assert heldout <= {item.question for item in ReasoningSource(0.2).problems("heldout")}


def test_opened_by_name():
    task = open_task("reasoning", "--config.eval.task")
    assert task == ReasoningTask()
    assert task.name == "reasoning"
    with pytest.raises(UserError, match="--config.eval.task=maths: there is no such task; write one of reasoning"):
        open_task("maths", "--config.eval.task")
    with pytest.raises(UserError, match="Unknown kind of problem 'maths'"):
        list(ReasoningTask(kinds=("maths",)).questions("train"))
