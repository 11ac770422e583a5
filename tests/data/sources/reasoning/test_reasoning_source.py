"""The source: disjoint splits without repetitions, and the forms for pretraining, SFT and reinforcement learning."""

from collections import Counter

import pytest

from qwen3f.data.cache.token_cache import build_or_open
from qwen3f.data.chat.template import render
from qwen3f.data.sources.documents import HOLDOUT
from qwen3f.data.sources.reasoning import DIFFICULTIES, KINDS, ReasoningSource, chat_messages, problem, question_answer
from qwen3f.data.sources.registry import open_source
from qwen3f.errors import UserError


def test_splits_are_disjoint_and_without_repetitions_over_seeds_and_sizes():
    questions = {"train": [], "heldout": []}
    for seed, count in ((0, 6000), (1, 3000)):
        source = ReasoningSource(0.2, seed, count)
        counts = Counter()
        of_seed = {split: [p.question for p in source.problems(split, counts)] for split in questions}
        for split, found in of_seed.items():
            assert len(set(found)) == len(found)
            questions[split] += found
        total = sum(map(len, of_seed.values()))
        assert total + counts["repeated_questions"] == count
        assert set(counts) == {"repeated_questions"}
        assert counts["repeated_questions"] < 0.05 * count
        assert 0.17 * total < len(of_seed["heldout"]) < 0.23 * total  # 5 standard deviations of 3,000 are 0.037
    assert not set(questions["train"]) & set(questions["heldout"])
    # What is held out at a small share is held out at a larger one too, so it is never trained on by mistake.
    smaller = {p.question for p in ReasoningSource(0.05, 0, 3000).problems("heldout")}
    assert smaller
    assert not smaller & {p.question for p in ReasoningSource(0.2, 0, 3000).problems("train")}


def test_kinds_and_difficulties_take_turns():
    source = ReasoningSource(0.0, seed=4, num_problems=300)
    counts = Counter()
    found = list(source.problems("train", counts))
    shares = Counter((p.kind, p.difficulty) for p in found)
    assert len(shares) == len(KINDS) * len(DIFFICULTIES) == 30
    assert min(shares.values()) >= 10 - counts["repeated_questions"]
    assert found[0] == problem(KINDS[0], 1, 4, 0)
    few = ReasoningSource(0.0, 4, 20, kinds=("logic",), difficulties=(3, 5))
    assert [(p.kind, p.difficulty) for p in few.problems("train")] == [("logic", 3), ("logic", 5)] * 10
    assert list(few.problems("heldout")) == []
    for empty in ({"kinds": ()}, {"difficulties": ()}):
        with pytest.raises(UserError, match="without kinds or difficulties has no problem: give at least one"):
            ReasoningSource(0.1, **empty)


def test_repetitions_are_dropped_and_counted():
    # 3,000 sums and products of at most 50 repeat.
    source = ReasoningSource(0.1, num_problems=3000, kinds=("arithmetic",), difficulties=(1,))
    everything = [problem("arithmetic", 1, 0, i).question for i in range(3000)]
    counts = Counter()
    found = [p.question for split in ("train", "heldout") for p in source.problems(split, counts)]
    assert Counter(found) == Counter(set(everything))
    assert counts["repeated_questions"] == 3000 - len(set(everything)) > 300


def test_documents_are_stable_text_with_numbers():
    source = ReasoningSource(0.1, num_problems=200)
    documents = [d for split in ("train", "heldout") for d in source.documents(split)]
    assert documents == [d for split in ("train", "heldout") for d in source.documents(split)]
    by_name = {d.name: d.text for d in documents}
    assert len(by_name) == len(documents) > 190
    first = problem("arithmetic", 1, 0, 0)
    assert by_name["reasoning:1"] == f"{first.question}\n\n{first.solution}\n"


def test_fingerprint_follows_every_setting():
    base = ReasoningSource(0.1)
    others = [
        ReasoningSource(0.2),
        ReasoningSource(0.1, seed=1),
        ReasoningSource(0.1, num_problems=7),
        ReasoningSource(0.1, kinds=("logic",)),
        ReasoningSource(0.1, difficulties=(1,)),
    ]
    prints = [s.fingerprint("train") for s in (base, *others)] + [base.fingerprint("heldout")]
    assert len(set(prints)) == 7
    assert ReasoningSource(0.1).fingerprint("train") == prints[0]


def test_opened_by_name_and_tokenised(tokenizer, tmp_path):
    source = open_source("reasoning", holdout=0.3)
    assert source == ReasoningSource(HOLDOUT)  # one split for every stage, whatever data.holdout says
    assert source.name == "reasoning"
    with pytest.raises(UserError, match=r"data.mixture=reasoning reads no directory: leave out --config.data.root='x'"):
        open_source("reasoning", root="x")
    small = ReasoningSource(0.3, num_problems=60)
    cache = build_or_open(small, "heldout", tokenizer, tmp_path)
    texts = [d.text for d in small.documents("heldout")]
    assert cache.num_docs == len(texts) > 5
    assert cache.doc_bytes.tolist() == [len(text.encode()) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_forms_for_chat_and_reinforcement_learning(kind):
    item = problem(kind, 3, 0, 2)
    derivation, conclusion = item.solution.rsplit("\n", 1)
    boxed = f"The answer is \\boxed{{{item.answer}}}."
    assert conclusion == boxed
    text = render(chat_messages(item))
    assert text == (
        f"<|im_start|>user\n{item.question}<|im_end|>\n<|im_start|>assistant\n"
        f"<think>\n{derivation}\n</think>\n\n{boxed}<|im_end|>\n"
    )
    plain = render(chat_messages(item, thinking=False))
    assert plain.endswith(f"<think>\n\n</think>\n\n{boxed}<|im_end|>\n")
    assert derivation not in plain
    assert question_answer(item) == {"question": item.question, "answer": item.answer}
