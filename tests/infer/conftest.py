"""A tiny model with a real tokenizer, as a Hugging Face directory."""

import pytest

from experiments.generate import get_config
from qwen3f import params, presets
from qwen3f.data.tokenizers.sentencepiece_tokenizer import train_sentencepiece
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.infer.run import run
from qwen3f.interop import hf
from tests.infer.batch_rows import read

TEXTS = [f"The answer to question {i} is é{i}; think about it, then say {i + 1}.\n" for i in range(60)]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """(a Hugging Face directory, its config, its parameters, its tokenizer)."""
    place = tmp_path_factory.mktemp("generate")
    tokenizer = train_sentencepiece(TEXTS, 340, place / "t.model")
    cfg = presets.get("nano").replace(vocab_size=tokenizer.vocab_size, num_hidden_layers=1, max_position_embeddings=256)
    p = params.init_params(cfg, 1)
    hf.save_pretrained(place / "hf", cfg, p, tokenizer)
    return str(place / "hf"), cfg, p, load_tokenizer(place / "hf")


@pytest.fixture
def configure(source):
    """A function that returns the configuration of experiments/generate.py for the model of `source`, with changes."""

    def configure(**changes):
        config = get_config()
        config.update({"init_from": source[0], "max_new_tokens": 20, "device": "cpu", **changes})
        return config

    return configure


@pytest.fixture
def answer(configure, tmp_path):
    """A function that answers in.jsonl into out.jsonl. It returns the summary, and the lines in the order of rows."""

    def answer(**changes):
        config = configure(input=str(tmp_path / "in.jsonl"), out=str(tmp_path / "out.jsonl"), batch_size=4)
        config.update(changes)
        summary = run(config, tmp_path / "unused", progress=False)
        lines = read(tmp_path / "out.jsonl")
        assert len({line["row"] for line in lines}) == len(lines)
        return summary, sorted(lines, key=lambda line: line["row"])

    return answer
