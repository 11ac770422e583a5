"""Broken and hostile directories: one message that names file or tensor, and no trace on disk."""

import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3f import params
from qwen3f.config import ModelConfig
from qwen3f.data.tokenizers import bpe_files
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.errors import UserError
from qwen3f.interop import hf, writer
from tests.interop.models import edit_config, edit_tensors

CFG = ModelConfig(num_hidden_layers=2, hidden_size=16, head_dim=8, intermediate_size=24, vocab_size=50)
NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
MANY, LAST = "model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors"


@pytest.fixture(scope="module")
def model():
    return params.init_params(CFG, 0)


def cut_file(at):
    def cut(directory):
        path = next(directory.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:at])

    return cut


def write(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def edit_index(edit):
    """Change the index in place: edit(weight_map)."""

    def change(directory):
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        edit(index["weight_map"])
        path.write_text(json.dumps(index))

    return change


def put(key, name):
    return edit_index(lambda weight_map: weight_map.update({key: name}))


def index_twice(directory):
    path = directory / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{MANY}",'))


def store(key, name):
    """Store `key` in a shard that the index doesn't name for it."""

    def change(directory):
        save_file({**load_file(directory / name), key: torch.ones(16)}, directory / name, {"format": "pt"})

    return change


def only_pickle(directory):
    (directory / "model.safetensors").unlink()
    torch.save({NORM: torch.ones(16)}, directory / "pytorch_model.bin")


EXPERTS = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
}
ONE_FILE = {
    "data cut short": (cut_file(-10), "model.safetensors is not a whole safetensors file"),
    "header cut short": (cut_file(40), "not a whole safetensors file"),
    "empty": (cut_file(0), "not a whole safetensors file"),
    "endless header": (write("model.safetensors", b"\xff" * 16), "not a whole safetensors file"),
    "missing": (lambda d: edit_tensors(d, **{NORM: ...}), f"missing: {NORM}"),
    "extra": (lambda d: edit_tensors(d, score__weight=torch.ones(2)), "don't belong.*score.weight"),
    "one layer more": (
        lambda d: edit_config(d, num_hidden_layers=3),
        "missing: model.layers.2.input_layernorm.weight.*8 m",
    ),
    "misshapen": (lambda d: edit_tensors(d, **{NORM: torch.ones(17)}), rf"{NORM} has shape \[17\].*\[16\]"),
    "transposed": (lambda d: edit_tensors(d, **{EMBED: torch.ones(16, 50)}), rf"{EMBED} has shape \[16, 50\]"),
    "int8": (lambda d: edit_tensors(d, **{NORM: torch.ones(16, dtype=torch.int8)}), f"{NORM} is stored as I8"),
    "float8": (lambda d: edit_tensors(d, **{NORM: torch.ones(16).to(torch.float8_e4m3fn)}), f"{NORM} is stored as F8"),
    "pickle": (only_pickle, "pytorch_model.bin.*convert it to safetensors"),
    "nothing": (lambda d: (d / "model.safetensors").unlink(), "holds no weights"),
    "no index": (lambda d: (d / "model.safetensors").rename(d / MANY), f"{MANY} but neither"),
    "two sets": (write("model.safetensors.index.json", b'{"weight_map": {"x": "a.safetensors"}}'), "holds both"),
    "an index of nothing": (write("model.safetensors.index.json", b"{}"), "index.json has no weight_map"),
    "an index of more": (
        write("model.safetensors.index.json", b'{"weight_map": {"x": "model.safetensors"}}'),
        "stores lm_head.weight, which .* puts in no file",
    ),
    "another family": (lambda d: edit_config(d, model_type="mistral"), "config.json: model_type is 'mistral'"),
    "endless layers": (
        lambda d: edit_config(d, num_hidden_layers=3 * 10**7),
        "config.json: num_hidden_layers × num_experts is 30,000,000, over the limit of 262,144 tensors; .*QWEN3F_MAX",
    ),
    "layers times experts": (
        lambda d: edit_config(d, **EXPERTS, num_hidden_layers=500, num_experts=500),
        "describes a model of 754,503 tensors, but only 25 are stored",
    ),
    "endless vocabulary": (
        lambda d: edit_config(d, vocab_size=2**62),
        "config.json: the model has 147,5.* parameters, over the limit of 17,592,186,044,416 parameters",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "there is no file .*config.json"),
    "config cut short": (write("config.json", b'{"model_type":'), "config.json is not JSON"),
    "config no object": (write("config.json", b"[1]"), "config.json holds a JSON list"),
    "config no text": (write("config.json", b"\xff\xfe\x00"), "config.json is not JSON"),
    "config too deep": (write("config.json", b"[" * 10**5), "config.json is not JSON"),
    "config key twice": (write("config.json", b'{"model_type": "qwen3", "model_type": "qwen3"}'), "'model_type' twice"),
}
SHARDS = {
    "relative path": (put(NORM, "../evil.safetensors"), "'../evil.safetensors'"),
    "absolute path": (put(NORM, "/tmp/evil.safetensors"), "'/tmp/evil.safetensors'"),
    "folder": (put(NORM, "sub/evil.safetensors"), "'sub/evil.safetensors'"),
    "backslash": (put(NORM, "..\\evil.safetensors"), "evil.safetensors'"),
    "no name": (put(NORM, 3), f"puts {NORM} in 3"),
    "pickle": (put(NORM, "evil.bin"), "'evil.bin'"),
    "no such file": (put("model.layers.0.x", "model-9.safetensors"), "there is no file .*model-9.safetensors"),
    "another shard": (put(NORM, MANY), f"stores {NORM}, which .* puts in {MANY}"),
    "unlisted": (edit_index(lambda m: m.pop(NORM)), f"stores {NORM}, which .* puts in no file"),
    "not stored": (put("model.layers.0.x", MANY), f"puts model.layers.0.x in {MANY}, which doesn't store it"),
    "index key twice": (index_twice, f"'{NORM}' twice"),
    "stored twice": (store(EMBED, LAST), f"{EMBED} is stored twice, in .*{MANY} and {LAST}"),
    "stored elsewhere": (store(NORM, MANY), f"{MANY} stores {NORM}, which .* puts in {LAST}"),
    "no map": (write("model.safetensors.index.json", b"{}"), "no weight_map"),
    "endless name": (
        put("model.layers.0.x", "x" * 300 + ".safetensors"),
        "x.safetensors cannot be opened .*name too long",
    ),
    "a shard is gone": (lambda d: (d / MANY).unlink(), f"there is no file .*{MANY}"),
}


@pytest.mark.parametrize("case", ONE_FILE)
def test_a_broken_directory(case, model, tmp_path):
    hf.save_pretrained(tmp_path / "m", CFG, model)
    check(ONE_FILE[case], tmp_path / "m")


@pytest.mark.parametrize("case", SHARDS)
def test_a_broken_index(case, model, tmp_path):
    hf.save_pretrained(tmp_path / "m", CFG, model, max_shard_bytes=12_000)
    assert (tmp_path / "m" / MANY).exists()
    hf.load_pretrained(tmp_path / "m")
    check(SHARDS[case], tmp_path / "m")


def check(case, directory):
    breaks, words = case
    breaks(directory)
    with pytest.raises(UserError, match=words):
        hf.load_pretrained(directory)


def test_sizes_are_refused_before_anything_is_made_of_them(model, tmp_path):
    """Refusing takes less than a second and 50 MB. It once took minutes and gigabytes."""
    hf.save_pretrained(tmp_path / "m", CFG, model)
    whole = (tmp_path / "m" / "config.json").read_bytes()
    for name in ("endless layers", "layers times experts", "endless vocabulary"):
        check(ONE_FILE[name], tmp_path / "m")  # imports and caches
        tracemalloc.start()
        began = time.process_time()
        try:
            check(ONE_FILE[name], tmp_path / "m")
            assert time.process_time() - began < 1
            assert tracemalloc.get_traced_memory()[1] < 50e6
        finally:
            tracemalloc.stop()
        (tmp_path / "m" / "config.json").write_bytes(whole)


def test_the_limit_of_layers_can_be_raised(model, tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN3F_MAX_MODEL_TENSORS", "1")
    hf.save_pretrained(tmp_path / "m", CFG, model)
    with pytest.raises(UserError, match="num_hidden_layers × num_experts is 2, over the limit of 1 tensors"):
        hf.load_pretrained(tmp_path / "m")
    monkeypatch.setenv("QWEN3F_MAX_MODEL_TENSORS", "2")
    hf.load_pretrained(tmp_path / "m")


def test_a_sparse_file_is_not_read(tmp_path):
    """A file of 1 TB that takes no disk space is refused by its size. Without a limit it would be read whole."""
    for name in ("tokenizer.json", "tokenizer.model", "merges.txt", "qwen.tiktoken", "config.json"):
        place = tmp_path / name.replace(".", "_")
        place.mkdir()
        (place / name).touch()
        os.truncate(place / name, 2**40)
        if name == "merges.txt":
            (place / "vocab.json").write_text(json.dumps({bpe_files.to_text(bytes([i])): i for i in range(256)}))
        read = hf.read_config if name == "config.json" else load_tokenizer
        with pytest.raises(UserError, match=rf"{name} has 1,099,511,627,776 bytes, over the limit of 67,108,864 bytes"):
            read(place)


def test_a_file_instead_of_a_directory(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "nothing"):
        with pytest.raises(UserError, match=name):
            hf.load_pretrained(tmp_path / name)
    with pytest.raises(UserError, match="loaded as torch.int8"):
        hf.load_pretrained(tmp_path, torch.int8)


def test_the_symlinks_of_a_cache_are_followed(model, tmp_path):
    """The Hugging Face cache: snapshots/X/model.safetensors -> ../../blobs/HASH."""
    hf.save_pretrained(tmp_path / "blobs", CFG, model)
    (snapshot := tmp_path / "snapshots" / "x").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(os.path.relpath(tmp_path / "blobs" / name, snapshot))
    assert hf.load_pretrained(snapshot)[0] == CFG.replace(num_experts_per_tok=0)


def without(model, path):
    return {key: leaf for key, leaf in model.items() if key != path}


@pytest.mark.parametrize(
    "cfg, change, words",
    [
        (CFG, lambda p: without(p, NORM), f"{NORM} is missing"),
        (CFG, lambda p: {**p, "x": torch.ones(1)}, "parameter x is unknown"),
        (CFG, lambda p: {**p, NORM: torch.ones(3)}, f"{NORM} has shape"),
        (CFG, lambda p: {**p, NORM: torch.ones(16, dtype=torch.int32)}, f"{NORM} can't be written as torch.int32"),
        (CFG.replace(qk_norm="l2"), lambda p: p, "qk_norm='l2'"),
        (CFG.replace(scalar_head=True), lambda p: without(p, "lm_head.weight"), "score.weight is missing"),
    ],
)
def test_nothing_is_written_for_a_wrong_model(cfg, change, words, model, tmp_path):
    with pytest.raises(UserError, match=words):
        hf.save_pretrained(tmp_path / "out", cfg, change(model))
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_an_empty_directory_is_filled(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    hf.save_pretrained(tmp_path / "link", CFG, model)
    assert (tmp_path / "link").is_symlink()
    assert hf.load_pretrained(tmp_path / "real")[1].keys() == model.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_path_with_two_dots_means_the_place_that_it_names(model, tmp_path):
    hf.save_pretrained(tmp_path / "nothing" / ".." / "out", CFG, model)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_mount_point_is_refused_before_weights_are_written(model, tmp_path, monkeypatch):
    """The finished directory could not be renamed to a mount point."""
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    monkeypatch.setattr(writer, "write_file", None)
    for name in ("out", "link"):
        with pytest.raises(UserError, match=f"{name} is a mount point.* such as .*{name}/model"):
            hf.save_pretrained(tmp_path / name, CFG, model)


def test_nothing_is_overwritten(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nowhere").symlink_to("gone")
    for name in ("full", "file", "nowhere"):
        with pytest.raises(UserError, match=name):
            hf.save_pretrained(tmp_path / name, CFG, model)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    hf.save_pretrained(tmp_path / "empty", CFG, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "nowhere"]
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "full").stat().st_mode  # permissions follow the umask


def test_a_full_disk_leaves_nothing(model, tmp_path, monkeypatch):
    real = writer.write_file

    def fails_later(path, *rest):
        if path.name > MANY:
            raise OSError(28, "No space left on device")
        real(path, *rest)

    monkeypatch.setattr(writer, "write_file", fails_later)
    with pytest.raises(UserError, match="out could not be written.*No space left"):
        hf.save_pretrained(tmp_path / "out", CFG, model, max_shard_bytes=12_000)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_several_dtypes_ask_for_one_by_its_flag(model, tmp_path):
    hf.save_pretrained(tmp_path / "x", CFG, model)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path / "x", **{name.replace(".", "__"): torch.ones(24, 16, dtype=torch.bfloat16)})
    with pytest.raises(UserError, match=rf"{name} is BF16, but .* is F32; .* write --config.dtype=float32 or"):
        hf.load_pretrained(tmp_path / "x")
    assert hf.load_pretrained(tmp_path / "x", torch.float32)[1]["model.layers.mlp.up_proj.weight"][1].eq(1).all()


def test_weights_that_float16_cannot_hold_are_not_loaded_as_infinite(tmp_path):
    wide = params.init_params(CFG, 0)
    wide[NORM][3] = 7e4
    hf.save_pretrained(tmp_path / "x", CFG, wide)
    with pytest.raises(UserError, match=rf"{NORM} holds weights that are not finite as float16; write --config.dtype="):
        hf.load_pretrained(tmp_path / "x", torch.float16)
    assert hf.load_pretrained(tmp_path / "x", torch.bfloat16)[1][NORM][3] == 70144
