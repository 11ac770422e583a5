"""Small chats, random weights to fine-tune, and the configuration of a run on both."""

import json

from qwen3f import params, presets
from qwen3f.data.tokenizers.qwen_tokenizer import QwenTokenizer
from qwen3f.interop import hf
from qwen3f.stages.configs import sft_config
from tests.data.chat.conversations import answer, call, tool, user
from tests.data.sources.adapters.real_rows import write
from tests.data.tokenizers.small_bpe import small_tokenizer_json

VOCAB, LENGTH = 300, 128
SMALL = {"vocab_size": VOCAB, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.05}


def thinking_rows():
    """Chats, most of two turns, one with a tool. Their samples have 42 to 123 tokens; one is too long for a row."""
    rows = [{"messages": [user(f"q{n}"), answer("a" * (n % 7 + 1), "t" * (n % 11 + 1)), user("so?"), answer(f"b{n}")]}
            for n in range(60)]  # fmt: skip
    asked = [user("x"), answer("", "t", [call("f", {"x": 1})]), tool("1"), answer("y")]
    return [*rows, {"messages": [user("z"), answer("w" * 200, "t")]}, {"messages": asked}]


def plain_rows():
    return [{"messages": [user(f"p{n}"), answer("c" * (n % 9 + 1))]} for n in range(60)]


def small_tokenizer(place):
    """A tokenizer of 266 ids: bytes, 5 merges and 5 special tokens."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "tokenizer.json").write_text(json.dumps(small_tokenizer_json()))
    return QwenTokenizer.load(place)


def write_weights(place, changes, seed=1):
    """Write random weights of the preset nano with `changes`, and the small tokenizer. Returns the directory."""
    cfg = presets.get("nano").replace(**changes)
    hf.save_pretrained(place, cfg, params.init_params(cfg, seed), small_tokenizer(place.parent / f"{place.name}.tok"))
    return str(place)


def write_data(root):
    write(thinking_rows(), root / "thinking" / "x.jsonl")
    write(plain_rows(), root / "plain" / "x.jsonl")
    for kind, more in (("dense", {}), ("moe", MOE)):
        write_weights(root / kind, SMALL | more)


def make_config(root, kind="dense", **changes):
    """Four steps in float64 on what `write_data` wrote into `root`; no questions are asked."""
    c = sft_config("nano")
    c.dtype, c.device = "float64", "cpu"
    c.model.update(SMALL | (MOE if kind == "moe" else {}))
    c.init_from = str(root / kind)
    c.data.update(mixture=f"chats@{root}/thinking=0.7,chats@{root}/plain=0.3", cache=str(root / "cache"), num_threads=1)
    c.update(steps=4, batch_size=8, microbatches=2, seq_len=LENGTH, log_every=1, show_samples=0)
    c.schedule.update(kind="constant", peak_lr=1e-2, warmup=0)
    c.eval.update(every=2, batch_size=8, questions=0)
    c.checkpoint.update(every=2, keep=0)
    c.update_from_flattened_dict(changes)
    return c
