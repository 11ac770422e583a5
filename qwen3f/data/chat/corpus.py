"""Build packed chats from a configuration: sources, token caches with trained bits, best fit, mixture.

The counterpart of `data.corpus` for supervised fine-tuning; caches, order, resume and mixtures are the same.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
from torch import Tensor

from qwen3f.data.cache.token_cache import TokenCache, build_or_open, cache_path
from qwen3f.data.chat.recognise import check_chat_tokenizer
from qwen3f.data.chat.report import PackingReport, packing_report
from qwen3f.data.chat.samples import TURNS, Turns
from qwen3f.data.chat.sources import check_name, open_chats
from qwen3f.data.corpus import cache_directory
from qwen3f.data.mixture import CYCLE, Mixture, make_mixture, parse_caps, parse_weights, temper
from qwen3f.data.packing.best_fit_dataset import BestFitDataset
from qwen3f.data.packing.concat import check_seq_len
from qwen3f.data.packing.pair_dataset import PairDataset
from qwen3f.data.sources.adapters.rows import OnBadRow, check_policy
from qwen3f.data.sources.documents import LimitedSource, Source, Split, describe_other_files
from qwen3f.data.sources.reasoning import DIFFICULTIES, FAMILIES, NUM_PROBLEMS, ReasoningSource
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.tasks.registry import open_task

LONG_CHATS = ("drop", "cut_end", "error")


@dataclass(frozen=True)
class ChatDataConfig:
    """What `config.data` holds for a stage that trains on chats.

    Attributes:
        mixture: sources of `chat.sources`, several with weights: "reasoning=0.5,ultrachat@DIR=0.5". A weight is the
            source's share of the rows.
        root: directory of the source, if the mixture does not name one.
        kinds, difficulties: of the generated problems, with commas between; "" for all.
        problems: number of problems to generate, both splits together.
        problem_seed: other seeds give other problems.
        turns: "last", a sample for each answer, its prompt as inference renders it; or "all", all answers of a
            conversation in one sample.
        switches: share of samples that say their mode by /think or /no_think; see `chat.samples`.
        judge: keep only answers that the judge of this task, such as "reasoning", calls right; "": keep all.
        long_chats: what to do with samples of more than seq_len + 1 tokens. "drop": leave them out and count them.
            "cut_end": end them with the last answer that fits whole (with turns=last there is only one answer, so the
            sample is dropped). "error": stop.
        on_bad_row: "error", or "skip" to leave out and count rows that cannot be used.
        max_samples: train on at most this many samples of each source, the first ones; 0: all.
        max_heldout: keep at most this many held-out samples of each source, the first ones.
        temperature: see `mixture.temper`.
        max_epochs: how often a source is read at most, "" for no limit; see `mixture.parse_caps`.
        cache: directory of token caches; "" is $XDG_CACHE_HOME/qwen3f or ~/.cache/qwen3f.
        num_threads: threads that tokenise, in each of the workers if there are any.
        workers: processes that tokenise.
    """

    mixture: str = "reasoning"
    root: str = ""
    kinds: str = ""
    difficulties: str = ""
    problems: int = NUM_PROBLEMS
    problem_seed: int = 0
    turns: Turns = "last"
    switches: float = 0.0
    judge: str = ""
    long_chats: Literal["drop", "cut_end", "error"] = "drop"
    on_bad_row: OnBadRow = "error"
    max_samples: int = 0
    max_heldout: int = 1000
    temperature: float = 0.0
    max_epochs: str = ""
    cache: str = ""
    num_threads: int = 2
    workers: int = 0


@dataclass(frozen=True)
class ChatCorpus:
    """Chats, or pairs of them, ready for training.

    Attributes:
        sources: name -> samples, by split.
        train: packed rows of the train splits, for a `Loader`.
        names: the sources in `train`, in its order.
        heldout: name -> packed rows of the held-out split; a source is missing if it has no held-out sample that fits.
        report: for each source of `train`, what was packed, and what was dropped and why.
    """

    sources: dict[str, Source]
    train: BestFitDataset | PairDataset | Mixture
    names: tuple[str, ...]
    heldout: dict[str, BestFitDataset | PairDataset]
    report: tuple[PackingReport, ...]

    @property
    def parts(self) -> tuple[BestFitDataset | PairDataset, ...]:
        """The datasets of `names`."""
        return self.train.parts if isinstance(self.train, Mixture) else (self.train,)

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of the training rows by part."""
        return tuple(n / CYCLE for n in self.train.slots) if isinstance(self.train, Mixture) else (1.0,)

    def check_covers(self, examples: int, seed: int) -> None:
        """Raises UserError if max_epochs leaves fewer rows than `examples`, which a run needs."""
        total = self.train.total(seed) if isinstance(self.train, Mixture) else None
        if total is not None and total < examples:
            raise UserError(
                f"--config.data.max_epochs leaves {total} rows and the run needs {examples} up to its last step: "
                "raise it, lower --config.steps, or give more chats."
            )

    def train_metrics(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """What to log for a batch: the share of its places that are padding, and the share whose target is trained."""
        return {
            "padding": (batch["segments"] == 0).float().mean().item(),
            "supervised": (batch["loss_weights"] > 0).float().mean().item(),
        }

    def describe(self) -> list[str]:
        """Lines of the log for each source's training rows and held-out rows."""
        lines = [
            line
            for part, share in zip(self.report, self.shares)
            for line in part.lines(share if len(self.names) > 1 else None)
        ]
        for name in self.names:
            rows = self.heldout.get(name)
            held_out = (
                "no sample that fits" if rows is None else f"{rows.cache.num_docs:,} samples in {len(rows):,} rows"
            )
            lines.append(f"data: {name}, {held_out} held out")
        return [*lines, *describe_other_files(self.sources)]


def prepare_chats(cfg: ChatDataConfig, seq_len: int, tokenizer: Tokenizer, progress: bool = True) -> ChatCorpus:
    """Open the chats; tokenises both splits unless they are in the cache.

    Several processes may do this at once, as with `corpus.prepare`.

    Args:
        cfg: what to read and where to cache it.
        seq_len: length T of the rows, in tokens.
        tokenizer: that of the model to train.
        progress: show progress bars on stderr.

    Raises:
        UserError: settings that exclude each other, a tokenizer that cannot write Qwen3's chats, a row that cannot be
            used, a source with no sample left; and see `parse_weights`, `make_mixture`, `open_chats`.
    """
    check(cfg)
    check_seq_len(seq_len)
    kind = check_chat_tokenizer(tokenizer)
    if cfg.switches and not kind.asks:
        raise UserError(
            f"--config.data.switches={cfg.switches} is for models that think when asked; the chat template of this "
            f"one, of the kind {kind.name}, has no switches: write --config.data.switches=0."
        )
    options = {
        "turns": cfg.turns,
        "switches": cfg.switches,
        "task": open_task(cfg.judge, "--config.data.judge") if cfg.judge else None,
        "on_bad_row": cfg.on_bad_row,
        "kind": kind,
    }
    problems = generated_problems(cfg)
    recipe = Recipe(
        open=lambda name: open_chats(name, cfg.root, problems, **options),
        limit=LimitedSource,
        pack=lambda source, split, cache: _pack(cfg, source, split, cache, tokenizer, seq_len),
    )
    return prepare_packed(cfg, recipe, tokenizer, progress)


@dataclass(frozen=True)
class Recipe:
    """The steps in which chats and preference pairs differ.

    open: name in the mixture -> its source. limit: (source, n) -> the source with only the first n samples of each
    split. pack: (source, split, token cache) -> the rows of the split; None if nothing of a held-out split fits.
    """

    open: Callable[[str], Source]
    limit: Callable[[Any, int], Source]
    pack: Callable[[Source, Split, TokenCache], BestFitDataset | PairDataset | None]


def prepare_packed(cfg: Any, recipe: Recipe, tokenizer: Tokenizer, progress: bool) -> ChatCorpus:
    """What `prepare_chats` does, with the steps of a recipe.

    cfg: a ChatDataConfig, or another class with the same attributes for mixture, limits and cache.
    """
    weights = dict(parse_weights(cfg.mixture))
    if cfg.root and len(weights) > 1:
        raise UserError("--config.data.root is the directory of one source: write NAME@DIR in the mixture instead.")
    caps = parse_caps(cfg.max_epochs, list(weights))
    sources = {name: recipe.open(name) for name in weights}
    cache_dir = cache_directory(cfg.cache)

    def packed(split: Split, most: int) -> dict[str, BestFitDataset | PairDataset]:
        found = {}
        for name, source in sources.items():
            limited = recipe.limit(source, most) if most else source
            path = cache_path(limited, split, tokenizer, cache_dir)
            if path.exists() or _has_samples(limited, split):
                cache = build_or_open(limited, split, tokenizer, cache_dir, cfg.num_threads, cfg.workers, progress)
                if (rows := recipe.pack(limited, split, cache)) is not None:
                    found[name] = rows
        return found

    heldout = packed("heldout", cfg.max_heldout)  # first: it is small, and a fault shows before the long work
    train = packed("train", cfg.max_samples)
    shares = temper(weights, {name: part.cache.num_tokens for name, part in train.items()}, cfg.temperature)
    limits = list(caps.values())
    if len(train) == 1 and limits == [None]:
        dataset = next(iter(train.values()))
    else:
        dataset = make_mixture(list(train.values()), list(shares.values()), max_epochs=limits)
    report = tuple(packing_report(name, part) for name, part in train.items())
    return ChatCorpus(sources, dataset, tuple(train), heldout, report)


def check(cfg: ChatDataConfig) -> None:
    """Raises UserError for values that cannot work, alone or together."""
    for key, allowed in (("turns", TURNS), ("long_chats", LONG_CHATS)):
        if getattr(cfg, key) not in allowed:
            raise UserError(f"--config.data.{key} is {getattr(cfg, key)!r}: write one of {', '.join(allowed)}.")
    check_policy(cfg.on_bad_row)
    for name, _ in parse_weights(cfg.mixture):
        check_name(name)
    if not 0 <= cfg.switches <= 1:
        raise UserError(f"--config.data.switches is {cfg.switches}: give a share from 0 to 1.")
    if cfg.switches and cfg.turns == "all":
        raise UserError(
            "--config.data.switches is for one answer a sample: write --config.data.turns=last, or "
            "--config.data.switches=0."
        )
    for key, lowest in (("problems", 1), ("max_samples", 0), ("max_heldout", 1), ("num_threads", 1), ("workers", 0)):
        if getattr(cfg, key) < lowest:
            raise UserError(f"--config.data.{key} is {getattr(cfg, key)}: give {lowest} or more.")
    generated_problems(cfg)
    if cfg.judge:
        open_task(cfg.judge, "--config.data.judge")


def generated_problems(cfg: ChatDataConfig, readers: Iterable[str] = ()) -> ReasoningSource:
    """The generated problems of all families. Each source or task reads only its own (`ReasoningSource.family`).

    readers: names of the sources or tasks that read them; () if unknown. Raises UserError for an unknown kind or
    difficulty, and for a kind that none of the readers has.
    """
    kinds = _chosen("kinds", cfg.kinds, tuple(kind for family in FAMILIES.values() for kind in family))
    read = [kind for name in readers for kind in FAMILIES.get(name, ())]
    if cfg.kinds and read and (unread := [kind for kind in kinds if kind not in read]):
        raise UserError(
            f"--config.data.kinds={cfg.kinds} has {', '.join(unread)}, which nothing here reads; write some of "
            f"{', '.join(read)}."
        )
    difficulties = tuple(map(int, _chosen("difficulties", cfg.difficulties, tuple(map(str, DIFFICULTIES)))))
    return ReasoningSource(seed=cfg.problem_seed, num_problems=cfg.problems, kinds=kinds, difficulties=difficulties)


def _chosen(key: str, written: str, known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(map(str.strip, written.split(","))) if written else known
    if not set(chosen) <= set(known) or len(set(chosen)) < len(chosen):
        raise UserError(
            f"--config.data.{key} is {written!r}: write different ones of {', '.join(known)}, with commas between."
        )
    return chosen


def _has_samples(source: Source, split: Split) -> bool:
    """Whether a split has a sample. Raises UserError if the train split has none."""
    counts: Counter[str] = Counter()
    if next(source.documents(split, counts), None) is not None:
        return True
    if split == "train":
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
        raise UserError(
            f"{source.name} has no sample to train on{f' (left out: {reasons})' if reasons else ''}: give other rows"
            f"{', or write --config.data.judge=' + repr('') if {'no_answer', 'wrong_answers'} & set(counts) else ''}."
        )
    return False


def _pack(
    cfg: ChatDataConfig, source: Source, split: Split, cache: TokenCache, tokenizer: Tokenizer, seq_len: int
) -> BestFitDataset | None:
    """The rows of a split; None if no sample of a held-out split fits."""
    if cfg.long_chats == "error":
        _refuse_long(source, split, cache, seq_len)
    policy = "cut_end" if cfg.long_chats == "cut_end" else "drop"
    try:
        return BestFitDataset(cache, seq_len, long_documents=policy, pad_id=tokenizer.pad_id)
    except UserError as error:
        if split == "heldout":
            return None
        raise UserError(f"{source.name}: {error}") from None


def _refuse_long(source: Source, split: Split, cache: TokenCache, seq_len: int) -> None:
    """Raises UserError with file and row of the first sample that is too long, if there is one."""
    lengths = np.diff(cache.doc_offsets)
    too_long = np.flatnonzero(lengths > seq_len + 1)
    if not too_long.size:
        return
    first = next(islice(source.documents(split, Counter()), int(too_long[0]), None))
    raise UserError(
        f"{first.name} has {lengths[too_long[0]]:,} tokens, more than seq_len={seq_len} takes, and so have "
        f"{too_long.size:,} of {len(lengths):,} samples: raise --config.seq_len, or write "
        "--config.data.long_chats=drop."
    )
