"""Log-probabilities of given tokens after given tokens, with every shared beginning computed once.

B rows · T new tokens of a row · D hidden · V vocabulary · N scored targets · U places that they are predicted at
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.eval.prefix_tree import Node, Scored, build
from qwen3f.infer.device import unstacked
from qwen3f.model.kv_cache import KVCache

LOGITS = 2**26  # logits computed at a time


@dataclasses.dataclass(frozen=True)
class Score:
    """log_prob: the sum over a sequence's targets, natural logarithm. greedy: each is the likeliest token there."""

    log_prob: float
    greedy: bool


class Scorer:
    """Scores token sequences. The results do not depend on batch_tokens, nor on their order, but for rounding.

    batch_tokens: places of the key/value cache at a time, of all rows together; one row may have more.
    counts: "computed": tokens that went through the model; "padding": padding beside them; "asked": tokens of all
    sequences, without sharing beginnings.
    """

    def __init__(self, cfg: ModelConfig, params: P.Params, batch_tokens: int, execution: model.Execution) -> None:
        if cfg.scalar_head:
            raise UserError(
                "this is a reward model (model.scalar_head=True), which says nothing of the next token; name another, "
                "--config.init_from=W"
            )
        if batch_tokens < 1:
            raise UserError(f"batch_tokens must be at least 1, got {batch_tokens}")
        self._params = unstacked(cfg, params)
        self._cfg, self._batch_tokens = cfg, batch_tokens
        self._hidden = model.make_cached_forward(cfg, dataclasses.replace(execution, compile="off"))
        self._head = model.head_weight(cfg, self._params)
        self.counts: Counter[str] = Counter()

    def __call__(self, sequences: Sequence[Scored]) -> list[Score]:
        """A score for each. Raises UserError for logits that are not finite."""
        found = [[0.0] * len(one.targets) for one in sequences]
        greedy = [True] * len(sequences)
        for want, log_prob, likeliest in self._below(build(sequences), None, []):
            found[want.sequence][want.index] = log_prob
            greedy[want.sequence] &= likeliest
        self.counts["asked"] += sum(len(one.tokens) for one in sequences)
        return [Score(math.fsum(values), best) for values, best in zip(found, greedy)]

    def _below(self, nodes: Sequence[Node], cache: KVCache | None, rows: Sequence[int]) -> Iterator[tuple]:
        """(want, log-prob, whether the target is the likeliest token) for all wants of `nodes` and the nodes below.

        cache: the KV cache of their parents; node i continues row rows[i] of it. None: the nodes have no parents.
        """
        order = sorted(range(len(nodes)), key=lambda i: (bool(nodes[i].children), -nodes[i].end, i))
        for part in _batches(order, nodes, self._batch_tokens):
            chosen = [nodes[i] for i in part]
            hidden_BTD, after = self._read(chosen, cache, [rows[i] for i in part] if cache is not None else None)
            yield from self._scores(chosen, hidden_BTD)
            inner = [(child, row) for row, node in enumerate(chosen) for child in node.children]
            del hidden_BTD
            if inner:
                yield from self._below([child for child, _ in inner], after, [row for _, row in inner])

    def _read(self, nodes: Sequence[Node], cache: KVCache | None, rows: list[int] | None) -> tuple[Tensor, KVCache]:
        size, longest = max(node.end for node in nodes), max(len(node.tokens) for node in nodes)
        own = model.init_cache(self._cfg, self._params, len(nodes), size)  # a page for each row; page 0: padding
        if cache is not None and rows is not None:
            _copy_rows(cache, own, torch.tensor(rows, device=self._head.device))
        tokens, positions, slots = (np.zeros((len(nodes), longest), np.int64) for _ in range(3))
        for row, node in enumerate(nodes):
            count = len(node.tokens)
            tokens[row, :count] = node.tokens
            positions[row, :count] = np.arange(node.start, node.end)
            slots[row, :count] = (1 + row) * size + positions[row, :count]
        batch = {"tokens": tokens, "positions": positions, "slots": slots}
        real = sum(len(node.tokens) for node in nodes)
        self.counts.update(computed=real, padding=len(nodes) * longest - real)
        batch = {key: torch.from_numpy(x).to(self._head.device) for key, x in batch.items()}
        return self._hidden(self._params, own, batch, table=1, span=size)

    def _scores(self, nodes: Sequence[Node], hidden_BTD: Tensor) -> Iterator[tuple]:
        wants = [(row, want.place - node.start, want) for row, node in enumerate(nodes) for want in node.wants]
        wants.sort(key=lambda item: item[:2])
        places = sorted({item[:2] for item in wants})
        number = {place: i for i, place in enumerate(places)}
        step, done = max(1, LOGITS // self._cfg.vocab_size), 0
        for first in range(0, len(places), step):
            part = places[first : first + step]
            end = done
            while end < len(wants) and number[wants[end][:2]] < first + len(part):
                end += 1
            own, done = wants[done:end], end
            rows, columns = (torch.tensor(x, device=hidden_BTD.device) for x in zip(*part))
            at_N, targets_N = (
                torch.tensor(x, device=hidden_BTD.device)
                for x in zip(*((number[item[:2]] - first, item[2].target) for item in own))
            )
            log_probs_N, best_N = _log_probs(hidden_BTD[rows, columns], self._head, at_N, targets_N)
            for (_, _, want), log_prob, best in zip(own, log_probs_N.tolist(), best_N.tolist()):
                if not math.isfinite(log_prob):
                    raise UserError("the model's logits are not finite; check its weights, or use dtype=float32")
                yield want, log_prob, best


def _log_probs(hidden_UD: Tensor, head_VD: Tensor, at_N: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of targets_N at place at_N, whether the target is the likeliest token there)."""
    logits_UV = F.linear(hidden_UD, head_VD)
    logits_UV = logits_UV.to(torch.promote_types(logits_UV.dtype, torch.float32))
    picked_N = logits_UV[at_N, targets_N]
    return picked_N - logits_UV.logsumexp(-1)[at_N], logits_UV.argmax(-1)[at_N] == targets_N


def _batches(order: Sequence[int], nodes: Sequence[Node], batch_tokens: int) -> Iterator[list[int]]:
    """`order` in parts whose rows, each as long as the part's longest, have at most batch_tokens places."""
    part: list[int] = []
    longest = 0
    for i in order:
        longest = max(longest, nodes[i].end)
        if part and longest * (len(part) + 1) > batch_tokens:
            yield part
            part, longest = [], nodes[i].end
        part.append(i)
    if part:
        yield part


def _copy_rows(source: KVCache, target: KVCache, rows_B: Tensor) -> None:
    """Copy rows `rows_B` of `source` into the first rows of `target`. Both have one page for each row; places beyond
    the shorter page are not copied."""
    held = min(source.page_size, target.page_size)
    for old, new in zip((*source.keys, *source.values), (*target.keys, *target.values)):
        new[1:, :, :held] = old[1 + rows_B, :, :held]
