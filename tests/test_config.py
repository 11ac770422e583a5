"""ModelConfig: files, checks, and parameter counts against Qwen3's published ones."""

import math
from itertools import pairwise

import pytest

from qwen3f import params, presets
from qwen3f.config import ModelConfig, RopeScaling
from qwen3f.errors import UserError

# Exact counts: of Hugging Face's models (built on the meta device), and of the sizes in the project's description,
# where a configuration can reach them.
COUNTS = {
    "debug": (23_884_544, 23_884_544),
    "debug_moe": (46_088_960, 27_067_136),
    "small": (1_610_474_496, 1_610_474_496),
    "medium": (8_190_735_360, 8_190_735_360),
    "large": (235_093_634_560, 22_190_763_520),
    "qwen3-0.6b": (596_049_920, 596_049_920),
    "qwen3-1.7b": (1_720_574_976, 1_720_574_976),
    "qwen3-4b": (4_022_468_096, 4_022_468_096),
    "qwen3-8b": (8_190_735_360, 8_190_735_360),
    "qwen3-14b": (14_768_307_200, 14_768_307_200),
    "qwen3-32b": (32_762_123_264, 32_762_123_264),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
    "qwen3-235b-a22b": (235_093_634_560, 22_190_763_520),
    "qwen3-vl-2b": (2_127_532_032, 2_127_532_032),
    "qwen3-vl-4b": (4_437_815_808, 4_437_815_808),
    "qwen3-vl-8b": (8_767_123_696, 8_767_123_696),
    "qwen3-vl-30b-a3b": (31_070_754_032, 3_353_032_704 + 538_631_408),
    "qwen3-vl-235b-a22b": (235_670_022_896, 22_190_763_520 + 576_388_336),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_exact(name):
    cfg = presets.get(name)
    assert (cfg.total_params_estimate(), cfg.active_params_estimate()) == COUNTS[name]


def test_count_equals_the_tensors_made():
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": (3,)}
    cfg = presets.get("nano").replace(num_hidden_layers=4, attention_bias=True, decoder_sparse_step=2, **moe)
    made = params.init_params(cfg, 0)
    assert sum(p.numel() for p in made.values()) == cfg.total_params_estimate()
    assert (cfg.sparse_layers, cfg.dense_layers) == ((1,), (0, 2, 3))
    params.check_params(cfg, made)


def test_matmul_params_leave_out_the_lookup_and_vectors():
    cfg = presets.get("debug")
    layers = 6 * (2 * 256 * 1024 + 2 * 256 * 256 + 3 * 256 * 688)
    assert cfg.matmul_params() == layers + 32768 * 256  # the head, not the embedding
    assert cfg.replace(tie_word_embeddings=True).matmul_params() == cfg.matmul_params()
    for tied in (True, False):  # one row for a score, no vocabulary
        assert cfg.replace(tie_word_embeddings=tied, scalar_head=True).matmul_params() == layers + 256


def test_matmul_params_leave_out_the_tower():
    assert presets.get("qwen3-vl-2b").matmul_params() == presets.get("qwen3-1.7b").matmul_params()


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_files_round_trip(tmp_path, kind):
    cfg = presets.get("large").replace(mlp_only_layers=(0, 5))
    path = tmp_path / f"c.{kind}"
    getattr(cfg, f"to_{kind}")(path)
    assert getattr(ModelConfig, f"from_{kind}")(path) == cfg
    assert cfg.rope_scaling.original_max_position_embeddings == 32768


def test_booleans_of_config_files_are_understood():
    cfg = ModelConfig(qk_norm=True, gradient_checkpointing=True)
    assert (cfg.qk_norm, cfg.gradient_checkpointing) == ("rms", "full")
    assert ModelConfig(qk_norm=False, gradient_checkpointing=False).qk_norm == "none"


@pytest.mark.parametrize(
    "values, words",
    [
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "multiple"),
        ({"head_dim": 7}, "even"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be positive and finite, got nan"),
        ({"rope_theta": math.inf}, r"config\.model\.rope_theta must be positive and finite, got inf"),
        ({"rope_theta": 10**400}, "rope_theta must be positive and finite, got 1000"),
        ({"embed_initializer_range": math.nan}, "embed_initializer_range must be finite and at least 0, got nan"),
        ({"mlp_only_layers": (99,)}, r"config\.model\.mlp_only_layers \(\[99\]\) must be layers of the model, 0 … 5"),
        ({1: 2}, "config.model: unknown key '1'"),
        (
            {"rope_scaling": "yarn"},
            "config.model.rope_scaling is 'yarn'; it must be of type dict, as {'rope_type': 'yarn'",
        ),
        ({"attention_dropout": 1.0}, "attention_dropout"),
        ({"qk_norm": "layer"}, "rms, l2, none"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is unknown"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"type": "yarn", "factr": 2.0}}, "did you mean 'factor'"),
        ({"num_experts": 4, "num_experts_per_tok": 5, "moe_intermediate_size": 8}, "num_experts_per_tok"),
    ],
)
def test_wrong_values_are_named(values, words):
    with pytest.raises(UserError, match=words):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    "key", ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"]
)
@pytest.mark.parametrize("value", [0, -2, pytest.param(10**400, id="1e400"), 1e308, 1e-320, math.nan, math.inf])
def test_numbers_of_yarn_are_finite_and_positive(key, value):
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
    words = rf"config\.model\.rope_scaling\.{key} is .*; it must be "
    for make in (RopeScaling.from_dict, lambda values: RopeScaling(**values)):
        with pytest.raises(UserError, match=words):
            make({**yarn, key: value})
    with pytest.raises(UserError, match=words):
        ModelConfig.from_dict({"rope_scaling": {**yarn, key: value}})


@pytest.mark.parametrize("value", ["abc", 3, (1.0,), (True,), ("1",), {0: 1}])
@pytest.mark.parametrize("name", ["mlp_only_layers", "vision_deepstack_layers", "mrope_section"])
def test_lists_of_numbers_hold_whole_numbers(name, value):
    with pytest.raises(UserError, match=rf"model.{name} is .*; write whole numbers, such as \(0, 1\)"):
        ModelConfig(**{name: value})


def test_yarn_needs_a_rotary_base_above_1():
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
    with pytest.raises(UserError, match="model.rope_theta must be above 1 where config.model.rope_scaling is set"):
        presets.get("nano").replace(rope_theta=1.0, rope_scaling=RopeScaling.from_dict(yarn))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_files_with_a_signature_and_either_line_end(end, tmp_path):
    cfg = presets.get("nano")
    cfg.to_json(tmp_path / "c.json")
    cfg.to_yaml(tmp_path / "c.yaml")
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", end))
    assert ModelConfig.from_json(tmp_path / "c.json") == ModelConfig.from_yaml(tmp_path / "c.yaml") == cfg


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        ModelConfig.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: cannot be parsed"):
        ModelConfig.from_json(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[" * 10**5)
    with pytest.raises(UserError, match=r"bad\.json: cannot be parsed: maximum recursion"):
        ModelConfig.from_json(tmp_path / "bad.json")
    (tmp_path / "bad.yaml").write_text("{" * 2000)
    with pytest.raises(UserError, match=r"bad\.yaml: cannot be parsed: maximum recursion"):
        ModelConfig.from_yaml(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="did you mean 'small'"):
        presets.get("smal")


def test_aliases_of_yaml_that_make_much_of_little_are_named_briefly(tmp_path):
    lists = ["&a [x, x, x, x, x, x, x, x, x]"]
    lists += [f"&{now} [{', '.join([f'*{before}'] * 9)}]" for before, now in pairwise("abcdefghijkl")]  # 9**12 in all
    for name in ("hidden_size", "mlp_only_layers"):
        (tmp_path / "c.yaml").write_text(f"{name}: [{', '.join(lists)}]\n")
        with pytest.raises(UserError, match=rf"config\.model\.{name} is \[.*\]; ") as error:
            ModelConfig.from_yaml(tmp_path / "c.yaml")
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "field, value",
    [
        ("rope_scaling", 3),
        ("hidden_size", "256"),
        ("hidden_size", 256.0),
        ("tie_word_embeddings", 1),
        ("rope_theta", True),
    ],
)
def test_a_value_of_another_type_is_named(field, value):
    with pytest.raises(UserError, match=rf"model.{field} is {value!r}; it must be of type "):
        ModelConfig(**{field: value})
    scaling = {"rope_type": "yarn", "factor": "4", "original_max_position_embeddings": 512}
    with pytest.raises(UserError, match=r"rope_scaling.factor is '4'; it must be of type float"):
        ModelConfig(rope_scaling=scaling)
