"""The tasks of GSM8K and MATH, from local copies in their own schemas."""

import pytest

from qwen3f.errors import UserError
from qwen3f.tasks.registry import open_task
from tests.data.sources.adapters.real_rows import write


@pytest.fixture
def root(tmp_path):
    gsm = [{"question": f"What is {n} + {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n:,}"}
           for n in (2, 700)]  # fmt: skip
    write(gsm, tmp_path / "gsm8k" / "train.jsonl")
    write([{"question": "What is 3?", "answer": "#### 3"}, {"question": "?", "answer": "none"}],
          tmp_path / "gsm8k" / "test.jsonl")  # fmt: skip
    row = {"level": "Level 1", "type": "Algebra"}
    write([{"problem": "Half?", "solution": r"so $\boxed{\frac{1}{2}}$", **row}], tmp_path / "math" / "train.jsonl")
    write([{"problem": "Two?", "solution": r"\boxed{2}", **row}], tmp_path / "math" / "test.jsonl")
    return tmp_path


def test_questions_are_those_of_the_data_sets_own_splits(root):
    task = open_task(f"gsm8k@{root}/gsm8k", "--config.tasks")
    train, heldout = (list(task.questions(split)) for split in ("train", "heldout"))
    assert [question.gold for question in train] == ["4", "1400"]
    assert [question.gold for question in heldout] == ["3"]  # a row without an answer is left out
    assert train[0].prompt == "What is 2 + 2?\nPut the final answer into \\boxed{}."
    assert (task.name, task.judge("<think>\n</think>\n\\boxed{1,400}", "1400")) == ("gsm8k", 1.0)
    assert task.judge("\\boxed{1401}", "1400") == 0.0


def test_answers_are_compared_as_mathematics(root):
    task = open_task(f"math@{root}/math", "--config.tasks")
    (question,) = task.questions("train")
    assert question.gold == r"\frac{1}{2}"
    assert task.judge(r"\boxed{0.5}", question.gold) == 1.0
    assert task.judge(r"\boxed{\frac{2}{3}}", question.gold) == 0.0


def test_names_and_places_that_are_not_there(root):
    for name in ("gsm8k@", "gsm", "reasoning@DIR"):
        with pytest.raises(
            UserError, match=rf"--config\.tasks={name}: there is no such task; write one of reasoning, procedures, code"
        ):
            open_task(name, "--config.tasks")
    with pytest.raises(UserError, match="nowhere"):
        list(open_task(f"gsm8k@{root}/nowhere", "--config.tasks").questions("train"))
