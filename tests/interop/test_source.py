"""init_from takes Hugging Face directories, workdirs and their checkpoints alike; and export is the way back."""

import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from qwen3f import cli, model, params
from qwen3f.checkpoint import manifest
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.config import ModelConfig
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.errors import UserError
from qwen3f.interop import export, hf, source
from qwen3f.stages.configs import pretrain_config
from qwen3f.train.loop import run
from qwen3f.train.restore import starting_state
from qwen3f.train.setup import make_setup
from tests.data.tokenizers.small_bpe import small_tokenizer_json

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "red", "green", "blue", "birds", "in", "trees")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    rand = random.Random(0)
    texts = (" ".join(rand.choice(WORDS) for _ in range(rand.randint(5, 80))) for _ in range(200))
    (root / "corpus").mkdir()
    (root / "corpus" / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


def configured(root, **changes):
    config = pretrain_config("nano")
    config.device = "cpu"
    config.data.update(mixture=f"files@{root / 'corpus'}", cache=str(root / "cache"))
    config.model.update(vocab_size=320, num_hidden_layers=2, hidden_size=32, intermediate_size=48, head_dim=16)
    config.update(steps=4, batch_size=2, seq_len=16, log_every=2)
    config.eval.update(every=0, max_docs=2)
    config.checkpoint.update(every=2, keep=0)
    config.sample.update(tokens=2)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def trained(root):
    """A workdir with checkpoints of steps 2 and 4."""
    run(configured(root), root / "w", progress=False)
    return root / "w"


@pytest.fixture(scope="module")
def directory(root, trained):
    """The same model's Hugging Face directory, in bf16."""
    cfg = source.read_model_config(str(trained))
    p = source.read_params(str(trained), cfg, "cpu", torch.bfloat16)
    hf.save_pretrained(root / "hf", cfg, p, source.read_tokenizer(str(trained)))
    return root / "hf"


def test_the_three_kinds_hold_the_same_model(root, trained, directory):
    last, step_4, step_2, theirs = [
        source.read_params(str(place), source.read_model_config(str(place)), "cpu")
        for place in (trained, trained / "checkpoints" / "4", trained / "checkpoints" / "2", directory)
    ]
    assert all(torch.equal(last[path], step_4[path]) for path in last)
    assert any(not torch.equal(last[path], step_2[path]) for path in last)
    assert all(torch.equal(last[path].bfloat16(), theirs[path]) for path in last)
    texts = ["the cat", "\u2581 é 猫"]
    ids = [
        [source.read_tokenizer(str(p)).encode(t) for t in texts]
        for p in (trained, trained / "checkpoints/2", directory)
    ]
    assert ids[0] == ids[1] == ids[2]


def test_training_starts_from_a_hugging_face_directory(root, directory, tmp_path, capsys):
    """Master weights are float32 and equal the stored bf16; the tokenizer is copied; a new rope_theta is printed."""
    free = {"model.rope_theta": 1e6, "model.gradient_checkpointing": "full", "model.attention_dropout": 0.1}
    config = configured(root, init_from=str(directory), **free)
    plan = make_setup(config)
    with Checkpointer(tmp_path / "c", 0, 0) as checkpoints:
        state, _ = starting_state(plan, checkpoints)
    stored = hf.load_pretrained(directory)[1]
    assert all(leaf.dtype == torch.float32 for leaf in state.params.values())
    assert all(torch.equal(leaf, stored[path].float()) for path, leaf in state.params.items())
    assert f"config.init_from={directory}: rope_theta: 10000.0 -> 1000000.0" in capsys.readouterr().out
    assert int(state.step) == 0
    run(config, tmp_path / "w", progress=False)
    assert source.read_model_config(str(tmp_path / "w")).rope_theta == 1e6
    assert load_tokenizer(tmp_path / "w" / "tokenizer").fingerprint == load_tokenizer(directory).fingerprint


@pytest.mark.parametrize("place", ["w", "hf"])
def test_another_model_is_refused_before_anything_is_read(place, root, trained, directory, tmp_path):
    config = configured(
        root, init_from=str(root / place), **{"model.intermediate_size": 40, "model.hidden_act": "relu"}
    )
    config.data.mixture = "files@/no/such/directory"
    with pytest.raises(UserError, match=r"intermediate_size is 48 there and 40 here, hidden_act is silu there") as e:
        run(config, tmp_path / "out", progress=False)
    assert "--config.model.intermediate_size=48" in str(e.value)
    assert not (tmp_path / "out").exists()


def test_places_that_are_none(root, trained, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for place, words in (
        (tmp_path, "no .*config.json with a model_type"),
        (tmp_path / "nothing", "init_from=.*nothing"),
        (tmp_path / "empty", "holds no checkpoint"),
        (trained / "checkpoints" / "3", "no checkpoint of step 3: there are 2, 4"),
    ):
        with pytest.raises(UserError, match=words):
            source.read_model_config(str(place))
    for look in (source.locate, source.pinned, source.read_model_config):
        with pytest.raises(UserError, match="config.dpo.reference=/none: there is no /none/checkpoints"):
            look("/none", "config.dpo.reference")


def test_what_a_place_is_called_does_not_matter(root, trained, directory, tmp_path, monkeypatch):
    """A Hugging Face directory may be named like a checkpoint or have such a folder; ours may be given as "."."""
    named = shutil.copytree(directory, tmp_path / "checkpoints" / "500")
    folder = shutil.copytree(directory, tmp_path / "hf")
    (folder / "checkpoints" / "500").mkdir(parents=True)
    expected = source.read_params(str(directory), source.read_model_config(str(directory)), "cpu")
    for place in (named, folder):
        assert source.locate(str(place)) == source.Source(place, is_hf=True)
        cfg = source.read_model_config(str(place))
        assert all(
            torch.equal(leaf, expected[path]) for path, leaf in source.read_params(str(place), cfg, "cpu").items()
        )
        assert source.read_tokenizer(str(place)).fingerprint == source.read_tokenizer(str(directory)).fingerprint
    monkeypatch.chdir(trained / "checkpoints" / "2")
    assert source.locate(".") == source.Source(trained, is_hf=False, step=2)
    broken = shutil.copytree(trained, tmp_path / "w")
    (broken / "config.json").write_text("{")  # ignored in a workdir, whose checkpoints hold the configuration
    assert source.locate(str(broken)) == source.Source(broken, is_hf=False)
    (folder / "checkpoints" / "500").rmdir()
    (folder / "checkpoints").rmdir()
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        source.locate(str(folder))


def test_a_directory_without_tokenizer_asks_for_one(root, tmp_path):
    cfg = ModelConfig.from_dict(configured(root).model.to_dict())
    hf.save_pretrained(tmp_path / "bare", cfg, params.init_params(cfg, 0))
    with pytest.raises(UserError, match="no tokenizer at .*bare"):
        run(configured(root, init_from=str(tmp_path / "bare")), tmp_path / "w", progress=False)


def test_qwen_vocabulary_rule(root, tmp_path):
    """A Qwen tokenizer may have fewer tokens than the embedding has rows, never more; it is exported and kept."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_tokenizer_json()))
    tokenizer = load_tokenizer(tmp_path)
    assert 250 < tokenizer.vocab_size < 320
    cfg = ModelConfig.from_dict(configured(root).model.to_dict())
    hf.save_pretrained(tmp_path / "hf", cfg, params.init_params(cfg, 0), tokenizer)
    text = "<|im_start|>user\nthe 猫 sat 123\n"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode(text) == source.read_tokenizer(str(tmp_path / "hf")).encode(text, allow_special=True)
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == {theirs.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")}

    run(configured(root, init_from=str(tmp_path / "hf"), steps=1), tmp_path / "w", progress=False)
    assert load_tokenizer(tmp_path / "w" / "tokenizer").encode(text) == tokenizer.encode(text)

    small = cfg.replace(vocab_size=100)
    with pytest.raises(UserError, match=f"the tokenizer has {tokenizer.vocab_size} tokens and the model only 100"):
        hf.save_pretrained(tmp_path / "small", small, params.init_params(small, 0), tokenizer)
    changes = {"model.vocab_size": 100, "data.tokenizer": str(tmp_path / "hf")}
    with pytest.raises(UserError, match=f"{tokenizer.vocab_size} tokens and the model 100"):
        run(configured(root, **changes), tmp_path / "v", progress=False)


def test_the_export_experiment(root, trained, tmp_path):
    """Through launch.py: transformers gives the logits of the checkpoint."""
    out = tmp_path / "out"
    command = [
        "launch.py", "--config", "experiments/export_hf.py", f"--config.init_from={trained / 'checkpoints' / '2'}",
        f"--config.out={out}", "--config.dtype=float32", "--config.max_shard_gb=1e-4",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*.safetensors"))) > 1
    cfg = source.read_model_config(str(trained))
    p = source.read_params(str(trained / "checkpoints" / "2"), cfg, "cpu")
    tokens = torch.randint(0, cfg.vocab_size, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out)(tokens).logits
        assert (model.apply(cfg, p, {"tokens": tokens}).logits - theirs).abs().max() <= 2e-5
    ours = source.read_tokenizer(str(trained))
    text = "the cat\n    sat 猫 \u2581 <|im_end|>"
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert load_tokenizer(out).encode(text, True) == ours.encode(text, True) == theirs(text)["input_ids"]
    assert theirs.decode(ours.encode(text)) == text
    config = json.loads((out / "config.json").read_text())
    assert (theirs.eos_token_id, theirs.pad_token_id) == (config["eos_token_id"], config["pad_token_id"])


@pytest.mark.parametrize("use", ["export", "generate", "train"])
def test_a_damaged_record_starts_nothing(use, root, trained, tmp_path):
    """One flipped bit makes rope_theta 30000 instead of 10000."""
    place = shutil.copytree(trained, tmp_path / "w")
    path = place / "checkpoints" / "4" / "meta" / "metadata"
    content = path.read_bytes()
    assert content.count(b'"rope_theta": 10000.0') == 1
    path.write_bytes(content.replace(b'"rope_theta": 1', b'"rope_theta": 3'))
    uses = {
        "train": lambda: run(configured(root, init_from=str(place)), tmp_path / "out", progress=False),
        "export": lambda: start("export_hf", init_from=str(place), out=str(tmp_path / "out")),
        "generate": lambda: start("generate", init_from=str(place), prompt="the cat", chat=False),
    }

    def start(name, **changes):
        config = cli.load_experiment(f"experiments/{name}.py")
        config.update(changes)
        cli.run_stage(config, tmp_path / "unused", progress=False)

    with pytest.raises(UserError, match="4 is damaged: the checksum of meta/metadata is not the one in its manifest"):
        uses[use]()
    assert not (tmp_path / "out").exists()


def test_a_model_of_no_size_that_can_be(trained, tmp_path):
    """A valid manifest is no protection here: whoever writes a checkpoint can write its manifest too."""
    place = shutil.copytree(trained, tmp_path / "w") / "checkpoints" / "4"
    record = place / "meta" / "metadata"
    for key, value in (("num_hidden_layers", 30_000_000), ("vocab_size", 2**62)):
        meta = json.loads((trained / "checkpoints" / "4" / "meta" / "metadata").read_text())
        meta["config"]["model"][key] = value
        record.write_text(json.dumps(meta))
        manifest.write(place, {})
        with pytest.raises(UserError, match=r"w/checkpoints/4: .*, over the limit of .* set QWEN3F_MAX_MODEL_"):
            source.check_same_model(str(tmp_path / "w"), source.read_model_config(str(trained)))
    meta["config"] = {}
    record.write_text(json.dumps(meta))
    manifest.write(place, {})
    with pytest.raises(UserError, match="w/checkpoints/4 does not say which model it is of"):
        source.read_model_config(str(tmp_path / "w"))


def test_every_dtype_is_exported(tmp_path):
    cfg = ModelConfig(num_hidden_layers=1, hidden_size=16, head_dim=8, intermediate_size=24, vocab_size=50)
    p = params.init_params(cfg, 0)
    hf.save_pretrained(tmp_path / "in", cfg, p)
    p["model.norm.weight"][0] = 2.0**16
    hf.save_pretrained(tmp_path / "wide", cfg, p)

    def written(name, dtype):
        config = cli.load_experiment("experiments/export_hf.py")
        place = tmp_path / f"{name}-{dtype}"
        config.update(init_from=str(tmp_path / name), out=str(place), dtype=dtype, tokenizer=False)
        cli.run_stage(config, tmp_path / "unused", False)
        return {str(leaf.dtype).removeprefix("torch.") for leaf in hf.load_pretrained(place)[1].values()}

    for dtype in ("bfloat16", "float16", "float32"):
        assert written("in", dtype) == {dtype}
    assert written("in", "stored") == {"float32"}
    with pytest.raises(UserError, match="config.dtype='float64' is unknown; use one of bfloat16, .*, stored"):
        written("in", "float64")
    with pytest.raises(UserError, match="model.norm.weight holds weights that are not finite as float16; write"):
        written("wide", "float16")
    assert not (tmp_path / "wide-float16").exists()
    with pytest.raises(UserError, match="model.norm.weight holds weights that are too large for float16; write config"):
        hf.save_pretrained(tmp_path / "direct", cfg, p, dtype=torch.float16)
    assert written("wide", "bfloat16") == {"bfloat16"}


def test_export_defaults_and_errors(trained, tmp_path):
    config = cli.load_experiment("experiments/export_hf.py")
    for changes, words in (
        ({}, "config.init_from is missing"),
        ({"init_from": str(trained)}, "config.out is missing"),
        ({"out": str(tmp_path / "o"), "dtype": "int8"}, "config.dtype='int8'"),
        ({"dtype": "bfloat16", "max_shard_gb": 0.0}, "config.max_shard_gb=0.0 is less than a byte"),
        ({"max_shard_gb": 1e-10}, "config.max_shard_gb=1e-10 is less than a byte"),
        ({"max_shard_gb": 5.0, "out": "~no-such-user/o"}, "config.out: there is no home directory for ~no-such-user"),
    ):
        config.update(changes)
        with pytest.raises(UserError, match=words):
            export.run(config, tmp_path / "unused")
    config.update(max_shard_gb=5.0, out=str(tmp_path / "o"))
    export.run(config, tmp_path / "unused")
    with pytest.raises(UserError, match=r"^--config\.out=.*o is not empty"):
        export.run(config, tmp_path / "unused")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o"]
    assert {leaf.dtype for leaf in hf.load_pretrained(tmp_path / "o")[1].values()} == {torch.bfloat16}
