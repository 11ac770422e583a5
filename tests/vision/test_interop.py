"""Directories of Qwen3-VL and Qwen3-VL-MoE, read from transformers and written back: every tensor bit for bit.

transformers reads the directory that we wrote and gives the same logits as before, bit for bit. That our model's logits
equal its logits is shown in test_against_transformers.py.
"""

import json
import random

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qwen3f import params as P
from qwen3f import presets
from qwen3f.errors import UserError
from qwen3f.interop import hf, keys, vision_config
from qwen3f.interop.source import check_same_model
from tests.interop.models import edit_config, same_bits, tensors
from tests.vision.hf_vl import MOE, from_hf, hf_model, our_batch, row, their_arguments, vl_config

CASES = {"dense": {}, "tied, bias": {"tie_word_embeddings": True, "attention_bias": True}, "moe": MOE}
CASES |= {"moe, a dense layer, tied": {**MOE, "mlp_only_layers": (1,), "tie_word_embeddings": True}}


def released(directory):
    """Rewrite a directory in the form of the released models: experts transposed, old keys in the config."""
    path = directory / "model.safetensors"
    held = {k: v.transpose(1, 2).contiguous() if ".mlp.experts." in k else v for k, v in load_file(path).items()}
    save_file(held, path, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope.pop("rope_theta")
    config["text_config"]["rope_scaling"] = {**rope, "mrope_interleaved": True}
    config["text_config"]["num_experts"] = config["text_config"].pop("num_local_experts", 0) or ...
    config["vision_config"]["model_type"] = config["model_type"]
    config["vision_config"].pop("rope_parameters")
    config["text_config"] = {k: v for k, v in config["text_config"].items() if v is not ...}
    (directory / "config.json").write_text(json.dumps(config))


def in_memory(cfg, theirs, p):
    """Assert that p, which was read, equals the parameters that transformers' model holds in memory."""
    held = from_hf(cfg, {name: leaf.detach() for name, leaf in theirs.named_parameters()})
    assert all(same_bits(leaf, held[path]) for path, leaf in p.items())
    assert p.keys() == held.keys()


@pytest.mark.parametrize("form", ["transformers 5", "released"])
@pytest.mark.parametrize("case", CASES)
def test_from_transformers_and_back(case, form, tmp_path):
    cfg = vl_config(**CASES[case])
    theirs = hf_model(cfg)
    theirs.save_pretrained(tmp_path / "theirs")
    if form == "released":
        released(tmp_path / "theirs")
    got, p = hf.load_pretrained(tmp_path / "theirs")
    assert got.replace(initializer_range=0.02) == cfg.replace(rms_norm_eps=got.rms_norm_eps)
    assert keys.count(cfg) == len(keys.slots(cfg))
    in_memory(cfg, theirs, p)
    r = row(random.Random(0), "titv")
    batch = our_batch(cfg, [r], torch.float32)
    with torch.no_grad():
        expected = theirs(**their_arguments(r, batch, 0)).logits
        hf.save_pretrained(tmp_path / "ours", got, p, max_shard_bytes=30_000)
        again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", attn_implementation="eager")
        again.config.text_config._experts_implementation = "eager"
        assert torch.equal(again(**their_arguments(r, batch, 0)).logits, expected)
    assert hf.load_pretrained(tmp_path / "ours")[0] == got
    if form == "released":
        before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
        assert before.keys() == after.keys()
        assert all(same_bits(before[key], after[key]) for key in before)


@pytest.mark.parametrize("width", [24, 48])
@pytest.mark.parametrize("form", ["transformers 5", "released"])
def test_square_experts_are_told_by_the_tensor_that_is_not(width, form, tmp_path):
    """The hidden size is 48. With a width of 24 or 48, one of the two expert tensors of a layer is square:
    gate_up_proj, of 2 · 24, or down_proj. The other tensor shows the layout. transformers 5 misreads the released form
    of such a model."""
    cfg = vl_config(**{**MOE, "moe_intermediate_size": width})
    theirs = hf_model(cfg)
    theirs.save_pretrained(tmp_path)
    if form == "released":
        released(tmp_path)
    got, p = hf.load_pretrained(tmp_path)
    in_memory(cfg, theirs, p)
    with pytest.raises(UserError, match="square matrices"):
        hf.save_pretrained(tmp_path / "ours", got, p)


def test_layers_in_both_layouts_are_refused(tmp_path):
    hf_model(vl_config(**MOE)).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    key = "model.language_model.layers.1.mlp.experts.down_proj"
    held[key] = held[key].transpose(1, 2).contiguous()
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="layers.1.mlp.experts.down_proj has shape"):
        hf.load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b", "qwen3-vl-30b-a3b"])
def test_presets_are_models_of_transformers(name):
    """For the released sizes, names and shapes equal those of transformers' modules on the meta device."""
    cfg = presets.get(name)
    values = vision_config.to_hf(cfg, torch.bfloat16)
    kind = "Moe" if cfg.num_experts else ""
    with torch.device("meta"):
        config = getattr(transformers, f"Qwen3VL{kind}Config")(**values)
        theirs = getattr(transformers, f"Qwen3VL{kind}ForConditionalGeneration")(config)
    ours = {key: slot.shape for key, slot in keys.slots(cfg, transposed=False).items()}
    shapes = {key: tuple(leaf.shape) for key, leaf in theirs.named_parameters()}
    assert ours == shapes
    assert sum(leaf.numel() for leaf in theirs.parameters()) == cfg.total_params_estimate()
    assert vision_config.from_hf(values, "x") == cfg


def nested(directory, part, **changes):
    config = json.loads((directory / "config.json").read_text())
    values = {**config[part], **changes}
    edit_config(directory, **{part: {key: value for key, value in values.items() if value is not ...}})


@pytest.mark.parametrize(
    "part, changes, words",
    [
        ("vision_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("vision_config", {"out_hidden_size": 47}, "out_hidden_size is 47"),
        ("vision_config", {"num_position_embeddings": 26}, "num_position_embeddings is 26"),
        ("vision_config", {"rope_parameters": {"rope_theta": 5e5}}, "rope_parameters is"),
        ("vision_config", {"window_size": 112}, "the key 'window_size' is not known"),
        ("vision_config", {"deepstack_visual_indexes": [2, 0]}, r"vision_deepstack_layers \(\[2, 0\]\) must be in asc"),
        ("vision_config", {"depth": "4"}, "depth is '4'; it must be an integer"),
        ("vision_config", {"depth": 10**9}, "vision_num_hidden_layers is 1,000,000,000, over the limit of 262,144"),
        ("vision_config", {"quantization_config": {}}, "vision_config: quantization_config is set; give the directory"),
        ("vision_config", {"torchscript": True}, "vision_config: torchscript is True, .*; only False can be read"),
        ("text_config", {"rope_parameters": {"mrope_section": [4, 2, 1]}}, "mrope_section"),
        ("text_config", {"rope_parameters": {"mrope_interleaved": False}}, "mrope_interleaved is false"),
        ("text_config", {"rope_scaling": {"mrope_section": [2, 4, 2]}}, "two different mrope_sections"),
        ("text_config", {"sliding": 3}, "the key 'sliding' is not known"),
        ("text_config", {"model_type": "qwen2"}, "text_config.model_type is 'qwen2'"),
    ],
)
def test_what_cannot_be_read_is_named(part, changes, words, tmp_path):
    hf_model(vl_config()).config.save_pretrained(tmp_path)
    assert hf.read_config(tmp_path).vision_enabled
    nested(tmp_path, part, **changes)
    with pytest.raises(UserError, match=words):
        hf.read_config(tmp_path)


def test_top_level_is_checked(tmp_path):
    hf_model(vl_config()).config.save_pretrained(tmp_path)
    for changes, words in (
        ({"vision_config": None}, "vision_config is None"),
        ({"architectures": ["Qwen3VLModel"]}, "architectures is"),
        ({"image_token_id": 97}, "image_token_id .97. must be below"),
        ({"quantization_config": {"quant_method": "fp8"}}, "json: quantization_config is set; give the directory of"),
        ({"window": 3}, "the key 'window' is not known for qwen3_vl"),
    ):
        before = (tmp_path / "config.json").read_text()
        edit_config(tmp_path, **changes)
        with pytest.raises(UserError, match=words):
            hf.read_config(tmp_path)
        (tmp_path / "config.json").write_text(before)


def test_what_other_programs_write_at_the_top_and_for_the_tower_is_read(tmp_path):
    """As for a text model: keys that change nothing are accepted, in every part of the config."""
    hf_model(vl_config()).config.save_pretrained(tmp_path)
    expected = hf.read_config(tmp_path)
    harmless = {"unsloth_fixed": True, "unsloth_version": "1", "torchscript": False, "output_attentions": False}
    edit_config(tmp_path, **harmless)
    for part in ("text_config", "vision_config"):
        nested(tmp_path, part, **harmless)
    assert hf.read_config(tmp_path) == expected


@pytest.mark.parametrize("changes", [{"vision_merger": "pool_linear"}, {"vision_deepstack_mode": "vit_fuse"}])
def test_what_hugging_face_cannot_hold_is_named(changes, tmp_path):
    cfg = vl_config(**changes)
    with pytest.raises(UserError, match=f"model.{next(iter(changes))}="):
        hf.save_pretrained(tmp_path / "x", cfg, P.init_params(cfg, 0))


def test_a_tower_may_be_put_on_a_language_model(tmp_path):
    """A model with a vision tower may start from weights without one, but not from weights with another tower."""
    cfg = vl_config()
    text = cfg.replace(vision_enabled=False)
    hf.save_pretrained(tmp_path / "text", text, P.init_params(text, 0))
    check_same_model(str(tmp_path / "text"), cfg)
    hf.save_pretrained(tmp_path / "vl", cfg, P.init_params(cfg, 0))
    check_same_model(str(tmp_path / "vl"), cfg)
    with pytest.raises(UserError, match="vision_num_hidden_layers"):
        check_same_model(str(tmp_path / "vl"), cfg.replace(vision_num_hidden_layers=5))
