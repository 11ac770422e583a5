"""The Evaluator's scores equal the model's plain forward pass, however sequences share work and batches; also choices,
perplexity and bad input.
"""

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f import model, params
from qwen3f.data.packing.concat import IGNORED_TARGET
from qwen3f.data.tokenizers.qwen_tokenizer import QwenTokenizer
from qwen3f.errors import UserError
from qwen3f.eval import Evaluator
from qwen3f.eval.evaluator import windows
from qwen3f.eval.prefix_tree import Scored, build, walk
from qwen3f.eval.scoring import Scorer
from tests.eval import tiny_model
from tests.stages.toy_chats import MOE, small_tokenizer_json

CFG = tiny_model.CFG.replace(max_position_embeddings=128)
DOUBLE = tiny_model.weights(torch.float64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_model.tokenizer(tmp_path_factory.mktemp("t"))


def plain(cfg, p, one):
    """(sum of log-probs, greedy) of one sequence by the forward pass without a cache."""
    logits = model.apply(cfg, p, {"tokens": torch.tensor([one.tokens])}).logits[0, -len(one.targets) :]
    targets = torch.tensor(one.targets)
    log_probs = logits.log_softmax(-1).gather(1, targets[:, None])
    return log_probs.sum().item(), bool((logits.argmax(-1) == targets).all())


def few_shot(seed, prefixes=2, questions=5, choices=3):
    """Sequences of a long prefix, a question and a choice of several tokens; some end where others continue."""
    rand = random.Random(seed)

    def ids(n):
        return [rand.randrange(CFG.vocab_size) for _ in range(n)]

    out = []
    for prefix in (ids(rand.randrange(1, 60)) for _ in range(prefixes)):
        for question in (ids(rand.randrange(1, 20)) for _ in range(questions)):
            for targets in (ids(rand.randrange(1, 8)) for _ in range(choices)):
                whole = [*prefix, *question, *targets]
                out.append(Scored(tuple(whole[:-1]), tuple(targets)))
    return [*out, out[0], Scored(out[1].tokens[:-1] or (1,), (5,))]


@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_scores_are_those_of_each_sequence_alone(kind, batch_tokens):
    cfg = CFG.replace(**(MOE if kind == "moe" else {}))
    p = {path: leaf.double() for path, leaf in params.init_params(cfg, 7).items()}
    sequences = few_shot(0)
    best = Scored(sequences[0].tokens, sequences[0].targets)
    greedy = model.apply(cfg, p, {"tokens": torch.tensor([best.tokens])}).logits[0, -1].argmax().item()
    sequences.append(Scored(best.tokens, (greedy,)))
    scorer = Scorer(cfg, p, batch_tokens, model.EAGER)
    found = scorer(sequences)
    expected = [plain(cfg, p, one) for one in sequences]
    np.testing.assert_allclose([x.log_prob for x in found], [x for x, _ in expected], rtol=0, atol=1e-11)
    assert [x.greedy for x in found] == [x for _, x in expected]
    assert found[-1].greedy
    assert not all(x.greedy for x in found)
    assert scorer.counts["asked"] == sum(len(x.tokens) for x in sequences) > 2.5 * scorer.counts["computed"]


def test_float32_does_not_depend_on_batch_order_or_company():
    """Within a relative 1e-6 of a log-likelihood: other batches change the order of its sums."""
    p, sequences = tiny_model.weights(), few_shot(1)
    first = np.array([x.log_prob for x in Scorer(CFG, p, 10_000, model.EAGER)(sequences)])
    order = random.Random(0).sample(range(len(sequences)), len(sequences))
    shuffled = Scorer(CFG, p, 97, model.EAGER)([sequences[i] for i in order])
    np.testing.assert_allclose([x.log_prob for x in shuffled], first[order], rtol=1e-6)
    alone = [Scorer(CFG, p, 1, model.EAGER)([one])[0].log_prob for one in sequences]
    np.testing.assert_allclose(alone, first, rtol=1e-6)


sequences = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=90), st.integers(1, 6)), min_size=1, max_size=12
)


@settings(max_examples=200)
@given(sequences)
def test_a_tree_holds_every_target_once_at_its_place(drawn):
    """The tokens on the path to a node are the beginning of every sequence that the node scores.

    Only three different ids are drawn, so that sequences share much.
    """
    asked = [Scored(tuple(ids), tuple(ids[-count:])) for ids, count in drawn for count in [min(count, len(ids))]]
    found = {}

    def visit(node, before):
        here = before + node.tokens
        assert node.start == len(before)
        for want in node.wants:
            one = asked[want.sequence]
            assert here[: want.place + 1] == one.tokens[: want.place + 1]
            assert node.start <= want.place < node.end
            assert (want.sequence, want.index) not in found
            found[want.sequence, want.index] = want.target, want.place
        for child in node.children:
            visit(child, here)

    tree = build(asked)
    for node in tree:
        visit(node, ())
    assert found == {
        (i, j): (target, one.first + j) for i, one in enumerate(asked) for j, target in enumerate(one.targets)
    }
    assert sum(len(node.tokens) for node in walk(tree)) <= sum(len(one.tokens) for one in asked)


def test_deeply_nested_beginnings_end():
    ids = tuple([1] * 3000)
    asked = [Scored((*ids[:n], 2), (3,)) for n in range(1, 3000, 3)]
    assert sum(len(node.wants) for node in walk(build(asked))) == len(asked)


def test_a_few_shot_prefix_is_computed_once_a_subject(tokenizer):
    """5-shot questions like MMLU's: over 20 times fewer tokens are computed than with each choice scored alone."""
    cfg = CFG.replace(max_position_embeddings=4096)
    ev = Evaluator(cfg, tiny_model.weights(), tokenizer, batch_tokens=40_000)
    shots = "".join(f"Question {i}: what is {i} and {i}?\nA. x\nB. y\nAnswer: A\n\n" for i in range(5))
    contexts = [
        f"About {s}.\n\n{shots}Question: {n * 7919 % 101} of {s}?\nAnswer:" for s in ("birds", "law") for n in range(12)
    ]
    questions = [{"context": context, "choices": list("ABCD"), "answer": 0} for context in contexts]
    ev.multiple_choice(questions)
    prefixes = sum(len(tokenizer.encode(f"About {s}.\n\n{shots}")) for s in ("birds", "law"))
    own = sum(len(tokenizer.encode(q["context"].rpartition("\n\n")[2])) for q in questions)
    # A choice is two ids here, a blank and a letter. So each question adds four rows of one token.
    assert ev.counts["computed"] <= prefixes + own + 4 * len(questions)
    assert ev.counts["asked"] > 20 * ev.counts["computed"]


def test_special_tokens_are_read_in_each_text_whatever_its_company(tmp_path):
    """This must hold for a token with a name unlike <|im_end|> too, such as Qwen3's <tool_call>."""
    made = small_tokenizer_json()
    made["added_tokens"][-1]["content"] = "<tool_call>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    named = QwenTokenizer.load(tmp_path)
    ev = Evaluator(CFG, DOUBLE, named)
    one, chat, plain_text = ("Say <tool_call> now", " yes"), ("a <|im_end|> b", "c"), ("no more", " than text")
    together = ev.encode_pairs([chat, one, plain_text, one])
    assert together == [ev.encode_pairs([pair])[0] for pair in (chat, one, plain_text, one)]
    assert together[1] == (named.encode(one[0], allow_special=True), named.encode(one[1]))
    assert named.special_id("<tool_call>") in together[1][0]
    assert ev.loglikelihood([chat, one])[1] == pytest.approx(ev.loglikelihood([one])[0], abs=1e-9)


QUESTIONS = [
    {"context": "The capital of France is", "choices": ["Paris", "a town named Rome", "é"], "answer": 0},
    {"context": "Two and two are ", "choices": ["4", "four", "five apples"], "answer": 1},
    {"context": "", "choices": ["x", "yy"], "answer": 1},
]


def test_multiple_choice_takes_the_best_a_character_and_a_byte(tokenizer):
    ev = Evaluator(CFG, DOUBLE, tokenizer)
    found = ev.multiple_choice(QUESTIONS)
    rows = [
        [x for x, _ in ev.loglikelihood([(q["context"], f" {choice}") for choice in q["choices"]])] for q in QUESTIONS
    ]
    assert found["loglikelihoods"] == [pytest.approx(row, abs=1e-9) for row in rows]
    for name, size in (("acc", lambda c: 1), ("acc_norm", len), ("acc_bytes", lambda c: len(c.encode()))):
        best = [np.argmax([x / size(c) for x, c in zip(row, q["choices"])]) for row, q in zip(rows, QUESTIONS)]
        assert found[name] == np.mean([i == q["answer"] for i, q in zip(best, QUESTIONS)])
    assert ev.counts["alike"] == ev.counts["truncated"] == 0


def test_choices_alike_and_cut_contexts_are_counted(tokenizer):
    ev = Evaluator(CFG, DOUBLE, tokenizer)
    same = {"context": "x", "choices": ["the", "the", "a"], "answer": 0}
    long = {"context": "word " * 60, "choices": ["a", "b"], "answer": 0}
    one, two = ev.choices([same, long])
    assert (one.alike, one.truncated, two.alike, two.truncated) == (True, False, False, True)
    assert (ev.counts["alike"], ev.counts["truncated"]) == (1, 2)
    assert one.log_probs[0] == one.log_probs[1]
    # The part that was cut has no effect: another beginning changes nothing.
    other = {**long, "context": "other " * 20 + "word " * 60}
    assert ev.choices([other])[0].log_probs == pytest.approx(two.log_probs, abs=1e-9)


def batch(rows):
    length = max(len(ids) for ids in rows)
    out = {"tokens": [], "targets": [], "loss_weights": [], "segments": []}
    for ids in rows:
        pad = length - len(ids)
        out["tokens"].append([*ids, *[0] * pad])
        out["targets"].append([*ids[1:], *[IGNORED_TARGET] * (pad + 1)])
        out["loss_weights"].append([1.0] * (len(ids) - 1) + [0.0] * (pad + 1))
        out["segments"].append([1] * len(ids) + [0] * pad)
    kinds = {"loss_weights": torch.float32, "segments": torch.int32}
    return {key: torch.tensor(value, dtype=kinds.get(key, torch.int64)) for key, value in out.items()}


def test_perplexity_is_exp_of_the_mean_over_all_tokens(tokenizer):
    rand = random.Random(3)
    rows = [[rand.randrange(CFG.vocab_size) for _ in range(n)] for n in (5, 17, 2, 30)]
    nats = [-plain(CFG, DOUBLE, Scored(tuple(ids[:-1]), tuple(ids[1:])))[0] for ids in rows]
    expected = math.exp(sum(nats) / sum(len(ids) - 1 for ids in rows))
    ev = Evaluator(CFG, DOUBLE, tokenizer)
    assert ev.perplexity([batch(rows[:1]), batch(rows[1:])]) == pytest.approx(expected, rel=1e-10)
    assert ev.perplexity(iter([batch(rows)])) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(UserError, match="predict no token"):
        ev.perplexity([])


@settings(max_examples=100)
@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_windows_predict_every_token_once_with_at_least_their_context(count, length, data):
    context = data.draw(st.integers(1, length))
    ids = list(range(1, count + 1))
    found = list(windows(ids, 0, length, context))
    assert [target for one in found for target in one.targets] == ids
    for number, one in enumerate(found):
        assert len(one.tokens) <= length
        whole = [0, *ids]
        end = one.targets[-1]
        assert list(one.tokens) == whole[end - len(one.tokens) : end]
        if number:  # of a later window, the first prediction sees at least `context` tokens
            assert len(one.tokens) - len(one.targets) + 1 >= context


def test_document_perplexity_counts_words_and_bytes(tokenizer):
    ev = Evaluator(CFG, DOUBLE, tokenizer)
    texts = ["naïve words  here", "one"]
    total, size = sum(ev.rolling(texts)), sum(len(text.encode()) for text in texts)
    found = ev.document_perplexity(texts)
    assert found["bits_per_byte"] == pytest.approx(-total / size / math.log(2))
    assert found["byte_perplexity"] == pytest.approx(math.exp(-total / size))
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / 4))
    # With context=8 the window moves by one token, so each token has more context than in the harness.
    short = Evaluator(CFG.replace(max_position_embeddings=8), DOUBLE, tokenizer)
    ids = tokenizer.encode(texts[0])
    each = [plain(CFG, DOUBLE, Scored(tuple([tokenizer.eos_id, *ids][max(0, i - 7) : i + 1]), (ids[i],)))[0]
            for i in range(len(ids))]  # fmt: skip
    assert short.rolling(texts[:1], context=8) == pytest.approx([sum(each)], abs=1e-9)


def test_a_long_text_without_blanks_has_a_perplexity(tokenizer):
    """It is one word, and its probability is smaller than any float: the perplexity of words is infinite."""
    found = Evaluator(CFG, DOUBLE, tokenizer).document_perplexity(["今日は天気がいい" * 12])
    assert found["word_perplexity"] == math.inf
    assert math.isfinite(found["byte_perplexity"])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda ev: ev.multiple_choice([]), "no questions"),
        (lambda ev: ev.multiple_choice([{"context": "x", "choices": ["a", "b"], "answer": 2}]), "answer 2 is none of"),
        (lambda ev: ev.multiple_choice([{"context": "x", "choices": ["a", "b"], "answer": -1}]), "answer -1 is none"),
        (lambda ev: ev.multiple_choice([{"context": "x", "choices": ["a"], "answer": 0}]), "at least two"),
        (lambda ev: ev.multiple_choice([{"context": ["x"], "choices": ["a", "b"], "answer": 0}]), "1 contexts for 2"),
        (lambda ev: ev.loglikelihood([("a", "b"), ("a", "")]), "continuation 1, '', has no tokens"),
        (lambda ev: ev.loglikelihood([("a", "x" * 200)]), "continuation 0 has 200 tokens, more than the model's 128"),
        (lambda ev: ev.rolling(["a"], context=0), "context=0"),
        (lambda ev: ev.document_perplexity([""]), "no text"),
        (lambda ev: Evaluator(CFG, DOUBLE, ev.tokenizer, batch_tokens=-1), "batch_tokens must not be negative"),
        (lambda ev: Evaluator(CFG.replace(scalar_head=True), DOUBLE, ev.tokenizer), "scalar_head"),
    ],
)
def test_bad_input_is_one_line_that_says_what(call, words, tokenizer):
    with pytest.raises(UserError, match=words) as caught:
        call(Evaluator(CFG, DOUBLE, tokenizer))
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_named(tokenizer):
    broken = {path: torch.full_like(leaf, math.nan) for path, leaf in DOUBLE.items()}
    with pytest.raises(UserError, match="not finite"):
        Evaluator(CFG, broken, tokenizer).loglikelihood([("a", "b")])
