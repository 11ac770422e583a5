"""Vision benchmarks asked of a vision model: prompts and pictures, local copies, resuming, and what cannot be asked."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from qwen3f import params, presets
from qwen3f.data.tokenizers.sentencepiece_tokenizer import train_sentencepiece
from qwen3f.errors import UserError
from qwen3f.eval import run
from qwen3f.eval.benchmarks import registry
from qwen3f.eval.benchmarks.items import grouped, items, load
from qwen3f.infer.engine import Engine
from qwen3f.infer.prompts import encode_shown, pictures_of, read_images
from qwen3f.interop import hf
from qwen3f.processes.world import World
from tests.eval.eval_runs import configure

LIMITS = {"min_pixels": 32 * 32, "max_pixels": 64 * 64}
SIZES = [(64, 48), (32, 80), (50, 50)]
PEOPLE = [{"answer": "cat", "answer_id": i} for i in range(10)]
ROWS = {
    "vqav2": {"question_id": 1, "question": "What is it?", "answers": PEOPLE},
    "textvqa": {"question": "what is it?", "answers": ["cat"] * 10},
    "docvqa": {"questionId": "1", "question": "What is it?", "answers": ["cat"]},
    "chartqa": {"type": "human_test", "question": "What is it?", "answer": "5"},
}
SPLIT = {one.name: one.split for one in registry.VISION}


def picture(number):
    width, height = SIZES[number]
    pixels, out = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_parquet(place, name, numbers=(0, 1, 2)):
    place.mkdir(parents=True, exist_ok=True)
    rows = [{**ROWS[name], "image": {"bytes": picture(i), "path": None}} for i in numbers]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / f"{SPLIT[name]}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """(directory, config, parameters, tokenizer) of a small vision model, which lies in hf; data sets lie in rows."""
    root = tmp_path_factory.mktemp("seeing")
    texts = [f"What is it? Answer the question using a single word or phrase. A cat, {i}.\n" for i in range(60)]
    tokenizer = train_sentencepiece(texts, 340, root / "t.model")
    cfg = presets.get("nano_vl").replace(vocab_size=340, num_hidden_layers=2, vision_num_hidden_layers=2)
    p = params.init_params(cfg.replace(initializer_range=0.2), 1)
    hf.save_pretrained(root / "hf", cfg, p, tokenizer)
    for name in ROWS:
        write_parquet(root / "rows" / name, name)
    return root, cfg, p, tokenizer


def test_a_model_that_sees_is_asked_about_each_picture(seeing, tmp_path):
    """Prompts are chats as generate.py writes them. Each answer equals the engine's for that picture alone."""
    root, cfg, p, tokenizer = seeing
    config = configure(root, benchmarks="vqav2,textvqa,docvqa,chartqa", prompt="chat", **LIMITS)
    found = run.evaluate(config, tmp_path / "e", progress=False)["benchmarks"]
    assert {name: one["questions"] for name, one in found.items()} == dict.fromkeys(ROWS, 3)
    engine, outputs = Engine(cfg, p, tokenizer=tokenizer), []
    for i, record in enumerate(found["docvqa"]["samples"]):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
        shown = read_images(str(tmp_path / f"{i}.png"), cfg, *LIMITS.values())
        ids = encode_shown(
            tokenizer, [{"role": "user", "content": record["question"]}], [s.text for s in shown], thinking=False
        )
        (one,) = engine.generate([ids], max_new_tokens=6, pictures=[pictures_of(shown)])
        outputs.append(tokenizer.decode([n for n in one.ids if n not in tokenizer.stop_ids], skip_special=True))
        assert record["prompt"].count("<|vision_start|><|image_pad|><|vision_end|>What is it?") == 1
    assert [record["outputs"] for record in found["docvqa"]["samples"]] == [[text] for text in outputs]
    assert len(set(outputs)) > 1
    assert "pictures of 1,024 to 4,096 pixels" in (tmp_path / "e" / "results.md").read_text()


def test_raw_prompts_samples_and_few_at_a_time(seeing, tmp_path, monkeypatch):
    changes = {"benchmarks": "textvqa", "samples": 2, "temperature": 1.0, **LIMITS}
    whole = run.evaluate(configure(seeing[0], **changes), tmp_path / "a", progress=False)["benchmarks"]["textvqa"]
    monkeypatch.setattr("qwen3f.eval.generation.PICTURES", 2)
    parts = run.evaluate(configure(seeing[0], **changes), tmp_path / "b", progress=False)["benchmarks"]["textvqa"]
    assert whole["samples"] == parts["samples"]
    assert whole["samples"][0]["prompt"].startswith("<|vision_start|><|image_pad|><|vision_end|>What is it?\nAnswer")


def test_every_form_of_a_picture_is_read(tmp_path):
    """Bytes in parquet and paths in JSON. (The Hub gives pillow images: the same pixels, but another digest.)"""
    benchmark = {one.name: one for one in registry.VISION}["docvqa"]
    write_parquet(tmp_path / "parquet", "docvqa", [1])
    (tmp_path / "json" / "png").mkdir(parents=True)
    (tmp_path / "json" / "png" / "1.png").write_bytes(picture(1))

    def write(image):
        line = json.dumps([{**ROWS["docvqa"], "image": image}])
        (tmp_path / "json" / "validation.json").write_text(line)
        return load(benchmark, str(tmp_path / "json"), None, 0)[0].item.image

    (one,) = load(benchmark, str(tmp_path / "parquet"), None, 0)
    assert one.item.image.digest() == write("png/1.png").digest()
    assert one.item.image.open().tobytes() == write("png/1.png").open().tobytes()
    for wrong in ("png/2.png", "../1.png", None, {"bytes": None}, 5, base64.b64encode(b"x").decode()):
        with pytest.raises(UserError, match=r"validation\.json:1"):
            write(wrong)


def test_only_the_pictures_that_are_asked_about_are_kept(seeing):
    benchmark = {one.name: one for one in registry.VISION}["docvqa"]
    found = grouped(items(benchmark, str(seeing[0] / "rows" / "docvqa"), "validation"), 1)
    assert [one.image is None for one in found[""]] == [False, True, True]


def test_a_rank_holds_the_pictures_of_its_own_questions(tmp_path, monkeypatch):
    """Rank 0 holds all of them: it compares them with its records."""
    monkeypatch.setattr("qwen3f.eval.benchmarks.items.BLOCK", 2)
    write_parquet(tmp_path, "docvqa", (0, 1, 2, 0, 1, 2))
    benchmark = {one.name: one for one in registry.VISION}["docvqa"]
    ranks = [World(rank, 2) for rank in (0, 1)]
    first, second = (load(benchmark, str(tmp_path), None, 0, world) for world in ranks)
    assert all(one.item.image for one in first)
    assert [one.item.image is not None for one in second] == [False, False, True, True, False, False]
    assert [one.number for one in first if one.of_rank(ranks[0])] == [0, 1, 4, 5]
    assert [one.number for one in second if one.of_rank(ranks[1])] == [2, 3]


def test_a_picture_of_several_questions_is_kept_once(tmp_path):
    """VQAv2 asks five questions about each of its pictures, and repeats it in each row."""
    write_parquet(tmp_path, "vqav2", (0, 1, 0, 0, 1))
    benchmark = {one.name: one for one in registry.VISION}["vqav2"]
    images = [one.item.image for one in load(benchmark, str(tmp_path), None, 0)]
    assert [image.source for image in images] == [picture(i) for i in (0, 1, 0, 0, 1)]
    assert len({id(image.source) for image in images}) == 2
    assert len({image.row for image in images}) == 5


def test_another_picture_is_another_question(seeing, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(seeing[0] / "rows", root / "rows")
    config = configure(seeing[0], benchmarks="docvqa", **LIMITS, **{"data.root": str(root / "rows")})
    run.evaluate(config, tmp_path / "e", progress=False)
    run.evaluate(config, tmp_path / "e", progress=False)
    write_parquet(root / "rows" / "docvqa", "docvqa", (0, 2, 2))
    with pytest.raises(UserError, match="question 1 of docvqa, .* has another image than its record"):
        run.evaluate(config, tmp_path / "e", progress=False)


def test_what_cannot_be_shown_is_one_line(seeing, tmp_path):
    for changes, words in (
        ({"min_pixels": 0}, "--config.min_pixels=0 and --config.max_pixels=4096"),
        ({"max_pixels": 2**22, "min_pixels": 2**22}, "docvqa.*:1 has .* tokens with its picture.*--config.max_pixels"),
    ):
        with pytest.raises(UserError, match=words):
            run.evaluate(configure(seeing[0], benchmarks="docvqa", **LIMITS | changes), tmp_path / "e", progress=False)
    (tmp_path / "rows" / "docvqa").mkdir(parents=True)
    rows = [{**ROWS["docvqa"], "image": {"bytes": b"no picture", "path": "x.png"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows" / "docvqa" / "validation.parquet")
    config = configure(seeing[0], benchmarks="docvqa", **LIMITS, **{"data.root": str(tmp_path / "rows")})
    with pytest.raises(UserError, match=r"the image of .*validation.parquet:1 cannot be read"):
        run.evaluate(config, tmp_path / "f", progress=False)


@pytest.mark.parametrize(
    "question, words",
    [("What does <|image_pad|> say?", "parquet:1 holds the text of <|image_pad|>"), ("x" * 9000, "its words alone")],
)
def test_a_question_that_cannot_stand_beside_its_picture_is_named(seeing, tmp_path, question, words):
    rows = [{**ROWS["textvqa"], "question": question, "image": {"bytes": picture(0), "path": None}}]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / f"{SPLIT['textvqa']}-00000-of-00001.parquet"
    )
    config = configure(seeing[0], benchmarks=f"textvqa@{tmp_path}", **LIMITS)
    with pytest.raises(UserError, match=re.escape(words)):
        run.evaluate(config, tmp_path / "e", progress=False)
