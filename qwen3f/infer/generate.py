"""Answers from a model, one token a step with a key/value cache: all at once (`generate`) or as they come (`stream`).

B rows · T columns of the prompts · N new tokens · V vocabulary
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen3f import model
from qwen3f import params as P
from qwen3f.compilation import compile_static
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.infer.sampling import GREEDY, SamplingParams, sample, streams
from qwen3f.infer.thinking import ThinkingBudget, apply_budget

PREFILL = 1024  # prompt tokens a pass: bounds the memory of masks and activations
SPAN = 256  # attention looks at this many slots of the cache, or a multiple: what is empty is not read


@dataclasses.dataclass(frozen=True)
class Requests:
    """What is asked of each row, beside its prompt.

    Attributes:
      stop_ids: a row stops after any of these; then it yields pad_id (default: the first stop id).
      prompt_lengths: B numbers; row b's prompt is its last prompt_lengths[b] columns, the rest is padding on the left,
        whatever its ids. Default: T for all. A padded row gets the tokens that it gets alone.
      request_ids: B numbers that name the rows to the random stream; default 0 … B−1. A row's draws depend on
        (seed, request id, position in the row).
      budget: a limit on thinking, counted in the answer's tokens.
      num_ids: ids from here on are never chosen (Qwen3's embedding has rows that its tokenizer doesn't use). Default:
        vocab_size.
      execution: compile "block" or "step" compiles the decoding pass (for a fixed batch and cache size), never the
        prompt's.
    """

    stop_ids: Sequence[int] = ()
    pad_id: int | None = None
    prompt_lengths: Tensor | Sequence[int] | None = None
    request_ids: Tensor | Sequence[int] | None = None
    budget: ThinkingBudget | None = None
    num_ids: int | None = None
    execution: model.Execution = model.EAGER


_SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams))


def generate(
    cfg: ModelConfig, params: P.Params, tokens: Tensor, *, max_new_tokens: int, seed: int = 0, **options: Any
) -> Tensor:
    """The prompts with their answers: int64 [B, T] -> [B, T + N], N = max_new_tokens.

    options: fields of SamplingParams (temperature, top_p, …) and of Requests (stop_ids, …); the rest as `stream` has
    it. A row that stops keeps its stop id and is filled up with pad_id.
    """
    sampling = SamplingParams(**{name: options.pop(name) for name in _SAMPLING & options.keys()})
    new = list(stream(cfg, params, tokens, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, **options))
    out = torch.cat([tokens, *(ids_B[:, None] for ids_B in new)], dim=1)
    missing = max_new_tokens - len(new)  # all rows had stopped
    return torch.nn.functional.pad(out, (0, missing), value=_pad_id(options.get("stop_ids", ()), options.get("pad_id")))


def stream(
    cfg: ModelConfig,
    params: P.Params,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    seed: int = 0,
    **options: Any,
) -> Iterator[Tensor]:
    """The new token of each row, int64 [B], step by step; ends after max_new_tokens or when every row has stopped.

    Args:
      params: as for qwen3f.model.apply; their dtype is the compute dtype.
      tokens: int64 [B, T], on the parameters' device.
      options: fields of Requests.
    Rows may grow past max_position_embeddings, as in transformers; prompts may not. Raises UserError at once for input
    that cannot run, and on a step whose logits are not finite.
    """
    asked = Requests(**options)
    stop_ids, pad_id, budget = asked.stop_ids, asked.pad_id, asked.budget
    if cfg.scalar_head:
        raise UserError("model.scalar_head=True makes a score of each token, not text; name a model with a vocabulary")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    batch = tokens.shape[0]
    lengths_B = _per_row("prompt_lengths", asked.prompt_lengths, tokens, [tokens.shape[1]] * batch)
    request_B = _per_row("request_ids", asked.request_ids, tokens, range(batch))
    real_BT = torch.arange(tokens.shape[1], device=tokens.device) >= (tokens.shape[1] - lengths_B)[:, None]
    tokens = torch.where(real_BT, tokens, 0)
    _check_prompts(cfg, tokens, lengths_B)
    for name, ids in (
        ("stop_ids", stop_ids),
        ("pad_id", [pad_id or 0]),
        ("budget", budget.closing_ids if budget else ()),
    ):
        if any(not 0 <= i < cfg.vocab_size for i in ids):
            raise UserError(f"{name}: {list(ids)} must be token ids below the vocabulary's {cfg.vocab_size}")
    num_ids = cfg.vocab_size if asked.num_ids is None else asked.num_ids
    if not 1 <= num_ids <= cfg.vocab_size:
        raise UserError(f"num_ids must lie in 1..vocab_size ({cfg.vocab_size}), got {num_ids}; see the tokenizer")
    prompt = _Prompt(tokens, real_BT, lengths_B, request_B)
    stop = torch.tensor(list(stop_ids), dtype=torch.int64, device=tokens.device)
    rules = _Rules(sampling, seed, budget, num_ids, stop, _pad_id(stop_ids, pad_id))
    return _steps(cfg, params, prompt, max_new_tokens, rules, asked.execution)


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """tokens_BT with 0 for padding; real_BT: bool, False for padding; lengths_B, request_B: int64."""

    tokens_BT: Tensor
    real_BT: Tensor
    lengths_B: Tensor
    request_B: Tensor


@dataclasses.dataclass(frozen=True)
class _Rules:
    """How tokens are chosen and when a row ends; names as in `stream`, stop: int64 [number of stop ids]."""

    sampling: SamplingParams
    seed: int
    budget: ThinkingBudget | None
    num_ids: int
    stop: Tensor
    pad_id: int


@torch.no_grad()
def _steps(
    cfg: ModelConfig,
    params: P.Params,
    prompt: _Prompt,
    max_new_tokens: int,
    rules: _Rules,
    execution: model.Execution,
) -> Iterator[Tensor]:
    batch, columns = prompt.tokens_BT.shape
    stacked = [path for path, spec in P.abstract_params(cfg).items() if spec.stack and isinstance(params[path], Tensor)]
    params = params | {path: params[path].unbind(0) for path in stacked}
    size = columns + max_new_tokens
    if compiled := execution.compile != "off":
        size = _round_up(size)  # answers of about one length then share the compiled code
    cache = model.init_cache(cfg, params, batch, size)
    decode = _decoder(cfg, execution)

    still_B = torch.ones(batch, dtype=torch.bool, device=cache.lengths.device)  # rows that have not stopped
    open_B = still_B  # rows that still think
    seen_BV = still_B.new_zeros(batch, cfg.vocab_size)  # the answers' tokens
    ids_B = None
    for step in range(max_new_tokens):
        if ids_B is None:
            logits_B1V, cache = _prefill(cfg, params, prompt, cache, execution)
        else:
            span = size if compiled else min(_round_up(columns + step), size)
            logits_B1V, cache = decode(params, {"tokens": ids_B[:, None]}, cache, span=span, last=True, donate=True)
        logits_BV = logits_B1V[:, -1, : rules.num_ids]
        if not bool(logits_BV.isfinite().all()):
            raise UserError(
                f"the model's logits are not finite at new token {step + 1}; check its weights, or use dtype=float32"
            )
        stream_B = streams(rules.seed, prompt.request_B, prompt.lengths_B + step)
        ids_B = sample(logits_BV, rules.sampling, stream_B, seen_BV[:, : rules.num_ids])
        if rules.budget is not None:
            ids_B, open_B = apply_budget(rules.budget, step, ids_B, open_B)
        ids_B = torch.where(still_B, ids_B, rules.pad_id)
        seen_BV.scatter_(1, ids_B[:, None], True)
        still_B = still_B & ~torch.isin(ids_B, rules.stop)
        yield ids_B
        if not bool(still_B.any()):
            return


def _prefill(
    cfg: ModelConfig, params: P.Params, prompt: _Prompt, cache: model.KVCache, execution: model.Execution
) -> tuple[Tensor, model.KVCache]:
    """(logits of the last column [B, 1, V], the cache with the prompts in it)."""
    forward = model.make_cached_forward(cfg, dataclasses.replace(execution, compile="off"))
    logits = None
    for start in range(0, prompt.tokens_BT.shape[1], PREFILL):
        part = slice(start, start + PREFILL)
        batch = {"tokens": prompt.tokens_BT[:, part], "segments": prompt.real_BT[:, part].int()}
        span = min(_round_up(start + PREFILL), cache.max_len)
        logits, cache = forward(params, batch, cache, span=span, last=True, donate=True)
    return logits, cache


@functools.lru_cache(maxsize=8)
def _decoder(cfg: ModelConfig, execution: model.Execution) -> Any:
    """The cached forward pass; with compile="step" as one graph. Kept, since the compiled code is."""
    forward = model.make_cached_forward(cfg, execution)
    return compile_static(forward) if execution.compile == "step" else forward


def _per_row(name: str, values: Tensor | Sequence[int] | None, tokens: Tensor, default: Sequence[int]) -> Tensor:
    out = torch.as_tensor(default if values is None else values, dtype=torch.int64, device=tokens.device)
    if out.shape != (tokens.shape[0],):
        raise UserError(f"{name} must hold one number for each of the {tokens.shape[0]} rows, got {list(out.shape)}")
    return out


def _check_prompts(cfg: ModelConfig, tokens_BT: Tensor, lengths_B: Tensor) -> None:
    if tokens_BT.numel() == 0 or int(lengths_B.min()) < 1:
        raise UserError("a prompt is empty; give every row one token at least, e.g. <|endoftext|>")
    longest, columns = int(lengths_B.max()), tokens_BT.shape[1]
    if longest > columns:
        raise UserError(f"prompt_lengths: {longest} is more than the {columns} columns of tokens")
    if longest > cfg.max_position_embeddings:
        raise UserError(
            f"a prompt has {longest} tokens and the model's max_position_embeddings is {cfg.max_position_embeddings}; "
            "shorten it"
        )
    low, high = int(tokens_BT.min()), int(tokens_BT.max())
    if low < 0 or high >= cfg.vocab_size:
        raise UserError(
            f"a prompt has token id {low if low < 0 else high}, ids of this model are 0 to {cfg.vocab_size - 1}; use "
            "the tokenizer that belongs to it"
        )


def _pad_id(stop_ids: Sequence[int], pad_id: int | None) -> int:
    return pad_id if pad_id is not None else next(iter(stop_ids), 0)


def _round_up(slots: int) -> int:
    return -(-slots // SPAN) * SPAN
