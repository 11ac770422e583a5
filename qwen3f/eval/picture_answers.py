"""A few held-out questions about pictures, answered in the model's own words, for the report: with the pictures."""

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from qwen3f.config import ModelConfig
from qwen3f.data.multimodal.dataset import Document, VisualDataset
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.eval.answers import KEPT_TEXTS
from qwen3f.eval.last_query import last_query
from qwen3f.infer.engine import Engine, completion
from qwen3f.infer.pictures import Pictures
from qwen3f.model import EAGER, Execution
from qwen3f.params import Params
from qwen3f.vision.preprocess import image_patches

_PICTURE = re.compile(r"<\|vision_start\|>.*?<\|vision_end\|>", re.DOTALL)
_SIDE = 256  # pixels of a kept picture, at most
_CACHE, _PAGE = 4096, 64  # tokens: the KV cache has at least _CACHE, rounded up to a multiple of _PAGE


def chosen(dataset: VisualDataset, most: int = KEPT_TEXTS) -> list[Document]:
    """The first held-out chat with a picture of each topic."""
    first: dict[str, Document] = {}
    for document in dataset.documents:
        if document.group and document.pictures and document.trained.any():
            first.setdefault(document.group, document)
    return list(first.values())[:most]


def answer_chosen(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    dataset: VisualDataset,
    documents: Sequence[Document],
    execution: Execution = EAGER,
) -> list[dict[str, Any]]:
    """A dict for each document, for logger.answers, with the model's greedy answer. On one device.

    An answer may have twice as many tokens as the right answer, and 8 more.

    params: in the compute dtype. Raises UserError for a picture that cannot be read any more.
    """
    starts = [int(document.trained.argmax()) for document in documents]
    rooms = [
        min(2 * int(document.trained.sum()) + 8, cfg.max_position_embeddings - start)
        for document, start in zip(documents, starts)
    ]
    longest = max(map(sum, zip(starts, rooms)), default=0)
    engine = Engine(
        cfg.replace(gradient_checkpointing="none"),
        params,
        execution=execution,
        tokenizer=tokenizer,
        max_tokens=max(_CACHE, -(-longest // _PAGE) * _PAGE),
    )
    lines = []
    for number, (document, start, room) in enumerate(zip(documents, starts, rooms)):
        images = [file.open() for file in document.pictures]
        seen = Pictures.of([image_patches(image, cfg, *dataset.limits) for image in images])
        gold = _words(tokenizer, document.ids[start:][document.trained[start:]].tolist())
        request = engine.request(document.ids[:start].tolist(), room, pictures=seen, stream=number)
        [row] = engine.submit([request])
        engine.run([row])
        text = _words(tokenizer, completion(row).ids)
        lines.append(
            {
                "mode": "plain",
                "group": document.group,
                "prompt": _question(tokenizer.decode(document.ids[:start].tolist())),
                "gold": gold,
                "text": text,
                "mark": float(text == gold),
                "ended": row.finish_reason == "stop",
                "pictures": [_png(image) for image in images],
            }
        )
    return lines


def _words(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special=True).strip()


def _question(prompt: str) -> str:
    """The last user's turn, without what stands for pictures."""
    return _PICTURE.sub("", last_query(prompt)).strip()


def _png(image: Image.Image) -> str:
    """The image, scaled down, as a PNG file in a data URI."""
    small, out = image.convert("RGB"), io.BytesIO()
    small.thumbnail((_SIDE, _SIDE))
    small.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
