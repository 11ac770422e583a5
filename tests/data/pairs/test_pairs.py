"""Preference pairs of files and generated problems: one prompt, the better answer by a rule, one split for each
question; bad pairs are refused or counted.
"""

from collections import Counter

import numpy as np
import pytest

from qwen3f.data.chat.examples import chat_tokens
from qwen3f.data.chat.kinds import KINDS
from qwen3f.data.chat.report import render_samples
from qwen3f.data.chat.template import encode_chat, split_thought
from qwen3f.data.loader import build_batch
from qwen3f.data.pairs.corpus import PairDataConfig, PairLayout, prepare_pairs
from qwen3f.data.pairs.generated import GENERATED
from qwen3f.data.pairs.sources import open_pairs
from qwen3f.data.sources.documents import HOLDOUT, is_heldout
from qwen3f.data.sources.reasoning import ReasoningSource
from qwen3f.errors import UserError
from qwen3f.tasks.answer_text import boxed_answer
from qwen3f.tasks.reasoning import ReasoningTask
from tests.data.chat.conversations import TOOLS, answer, user
from tests.data.sources.adapters.real_rows import ROWS, write
from tests.stages.toy_chats import small_tokenizer

PROBLEMS = ReasoningSource(num_problems=600)
GOOD = {"chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]}


def opened(rows, tmp_path, **options):
    write(rows, tmp_path / "x.jsonl")
    return open_pairs(f"pairs@{tmp_path}", "", PROBLEMS, **options)


def both(source, counts=None):
    return [pair for split in ("train", "heldout") for pair in source.pairs(split, counts)]


def test_pairs_of_files_have_one_prompt_and_two_answers(tmp_path):
    history = [user("h"), answer("c", "t"), user("more")]
    rows = [
        GOOD,
        {"chosen": [*history, answer("x", "t")], "rejected": [*history, answer("y")], "margin": 2.5, "tools": TOOLS},
    ]
    first, second = sorted(both(opened(rows, tmp_path)), key=lambda pair: pair.margin)
    assert (first.margin, second.margin) == (1.0, 2.5)
    assert first.chosen.name == f"{tmp_path / 'x.jsonl'}:1, chosen"
    assert not first.chosen.enable_thinking  # no answer has a thought: the prompt holds the empty thinking block
    assert second.rejected.enable_thinking  # one answer has a thought: both answers write their block
    assert second.chosen.tools is not None
    assert [s.messages[-1]["content"] for s in second] == ["x", "y"]


PREFIXES = [("\n they", " the"), ("the", "they"), ("a", "\n\nab"), ("<thinker> x", "x")]


@pytest.mark.parametrize("better, worse", PREFIXES)
def test_both_answers_of_a_pair_have_the_ids_of_one_prompt(better, worse, tmp_path):
    """The ids of the prompt do not depend on the answer.

    Not even if the answer's first characters could merge with the prompt's last ones, or if both answers begin alike.
    """
    tokenizer = small_tokenizer(tmp_path / "tok")
    rows = [{"chosen": [user("q"), answer(better)], "rejected": [user("q"), answer(worse)]}]
    (pair,) = both(opened(rows, tmp_path / "d"))
    prompt = encode_chat(tokenizer, [user("q")], add_generation_prompt=True, enable_thinking=False)
    for sample in pair:
        (ids,), (trained,) = type(sample).tokenise([sample], tokenizer, 1)
        count = int(trained.argmax())
        assert ids[:count].tolist() == prompt
        assert trained[count:].all()
        expected = chat_tokens(tokenizer, sample.messages, enable_thinking=False)[0]
        assert ids.tolist() == expected[: len(ids)]


@pytest.mark.parametrize(
    "row, reason, words",
    [
        ({**GOOD, "rejected": [user("p"), answer("b")]}, "different_prompts", "differ between chosen and rejected"),
        ({**GOOD, "rejected": [user("q"), answer("")]}, "empty_texts", "rejected: Message 1 is an empty answer"),
        ({**GOOD, "chosen": [user("q"), answer(" ")]}, "empty_texts", "chosen: Message 1 is an empty answer"),
        ({**GOOD, "chosen": [user("q")]}, "unanswered", "has no assistant's turn"),
        ({**GOOD, "chosen": [*GOOD["chosen"], user("?")]}, "invalid_rows", "has turns after the last answer"),
        ({**GOOD, "margin": 0}, "invalid_rows", "margin=0: write a positive number"),
        ({**GOOD, "margin": "much"}, "invalid_rows", "margin='much'"),
        ({**GOOD, "margin": 10**400}, "invalid_rows", "write a positive number of at most 3.4e\\+38"),
        ({**GOOD, "margin": 1e39}, "invalid_rows", "margin=1e\\+39: write a positive number of at most"),
        ({**GOOD, "enable_thinking": "no"}, "invalid_rows", "enable_thinking='no': write true or false"),
        ({"chosen": GOOD["chosen"]}, "missing_columns", "has no column 'rejected'"),
        ({**GOOD, "rejected": None}, "null_values", "has null under 'rejected'"),
        (
            {"chosen": [user("q"), answer("a", "t")], "rejected": [user("q"), answer("b")], "enable_thinking": False},
            "misplaced_thoughts",
            "has a thought, but enable_thinking is false",
        ),
    ],
)
def test_bad_pairs_are_named_or_counted(row, reason, words, tmp_path):
    source = opened([GOOD, row], tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        both(source)
    assert f"{tmp_path / 'x.jsonl'}:2" in str(caught.value)
    assert "on_bad_row=skip" in str(caught.value)
    counts = Counter()
    assert len(both(opened([GOOD, row], tmp_path, on_bad_row="skip"), counts)) == 1
    assert counts == {reason: 2}  # a row is read once for each split


def test_pairs_are_of_the_model_s_kind_of_chats(tmp_path):
    """As chats are: if the kind of template has no place for thoughts, a pair with a thought is refused."""
    plain, thinks = GOOD, {"chosen": [user("q"), answer("a", "t")], "rejected": [user("q"), answer("b")]}
    for kind in KINDS.values():
        source = opened([plain, plain | {"margin": 2}], tmp_path, template=kind)
        assert {sample.kind for pair in both(source) for sample in pair} == {kind}
        source = opened([thinks], tmp_path, template=kind)
        if kind.thinks:
            assert both(source)
        else:
            with pytest.raises(UserError, match=f"Message 1 has a thought, .* kind {kind.name}, has no place for one"):
                both(source)
    prints = {opened([plain], tmp_path, template=kind).fingerprint("train") for kind in KINDS.values()}
    assert len(prints) == len(KINDS)


def called(arguments, id="c1", thought=None):
    return answer("", thought, [{"id": id, "function": {"name": "f", "arguments": arguments}}])


def test_a_thought_before_the_last_answer_is_a_fault_where_there_is_no_place_for_one(tmp_path):
    for thinks in (answer("x", "t"), answer("<think>t</think>x")):
        row = {side: [user("h"), thinks, *GOOD[side]] for side in GOOD}
        for kind in KINDS.values():
            counts = Counter()
            found = both(opened([GOOD, row], tmp_path, template=kind, on_bad_row="skip"), counts)
            assert all(sample.text for pair in found for sample in pair)
            assert counts == ({} if kind.thinks else {"misplaced_thoughts": 2})
            if not kind.thinks:
                with pytest.raises(UserError, match=r"x.jsonl:2, chosen: Message 1 has a thought, .* has no place for"):
                    both(opened([GOOD, row], tmp_path, template=kind))


def test_equal_is_what_the_template_writes(tmp_path):
    """Answers and prompts are compared as the template writes them.

    It writes no ids of calls, so these may differ. 1, 1.0 and true are different texts, and so are arguments in another
    order.
    """
    tie = {"chosen": [user("q"), called({"x": 1}, "c1")], "rejected": [user("q"), called({"x": 1}, "c2")]}
    counts = Counter()
    assert not both(opened([tie], tmp_path), counts)
    assert counts == {"ties": 2}
    numbers = [{"x": 1, "y": 2}, {"x": 1.0, "y": 2}, {"x": True, "y": 2}, {"y": 2, "x": 1}]
    for one in numbers:
        for other in numbers:
            row = {"chosen": [user("q"), called(one)], "rejected": [user("q"), called(other)]}
            assert bool(both(opened([row], tmp_path))) == (one is not other)
            asked = [
                [user("q"), called(arguments, id), {"role": "tool", "content": "1", "tool_call_id": id}]
                for arguments, id in ((one, "a"), (other, "b"))
            ]
            row = {side: [*turns, GOOD[side][1]] for side, turns in zip(GOOD, asked)}
            if one is other:
                (pair,) = both(opened([row], tmp_path))
                assert pair.chosen.text.removesuffix("a<|im_end|>\n") == pair.rejected.text.removesuffix(
                    "b<|im_end|>\n"
                )
            else:
                with pytest.raises(UserError, match="differ between chosen and rejected"):
                    both(opened([row], tmp_path))
    texts = {"chosen": [user("q"), called({"x": "1"})], "rejected": [user("q"), called({"x": 1})]}
    blank = {"chosen": [user("q"), called({"x": "1"})], "rejected": [user("q"), called({"x": " 1"})]}
    for kind in KINDS.values():  # XML writes both as 1
        assert bool(both(opened([texts], tmp_path, template=kind))) != kind.xml
        assert both(opened([blank], tmp_path, template=kind))


def test_prompts_are_equal_wherever_their_thoughts_stand(tmp_path):
    turns = [[user("h"), thinks, user("q")] for thinks in (answer("x", "t"), answer("<think>\nt\n</think>\n\nx"))]
    assert (
        len(both(opened([{"chosen": [*turns[0], answer("a")], "rejected": [*turns[1], answer("b")]}], tmp_path))) == 1
    )
    other = [user("h"), answer("x", "u"), user("q")]
    with pytest.raises(UserError, match="differ between chosen and rejected"):
        both(opened([{"chosen": [*turns[0], answer("a")], "rejected": [*other, answer("b")]}], tmp_path))


def test_scored_pairs_are_reported_and_shown_by_their_last_places(tmp_path):
    rows = [{side: [user(f"q{n}"), *GOOD[side][1:]] for side in GOOD} for n in range(40)]
    for scored in (True, False):
        corpus = prepared(tmp_path, rows, PairLayout(100, scored))
        (report,), (part,) = corpus.report, corpus.parts
        assert report.supervised == sum(int((part[i]["loss_weights"] > 0).sum()) for i in range(len(part)))
        assert (report.supervised == report.packed) == scored
        batch = build_batch(corpus.train, 0, np.arange(2), 0, 266)
        shown = render_samples(batch, small_tokenizer(tmp_path / "tok"), 4)
        written = {True: "⟦<|im_end|>⟧", False: "<|im_end|>⟧"}[scored]
        assert all(text.count("⟦") == 1 and text.endswith(written) for text in shown)


def test_equal_answers_are_left_out_and_counted(tmp_path):
    counts = Counter()
    same = {"chosen": [user("q"), answer("a ")], "rejected": [user("q"), answer("a")]}
    assert len(both(opened([same, GOOD], tmp_path), counts)) == 1
    assert counts == {"ties": 2}


def test_ultrafeedback_gives_its_best_and_worst_with_the_ratings_difference(tmp_path):
    write(ROWS["ultrafeedback"], tmp_path / "x.jsonl")
    counts = Counter()
    found = both(open_pairs(f"ultrafeedback@{tmp_path}", "", PROBLEMS), counts)
    assert [[sample.messages[-1]["content"] for sample in pair] for pair in found] == [
        ["Hi!", "Go away."],
        ["2", "No."],
    ]
    assert [pair.margin for pair in found] == [3.0, 1.0]
    assert counts == {"ties": 2, "unrated": 2}


@pytest.mark.parametrize("kind", GENERATED)
def test_generated_pairs_are_better_by_their_rule(kind):
    """In both splits the better answer is right and boxed; the worse one is wrong, not boxed or padded, by its kind."""
    judge = ReasoningTask().judge
    golds = {item.question: item.answer for split in ("train", "heldout") for item in PROBLEMS.problems(split)}
    source = open_pairs(kind, "", PROBLEMS)
    found = both(source)
    assert len(found) == len(golds)
    for pair in found:
        (better, worse), gold = (sample.messages[-1] for sample in pair), golds[pair.chosen.messages[0]["content"]]
        assert judge(better["content"], gold) == 1.0
        assert bool(split_thought(better)[0]) == (not kind.endswith("-plain"))
        if kind.startswith("right"):
            assert judge(worse["content"], gold) == 0.0
            assert boxed_answer(worse["content"]) is not None
        elif kind.startswith("boxed"):
            assert boxed_answer(worse["content"]) is None
            assert gold in worse["content"]
        else:
            assert judge(worse["content"], gold) == 1.0
            assert len(pair.rejected.text) > len(pair.chosen.text) + 20
    assert found == both(open_pairs(kind, "", PROBLEMS))


def test_a_question_is_in_the_split_of_every_stage():
    for kind in GENERATED:
        source = open_pairs(kind, "", PROBLEMS)
        for split in ("train", "heldout"):
            pairs = list(source.pairs(split))
            assert pairs
            assert all(is_heldout(pair.question, HOLDOUT) == (split == "heldout") for pair in pairs)


@pytest.mark.parametrize(
    "name, root, words",
    [
        ("right-or-wrng", "", "Unknown source 'right-or-wrng' .*: write one of right-or-wrong, .*ultrafeedback@DIR"),
        ("pairs", "", "must name one directory: write pairs@DIR"),
        ("pairs@/nowhere", "", "/nowhere"),
        ("gsm8k@/x", "", "Unknown source"),
    ],
)
def test_sources_that_are_not_there_are_named(name, root, words):
    with pytest.raises(UserError, match=words):
        open_pairs(name, root, PROBLEMS)


def prepared(tmp_path, rows, layout, **changes):
    write(rows, tmp_path / "d" / "x.jsonl")
    config = PairDataConfig(mixture=f"pairs@{tmp_path}/d", cache=str(tmp_path / "cache"), num_threads=1, **changes)
    return prepare_pairs(config, layout, small_tokenizer(tmp_path / "tok"), progress=False)


def test_a_pair_that_does_not_fit_is_dropped_whole_and_counted(tmp_path):
    """Here the prompt alone fills most of the context. Neither a prompt nor an answer is ever cut."""
    long = {side: [user("z" * 60), *GOOD[side][1:]] for side in GOOD}
    corpus = prepared(tmp_path, [GOOD, long], PairLayout(100))
    assert corpus.report[0].too_long == 2  # both answers
    assert "2 of 4 samples are longer than seq_len and dropped (--config.data.long_pairs)" in "\n".join(
        corpus.describe()
    )
    with pytest.raises(UserError, match=r"x.jsonl:2, chosen and its counterpart take .* places, more than seq_len=100"):
        prepared(tmp_path, [GOOD, long], PairLayout(100), long_pairs="error")
    with pytest.raises(UserError, match="None of the 2 pairs fits into seq_len=20: raise --config.seq_len"):
        prepared(tmp_path, [GOOD, long], PairLayout(20))


def test_limits_count_pairs(tmp_path):
    rows = [{side: [user(f"q{n}"), *GOOD[side][1:]] for side in GOOD} | {"margin": n + 1} for n in range(100)]
    corpus = prepared(tmp_path, rows, PairLayout(100, margins=True), max_samples=7, max_heldout=2)
    (part,) = corpus.parts
    assert (part.cache.num_docs, next(iter(corpus.heldout.values())).cache.num_docs) == (14, 4)
    expected = [pair.margin for pair in next(iter(corpus.sources.values())).pairs("train")][:7]
    assert part.margins.tolist() == expected


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"long_pairs": "cut"}, "long_pairs is 'cut'"),
        ({"max_heldout": 0}, "max_heldout is 0"),
        ({"kinds": "x"}, "kinds"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        prepared(tmp_path, [GOOD], PairLayout(100), **changes)
