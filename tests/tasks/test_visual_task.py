"""The task visual: topics, splits, and the judge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.tasks.registry import open_task
from qwen3f.tasks.visual import VisualTask, topic

TASK = VisualTask(num_pictures=400)


def test_each_question_has_one_picture_and_its_topic():
    for question in TASK.questions("train"):
        assert len(question.images) == 1
        assert question.group == (topic(question.prompt),)
        assert TASK.judge(question.gold, question.gold) == 1.0
    with pytest.raises(ValueError, match="no topic"):
        topic("Who are you?")


def test_the_splits_share_no_picture():
    seen, held = ({q.images[0].tobytes() for q in TASK.questions(split)} for split in ("train", "heldout"))
    assert held
    assert not seen & held


@pytest.mark.parametrize(
    "written, right",
    [
        ("red", 1.0),
        (" Red.\n", 1.0),
        ("<think>\nblue?\n</think>\n\nred", 1.0),
        ("reddish", 0.0),
        ("", 0.0),
        ("blue", 0.0),
    ],
)
def test_blanks_case_and_a_full_stop_do_not_count(written, right):
    assert TASK.judge(written, "red") == right


def test_a_thought_that_does_not_end_is_no_answer():
    assert TASK.judge("<think>red", "red") == 0.0


@given(st.text(), st.text())
def test_any_text_is_judged(written, gold):
    assert TASK.judge(written, gold) in (0.0, 1.0)


def test_it_is_in_the_registry():
    assert open_task("visual", "--config.eval.task").name == "visual"
