"""A tokenizer trained on generated chats, for a model that is trained from scratch."""

import dataclasses
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import sentencepiece

from qwen3f.data.mixture import parse_weights
from qwen3f.data.multimodal.dataset import VisualDataConfig, open_source
from qwen3f.data.multimodal.samples import PICTURE
from qwen3f.data.sources.documents import stable_hash
from qwen3f.data.tokenizers.sentencepiece_tokenizer import TRAINER_OPTIONS, train_sentencepiece
from qwen3f.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError

SAMPLES = 4096
"""The tokenizer is trained on this many chats of each source, the first ones."""


def trained_tokenizer(data: VisualDataConfig, vocab_size: int, cache_dir: Path) -> Tokenizer:
    """A tokenizer trained on the text of the train split; kept in cache_dir, and read from there if it exists.

    Raises UserError for a source in files: such a run must name its tokenizer. Also raises as train_sentencepiece.
    """
    names = list(dict(parse_weights(data.mixture)))
    if files := [name for name in names if "@" in name]:
        raise UserError(
            f"no tokenizer for {', '.join(files)}: write --config.init_from=W for a model's own, or "
            "--config.data.tokenizer=PATH"
        )
    key = ("roles", dataclasses.astuple(data), SAMPLES, sentencepiece.__version__, sorted(TRAINER_OPTIONS.items()))
    path = cache_dir / f"tokenizer-visual-{vocab_size}-{stable_hash(repr(key).encode()):016x}.model"
    if path.exists():
        return load_tokenizer(str(path))
    samples = (islice(open_source(name, data).samples("train", Counter()), SAMPLES) for name in names)
    messages = (message for sample in chain(*samples) for message in sample.chat.messages)
    # with the roles, since the tokens of a chat hold them too
    texts = (f"{message['role']}\n{message['content'].replace(PICTURE, '')}" for message in messages)
    return train_sentencepiece(texts, vocab_size, path)
