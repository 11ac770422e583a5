"""Weights and configs go to transformers and back, bit for bit; and the memory that this takes.

Tolerance on logits of about ±10, fp32: 2e-5, rounding of two orders of summation (see tests/model). All else is exact.
"""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3f import model, params
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.interop import hf, keys, source
from sharding.mesh import parse_mesh
from sharding.state import cut_params
from tests.checkpoint.test_shards import layouts
from tests.interop.models import CASES, EXPERTS, SIZES, edit_config, edit_tensors, hf_model, same_bits, tensors

KEYS_OF_OLD_READERS = {"rope_theta", "rope_scaling", "torch_dtype", "architectures", "model_type", "head_dim"}


def random_tokens(cfg):
    return torch.randint(0, cfg.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES)
def test_from_transformers_and_back(case, tmp_path):
    """Their directory -> our logits; our directory -> their logits; every tensor keeps its bits."""
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    cfg, p = hf.load_pretrained(tmp_path / "theirs")
    assert keys.count(cfg) == len(keys.slots(cfg))
    tokens = random_tokens(cfg)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.abs().max() > 3
        assert (model.apply(cfg, p, {"tokens": tokens}).logits - expected).abs().max() <= 2e-5

        hf.save_pretrained(tmp_path / "ours", cfg, p, max_shard_bytes=30_000)
        before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
        assert before.keys() == after.keys()
        assert all(same_bits(before[key], after[key]) for key in before)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert torch.equal(again(tokens).logits, expected)
    assert json.loads((tmp_path / "ours" / "config.json").read_text()).keys() >= KEYS_OF_OLD_READERS
    assert hf.load_pretrained(tmp_path / "ours")[0] == cfg


@pytest.mark.parametrize("case", ["tied", "moe"])
def test_bf16_stays_bf16(case, tmp_path):
    theirs = hf_model(case, torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    cfg, p = hf.load_pretrained(tmp_path / "theirs")
    assert {leaf.dtype for leaf in p.values()} == {torch.bfloat16}
    hf.save_pretrained(tmp_path / "ours", cfg, p)
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert all(same_bits(before[key], after[key]) for key in before | after)
    read = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("theirs", "ours")]
    assert {m.dtype for m in read} == {torch.bfloat16}
    with torch.no_grad():
        expected, again = [m(random_tokens(cfg)).logits for m in read]
    assert torch.equal(expected, again)

    wide = hf.load_pretrained(tmp_path / "ours", torch.float32)[1]
    assert all(torch.equal(leaf, p[path].float()) and leaf.dtype == torch.float32 for path, leaf in wide.items())
    hf.save_pretrained(tmp_path / "cast", cfg, wide, dtype=torch.bfloat16)
    assert all(same_bits(before[key], tensor) for key, tensor in tensors(tmp_path / "cast").items())


def test_old_config_form_gives_the_same_model(tmp_path):
    hf_model("yarn").save_pretrained(tmp_path)
    cfg = hf.read_config(tmp_path)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    edit_config(tmp_path, rope_parameters=..., rope_theta=theta, rope_scaling=rope, torch_dtype="float32", dtype=...)
    assert hf.read_config(tmp_path) == cfg
    assert cfg.rope_theta == 1e6
    assert cfg.rope_scaling.factor == 4.0


def test_one_file_or_shards(tmp_path):
    cfg = ModelConfig(num_hidden_layers=2, hidden_size=16, head_dim=8, intermediate_size=24, vocab_size=50)
    p = params.init_params(cfg, 0)
    hf.save_pretrained(tmp_path / "one", cfg, p)
    assert sorted(f.name for f in (tmp_path / "one").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    hf.save_pretrained(tmp_path / "many", cfg, p, max_shard_bytes=8000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in p.values())
    largest = max(leaf.nbytes for leaf in tensors(tmp_path / "one").values())
    assert all(path.stat().st_size <= max(8000, largest) + 4096 for path in (tmp_path / "many").glob("*.safetensors"))
    for name in ("one", "many"):
        assert all(same_bits(leaf, p[path]) for path, leaf in hf.load_pretrained(tmp_path / name)[1].items())


@pytest.mark.parametrize("mesh", ["dp2,tp2", "pp2,tp2", "dp2,ep2"])
def test_a_rank_reads_its_shards_alone(mesh, tmp_path):
    """The rank's tensors equal the shards cut from the whole model, and the rank allocates nothing else."""
    cfg = ModelConfig(**SIZES | EXPERTS | {"num_experts": 4, "vocab_size": 96})
    hf.save_pretrained(tmp_path / "m", cfg, params.init_params(cfg, 0))
    p = hf.load_pretrained(tmp_path / "m")[1]
    for _, layout in layouts(parse_mesh(mesh)):
        made = Made()
        with made:
            own = source.read_params(str(tmp_path / "m"), cfg, "cpu", layout=layout)
        expected = cut_params(cfg, p, layout)
        assert own.keys() == expected.keys()
        assert all(same_bits(leaf, expected[path]) for path, leaf in own.items())
        assert made.bytes == sum(leaf.nbytes for leaf in own.values())


class Made(TorchDispatchMode):
    """Counts the bytes of the tensors that are allocated inside the context."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function is torch.ops.aten.empty.memory_format or function is torch.ops.aten.clone.default:
            self.bytes += out.nbytes
        return out


def test_an_index_beside_the_one_file_that_it_names(tmp_path):
    """mlx writes such an index."""
    cfg = ModelConfig(num_hidden_layers=2, hidden_size=16, head_dim=8, intermediate_size=24, vocab_size=50)
    p = params.init_params(cfg, 0)
    hf.save_pretrained(tmp_path / "m", cfg, p)
    names = dict.fromkeys(sorted(tensors(tmp_path / "m")), "model.safetensors")
    index = {"metadata": {"total_size": sum(leaf.nbytes for leaf in p.values())}, "weight_map": names}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(same_bits(leaf, p[path]) for path, leaf in hf.load_pretrained(tmp_path / "m")[1].items())


def test_mixed_dtypes_are_kept_leaf_by_leaf(tmp_path):
    """A router is in fp32, its model in bf16. Layers of one stack must have one dtype unless a dtype is asked for."""
    hf_model("moe", torch.bfloat16).save_pretrained(tmp_path)
    routers = {key: t.float() for key, t in tensors(tmp_path).items() if key.endswith("mlp.gate.weight")}
    edit_tensors(tmp_path, **routers)
    cfg, p = hf.load_pretrained(tmp_path)
    assert {path for path, leaf in p.items() if leaf.dtype == torch.float32} == {"model.layers.mlp.gate.weight"}
    hf.save_pretrained(tmp_path / "ours", cfg, p)
    assert all(same_bits(t, tensors(tmp_path / "ours")[key]) for key, t in tensors(tmp_path).items())
    edit_tensors(tmp_path, model__layers__1__mlp__gate__weight=routers["model.layers.1.mlp.gate.weight"].bfloat16())
    with pytest.raises(UserError, match="layers.1.mlp.gate.weight is BF16.*layers.0.mlp.gate.weight is F32"):
        hf.load_pretrained(tmp_path)
    assert hf.load_pretrained(tmp_path, torch.float32)[1]["model.layers.mlp.gate.weight"].dtype == torch.float32


def test_what_old_files_store_besides(tmp_path):
    """A tied head that equals the embedding, and rotary buffers, are accepted; another head is not."""
    hf_model("tied").save_pretrained(tmp_path)
    cfg, p = hf.load_pretrained(tmp_path)
    embed = tensors(tmp_path)["model.embed_tokens.weight"]
    buffers = {
        "model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8),
    }
    edit_tensors(tmp_path, **buffers, lm_head__weight=embed.clone())
    again_cfg, again = hf.load_pretrained(tmp_path)
    assert again_cfg == cfg
    assert again.keys() == p.keys()
    other = embed.clone()
    other[3, 5] += 1
    for head, words in ((other, "tie_word_embeddings is true"), (embed[:-1].clone(), "lm_head.weight has shape")):
        edit_tensors(tmp_path, lm_head__weight=head)
        with pytest.raises(UserError, match=words):
            hf.load_pretrained(tmp_path)


_PEAK = """
import resource, sys, torch
from qwen3f.interop import hf
hf._MAPPED_BYTES = 2**20
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
directory = sys.argv[1]
torch.ones(9).bfloat16().float()
before = peak()
cfg, params = hf.load_pretrained(directory, torch.float32)
loaded = peak()
hf.save_pretrained(directory + "-again", cfg, params, dtype=torch.bfloat16)
print(loaded - before, peak() - loaded)
"""


def test_memory_is_the_model_and_one_tensor(tmp_path):
    """Loading takes the model and one tensor more, saving one tensor; each may take 10 MB more, for the interpreter.

    The weights have 126 MB in float32, the file 63 MB, and a tensor has at most 17 MB.
    """
    cfg = ModelConfig(hidden_size=512, num_hidden_layers=6, intermediate_size=2048, vocab_size=8192, head_dim=64)
    table = params.abstract_params(cfg)
    p = {path: torch.full(spec.shape, 0.5, dtype=torch.bfloat16) for path, spec in table.items()}
    hf.save_pretrained(tmp_path / "m", cfg, p)
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "m")], capture_output=True, text=True, timeout=120, check=True
    )
    loading, saving = map(int, done.stdout.split())
    total, largest = 4 * cfg.total_params_estimate(), 4 * cfg.vocab_size * cfg.hidden_size
    assert loading <= total + largest + 10e6
    assert saving <= largest + 10e6
