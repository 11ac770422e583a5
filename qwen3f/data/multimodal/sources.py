"""Sources of chats with pictures: generated ones, rows in local files, and also text-only chats.

    images                 generated pictures (data.sources.images), a question and its answer each
    captions               the same pictures, described
    llava-instruct-150k@DIR   DIR holds llava_instruct_150k.json and the images that it names
    chats@DIR              rows of messages in .jsonl and other files whose contents may be lists of parts,
                           {"type": "text", "text": …}, {"type": "image", "image": path below DIR} and
                           {"type": "video", "video": path below DIR, or several} (multimodal.videos)
    anything else          a source of data.chat.sources: text-only chats

A hash decides what is held out: of the names of the picture files and the first question; for generated pictures, of
everything that is drawn.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from qwen3f.data.chat.conversation import OPTIONAL_COLUMNS, Conversation, checked_messages, read_conversation
from qwen3f.data.chat.kinds import HYBRID, TemplateKind
from qwen3f.data.chat.samples import Turns, make_samples
from qwen3f.data.chat.sources import check_name as check_chat_name
from qwen3f.data.chat.sources import open_chats
from qwen3f.data.multimodal.samples import PICTURE, VisualSample, count_pictures
from qwen3f.data.multimodal.videos import VideoFile, VideoFrames, decode, video_of
from qwen3f.data.sources.adapters import multimodal
from qwen3f.data.sources.adapters.opening import raw_rows
from qwen3f.data.sources.adapters.registry import HubDataset, find
from qwen3f.data.sources.adapters.rows import BadRow, LeftOut, OnBadRow, Row, RowFault, list_of_dicts
from qwen3f.data.sources.documents import HOLDOUT, Split, distinct, is_heldout
from qwen3f.data.sources.images import KINDS, NUM_PICTURES, REPEATED, every_picture, picture
from qwen3f.data.sources.reasoning import ReasoningSource
from qwen3f.errors import UserError
from qwen3f.files import user_path
from qwen3f.tasks.visual import topic

GENERATED = ("images", "captions")
DESCRIBE = "Describe the picture."

File = multimodal.ImageFile | VideoFile | VideoFrames

_CHATS = HubDataset("chats", "chats", "multimodal", ("messages",), OPTIONAL_COLUMNS)


@dataclass(frozen=True)
class DrawnPicture:
    """A generated picture, drawn again when it is needed."""

    kind: str
    seed: int
    index: int
    sides: tuple[int, int]
    pixels: tuple[int, int]  # height, width

    def size(self) -> tuple[int, int]:
        return self.pixels

    def open(self) -> Image.Image:
        return picture(self.kind, self.seed, self.index, *self.sides).image


@dataclass(frozen=True)
class Drawing:
    """What is drawn for the generated sources: `count` pictures of `kinds`; sides are in pixels."""

    count: int = NUM_PICTURES
    seed: int = 0
    min_side: int = 64
    max_side: int = 128
    kinds: tuple[str, ...] = KINDS


@dataclass(frozen=True)
class GeneratedSource:
    """Chats about generated pictures. name: one of GENERATED. kind: the kind of the chat template."""

    name: str
    drawing: Drawing
    kind: TemplateKind = HYBRID

    def samples(self, split: Split, counts: Counter[str]) -> Iterator[VisualSample]:
        for item in distinct(_told(self.drawing), lambda told: told.content, split, HOLDOUT, counts, REPEATED):
            asked, answer = (item.question, item.answer) if self.name == "images" else (DESCRIBE, item.caption)
            messages = ({"role": "user", "content": PICTURE + asked}, {"role": "assistant", "content": answer})
            conversation = Conversation(messages, f"{self.name}, {item.picture.kind}:{item.picture.index}")
            (chat,) = make_samples(conversation, kind=self.kind)
            yield VisualSample(chat, (item.picture,), topic(item.question) if self.name == "images" else "")


class _Told(NamedTuple):
    """A generated picture in words. content: all that is drawn."""

    picture: DrawnPicture
    caption: str
    question: str
    answer: str
    content: bytes


@lru_cache(maxsize=1)
def _told(d: Drawing) -> tuple[_Told, ...]:
    """The generated pictures of both splits, with repetitions. They are cached, as several sources and splits need
    them."""
    sides = (d.min_side, d.max_side)
    return tuple(
        _Told(
            DrawnPicture(item.kind, d.seed, item.index, sides, item.image.size[::-1]),
            *(item.caption, item.question, item.answer, item.parameters.encode()),
        )
        for item in every_picture(d.seed, d.count, d.kinds, *sides)
    )


@dataclass(frozen=True)
class RowSource:
    """Rows of files. read: a row -> (its conversation, with PICTURE in its texts; its pictures). kind: of the chat
    template."""

    name: str
    dataset: HubDataset
    root: str
    read: Callable[[Row], tuple[Conversation, tuple[File, ...]]]
    turns: Turns
    on_bad_row: OnBadRow
    kind: TemplateKind = HYBRID

    def samples(self, split: Split, counts: Counter[str]) -> Iterator[VisualSample]:
        for row in raw_rows(self.dataset, self.root, "", streaming=True):
            try:
                if isinstance(row, BadRow):
                    raise RowFault(row.reason, row.message)
                conversation, files = self.read(row)
                self._check(files)
                chats = make_samples(conversation, self.turns, kind=self.kind)
            except RowFault as fault:
                if self.on_bad_row == "error":
                    raise UserError(f"{fault.message} (--config.data.on_bad_row=skip leaves such rows out)") from None
                counts[fault.reason] += 1
            except LeftOut as left:
                counts[left.reason] += 1
            else:
                seen = " ".join(file.path.name for file in files).encode()
                if is_heldout(seen + conversation.question, HOLDOUT) == (split == "heldout"):
                    for chat in chats:
                        shown = sum(message["content"].count(PICTURE) for message in chat.messages)
                        yield VisualSample(chat, files[:shown])

    def _check(self, files: tuple[File, ...]) -> None:
        """Raises RowFault for a picture whose header cannot be read. With on_bad_row="skip" the whole picture is read,
        so that training meets no bad one."""
        whole = self.on_bad_row != "error"
        for file in files:
            try:
                if isinstance(file, multimodal.ImageFile):
                    file.open() if whole else file.size()
                else:
                    decode(file) if whole else file.header()
            except UserError as error:
                raise RowFault("bad_images", str(error)) from None


@dataclass(frozen=True)
class WordSource:
    """Text-only chats, of data.chat.sources."""

    name: str
    chats: Any

    def samples(self, split: Split, counts: Counter[str]) -> Iterator[VisualSample]:
        return (VisualSample(chat) for chat in self.chats.documents(split, counts))


VisualSource = GeneratedSource | RowSource | WordSource


def open_visual(
    name: str,
    drawing: Drawing,
    problems: ReasoningSource,
    turns: Turns,
    on_bad_row: OnBadRow,
    kind: TemplateKind = HYBRID,
) -> VisualSource:
    """The source that a mixture names; see the module's text. kind: of the model's chat template.

    Raises UserError for an unknown name, or no directory.
    """
    rows, _, directory = name.partition("@")
    if name in GENERATED:
        return GeneratedSource(name, drawing, kind)
    if rows in (_CHATS.name, multimodal.DEFAULT):
        root = user_path(directory, "config.data.mixture")
        if not directory or not root.is_dir():
            raise UserError(f"--config.data.mixture={name!r} names no directory that is there: write {rows}@DIR")
        dataset = _CHATS if rows == _CHATS.name else find(rows, "multimodal")
        read = partial(_read_chat if rows == _CHATS.name else _read_llava, root=root)
        return RowSource(name, dataset, directory, read, turns, on_bad_row, kind)
    return WordSource(name, open_chats(name, "", problems, turns=turns, on_bad_row=on_bad_row, kind=kind))


def check_name(name: str) -> None:
    """Raises UserError for a name in a mixture that no source has; looks at no directory."""
    if name in GENERATED or name.partition("@")[0] in (_CHATS.name, multimodal.DEFAULT):
        return
    try:
        check_chat_name(name)
    except UserError as error:
        raise UserError(f"{error} With pictures: {', '.join(GENERATED)}, {multimodal.DEFAULT}@DIR.") from None


def _read_llava(row: Row, root: Path) -> tuple[Conversation, tuple[multimodal.ImageFile, ...]]:
    chat = multimodal.llava(row, root)
    messages = []
    for message in chat.messages:
        before, found, after = message["content"].partition(multimodal.PLACEHOLDER)
        if found and message["role"] == "user":
            message = {**message, "content": before + PICTURE + after.lstrip("\n")}
        messages.append(message)
    _check_places(messages, (chat.image,), row.name)
    return Conversation(checked_messages(messages, row.name), row.name), (chat.image,)


def _read_chat(row: Row, root: Path) -> tuple[Conversation, tuple[File, ...]]:
    messages, files = [], []
    for message in list_of_dicts(row, "messages"):
        content = message.get("content")
        if isinstance(content, list):
            before = len(files)
            text = "".join(_part(part, root, row.name, files) for part in content)
            if len(files) > before and message.get("role") != "user":
                raise RowFault(
                    "invalid_rows",
                    f"{row.name} has an image or a video in a turn of {message.get('role')!r}: put it into a user's.",
                )
            message = {**message, "content": text}
        messages.append(message)
    if files:  # in a text-only chat the character is an ordinary one
        _check_places([messages, row.values.get("tools")], files, row.name)
    conversation = read_conversation(Row({**row.values, "messages": messages}, row.name))
    shown = sum(message["content"].count(PICTURE) for message in conversation.messages)
    return conversation, tuple(files[:shown])


def _part(part: Any, root: Path, where: str, files: list[File]) -> str:
    """A part's text; an image or a video is added to files."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, Mapping) and part.get("type") == "image" and isinstance(part.get("image"), str):
        files.append(multimodal.image_inside(root, part["image"], where))
        return PICTURE
    if isinstance(part, Mapping) and part.get("type") == "video":
        files.append(video_of(part, root, where))
        return PICTURE
    raise RowFault(
        "invalid_rows",
        f'{where} has the part {part!r}: write {{"type": "text", "text": …}}, {{"type": "image", "image": PATH}} or '
        '{"type": "video", "video": PATH}.',
    )


def _check_places(told: object, files: Sequence[File], where: str) -> None:
    """Raises RowFault if a text, a thought or a call holds PICTURE other than for one of `files`."""
    if count_pictures(told) != len(files):
        raise RowFault("invalid_rows", f"{where} holds U+FFFC, which stands for a picture here: remove it.")
