"""Answers to a batch of prompts as tensors, by the engine: all at once (`generate`) or token by token (`stream`).

B rows · T columns of the prompts · N new tokens
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.infer.device import CPU_ROUNDING
from qwen3f.infer.engine import Engine
from qwen3f.infer.pictures import Pictures
from qwen3f.infer.request import Row
from qwen3f.infer.sampling import GREEDY, SamplingParams
from qwen3f.infer.thinking import ThinkingBudget


@dataclasses.dataclass(frozen=True)
class Requests:
    """Options of `stream` and `generate`, beside the prompts.

    Attributes:
      stop_ids: a row stops after any of these; then it yields pad_id (default: the first stop id, or 0).
      prompt_lengths: B numbers; row b's prompt is its last prompt_lengths[b] columns. The columns before are padding,
        with any ids. Default: T for all. A padded row gets the same tokens as it gets alone.
      request_ids: B numbers that name the random streams of the rows; default 0 … B−1. A row's draws depend on
        (seed, request id, position in the row).
      budget: a limit on thinking, counted in the answer's tokens.
      num_ids: only ids below this are chosen (Qwen3's embedding has rows that its tokenizer does not use). Default:
        vocab_size.
      execution: how the model runs; its compile has no effect.
      pictures: images and videos of each row, see infer.pictures; () for none.
    """

    stop_ids: Sequence[int] = ()
    pad_id: int | None = None
    prompt_lengths: Tensor | Sequence[int] | None = None
    request_ids: Tensor | Sequence[int] | None = None
    budget: ThinkingBudget | None = None
    num_ids: int | None = None
    execution: model.Execution = model.EAGER
    pictures: Sequence[Pictures | None] = ()


_SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams))


def generate(
    cfg: ModelConfig, params: P.Params, tokens: Tensor, *, max_new_tokens: int, seed: int = 0, **options: Any
) -> Tensor:
    """The prompts with their answers: int64 [B, T] -> [B, T + N], N = max_new_tokens.

    options: fields of SamplingParams (temperature, top_p, …) and of Requests (stop_ids, …). Other arguments and errors
    are those of `stream`. A row that stops keeps its stop id and is filled up with pad_id.
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
    """Yields the next token of each row, int64 [B]; ends after max_new_tokens or when every row has stopped.

    Args:
      params: as for qwen3f.model.apply; their dtype is the compute dtype.
      tokens: int64 [B, T], on the parameters' device.
      options: fields of Requests.
    An answer may go beyond max_position_embeddings, as in transformers; a prompt may not. Raises UserError at once for
    input that cannot run, and later if the model's logits are not finite.
    """
    asked = Requests(**options)
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    pad_id = _pad_id(asked.stop_ids, asked.pad_id)
    if not 0 <= pad_id < cfg.vocab_size:
        raise UserError(f"pad_id: {pad_id} must be a token id below the vocabulary's {cfg.vocab_size}")
    batch, columns = tokens.shape
    lengths = _per_row("prompt_lengths", asked.prompt_lengths, batch, [columns] * batch)
    if any(length > columns for length in lengths):
        raise UserError(f"prompt_lengths: {max(lengths)} is more than the {columns} columns of tokens")
    if len(asked.pictures) not in (0, batch):
        raise UserError(
            f"pictures has {len(asked.pictures)} entries for {batch} rows; give one for each, None where a row has no "
            "images, or leave it out"
        )
    streams = _per_row("request_ids", asked.request_ids, batch, range(batch))
    most = -(-(columns + max_new_tokens) // CPU_ROUNDING) * CPU_ROUNDING
    engine = Engine(
        cfg,
        params,
        max_tokens=max(1, batch) * most,
        seed=seed,
        execution=asked.execution,
        num_ids=cfg.vocab_size if asked.num_ids is None else asked.num_ids,
    )
    requests = [
        engine.request(
            row[columns - length :] if length > 0 else [],
            max_new_tokens,
            sampling=sampling,
            stream=name,
            stop_ids=tuple(asked.stop_ids),
            budget=asked.budget,
            pictures=seen,
        )
        for row, length, name, seen in zip(tokens.tolist(), lengths, streams, asked.pictures or [None] * batch)
    ]
    return _in_step(engine, engine.submit(requests), tokens.device, pad_id)


def _in_step(engine: Engine, rows: list[Row], device: torch.device, pad_id: int) -> Iterator[Tensor]:
    """Yields the tokens of all rows place by place; pad_id for rows that have ended."""
    place = 0
    while True:
        while any(not row.finish_reason and row.answered <= place for row in rows):
            engine.step()
        if failed := next((row for row in rows if row.finish_reason.startswith("error")), None):
            raise UserError(failed.finish_reason.removeprefix("error: ") + ", or use dtype=float32")
        if all(row.answered <= place for row in rows):
            return
        new = [row.tokens[len(row.request.prompt) + place] if place < row.answered else pad_id for row in rows]
        yield torch.tensor(new, device=device)
        place += 1


def _per_row(name: str, values: Tensor | Sequence[int] | None, rows: int, default: Sequence[int]) -> list[int]:
    out = torch.as_tensor(default if values is None else values, dtype=torch.int64)
    if out.shape != (rows,):
        raise UserError(f"{name} must hold one number for each of the {rows} rows, got {list(out.shape)}")
    return out.tolist()


def _pad_id(stop_ids: Sequence[int], pad_id: int | None) -> int:
    return pad_id if pad_id is not None else next(iter(stop_ids), 0)
