"""The data sets of the pipeline as streams of examples for a `torch.utils.data.DataLoader`.

They use what runs use: `data/stream/` reads, mixes, tokenises and packs, `data/chat/` makes samples of conversations.

    tok = Tokenizer(backend="tiktoken", path="Qwen3-8B")
    pretrain = load_pretrain_dataset(stage=1, tokenizer=tok, max_seq_len=4096)
    for batch in DataLoader(pretrain, batch_size=8):
        batch["tokens"]  # [8, 4096]

They come from the Hub (streamed, no download in advance) or from local copies: `root=DIR`, or "name@DIR" in `mixture`.
`data/sources/adapters/` says what each data set is and how its rows are read. All functions take

    mixture      "name[@DIR][=weight],…" instead of the usual data sets, which have equal weights. A weight is a share
                 of rows, in pretraining of characters; when one data set ends, the others continue
    root         directory with one subdirectory for each local copy, of its short name; of a single data set it may be
                 the copy itself
    split        "" is the one to train on
    streaming    False downloads from the Hub first
    max_samples  read at most this many rows (those left out count too); in pretraining, documents
    on_bad_row   "error": a row that cannot be used raises UserError with file and row; "skip": it is left out and
                 counted. In pretraining, rows without a text are always left out and counted, as in a run

They return a dataset with `counts`, which says how many were left out for which reason (`adapters.rows.REASONS`).
All but the one for pretraining have a length. Rows come in the files' order: shuffle them beforehand, or use the
indexed `loader.Loader`.

Legend: T = max_seq_len. Token examples have the keys of `packing.concat.PackedDataset`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3f.data.chat.examples import chat_example, chat_tokens
from qwen3f.data.chat.kinds import TemplateKind
from qwen3f.data.chat.recognise import check_chat_tokenizer
from qwen3f.data.chat.samples import Sample, make_samples
from qwen3f.data.chat.sources import read_dataset
from qwen3f.data.packing.concat import Example
from qwen3f.data.sources.adapters import dpo, grpo, multimodal, pretrain, sft
from qwen3f.data.sources.adapters.registry import parse_mixture
from qwen3f.data.sources.adapters.rows import OnBadRow, Row
from qwen3f.data.stream.tokens import tokenised
from qwen3f.data.stream.torch_dataset import (
    CountedStream,
    DocumentItems,
    ExampleStream,
    Item,
    LeaveOut,
    RowItems,
    Share,
)
from qwen3f.data.stream.windows import windows
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.files import user_path


def load_pretrain_dataset(
    stage: int,
    tokenizer: Tokenizer,
    max_seq_len: int,
    *,
    mixture: str = "",
    root: str = "",
    split: str = "",
    streaming: bool = True,
    max_samples: int | None = None,
    on_bad_row: OnBadRow = "error",
    reset_positions: bool = True,
    cross_documents: bool = False,
) -> ExampleStream:
    """Documents, packed by concatenate and cut (see `stream.windows`): every token of every document once.

    Each of W workers packs its own documents, so the windows depend on W; worker w numbers its windows w, w + W, …
    (`index`).

    Args:
        stage: 1 (web text), 2 (mathematics and code) or 3 (books).
        tokenizer: text to ids; `eos_id` ends each document.
        max_seq_len: T; a longer document is cut and continues in the next window.
        reset_positions, cross_documents: as for `PackedDataset`. The others: see the module's docstring.

    Raises:
        UserError: another stage, T < 1, or as `parse_mixture`; while iterating, as `opening.rows`.
    """
    _check_length(max_seq_len)
    chosen = _choose(mixture, pretrain.STAGES, stage, "stage")
    parts = tuple(parse_mixture(chosen, root, "pretrain"))
    documents = DocumentItems(parts, split, streaming, max_samples, on_bad_row)
    return ExampleStream(documents, partial(_windows, tokenizer, max_seq_len, reset_positions, cross_documents))


def load_sft_dataset(
    variant: str,
    tokenizer: Tokenizer,
    max_seq_len: int,
    max_samples: int | None = None,
    *,
    mixture: str = "",
    root: str = "",
    split: str = "",
    streaming: bool = True,
    on_bad_row: OnBadRow = "error",
) -> CountedStream:
    """Chats: one example for each answer, with the turns before it, padded to T (see `chat.samples`, `chat.examples`).

    An example of more than T + 1 tokens is left out and counted as `too_long`: if it were cut, it would teach an answer
    without its end. All examples of one row have the row's number as `index`.

    Args:
        variant: "cold_start" (worked solutions as thinking) or "fusion" (chats without thinking).
        tokenizer: text to ids.
        max_seq_len: T. The others: see the module's docstring.

    Raises:
        UserError: another variant, T < 1, or as `parse_mixture`; while iterating, as `opening.rows`.
    """
    _check_length(max_seq_len)
    chosen = _choose(mixture, sft.VARIANTS, variant, "variant")
    kind = check_chat_tokenizer(tokenizer)
    adapters = {name: partial(_samples, name, kind) for name in sft.ADAPTERS}
    rows = RowItems(tuple(parse_mixture(chosen, root, "sft")), adapters, split, streaming, max_samples, on_bad_row)
    return CountedStream(rows, partial(_chats, tokenizer, max_seq_len))


def load_grpo_dataset(
    max_samples: int | None = None,
    *,
    mixture: str = grpo.DEFAULT,
    root: str = "",
    split: str = "",
    streaming: bool = True,
    on_bad_row: OnBadRow = "error",
) -> CountedStream:
    """Questions with verifiable answers: {"question": str, "answer": str, "index": int}.

    Raises:
        UserError: as `parse_mixture`; while iterating, as `opening.rows`.
    """
    parts = tuple(parse_mixture(mixture, root, "grpo"))
    return CountedStream(RowItems(parts, grpo.ADAPTERS, split, streaming, max_samples, on_bad_row), _queries)


def load_dpo_dataset(
    tokenizer: Tokenizer,
    max_seq_len: int,
    max_samples: int | None = None,
    *,
    mixture: str = dpo.DEFAULT,
    root: str = "",
    split: str = "",
    streaming: bool = True,
    on_bad_row: OnBadRow = "error",
) -> CountedStream:
    """Preference pairs: token examples of two rows [2, T], chosen then rejected, and ratings float32 [2].

    `DataLoader(…, collate_fn=collate_pairs)` makes batches of rows [B, T] of them. A pair with an answer that is too
    long for T is left out and counted as `too_long`.

    Args:
        tokenizer: text to ids.
        max_seq_len: T. The others: see the module's text.

    Raises:
        UserError: T < 1, or as `parse_mixture`; while iterating, as `opening.rows`.
    """
    _check_length(max_seq_len)
    adapters = {"ultrafeedback": dpo.ultrafeedback}
    rows = RowItems(tuple(parse_mixture(mixture, root, "dpo")), adapters, split, streaming, max_samples, on_bad_row)
    return CountedStream(rows, partial(_pairs, tokenizer, max_seq_len))


def load_multimodal_dataset(
    image_root: str | Path,
    max_samples: int | None = None,
    *,
    mixture: str = multimodal.DEFAULT,
    root: str = "",
    split: str = "",
    streaming: bool = True,
    on_bad_row: OnBadRow = "error",
) -> CountedStream:
    """Chats about images: {"messages": list of dicts, "image": multimodal.ImageFile, "index": int}.

    The text holds "<image>" where the image stands; `image.open()` reads it. Use `DataLoader(…, collate_fn=list)`.

    Args:
        image_root: folder of the images, which are not on the Hub. The others: see the module's text.

    Raises:
        UserError: no such folder, or as `parse_mixture`; while iterating, as `opening.rows`, or an image is missing.
    """
    folder = user_path(image_root, "image_root")
    if not folder.is_dir():
        raise UserError(f"There is no image folder {folder}: give image_root an existing one, e.g. COCO's train2017.")
    adapters = {name: partial(adapter, image_root=folder) for name, adapter in multimodal.ADAPTERS.items()}
    parts = tuple(parse_mixture(mixture, root, "multimodal"))
    return CountedStream(RowItems(parts, adapters, split, streaming, max_samples, on_bad_row), _image_chats)


def collate_pairs(pairs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of rows [2n, T] and ratings [2n] from n pairs: row 2i is the chosen answer of pair i, 2i + 1 the
    rejected.

    `index` is repeated for both rows, int64 [2n].
    """
    batch = {key: torch.cat([pair[key] for pair in pairs]) for key in pairs[0] if key != "index"}
    return {**batch, "index": torch.stack([pair["index"] for pair in pairs]).repeat_interleave(2)}


def _windows(
    tokenizer: Tokenizer,
    seq_len: int,
    reset_positions: bool,
    cross_documents: bool,
    items: Iterator[Item],
    share: Share,
    _: LeaveOut,
) -> Iterator[Example]:
    options = {"reset_positions": reset_positions, "cross_documents": cross_documents, "pad_id": tokenizer.pad_id}
    documents = tokenised(((item.value, None) for item in items), tokenizer, workers=0)
    for number, (make, _) in enumerate(windows(documents, seq_len, **options)):
        yield make(number * share.count + share.index)


def _samples(dataset: str, kind: TemplateKind, row: Row) -> list[Sample]:
    return make_samples(read_dataset(dataset, row), kind=kind)


def _chats(
    tokenizer: Tokenizer, seq_len: int, items: Iterator[Item], _: Share, leave_out: LeaveOut
) -> Iterator[Example]:
    for number, samples in items:
        for ids, trained in zip(*Sample.tokenise(samples, tokenizer, 1)):
            example = chat_example(ids, trained, seq_len, tokenizer.pad_id)
            if example is None:
                leave_out("too_long")
            else:
                yield {**example, "index": np.array(number, np.int64)}


def _pairs(
    tokenizer: Tokenizer, seq_len: int, items: Iterator[Item], _: Share, leave_out: LeaveOut
) -> Iterator[Example]:
    for number, pair in items:
        rows = []
        for answer in (pair.chosen, pair.rejected):
            messages = [*pair.prompt, {"role": "assistant", "content": answer}]
            rows.append(chat_example(*chat_tokens(tokenizer, messages), seq_len, tokenizer.pad_id))
        if None in rows:
            leave_out("too_long")
            continue
        example = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        yield {**example, "ratings": np.array(pair.ratings, np.float32), "index": np.array(number, np.int64)}


def _queries(items: Iterator[Item], _: Share, __: LeaveOut) -> Iterator[dict[str, Any]]:
    for number, query in items:
        yield {**query, "index": number}


def _image_chats(items: Iterator[Item], _: Share, __: LeaveOut) -> Iterator[dict[str, Any]]:
    for number, chat in items:
        yield {"messages": list(chat.messages), "image": chat.image, "index": number}


def _choose(mixture: str, usual: Mapping[Any, str], key: Any, what: str) -> str:
    """`mixture`, or if it is empty the usual one of `key`. Raises UserError for an unknown `key` in either case."""
    if key not in usual:
        raise UserError(f"{what} is {key!r}: write one of {', '.join(map(repr, usual))}.")
    return mixture or usual[key]


def _check_length(max_seq_len: int) -> None:
    if max_seq_len < 1:
        raise UserError(f"max_seq_len is {max_seq_len}: give at least 1.")
