"""Scores of a reward model inside a run equal transformers', whatever shares their batch; rules as numbers."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.data.sources.reasoning import problem
from qwen3f.errors import UserError
from qwen3f.preference.judges import RewardModel, rule_judge, task_judge
from qwen3f.preference.online_rows import Written
from qwen3f.preference.wins import quality
from qwen3f.processes.world import ALONE
from qwen3f.tasks.reasoning import ReasoningTask
from qwen3f.tasks.task import Question
from qwen3f.train.setup import make_setup
from qwen3f.train.stage import Run
from tests.model.hf_params import Widen
from tests.stages import toy_pairs

TASK = ReasoningTask()
ITEM = problem("arithmetic", 1, 0, 0)
QUESTION = Question(ITEM.question, ITEM.answer)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("judges")
    toy_pairs.write_data(place)
    return place


def opened(root):
    setup = make_setup(toy_pairs.online_config(root))
    return RewardModel(Run(setup, root, ALONE, False, lambda: False), str(root / "reward"), "--x")


def test_scores_are_those_of_transformers_for_any_company(root):
    """float64, 1e-10. 19 answers make three batches, of which the last is padded."""
    g = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 260, (n,), generator=g).tolist() for n in (1, 256, 3, 77, 128, 129, *range(40, 53))]
    model = opened(root)
    got = model.scores(documents)
    kind = transformers.AutoModelForSequenceClassification
    with Widen(), torch.no_grad():
        theirs = kind.from_pretrained(root / "reward", dtype=torch.float64)
        expected = [theirs(torch.tensor([ids])).logits.item() for ids in documents]
    assert got == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert model.scores(documents[::-1][:5]) == pytest.approx(expected[::-1][:5], rel=1e-10, abs=1e-10)
    written = [[Written(tuple(ids[2:]), "", True) for ids in documents[1:3]]]
    (found,) = model.judge([QUESTION], [documents[1][:2]], written)
    assert found[0] == pytest.approx(expected[1], rel=1e-10)
    assert model.scores([]) == []


@pytest.mark.parametrize("ids", [[], [1] * 257])
def test_inputs_that_no_row_holds_are_refused(ids, root):
    with pytest.raises(UserError, match="has 1 to config.seq_len=256 tokens"):
        opened(root).scores([[1, 2], ids])


ANSWERS = st.tuples(st.booleans(), st.booleans(), st.booleans(), st.integers(1, 50_000))


@given(ANSWERS, ANSWERS)
def test_a_rule_is_a_number_that_orders_answers_as_it_does(one, other):
    def make(right, formed, ended, length):
        text = f"\\boxed{{{ITEM.answer if right else 'x'}}}"
        return Written((1,) * length, text if formed else f"</think>{text}", ended)

    both = [make(*one), make(*other)]

    def of(question, answer):
        return quality(TASK, question, answer, False)

    ((a, b),) = rule_judge(of)([QUESTION], [(1,)], [both])
    x, y = (of(QUESTION, answer) for answer in both)
    assert ((a > b), (a < b)) == ((x > y), (x < y))
    (judged,) = task_judge(TASK)([QUESTION], [(1,)], [both])
    assert judged == [TASK.judge(answer.text, ITEM.answer) for answer in both]


def test_equal_answers_to_a_question_are_judged_once_and_those_to_another_again():
    asked = []

    class Counting:
        def judge(self, text, gold):
            asked.append((text, gold))
            return None if text == "?" else float(text == gold)

    questions = [Question("one", "a"), Question("two", "b")]
    own = [Written((i,), text, True) for i, text in enumerate("ab?a")]
    found = task_judge(Counting())(questions, [(1,), (2,)], [own, own])
    assert found == [[1.0, 0.0, None, 1.0], [0.0, 1.0, None, 0.0]]
    assert asked == [(text, gold) for gold in "ab" for text in "ab?"]
