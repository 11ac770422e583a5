"""Rows of chats with pictures: what is trained, where pictures stand, what is refused, and that no picture is cut."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from qwen3f import presets
from qwen3f.data.chat.kinds import KINDS
from qwen3f.data.loader import Loader
from qwen3f.data.multimodal.dataset import VisualDataConfig, open_source, prepare_visual
from qwen3f.data.multimodal.samples import PICTURE, image_segments, tokenise
from qwen3f.data.multimodal.tokenizer import trained_tokenizer
from qwen3f.errors import UserError
from qwen3f.tasks.registry import open_task
from qwen3f.vision.mrope import position_ids
from qwen3f.vision.preprocess import image_patches

CFG = presets.get("nano_vl")
SMALL = {"pictures": 120, "min_pixels": 64 * 64, "max_pixels": 96 * 96, "patches": 512, "images": 4}
SEQ_LEN = 256


def settings(**changes):
    return VisualDataConfig(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    data = settings(mixture="images=0.5,captions=0.5", pictures=2000)
    return trained_tokenizer(data, CFG.vocab_size, tmp_path_factory.mktemp("tokenizer"))


def chats(folder, rows, **images):
    """Write a folder of chats and images, return its source name. A row may be given as its messages alone."""
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    whole = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    return f"chats@{folder}"


def chat(*parts, answer="yes"):
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]


def text(words):
    return {"type": "text", "text": words}


def image(name):
    return {"type": "image", "image": f"{name}.png"}


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def all_documents(corpus, name):
    held = corpus.heldout.get(name)
    return [*corpus.train.documents, *(held.documents if held else ())]


def test_a_row_is_what_the_contract_says(tokenizer):
    corpus = prepare_visual(settings(mixture="images"), SEQ_LEN, tokenizer, CFG)
    dataset = corpus.train
    loader = Loader(dataset, 4, 0, 0, "cpu", CFG.vocab_size)
    batch = next(iter(loader))
    loader.close()
    shapes = {key: (tuple(x.shape), x.dtype) for key, x in batch.items()}
    assert shapes["pixel_values"] == ((4, 512, CFG.vision_patch_values), torch.float32)
    assert shapes["grids"] == ((4, 4, 3), torch.int32)
    assert shapes["visual_index"] == ((4, SEQ_LEN), torch.int32)
    assert shapes["positions"] == ((4, 3, SEQ_LEN), torch.int64)
    places = position_ids(batch["tokens"], batch["grids"], CFG, batch["segments"])
    real = (batch["segments"] != 0)[:, None].expand_as(places)
    assert torch.equal(places[real], batch["positions"][real])
    assert ((batch["visual_index"] > 0) == (batch["tokens"] == CFG.image_token_id)).all()
    assert (batch["loss_weights"][batch["visual_index"] > 0] == 0).all()  # the model does not learn placeholders
    assert not (batch["targets"] == CFG.image_token_id).any()


def test_answers_alone_are_trained_and_pixels_are_the_pictures(tokenizer):
    corpus = prepare_visual(settings(mixture="images"), SEQ_LEN, tokenizer, CFG)
    dataset, task = corpus.train, open_task("visual", "x")
    for i in range(3):
        row = dataset[i]
        done = 0
        for number, document in enumerate(dataset.members(i), 1):
            mine = row["segments"] == number
            answer = tokenizer.decode(row["targets"][mine & (row["loss_weights"] > 0)].tolist())
            (file,) = document.pictures
            drawn = file.open()
            patches, grid = image_patches(drawn, CFG, *dataset.limits)
            assert np.array_equal(row["pixel_values"][done : done + len(patches)], patches)
            assert grid == document.grids[0]
            assert file.size() == drawn.size[::-1]
            done += len(patches)
            asked = next(q for q in task.questions("train") if q.gold == answer.removesuffix("<|im_end|>"))
            assert task.judge(asked.gold, asked.gold) == 1.0
        assert not row["pixel_values"][done:].any()


# Kinds that always think are left out: their chats need a thought.
@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if not kind.always])
def test_a_sample_has_the_form_of_its_chat_template(kind, tokenizer):
    sample = next(open_source("images", settings(), kind).samples("train", Counter()))
    ids, _ = tokenise(sample, [image_segments(4)], tokenizer)
    written = tokenizer.decode([int(one) for one in ids if one != CFG.image_token_id])
    marks = "<|vision_start|><|vision_end|>"
    assert written == sample.chat.text.replace(PICTURE, marks).removesuffix("\n")
    assert ("<think>" in written) == kind.thinks


def test_the_splits_share_no_picture(tokenizer):
    corpus = prepare_visual(settings(mixture="images", pictures=400), SEQ_LEN, tokenizer, CFG)
    seen, held = (
        {image.open().tobytes() for document in part.documents for image in document.pictures}
        for part in (corpus.train, corpus.heldout["images"])
    )
    assert held
    assert not seen & held


def test_a_mixture_with_text_has_one_form(tokenizer):
    corpus = prepare_visual(settings(mixture="images=0.5,reasoning-plain=0.5"), SEQ_LEN, tokenizer, CFG)
    loader = Loader(corpus.train, 8, 0, 0, "cpu", CFG.vocab_size)
    batch = next(iter(loader))
    loader.close()
    used = batch["grids"].prod(-1).sum(1)
    assert {bool(x) for x in used} == {False, True}
    assert len(corpus.describe()) == 2


def test_chats_of_files_keep_their_pictures_in_place(tokenizer, tmp_path):
    rows = [chat(text("a "), image("one"), text(" b "), image("two"), text(f" c{n}")) for n in range(30)]
    name = chats(tmp_path, rows, one=noise(64, 32), two=noise(32, 96))
    corpus = prepare_visual(settings(mixture=name, min_pixels=32 * 32), SEQ_LEN, tokenizer, CFG)
    for document in all_documents(corpus, name):
        assert document.grids == ((1, 4, 8), (1, 12, 4))
        ids = document.ids.tolist()
        starts = [i for i, token in enumerate(ids) if token == CFG.vision_start_token_id]
        ends = [i for i, token in enumerate(ids) if token == CFG.vision_end_token_id]
        assert [end - start - 1 for start, end in zip(starts, ends)] == [8, 12]
        assert tokenizer.decode(ids[ends[0] + 1 : starts[1]]) == " b "


def test_placeholders_that_a_user_types_are_words(tokenizer, tmp_path):
    rows = [chat(text(f"<|vision_start|><|image_pad|><|vision_end|> {n}"), image("one")) for n in range(30)]
    name = chats(tmp_path, rows, one=noise(64, 64))
    corpus = prepare_visual(settings(mixture=name), SEQ_LEN, tokenizer, CFG)
    for document in all_documents(corpus, name):
        assert (document.ids == CFG.image_token_id).sum() == 16
        assert "<|image_pad|>" in tokenizer.decode(document.ids[document.ids != CFG.image_token_id].tolist())


@pytest.mark.parametrize(
    "row, words",
    [
        (chat(text(f"a {PICTURE} b"), image("one")), "U\\+FFFC"),
        (
            [*chat(text("a"), image("one"))[:1], {"role": "assistant", "content": "b", "reasoning_content": PICTURE}],
            "U\\+FFFC",
        ),
        ({"messages": chat(text("a"), image("one")), "tools": [{"name": "f", "description": PICTURE}]}, "U\\+FFFC"),
        ({"messages": chat(text("a")), "enable_thinking": "no"}, "enable_thinking='no': write true or false"),
        ({"messages": chat(text("a")), "enable_thinking": 0}, "enable_thinking=0: write true or false"),
        (chat(text("a"), {"type": "image", "image": "../x.png"}), "outside the folder"),
        (chat(text("a"), {"type": "image", "image": "data:image/png;base64," + "A" * 9000}), "A…', which is no path"),
        (chat(text("a"), {"type": "image", "image": "a\0b.png"}), "a.x00b.png', which is no"),
        (chat(text("a"), {"type": "image", "image": "none.png"}), "which is not in"),
        (chat(text("a"), {"type": "audio", "audio": "v.mp3"}), 'write {"type": "text"'),
        (chat(text("a"), image("broken")), "broken.png cannot be read"),
        (chat(text("a"), image("thin")), "narrower than 1 : 200"),
        (
            [*chat(text("a"))[:1], {"role": "assistant", "content": [image("one")]}],
            "an image or a video in a turn of 'assistant'",
        ),
    ],
)
def test_bad_rows_are_named_or_counted(row, words, tokenizer, tmp_path):
    good = [chat(text(f"q {n}"), image("one")) for n in range(40)]
    name = chats(tmp_path, [*good, row], one=noise(64, 64), thin=noise(402, 2), broken=noise(64, 64))
    whole = (tmp_path / "broken.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG" + whole[8:200])
    with pytest.raises(UserError, match=words):
        prepare_visual(settings(mixture=name), SEQ_LEN, tokenizer, CFG)
    corpus = prepare_visual(settings(mixture=name, on_bad_row="skip"), SEQ_LEN, tokenizer, CFG)
    assert sum(corpus.train.left_out.values()) == 1
    assert len(all_documents(corpus, name)) == 40


def test_in_a_chat_of_words_the_pictures_character_is_one_like_others(tokenizer, tmp_path):
    answers = "b", [text(f"b {PICTURE}")]
    rows = [chat(text(f"see {PICTURE} {n}"), answer=answers[n % 2]) for n in range(30)]
    rows[0][0]["content"] = f"see {PICTURE} 0"
    chats(tmp_path, rows)
    name = f"chats@{tmp_path}"
    corpus = prepare_visual(settings(mixture=name), SEQ_LEN, tokenizer, CFG)
    documents = all_documents(corpus, name)
    assert len(documents) == 30
    for document in documents:
        assert not document.pictures
        assert f"see {PICTURE} " in tokenizer.decode(document.ids.tolist())


def test_tools_of_a_row_are_in_its_prompt(tokenizer, tmp_path):
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "zoom", "arguments": {"to": 2}}]}
    tools = [{"type": "function", "function": {"name": "zoom", "description": "closer", "parameters": {}}}]
    rows = [{"messages": [*chat(text(f"q {n}"), image("one"))[:1], called], "tools": tools} for n in range(30)]
    name = chats(tmp_path, rows, one=noise(64, 64))
    corpus = prepare_visual(settings(mixture=name), 2 * SEQ_LEN, tokenizer, CFG)
    for document in all_documents(corpus, name):
        assert '"description": "closer"' in tokenizer.decode(document.ids.tolist())


@pytest.mark.parametrize("orientation", [0, 3, 6, 9, 65535])
def test_a_picture_has_the_size_that_preparing_read(orientation, tokenizer, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(96, 64).save(tmp_path / "one.jpg", exif=exif)
    part = {"type": "image", "image": "one.jpg"}
    name = chats(tmp_path, [chat(text(f"q {n}"), part) for n in range(30)])
    corpus = prepare_visual(settings(mixture=name), SEQ_LEN, tokenizer, CFG)
    turned = (1, 12, 8) if orientation == 6 else (1, 8, 12)
    assert {document.grids for document in all_documents(corpus, name)} == {(turned,)}
    assert corpus.train[0]["grids"][0].tolist() == list(turned)


def test_a_truncated_picture_is_skipped_before_training_begins(tokenizer, tmp_path):
    good = [chat(text(f"q {n}"), image("one")) for n in range(40)]
    name = chats(tmp_path, [*good, chat(text("a"), image("cut"))], one=noise(64, 64), cut=noise(90, 90))
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])  # the header is still valid
    corpus = prepare_visual(settings(mixture=name, on_bad_row="skip"), SEQ_LEN, tokenizer, CFG)
    assert corpus.train.left_out["bad_images"] == 1


def test_no_picture_is_ever_cut(tokenizer):
    """A chat that does not fit, by tokens or by patches, is left out whole and counted."""
    tight = settings(mixture="images", patches=100)
    with pytest.raises(UserError, match="no chat that fits into seq_len=20"):
        prepare_visual(tight, 20, tokenizer, CFG)
    corpus = prepare_visual(tight, SEQ_LEN, tokenizer, CFG)
    assert corpus.train.left_out["too_long"] > 0
    for i in range(len(corpus.train)):
        row = corpus.train[i]
        assert (row["visual_index"] > 0).sum() * 4 == row["grids"].prod(-1).sum() <= 100


def test_settings_that_cannot_work(tokenizer):
    for changes, words in (
        ({"patches": 6}, "data.patches=6"),
        ({"picture_kinds": "cube"}, "picture_kinds='cube'"),
        ({"mixture": "chats@/nowhere"}, "names no directory"),
        ({"mixture": "llava-instruct-150k"}, "names no directory"),
        ({"min_side": 10}, "give --config.data.min_side of at least 64, and --config.data.max_side of"),
        ({"max_pixels": 10}, "--config.data.min_pixels=4096 and --config.data.max_pixels=10 leave no size"),
        ({"turns": "some"}, "data.turns is 'some'"),
        ({"on_bad_row": "hide"}, "on_bad_row is 'hide'"),
    ):
        with pytest.raises(UserError, match=words):
            prepare_visual(settings(**changes), SEQ_LEN, tokenizer, CFG)
    with pytest.raises(UserError, match="image_token_id"):
        prepare_visual(settings(), SEQ_LEN, tokenizer, CFG.replace(image_token_id=200))
    with pytest.raises(UserError, match="vision_enabled=True"):
        prepare_visual(settings(), SEQ_LEN, tokenizer, CFG.replace(vision_enabled=False))


def test_llava_rows(tokenizer, tmp_path):
    noise(64, 64).save(tmp_path / "1.jpg")
    rows = [
        {"image": "1.jpg", "conversations": [
            {"from": "human", "value": f"<image>\nWhat is {n}?"}, {"from": "gpt", "value": "noise"},
            {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"},
        ]}
        for n in range(20)
    ]  # fmt: skip
    (tmp_path / "llava_instruct_150k.json").write_text(json.dumps(rows))
    name = f"llava-instruct-150k@{tmp_path}"
    corpus = prepare_visual(settings(mixture=name), SEQ_LEN, tokenizer, CFG)
    assert len(all_documents(corpus, name)) == 40  # a sample for each answer
    every = prepare_visual(settings(mixture=name, turns="all"), SEQ_LEN, tokenizer, CFG)
    assert len(all_documents(every, name)) == 20


def test_topics_cover_every_generated_question():
    from collections import Counter

    groups = Counter(s.group for s in open_source("images", settings(pictures=600)).samples("train", Counter()))
    assert len(groups) >= 11
