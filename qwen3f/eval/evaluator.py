"""A model's log-likelihoods, choices and perplexity, equal to those of EleutherAI's lm-evaluation-harness 0.4.13.

The harness's code for this: lm_eval/api/model.py (how a context and its continuation are tokenised),
lm_eval/models/huggingface.py (cut on the left), lm_eval/utils.py (windows over a document).
"""

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.eval.prefix_tree import Scored
from qwen3f.eval.scoring import Score, Scorer
from qwen3f.train.outputs import make_eval_step

CPU_TOKENS, CUDA_TOKENS = 4096, 131_072  # tokens of a batch, at most


@dataclasses.dataclass(frozen=True)
class Choice:
    """The result of one question: each choice's log-likelihood, judge_choice's marks, whether its context was cut, and
    whether two of its choices have the same tokens."""

    log_probs: tuple[float, ...]
    marks: dict[str, float]
    truncated: bool
    alike: bool


class Evaluator:
    """Evaluates one model on one device.

    Softmax is computed in float32 at least, whatever the parameters' dtype: the harness's softmax_dtype=float32, which
    for bfloat16 is not its default.

    Args:
        cfg, params: those of the model, as for qwen3f.model.apply; the parameters' dtype is the compute dtype.
        tokenizer: the one that the model was trained with.
        batch_tokens: tokens in a batch; 0: chosen by free memory (`find_batch_tokens`). It changes no result except by
            rounding.
        execution: how the model runs (attention, compilation).

    Attributes:
        counts: "computed", "padding" and "asked" tokens (scoring.Scorer); "truncated": continuations whose context was
            cut; "alike": questions with two choices of the same tokens.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: P.Params,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int = 0,
        execution: model.Execution = model.EAGER,
    ) -> None:
        if batch_tokens < 0:
            raise UserError(f"batch_tokens must not be negative, got {batch_tokens}")
        self.cfg, self.params, self.tokenizer, self.execution = cfg, params, tokenizer, execution
        self.batch_tokens = batch_tokens or find_batch_tokens(cfg, params)
        self._score = Scorer(cfg, params, self.batch_tokens, execution)
        self._truncated: Counter[str] = Counter()

    @property
    def counts(self) -> Counter[str]:
        return self._score.counts + self._truncated

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """[(sum of log-probs, is_greedy)] of each continuation after its context; in order, natural logarithms.

        An empty context is <|endoftext|>. A context too long for the model's positions is cut on its left and counted
        as "truncated". The name of a special token in a text is read as that token, as in the harness. Raises UserError
        for an empty continuation and one longer than the model's positions.
        """
        return [(one.log_prob, one.greedy) for one in self._scores(self.encode_pairs(pairs))]

    def multiple_choice(self, questions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """{"acc", "acc_norm", "acc_bytes": shares of questions answered right, "loglikelihoods": [[…], …]}.

        Args:
            questions: {"context": str, "choices": [str, …], "answer": int}. A continuation is "delimiter" (default one
                blank) and the choice. "context" may be a list with one context for each choice. acc takes the choice
                with the largest log-likelihood, acc_norm the largest per character of the choice, acc_bytes the largest
                per UTF-8 byte; among equal choices the first.

        Raises UserError for no questions, one choice alone, and an answer that is none of them.
        """
        if not questions:
            raise UserError("multiple_choice got no questions; give at least one")
        found = self.choices(questions)
        shares = {name: sum(one.marks[name] for one in found) / len(found) for name in found[0].marks}
        return {**shares, "loglikelihoods": [list(one.log_probs) for one in found]}

    def choices(self, questions: Sequence[Mapping[str, Any]]) -> list[Choice]:
        """What multiple_choice finds, question by question."""
        pairs, ends = [], [0]
        for number, question in enumerate(questions):
            pairs += choice_pairs(question, f"question {number}")
            ends.append(len(pairs))
        encoded = self.encode_pairs(pairs)
        found, out = [one.log_prob for one in self._scores(encoded)], []
        for question, (first, end) in zip(questions, pairwise(ends)):
            own = encoded[first:end]
            alike = len({repr(pair) for pair in own}) < len(own)
            truncated = any(self._exceeds(*pair) for pair in own)
            self._truncated["alike"] += alike
            marks = judge_choice(found[first:end], question["choices"], question["answer"])
            out.append(Choice(tuple(found[first:end]), marks, truncated, alike))
        return out

    def perplexity(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """exp of the mean negative log-likelihood (nats) of a predicted token, over all batches.

        Batches have the keys of `packing.concat.PackedDataset`, on any device. Tokens are weighted by loss_weights.
        Raises UserError if no batch predicts anything.
        """
        step, nats, weight = make_eval_step(self.cfg, execution=self.execution), 0.0, 0.0
        device = self.params[P.EMBED].device
        for batch in batches:
            found = step(self.params, {key: x.to(device) for key, x in batch.items()})
            nats, weight = nats + found[0].item(), weight + found[1].item()
        if not weight:
            raise UserError("perplexity: the batches predict no token; give some with loss_weights")
        return _exp(nats / weight)

    def rolling(self, documents: Sequence[str], context: int = 1) -> list[float]:
        """The log-likelihood of each document, read in windows of the model's positions.

        context: a window repeats at least this many tokens of the window before, to condition on. 1 is the least, and
        the harness's value; with max_position_embeddings each further window predicts one token. A document's first
        token follows <|endoftext|>.
        """
        length = self.cfg.max_position_embeddings
        if not 1 <= context <= length:
            raise UserError(f"context={context}: write 1 to the model's {length} positions")
        sequences, ends = [], [0]
        for ids in self._encode(documents):
            sequences += windows(ids, self.tokenizer.eos_id, length, context)
            ends.append(len(sequences))
        found = [one.log_prob for one in self._score(sequences)]
        return [math.fsum(found[first:end]) for first, end in pairwise(ends)]

    def document_perplexity(self, documents: Sequence[str], context: int = 1) -> dict[str, float]:
        """{"word_perplexity", "byte_perplexity", "bits_per_byte"} of documents, as the harness's wikitext has them.

        Words are separated by white space; bytes are those of UTF-8. In a script without blanks a document may be one
        word, and its word_perplexity infinite. context: as for `rolling`. Raises UserError without any text.
        """
        size = sum(len(text.encode()) for text in documents)
        if not size:
            raise UserError("document_perplexity got no text; give a document that is not empty")
        total = math.fsum(self.rolling(documents, context))
        words = sum(len(re.split(r"\s+", text)) for text in documents)
        bits = -total / size / math.log(2)
        return {"word_perplexity": _exp(-total / words), "byte_perplexity": _exp(-total / size), "bits_per_byte": bits}

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """(context ids, continuation ids) of each pair.

        Both texts are encoded together; the ids are then split after as many ids as the context has when encoded alone.
        Blanks at the context's end belong to the continuation. Raises UserError for a continuation without tokens.
        """
        moved = []
        for context, continuation in pairs:
            kept = context.rstrip()
            moved.append((kept, context[len(kept) :] + continuation) if context else (context, continuation))
        contexts = dict.fromkeys(context for context, _ in moved)
        ids_of = dict(zip(contexts, self._encode(list(contexts))))
        together = self._encode([context + continuation for context, continuation in moved])
        out = []
        for number, ((context, continuation), ids) in enumerate(zip(moved, together)):
            before = ids_of[context]
            rest = ids[len(before) :]
            if not rest:
                raise UserError(f"continuation {number}, {continuation!r}, has no tokens of its own; leave it out")
            out.append((before or [self.tokenizer.eos_id], rest))
        return out

    def _scores(self, encoded: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        length, sequences = self.cfg.max_position_embeddings, []
        for number, (context, continuation) in enumerate(encoded):
            if len(continuation) > length:
                raise UserError(
                    f"continuation {number} has {len(continuation)} tokens, more than the model's {length} positions; "
                    "shorten it"
                )
            self._truncated["truncated"] += self._exceeds(context, continuation)
            sequences.append(Scored(tuple([*context, *continuation][-length - 1 : -1]), tuple(continuation)))
        return self._score(sequences)

    def _exceeds(self, context: Sequence[int], continuation: Sequence[int]) -> bool:
        return len(context) + len(continuation) > self.cfg.max_position_embeddings + 1

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        trusted = [[(text, True)] for text in texts]  # names of special tokens are read in each, as the harness does
        return [ids.tolist() for ids in self.tokenizer.encode_segments_batch(trusted, num_threads=os.cpu_count() or 1)]


def _exp(nats: float) -> float:
    """exp(nats); infinite where math.exp would raise because the result is too large."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def choice_pairs(question: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    """The (context, continuation) of each choice. Raises UserError as Evaluator.multiple_choice does."""
    choices, answer, context = question["choices"], question["answer"], question["context"]
    if len(choices) < 2:
        raise UserError(f"{where} has {len(choices)} choices; give at least two")
    if not (isinstance(answer, int) and 0 <= answer < len(choices)):
        raise UserError(f"{where}: the answer {answer!r} is none of its {len(choices)} choices, counted from 0")
    contexts = [context] * len(choices) if isinstance(context, str) else context
    if len(contexts) != len(choices):
        raise UserError(f"{where} has {len(contexts)} contexts for {len(choices)} choices; give one for each")
    continuations = question.get("continuations", choices)
    return [(before, question.get("delimiter", " ") + after) for before, after in zip(contexts, continuations)]


def judge_choice(log_probs: Sequence[float], choices: Sequence[str], answer: int) -> dict[str, float]:
    """{"acc", "acc_norm", "acc_bytes"}: 1.0 where the answer is the first of the best choices; see multiple_choice."""
    lengths = {"acc": [1] * len(choices), "acc_norm": [len(c) for c in choices]}
    lengths["acc_bytes"] = [len(c.encode()) for c in choices]
    out = {}
    for name, divisors in lengths.items():
        # a choice without characters scores −∞, the result of the harness's division by 0
        values = [value / n if n else -math.inf for value, n in zip(log_probs, divisors)]
        out[name] = float(values.index(max(values)) == answer)
    return out


def windows(ids: Sequence[int], prefix: int, length: int, context: int) -> Iterator[Scored]:
    """A document's tokens in windows of at most `length`, each token predicted once; see Evaluator.rolling."""
    done = min(length, len(ids))
    if done:
        yield Scored((prefix, *ids[: done - 1]), tuple(ids[:done]))
    while done < len(ids):
        end = min(len(ids), done + length - context + 1)
        yield Scored(tuple(ids[end - length - 1 : end - 1]), tuple(ids[done:end]))
        done = end


def find_batch_tokens(cfg: ModelConfig, params: P.Params) -> int:
    """Tokens in a batch that should fit into half of the GPU's free memory, for KV cache and activations.

    A token needs memory for its keys and values, twice while rows are copied, and for its activations in one layer.
    """
    weight = params[P.EMBED]
    if weight.device.type != "cuda":
        return CPU_TOKENS
    heads = cfg.num_attention_heads + 4 * cfg.num_key_value_heads
    width = max(cfg.intermediate_size, cfg.moe_intermediate_size * max(1, cfg.num_experts_per_tok))
    cached = 4 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim
    a_token = (cached + 8 * cfg.hidden_size + 4 * heads * cfg.head_dim + 4 * width) * weight.element_size()
    return int(min(CUDA_TOKENS, max(1024, torch.cuda.mem_get_info(weight.device)[0] // 2 // a_token)))
