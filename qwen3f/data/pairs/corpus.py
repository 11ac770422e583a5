"""Build packed pairs from a configuration: sources, token caches with trained bits, best fit, mixture.

The counterpart of `chat.corpus`; caches, order, resume and mixtures are the same.
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from qwen3f.data.cache.column import Column, new_column
from qwen3f.data.cache.token_cache import TokenCache
from qwen3f.data.chat.corpus import ChatCorpus, Recipe, generated_problems, prepare_packed
from qwen3f.data.chat.recognise import check_chat_tokenizer
from qwen3f.data.mixture import parse_weights
from qwen3f.data.packing.concat import check_seq_len
from qwen3f.data.packing.pair_dataset import PairDataset
from qwen3f.data.pairs.sources import PairSource, check_name, open_pairs
from qwen3f.data.sources.adapters.rows import OnBadRow, check_policy
from qwen3f.data.sources.documents import Split
from qwen3f.data.sources.reasoning import NUM_PROBLEMS
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError

LONG_PAIRS = ("drop", "error")


@dataclass(frozen=True)
class PairDataConfig:
    """What `config.data` holds for a stage that trains on pairs.

    Attributes:
        mixture: sources of `pairs.sources`, several with weights. A weight is the source's share of the rows.
        long_pairs: what to do with pairs whose answers, both with their prompts, do not fit into a row of seq_len
            places: "drop" leaves them out and counts them; "error" stops.
        max_samples: train on at most this many pairs of each source, the first ones; 0: all.
        max_heldout: keep at most this many held-out pairs of each source, the first ones.
        The rest is as in `ChatDataConfig`.
    """

    mixture: str = "right-or-wrong=0.4,boxed-or-not=0.3,short-or-padded=0.3"
    root: str = ""
    kinds: str = ""
    difficulties: str = ""
    problems: int = NUM_PROBLEMS
    problem_seed: int = 0
    long_pairs: Literal["drop", "error"] = "drop"
    on_bad_row: OnBadRow = "error"
    max_samples: int = 0
    max_heldout: int = 1000
    temperature: float = 0.0
    max_epochs: str = ""
    cache: str = ""
    num_threads: int = 2
    workers: int = 0


@dataclass(frozen=True)
class PairLayout:
    """How pairs become rows.

    seq_len: places of a row. scored: see `PairDataset`. margins: whether rows have the pairs' margins.
    """

    seq_len: int
    scored: bool = False
    margins: bool = False


def prepare_pairs(cfg: PairDataConfig, layout: PairLayout, tokenizer: Tokenizer, progress: bool = True) -> ChatCorpus:
    """Open the pairs; tokenises both splits unless they are in the cache.

    Several processes may do this at once. Raises UserError as `chat.corpus.prepare_chats` does.
    """
    check(cfg)
    check_seq_len(layout.seq_len)
    problems = generated_problems(cfg, ["reasoning"]).family("reasoning")
    template = check_chat_tokenizer(tokenizer)
    recipe = Recipe(
        open=lambda name: open_pairs(name, cfg.root, problems, cfg.on_bad_row, template),
        limit=lambda source, most: replace(source, most=most),
        pack=lambda source, split, cache: _pack(cfg, layout, source, split, cache, tokenizer.pad_id),
    )
    return prepare_packed(cfg, recipe, tokenizer, progress)


def check(cfg: PairDataConfig) -> None:
    """Raises UserError for values that cannot work, alone or together."""
    if cfg.long_pairs not in LONG_PAIRS:
        raise UserError(f"--config.data.long_pairs is {cfg.long_pairs!r}: write one of {', '.join(LONG_PAIRS)}.")
    check_policy(cfg.on_bad_row)
    for name, _ in parse_weights(cfg.mixture):
        check_name(name)
    for key, lowest in (("problems", 1), ("max_samples", 0), ("max_heldout", 1), ("num_threads", 1), ("workers", 0)):
        if getattr(cfg, key) < lowest:
            raise UserError(f"--config.data.{key} is {getattr(cfg, key)}: give {lowest} or more.")
    generated_problems(cfg, ["reasoning"]).family("reasoning")


def _pack(
    cfg: PairDataConfig, layout: PairLayout, source: PairSource, split: Split, cache: TokenCache, pad_id: int
) -> PairDataset | None:
    """The rows of a split; None if no pair of a held-out split fits."""
    if cfg.long_pairs == "error":
        _refuse_long(source, split, cache, layout)
    margins = _margins(source, split, cache) if layout.margins else None
    try:
        return PairDataset(cache, layout.seq_len, pad_id, layout.scored, margins=margins)
    except UserError as error:
        if split == "heldout":
            return None
        raise UserError(f"{source.name}: {error}") from None


def _refuse_long(source: PairSource, split: Split, cache: TokenCache, layout: PairLayout) -> None:
    """Raises UserError with file and row of the first pair that is too long, if there is one."""
    places = np.diff(cache.doc_offsets) - (not layout.scored)
    lengths = places[::2] + places[1::2]
    too_long = np.flatnonzero(lengths > layout.seq_len)
    if not too_long.size:
        return
    first = next(islice(source.pairs(split, Counter()), int(too_long[0]), None))
    raise UserError(
        f"{first.chosen.name} and its counterpart take {lengths[too_long[0]]:,} places, more than "
        f"seq_len={layout.seq_len}, and so do {too_long.size:,} of {len(lengths):,} pairs: raise --config.seq_len, or "
        "write --config.data.long_pairs=drop."
    )


def _margins(source: PairSource, split: Split, cache: TokenCache) -> np.ndarray:
    """float32 [pairs]; kept in a file beside the tokens, since reading them means reading the source again."""
    path, count = Path(f"{cache.path}.margins.npy"), cache.num_docs // 2
    if not path.exists():
        found = np.fromiter((pair.margin for pair in source.pairs(split, Counter())), np.float32)
        if len(found) != count:
            raise UserError(f"The files of {source.name} changed while they were read: run again.")
        with new_column(path, count, np.dtype(np.float32)) as values:
            values[:] = found
    return np.array(Column(path, count).values)
