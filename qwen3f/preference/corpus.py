"""The tokenizer and the corpus of a run, for stages that train on pairs."""

import dataclasses
from collections.abc import Callable

import numpy as np

from qwen3f.data.chat.corpus import ChatCorpus
from qwen3f.data.chat.report import render_samples
from qwen3f.data.loader import build_batch
from qwen3f.data.mixture import Mixture
from qwen3f.data.packing.pair_dataset import PairDataset
from qwen3f.data.pairs.corpus import PairDataConfig, PairLayout, prepare_pairs
from qwen3f.data.pairs.corpus import check as check_data
from qwen3f.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError
from qwen3f.train.restore import check_tokenizer, find_tokenizer
from qwen3f.train.setup import Setup, at_least
from qwen3f.train.stage import Run


def check_pairs(setup: Setup) -> None:
    """Raises UserError for settings in data and eval that cannot run."""
    check_data(_data_config(setup))
    for key in ("eval.max_rows", "show_samples"):
        at_least(setup.config, key, 0)


def open_tokenizer(run: Run) -> Tokenizer:
    """The model's tokenizer. Raises UserError if there is none, or if it belongs to another model."""
    place = find_tokenizer(run.setup, run.workdir)
    if not place:
        raise UserError(
            "preferences need the tokenizer that the model was pretrained with: write --config.init_from=W, or "
            "--config.data.tokenizer=PATH"
        )
    tokenizer = load_tokenizer(place, run.setup.config.chat_template)
    check_tokenizer(tokenizer, run.setup.model)
    return tokenizer


def open_pairs(run: Run, layout: PairLayout) -> tuple[Tokenizer, ChatCorpus]:
    """The run's tokenizer and its pairs, packed. Raises UserError as prepare_pairs, and for too few rows."""
    config, tokenizer = run.setup.config, open_tokenizer(run)
    corpus = prepare_pairs(_data_config(run.setup), layout, tokenizer, run.progress)
    corpus.check_covers(config.steps * config.batch_size, config.seed)
    return tokenizer, corpus


def with_parts(corpus: ChatCorpus, change: Callable[[PairDataset], PairDataset]) -> ChatCorpus:
    """The corpus with `change` applied to each dataset: first those of the held-out split, then those of training."""
    heldout = {name: change(dataset) for name, dataset in corpus.heldout.items()}
    parts = tuple(map(change, corpus.parts))
    train = dataclasses.replace(corpus.train, parts=parts) if isinstance(corpus.train, Mixture) else parts[0]
    return dataclasses.replace(corpus, train=train, heldout=heldout)


def shown(setup: Setup, corpus: ChatCorpus, tokenizer: Tokenizer) -> tuple[str, ...]:
    """A few answers of the first rows, with the tokens that count marked."""
    count, seed = setup.config.show_samples, setup.config.seed
    rows = np.arange(min(count, setup.config.batch_size))
    if not len(rows):
        return ()
    batch = build_batch(corpus.train, 0, rows, seed, setup.model.vocab_size)
    return tuple(render_samples(batch, tokenizer, count))


def _data_config(setup: Setup) -> PairDataConfig:
    fields = {field.name for field in dataclasses.fields(PairDataConfig)}
    return PairDataConfig(**{key: value for key, value in setup.config.data.items() if key in fields})
