"""Config files of every form are read as transformers' own classes read them; what we can't hold is refused by name."""

import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.config import ModelConfig, RopeScaling
from qwen3f.errors import UserError
from qwen3f.interop import config as C
from tests.interop.models import YARN

DENSE, MOE = {"model_type": "qwen3"}, {"model_type": "qwen3_moe"}


def read(values):
    return C.from_hf(values, "DIR/config.json")


@pytest.mark.parametrize("values, kind", [(DENSE, transformers.Qwen3Config), (MOE, transformers.Qwen3MoeConfig)])
def test_omitted_keys_have_transformers_defaults(values, kind):
    cfg, theirs = read(values), kind()
    for name in C._DEFAULTS[values["model_type"]]:
        expected = getattr(theirs, name, None)
        if name == "head_dim" and expected is None:
            expected = theirs.hidden_size // theirs.num_attention_heads
        if name == "mlp_only_layers":
            expected = tuple(expected)
        assert getattr(cfg, name) == expected, name
    assert cfg.rope_theta == theirs.rope_parameters["rope_theta"] == 1e4
    # What transformers writes for it, with all defaults, is read as the same config.
    assert read(json.loads(theirs.to_json_string(use_diff=False)) | values) == cfg


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 5e6},
        {"rope_theta": 1000000, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": YARN},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
        {"rope_parameters": {**YARN, "rope_theta": 1e6, "attention_factor": None, "truncate": False}},
        {"rope_theta": 1e6, "rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 1e6}},
        {"rope_theta": 1e6, "rope_scaling": None, "rope_parameters": {**YARN, "rope_theta": 1e6}},
        {"rope_theta": 1e6, "rope_parameters": YARN},
    ],
)
def test_rotary_settings_read_as_transformers_reads_them(rope, tmp_path):
    def theirs(values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        found = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
        scaling = {key: v for key, v in found.items() if key not in ("rope_theta", "type") and v is not None}
        return found["rope_theta"], RopeScaling.from_dict(scaling)

    values = {**DENSE, "hidden_size": 64, "max_position_embeddings": 64, **rope}
    cfg = read(values)
    assert (cfg.rope_theta, cfg.rope_scaling) == theirs(values)
    assert theirs(C.to_hf(cfg, torch.float32)) == theirs(values)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": "qwen3_vl"}, "model_type is 'qwen3_vl'"),
        ({}, "model_type is None"),
        ({"model_type": ["qwen3"]}, "model_type is"),
        ({**DENSE, "architectures": ["Qwen3ForTokenClassification"]}, "architectures"),
        ({**DENSE, "architectures": ["Qwen3MoeForSequenceClassification"]}, "architectures"),
        (
            {**DENSE, "architectures": ["Qwen3ForSequenceClassification"]},
            "id2label is .*only a classifier of one label",
        ),
        ({**DENSE, "architectures": ["Qwen3ForSequenceClassification"], "id2label": 3}, "id2label is 3"),
        ({**DENSE, "use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
        ({**DENSE, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types.*sliding_attention"),
        ({**DENSE, "quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({**DENSE, "hidden_act": "swish"}, "hidden_act.*swish"),
        ({**DENSE, "num_experts": 8}, "num_experts is 8, which qwen3 has no form for here; only 0 can be read"),
        ({**DENSE, "num_local_experts": 8}, "num_local_experts is 8"),
        ({**DENSE, "linear_attention": False}, "the key 'linear_attention' is not known for qwen3"),
        ({**DENSE, "auto_map": {"AutoModel": "x.py"}}, "auto_map"),
        ({**DENSE, "hidden_size": "4096"}, "hidden_size is '4096'; it must be an integer"),
        ({**DENSE, "vocab_size": None}, "vocab_size is None"),
        ({**DENSE, "tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({**DENSE, "num_hidden_layers": -3}, "num_hidden_layers must be positive"),
        ({**DENSE, "num_attention_heads": 0}, "num_attention_heads must be positive"),
        ({**DENSE, "num_attention_heads": 6, "num_key_value_heads": 4}, "multiple of"),
        ({**MOE, "mlp_only_layers": [1.5]}, "mlp_only_layers"),
        ({**MOE, "num_experts": 8, "num_local_experts": 4}, "num_experts is 8 and num_local_experts 4"),
        ({**MOE, "num_experts": 4}, "num_experts_per_tok"),
        ({**DENSE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ({**DENSE, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ({**DENSE, "rope_scaling": {**YARN, "mscale": 1.0}}, "mscale"),
        ({**DENSE, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({**DENSE, "rope_parameters": "yarn"}, "rope_parameters"),
        ({**DENSE, "rope_scaling": {**YARN, "factor": "4"}}, "rope_scaling.factor is '4'"),
        ({**DENSE, "layer_types": 3}, "layer_types is 3"),
        ({**DENSE, "rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({**DENSE, "rope_theta": 10**400}, "rope_theta is 1000.*; it must be a finite number"),
        (
            {**DENSE, "rope_parameters": {"rope_theta": -(10**400)}},
            "rope_parameters.rope_theta is -1000.*; it must be a",
        ),
        ({**DENSE, "rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*; it must be a finite number"),
        ({**DENSE, "initializer_range": float("nan")}, "initializer_range is nan; it must be a finite number"),
        ({**DENSE, "rope_scaling": {**YARN, "factor": 0}}, "rope_scaling.factor is 0; it must be from 1e-9 to 1e18"),
        ({**DENSE, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "two different rotary bases"),
        ({**DENSE, "rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}}, "two different rotary scalings"),
    ],
)
def test_what_we_cannot_hold_is_named(values, words):
    with pytest.raises(UserError, match=words) as caught:
        read(values)
    assert str(caught.value).startswith("DIR/config.json: ")


# What transformers 4.57's Qwen3Config().to_dict() and Qwen3MoeConfig().to_dict() hold beyond the keys of version 5.
FULL_DUMP = {
    "return_dict": True, "output_hidden_states": False, "torchscript": False, "dtype": None, "pruned_heads": {},
    "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None,
    "add_cross_attention": False, "tie_encoder_decoder": False, "architectures": None, "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "task_specific_params": None, "problem_type": None, "tokenizer_class": None, "prefix": None, "bos_token_id": None,
    "pad_token_id": None, "eos_token_id": None, "sep_token_id": None, "decoder_start_token_id": None, "max_length": 20,
    "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1, "temperature": 1.0, "top_k": 50,
    "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False,
    "return_dict_in_generate": False, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "remove_invalid_values": False, "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "num_beam_groups": 1, "diversity_penalty": 0.0, "tf_legacy_loss": False,
    "use_bfloat16": False, "output_attentions": False, "_name_or_path": "", "transformers_version": "4.57.1",
}  # fmt: skip
OTHER_FAMILIES = {
    "qkv_bias": False, "mlp_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0, "use_mrope": False,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "pretraining_tp": 1, "quantization": None,
    "hidden_dropout": 0.0, "partial_rotary_factor": 1.0, "num_nextn_predict_layers": 0, "n_shared_experts": 0,
}  # fmt: skip
OPPOSITES = {
    "torchscript": True, "pruned_heads": {"0": [1]}, "is_decoder": True, "is_encoder_decoder": True,
    "cross_attention_hidden_size": 64, "add_cross_attention": True, "tie_encoder_decoder": True, "prefix": "x",
    "task_specific_params": {"x": 1}, "num_beams": 4, "do_sample": True, "repetition_penalty": 1.3, "temperature": 0.5,
    "tf_legacy_loss": True, "suppress_tokens": [3], "forced_eos_token_id": 2, "max_length": 4096, "use_bfloat16": True,
    "qkv_bias": True, "mlp_bias": True, "use_qk_norm": False, "shared_expert_intermediate_size": 512, "use_mrope": True,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "pretraining_tp": 2, "hidden_dropout": 0.1,
    "quantization": {"bits": 4}, "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 1, "n_shared_experts": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", [DENSE, MOE])
def test_neutral_values_change_nothing(family):
    assert read({**family, **FULL_DUMP, **OTHER_FAMILIES}) == read(family)
    assert read({**family, **dict.fromkeys(OPPOSITES)}) == read(family)  # null says nothing, either
    without_experts = {"num_experts": 0, "num_local_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
    assert read({**DENSE, **without_experts}) == read(DENSE)


@pytest.mark.parametrize("family", [DENSE, MOE])
@pytest.mark.parametrize("key", OPPOSITES)
def test_their_opposites_are_refused(key, family):
    with pytest.raises(UserError, match=f"DIR/config.json: {key} is .*; only .* can be read"):
        read({**family, key: OPPOSITES[key]})


def test_ignored_keys_change_nothing():
    noise = {
        "transformers_version": "4.51.0", "torch_dtype": "bfloat16", "eos_token_id": [1, 2], "bos_token_id": 0,
        "use_cache": True, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28,
        "layer_types": ["full_attention"] * 32, "quantization_config": None, "_name_or_path": "x",
    }  # fmt: skip
    assert read({**DENSE, **noise}) == read(DENSE)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"qk_norm": "l2"}, "qk_norm='l2'"),
        ({"qk_norm": "none"}, "qk_norm='none'"),
        ({"moe_drop_tokens": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}, "drop_tok"),
    ],
)
def test_what_hugging_face_cannot_hold_is_named(changes, words):
    with pytest.raises(UserError, match=words):
        C.to_hf(ModelConfig(**changes), torch.float32)


@st.composite
def configs(draw):
    kv_heads, ratio = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    experts = draw(st.sampled_from([0, 0, 4, 8]))
    sizes = {
        name: draw(st.integers(1, 512))
        for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "max_position_embeddings")
    }
    scaling = st.builds(
        RopeScaling,
        rope_type=st.just("yarn"),
        factor=st.floats(1.0, 64.0),
        original_max_position_embeddings=st.integers(1, 1 << 20),
        beta_fast=st.floats(1.0, 64.0),
        attention_factor=st.none() | st.floats(0.5, 2.0),
        truncate=st.booleans(),
    )
    moe = {
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, max(experts, 1))),
        "moe_intermediate_size": draw(st.integers(1, 99)),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.integers(1, 3)),
        "mlp_only_layers": tuple(draw(st.lists(st.integers(0, sizes["num_hidden_layers"] - 1), max_size=3))),
        "router_aux_loss_coef": draw(st.floats(0, 1)),
    }
    return ModelConfig(
        **sizes,
        **(moe if experts else {}),
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * ratio,
        head_dim=2 * draw(st.integers(1, 128)),
        rms_norm_eps=draw(st.floats(1e-8, 1e-3)),
        hidden_act=draw(st.sampled_from(["silu", "gelu", "relu"])),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        rope_theta=draw(st.floats(1e3, 1e7)),
        rope_scaling=draw(st.none() | scaling),
        initializer_range=draw(st.floats(1e-3, 1.0)),
    )


@settings(max_examples=100, deadline=None)
@given(configs())
def test_every_config_comes_back(cfg):
    assert read(json.loads(json.dumps(C.to_hf(cfg, torch.bfloat16)))) == cfg


@pytest.mark.parametrize("sparse", [False, True])
def test_whole_numbers_are_written_as_transformers_asks_for_them(sparse, tmp_path):
    """transformers' configs refuse 0 where they declare 0.0. Ours may hold 0, from a file or a call; we write 0.0."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "router_aux_loss_coef": 0}
    cfg = ModelConfig(
        rms_norm_eps=1, initializer_range=1, attention_dropout=0, rope_theta=1000000, **(moe if sparse else {})
    )
    (tmp_path / "config.json").write_text(json.dumps(C.to_hf(cfg, torch.float32)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.rms_norm_eps, theirs.initializer_range) == (1.0, 1.0)
    assert read(json.loads((tmp_path / "config.json").read_text())) == cfg
