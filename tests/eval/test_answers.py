"""Answers to a task's questions do not depend on the size of a batch; their marks equal marks by hand."""

import dataclasses

import pytest
import torch

from qwen3f import params, presets
from qwen3f.data.chat.template import encode_chat
from qwen3f.errors import UserError
from qwen3f.eval import answers
from qwen3f.eval.answers import Answer, AnswerOptions, answer, answers_of, judge, make_engine, parse_modes
from qwen3f.infer.request import Row
from qwen3f.tasks.reasoning import ReasoningTask
from qwen3f.tasks.task import Question
from tests.stages.toy_chats import SMALL, small_tokenizer

RIGHT = "<think>\n2 + 2 = 4\n</think>\n\nThe answer is \\boxed{4}."
LETTERS = Question("?", "4", ("letters", "difficulty 1"))
NUMBERS = Question("?", "4", ("numbers", "difficulty 1"))


def judged(text, thinking=True, ended=True):
    """(accuracy, well_formed) of one answer to a question whose answer is 4."""
    found = judge(ReasoningTask(), [LETTERS], [Answer(text, ended)], thinking)
    assert found["accuracy"] == found["accuracy/letters"] == found["accuracy/difficulty 1"]
    return found["accuracy"], found["well_formed"]


@pytest.mark.parametrize(
    "text, thinking, expected",
    [
        (RIGHT, True, (1, 1)),
        (RIGHT, False, (1, 0)),  # the prompt held a thinking block, and the answer has another
        (r"\boxed{4}", False, (1, 1)),
        (r"\boxed{4}", True, (1, 0)),  # without a thought
        ("<think>\n\n</think>\n\n\\boxed{4}", True, (1, 0)),
        ("<think>\n\\boxed{4}\n</think>\n\nFour.", True, (0, 1)),  # the box in the thought alone is no answer
        ("<think>\n\\boxed{4}\n", True, (0, 0)),
        ("<think>\nt\n</think>\n\n\\boxed{5}", True, (0, 1)),
        ("<think>\nt\n</think>\n\n", True, (0, 0)),
        ("", False, (0, 0)),
    ],
)
def test_an_answer_alone(text, thinking, expected):
    assert judged(text, thinking) == expected
    assert judged(text, thinking, ended=False) == (0, 0)  # not ended: wrong, however right its text


def test_groups_and_what_cannot_be_judged():
    class Fussy(ReasoningTask):
        def judge(self, answer_text, gold):
            return None if "?" in answer_text else super().judge(answer_text, gold)

    def said(text, ended=True):
        return Answer(f"<think>\nt\n</think>\n\n{text}", ended)

    questions = [LETTERS, LETTERS, NUMBERS, NUMBERS, NUMBERS]
    given = [said(r"\boxed{4}"), said(r"\boxed{5}"), said("?"), said("?", ended=False), said(r"\boxed{04}")]
    assert judge(Fussy(), questions, given, True) == {
        "accuracy": 2 / 4,  # the unjudged one is left out; the one that did not end is wrong
        "accuracy/difficulty 1": 2 / 4,
        "accuracy/letters": 1 / 2,
        "accuracy/numbers": 1 / 2,
        "well_formed": 4 / 5,
    }
    with pytest.raises(ValueError, match="shorter"):
        judge(Fussy(), questions, given[:2], True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(configuration, parameters in float64, tokenizer)."""
    cfg = presets.get("nano").replace(**SMALL)
    return cfg, params.init_params(cfg, 3, dtype=torch.float64), small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("thinking", [True, False])
def test_what_the_model_is_asked_and_what_of_its_ids_is_the_answer(small, thinking, monkeypatch):
    """A script gives the ids here. An answer ends before its first stop id; one without a stop id did not end."""
    cfg, p, tokenizer = small
    end, stop = tokenizer.special_id("<|im_end|>"), tokenizer.special_id("<|endoftext|>")
    script = [[*tokenizer.encode("ab"), end, 0, 0], [stop, 0, 0, 0, 0], tokenizer.encode("abcde")]
    asked = []

    def scripted(self, rows):
        for row in rows:
            request = row.request
            asked.append((list(request.prompt), request.stream, request.sampling.temperature, self.seed))
            ids = script[request.stream - 10]
            length = next((place for place, i in enumerate(ids) if i in request.stop_ids), len(ids) - 1) + 1
            row.tokens += ids[:length]
            row.finish_reason = "stop" if length < len(ids) else "length"

    class Scripted(answers.Engine):
        def submit(self, requests):
            rows = [Row(request, number) for number, request in enumerate(requests)]
            scripted(self, rows)
            return rows

    monkeypatch.setattr(answers, "Engine", Scripted)
    prompts = ["<|im_end|>", "a longer one", "b"]
    options = AnswerOptions(5, temperature=0.5, seed=7, first=10, batch_size=2)
    found = list(answer(cfg, p, tokenizer, prompts, thinking, options))
    assert found == [Answer("ab", True), Answer("", True), Answer("abcde", False)]
    assert [one[1:] for one in asked] == [(10, 0.5, 7), (11, 0.5, 7), (12, 0.5, 7)]
    rows = [one[0] for one in asked]
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    assert rows == [encode_chat(tokenizer, t, add_generation_prompt=True, enable_thinking=thinking) for t in turns]
    assert tokenizer.decode(rows[2]).endswith("assistant\n" if thinking else "<think>\n\n</think>\n\n")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_size_of_a_batch_changes_no_answer(small, temperature):
    """In float64, other rows of a batch change a row's logits by rounding only, too little to change an answer."""
    cfg, p, tokenizer = small
    prompts = ["a", "what is this", "b" * 40, "c", "no " * 9]
    options = AnswerOptions(12, temperature, seed=2)

    def texts(**changes):
        return list(answer(cfg, p, tokenizer, prompts, True, dataclasses.replace(options, **changes)))

    whole = texts()
    assert texts(batch_size=2) == texts(batch_size=1) == whole
    assert len({one.text for one in whole}) > 1
    assert (texts(seed=3) == whole) == (texts(first=5) == whole) == (temperature == 0)
    tail = list(answer(cfg, p, tokenizer, prompts[3:], True, dataclasses.replace(options, first=3)))
    assert tail == whole[3:]


def test_a_caller_who_stops_leaves_nothing_in_an_engine_of_others(small):
    cfg, p, tokenizer = small
    options = AnswerOptions(12, batch_size=2)
    engine = make_engine(cfg, p, tokenizer, options)
    passes = []

    def stop():
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(answers_of(engine, ["a", "b", "c"], True, options, stop))
    assert not engine.step()
    assert list(answers_of(engine, ["a"], True, options)) == list(answer(cfg, p, tokenizer, ["a"], True, options))


def test_modes():
    assert parse_modes("thinking, plain") == ("thinking", "plain")
    for text in ("", "think", "plain,fast", "plain,plain"):
        with pytest.raises(UserError, match=r"--config.eval.modes='.*': write thinking, plain, or thinking,plain"):
            parse_modes(text)
