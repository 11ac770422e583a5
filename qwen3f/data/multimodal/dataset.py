"""Packed rows of chats with pictures, ready for a Loader, and how they are made from a configuration.

Ids are kept in memory: at 500 tokens a chat, a million chats take 3 GB. Pictures are read when their row is built.

T = seq_len · P patches of a row · V values of a patch · n pictures of a row
"""

from collections import Counter
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from qwen3f.config import ModelConfig
from qwen3f.data.chat.kinds import HYBRID, TemplateKind
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.mixture import CYCLE, Mixture, make_mixture, parse_weights
from qwen3f.data.multimodal.packing import Needs, pack
from qwen3f.data.multimodal.samples import (
    Picture,
    VisualSample,
    check_tokenizer,
    image_segments,
    tokenise,
    video_segments,
)
from qwen3f.data.multimodal.sources import Drawing, VisualSource, check_name, open_visual
from qwen3f.data.multimodal.videos import Video, patches_of, planned
from qwen3f.data.packing.best_fit_dataset import best_fit_row
from qwen3f.data.packing.concat import Example
from qwen3f.data.sampler import example_index
from qwen3f.data.sources.adapters.rows import OnBadRow, check_policy
from qwen3f.data.sources.documents import Split
from qwen3f.data.sources.images import KINDS, check_sides
from qwen3f.data.sources.reasoning import ReasoningSource
from qwen3f.data.tokenizers.token_text import Segment
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.vision.mrope import position_ids, visual_index
from qwen3f.vision.preprocess import Grid, check_limits, image_grid, image_patches, merged_tokens, token_side


@dataclass(frozen=True)
class VisualDataConfig:
    """What `config.data` holds for the multimodal stage.

    Attributes:
        mixture: sources of multimodal.sources with weights, which are shares of the rows.
        pictures: number of generated pictures. picture_seed, min_side, max_side (pixels), picture_kinds: which ones.
        problems: number of generated problems, if the mixture has them.
        min_pixels, max_pixels: an image is scaled to a size between these. All sampled frames of a video together have
            about min_pixels/16 to 3/2·max_pixels pixels, by vision.video.fit_size; Qwen3-VL's own limits are in this
            proportion.
        patches, images: the most patches, and pictures, in a row; a video counts as one picture.
        turns, on_bad_row: as in ChatDataConfig; with on_bad_row="skip" all pictures in files are decoded before
            training begins.
        max_samples: train on at most this many chats of each source, the first ones; 0: all.
        max_heldout: keep at most this many held-out chats of each source, the first ones.
    """

    mixture: str = "images"
    pictures: int = 16_384
    picture_seed: int = 0
    min_side: int = 64
    max_side: int = 128
    picture_kinds: str = ""
    problems: int = 4_096
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    patches: int = 16_384
    images: int = 16
    turns: str = "last"
    on_bad_row: OnBadRow = "error"
    max_samples: int = 0
    max_heldout: int = 1000


@dataclass(frozen=True)
class Document:
    """A tokenised chat. ids: uint32 [tokens]. trained: bool [tokens]. grids: patches (time, height, width) of each of
    its pictures and videos. group: what held-out results are listed by."""

    ids: np.ndarray
    trained: np.ndarray
    pictures: tuple[Picture | Video, ...]
    grids: tuple[Grid, ...]
    group: str


@dataclass(frozen=True)
class VisualDataset:
    """Rows of whole chats, used like BestFitDataset.

    Keys as `packing.concat.PackedDataset`, but positions int64 [3, T]; also visual_index int32 [T], pixel_values
    float32 [P, V] and grids int32 [n, 3], padded with zeros.

    Attributes:
        documents, rows: the chats, and which of them share a row.
        cfg: the model, for patches and positions. room: the limits of a row. limits: (min_pixels, max_pixels).
        pad_id: token of the padding.
        left_out: number of chats left out, by reason.
    """

    documents: tuple[Document, ...]
    rows: tuple[tuple[int, ...], ...]
    cfg: ModelConfig
    room: Needs
    limits: tuple[int, int]
    pad_id: int
    left_out: Counter[str]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def padding(self) -> float:
        """Share of the places that are padding, over all rows."""
        filled = sum(len(document.ids) - 1 for document in self.documents)
        return 1.0 - filled / (len(self.rows) * self.room.places)

    def order(self, places: np.ndarray, seed: int) -> np.ndarray:
        """As BestFitDataset's."""
        return example_index(places, len(self), seed)

    def members(self, i: int) -> list[Document]:
        """A row's chats; the one of segment k is number k − 1."""
        return [self.documents[index] for index in self.rows[i]]

    def __getitem__(self, i: int) -> Example:
        """Raises UserError for a picture that cannot be read any more."""
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        chats = self.members(i)
        trained = [chat.trained[1:] for chat in chats]
        row = best_fit_row([chat.ids for chat in chats], self.room.places, i, True, self.pad_id, trained)
        pixels = np.zeros((self.room.patches, self.cfg.vision_patch_values), np.float32)
        grids = np.zeros((self.room.pictures, 3), np.int32)
        done = 0
        seen = [(file, grid) for chat in chats for file, grid in zip(chat.pictures, chat.grids)]
        for number, (file, grid) in enumerate(seen):
            if isinstance(file, Video):
                patches, found = patches_of(file, self.cfg, *self.limits)
            else:
                patches, found = image_patches(file.open(), self.cfg, *self.limits)
            if found != grid:
                raise UserError(f"{file} has another size or length than when the run began")
            pixels[done : done + len(patches)] = patches
            grids[number] = grid
            done += len(patches)
        tokens, segments = (torch.from_numpy(row[key])[None] for key in ("tokens", "segments"))
        positions = position_ids(tokens, torch.from_numpy(grids)[None], self.cfg, segments)[0]
        return {
            **row,
            "positions": torch.where(segments != 0, positions, 0).numpy(),
            "visual_index": visual_index(tokens, self.cfg)[0].numpy(),
            "pixel_values": pixels,
            "grids": grids,
        }


@dataclass(frozen=True)
class VisualCorpus:
    """train: packed rows. names: the sources in `train`. heldout: name -> packed rows, if a source has some."""

    train: VisualDataset | Mixture
    names: tuple[str, ...]
    heldout: dict[str, VisualDataset]

    def describe(self) -> list[str]:
        """A line for each part."""
        parts = self.train.parts if isinstance(self.train, Mixture) else (self.train,)
        shares = [n / CYCLE for n in self.train.slots] if isinstance(self.train, Mixture) else [1.0]
        lines = []
        for name, part, share in zip(self.names, parts, shares):
            seen = sum(len(document.grids) for document in part.documents)
            held = self.heldout.get(name)
            left = ", ".join(f"{count:,} {reason}" for reason, count in sorted(part.left_out.items()) if count)
            lines.append(
                f"data: {name} ({share:.0%} of rows), {len(part.documents):,} chats with {seen:,} pictures in "
                f"{len(part):,} rows, {part.padding:.0%} padding{f'; left out: {left}' if left else ''}; "
                f"{len(held.documents) if held else 0:,} held out"
            )
        return lines


def prepare_visual(data: VisualDataConfig, seq_len: int, tokenizer: Tokenizer, cfg: ModelConfig) -> VisualCorpus:
    """Read, tokenise and pack all sources. Raises UserError for settings that cannot work, and if no training chat of a
    source fits into a row."""
    check(data, seq_len, cfg)
    check_tokenizer(tokenizer, cfg)
    weights = dict(parse_weights(data.mixture))
    room = Needs(seq_len, data.patches, data.images)

    def packed(name: str, split: Split, most: int) -> VisualDataset | None:
        source = open_source(name, data, kind_of(tokenizer))
        counts: Counter[str] = Counter()
        found = (_document(sample, tokenizer, cfg, data, counts) for sample in source.samples(split, counts))
        documents = list(islice((document for document in found if document is not None), most or None))
        rows, too_large = pack([_needs(document) for document in documents], room)
        counts["too_long"] += len(too_large)
        if not rows:
            if split == "train":
                raise UserError(
                    f"--config.data.mixture: {name} has no chat that fits into seq_len={seq_len}, "
                    f"--config.data.patches={data.patches} and --config.data.images={data.images}: raise them"
                )
            return None
        keep = sorted(index for row in rows for index in row)
        place = {index: number for number, index in enumerate(keep)}
        return VisualDataset(
            tuple(documents[index] for index in keep),
            tuple(tuple(place[index] for index in row) for row in rows),
            cfg,
            room,
            (data.min_pixels, data.max_pixels),
            tokenizer.pad_id,
            counts,
        )

    heldout = {name: packed(name, "heldout", data.max_heldout) for name in weights}
    train = {name: packed(name, "train", data.max_samples) for name in weights}
    single = len(train) == 1
    dataset = next(iter(train.values())) if single else make_mixture([*train.values()], [*weights.values()])
    return VisualCorpus(dataset, tuple(train), {name: rows for name, rows in heldout.items() if rows})


def open_source(name: str, data: VisualDataConfig, kind: TemplateKind = HYBRID) -> VisualSource:
    """As multimodal.sources.open_visual."""
    problems = ReasoningSource(num_problems=data.problems)
    return open_visual(name, drawing(data), problems, data.turns, data.on_bad_row, kind)


def drawing(data: VisualDataConfig) -> Drawing:
    """What is drawn by a configuration. Raises UserError for an unknown kind of picture, and for impossible sides."""
    check_sides(data.min_side, data.max_side, "--config.data.")
    kinds = tuple(map(str.strip, data.picture_kinds.split(","))) if data.picture_kinds else KINDS
    if not set(kinds) <= set(KINDS):
        raise UserError(f"--config.data.picture_kinds={data.picture_kinds!r}: write some of {', '.join(KINDS)}")
    return Drawing(data.pictures, data.picture_seed, data.min_side, data.max_side, kinds)


def check(data: VisualDataConfig, seq_len: int, cfg: ModelConfig) -> None:
    """Raises UserError for values that cannot work."""
    if not cfg.vision_enabled:
        raise UserError(
            "the multimodal stage needs a vision tower, --config.model.vision_enabled=True: write a preset that has "
            "one, such as experiments/multimodal.py:nano_vl"
        )
    check_policy(data.on_bad_row)
    if data.turns not in ("last", "all"):
        raise UserError(f"--config.data.turns is {data.turns!r}: write one of last, all.")
    for key, low in (("pictures", 1), ("problems", 1), ("images", 1), ("max_samples", 0), ("max_heldout", 1)):
        if getattr(data, key) < low:
            raise UserError(f"--config.data.{key} is {getattr(data, key)}: give {low} or more.")
    block = cfg.vision_merger_spatial_factor**2
    if data.patches < block or data.patches % block:
        raise UserError(f"--config.data.patches={data.patches}: give a multiple of {block}, patches of a merged token")
    drawing(data)
    for name, _ in parse_weights(data.mixture):
        check_name(name)
    check_limits(token_side(cfg), data.min_pixels, data.max_pixels, "--config.data.")


def _document(
    sample: VisualSample, tokenizer: Tokenizer, cfg: ModelConfig, data: VisualDataConfig, counts: Counter[str]
) -> Document | None:
    """The sample as ids; with on_bad_row="skip", None for a picture that cannot be used, such as one too narrow."""
    try:
        shown = [_shown(file, cfg, data.min_pixels, data.max_pixels) for file in sample.pictures]
    except UserError as error:
        if data.on_bad_row == "error":
            raise UserError(
                f"{sample.chat.name}: {error} (--config.data.on_bad_row=skip leaves such rows out)"
            ) from None
        counts["bad_images"] += 1
        return None
    ids, trained = tokenise(sample, [text for _, text in shown], tokenizer)
    return Document(ids, trained, sample.pictures, tuple(grid for grid, _ in shown), sample.group)


def _shown(file: Picture | Video, cfg: ModelConfig, min_pixels: int, max_pixels: int) -> tuple[Grid, list[Segment]]:
    """(grid, the segments of text that stand for it) of a picture or video."""
    if isinstance(file, Video):
        grid, times = planned(file, cfg, min_pixels, max_pixels)
        return grid, video_segments(times, merged_tokens(grid, cfg) // grid[0])
    grid = image_grid(*file.size(), cfg, min_pixels, max_pixels)
    return grid, image_segments(merged_tokens(grid, cfg))


def _needs(document: Document) -> Needs:
    patches = sum(t * h * w for t, h, w in document.grids)
    return Needs(len(document.ids) - 1, patches, len(document.grids))
