"""The stage generate on a tiny model with a real tokenizer: what is printed, the settings of each mode, the errors."""

import json
import os
import subprocess
import sys

import pytest
import torch

from experiments.generate import get_config
from qwen3f import params, presets
from qwen3f.data.chat.template import encode_chat
from qwen3f.data.tokenizers.sentencepiece_tokenizer import train_sentencepiece
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.generate import generate
from qwen3f.infer.run import choose_sampling, run
from qwen3f.infer.sampling import NON_THINKING, THINKING, SamplingParams
from qwen3f.infer.thinking import CLOSING
from qwen3f.interop import hf

TEXTS = [f"The answer to question {i} is é{i}; think about it, then say {i + 1}.\n" for i in range(60)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(an HF directory, its config, its parameters, its tokenizer)."""
    place = tmp_path_factory.mktemp("generate")
    tokenizer = train_sentencepiece(TEXTS, 340, place / "t.model")
    cfg = presets.get("nano").replace(vocab_size=tokenizer.vocab_size, num_hidden_layers=1, max_position_embeddings=256)
    p = params.init_params(cfg, 1)
    hf.save_pretrained(place / "hf", cfg, p, tokenizer)
    return str(place / "hf"), cfg, p, load_tokenizer(place / "hf")


def configure(source, **changes):
    config = get_config()
    config.update({"init_from": source[0], "prompt": "What is é7?", "max_new_tokens": 20, "device": "cpu", **changes})
    return config


def answers(source, capsys, tmp_path, **changes):
    out = run(configure(source, **changes), tmp_path / "unused")
    assert not (tmp_path / "unused").exists()
    return out, capsys.readouterr()


@pytest.mark.parametrize("thinking", [True, False])
def test_chat_answers_what_generate_answers(source, capsys, tmp_path, thinking):
    _, cfg, p, tokenizer = source
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is é7?"}]
    ids = encode_chat(tokenizer, messages, add_generation_prompt=True, enable_thinking=thinking)
    kind = THINKING if thinking else NON_THINKING
    values = {name: getattr(kind, name) for name in ("temperature", "top_k", "top_p", "presence_penalty")}
    new = generate(cfg, p, torch.tensor([ids]), max_new_tokens=20, seed=5, stop_ids=tokenizer.stop_ids, **values)
    new = new[0, len(ids) :].tolist()
    stopped = [i for i, token in enumerate(new) if token in tokenizer.stop_ids]
    out, printed = answers(source, capsys, tmp_path, thinking=thinking, system="Be brief.", seed=5)
    assert out[0].text == tokenizer.decode(new[: stopped[0] if stopped else None])
    assert printed.out == out[0].text + "\n"
    assert f"{out[0].tokens} new tokens" in printed.err
    assert f"({len(ids)} prompt tokens)" in printed.err
    assert "tokens/s" in printed.err


def test_a_batch_prints_each_answer_under_its_prompt(source, capsys, tmp_path):
    _, cfg, p, tokenizer = source
    prompts = ("The answer", "T", "The answer to question 12 is")
    file = tmp_path / "answers.jsonl"
    options = {"prompt": "", "prompts": prompts, "chat": False, "out": str(file)}
    out, printed = answers(source, capsys, tmp_path, **options)
    for prompt, one in zip(prompts, out):
        ids = tokenizer.encode(prompt)
        new = generate(cfg, p, torch.tensor([ids]), max_new_tokens=20, stop_ids=tokenizer.stop_ids)[0, len(ids) :]
        text = [i for i in new.tolist() if i not in tokenizer.stop_ids]
        assert one.text == tokenizer.decode(text)
        assert not one.stopped
    assert printed.out == "".join(f"--- {prompt}\n{one.text}\n" for prompt, one in zip(prompts, out))
    answers(source, capsys, tmp_path, **options)  # appends
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [*prompts, *prompts]
    assert lines[1] == {"prompt": "T", "answer": out[1].text, "tokens": 20, "stopped": False}


def test_answers_end_at_stop_ids(source, capsys, tmp_path):
    """The head's rows for <|im_end|> and for a word of the first answer change places."""
    _, cfg, p, tokenizer = source
    prompts = ("The answer", "T", "The answer to question 12 is")
    ids = [torch.tensor([tokenizer.encode(prompt)]) for prompt in prompts]
    free = [generate(cfg, p, one, max_new_tokens=20)[0, one.shape[1] :].tolist() for one in ids]
    word, end = free[0][3], tokenizer.special_id("<|im_end|>")
    assert end not in free[0]
    order = torch.arange(cfg.vocab_size)
    order[word], order[end] = end, word
    place = tmp_path / "stops"
    hf.save_pretrained(place, cfg, {**p, "lm_head.weight": p["lm_head.weight"][order]}, tokenizer)
    out, printed = answers((str(place),), capsys, tmp_path, prompt="", prompts=prompts, chat=False)
    for one, wanted in zip(out, free):
        assert one.stopped == (word in wanted)
        length = wanted.index(word) if one.stopped else 20
        assert one.tokens == length + one.stopped
        assert one.text == tokenizer.decode(wanted[:length])
    assert {one.stopped for one in out} == {True, False}
    assert printed.out == "".join(f"--- {prompt}\n{one.text}\n" for prompt, one in zip(prompts, out))


def test_thinking_ends_at_the_budget(source, capsys, tmp_path):
    tokenizer = source[3]
    free, _ = answers(source, capsys, tmp_path, max_new_tokens=100, seed=1)
    out, _ = answers(source, capsys, tmp_path, max_new_tokens=100, seed=1, thinking_budget=5)
    before, _, after = out[0].text.partition(CLOSING)
    assert after
    assert free[0].text.startswith(before)
    closing = tokenizer.encode(CLOSING, allow_special=True)
    assert closing.count(tokenizer.special_id("</think>")) == 1
    assert tokenizer.decode(closing) == CLOSING


def test_settings_override_the_recommendation_one_by_one():
    config = get_config()
    assert choose_sampling(config, True) == THINKING
    config.temperature = 0.0
    assert choose_sampling(config, True) == SamplingParams(0.0, 20, 0.95)
    config.min_p = 0.1
    assert choose_sampling(config, False) == SamplingParams(0.0, 20, 0.8, 0.1, 1.5)
    config.chat = False
    assert choose_sampling(config, False) == SamplingParams(min_p=0.1)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"init_from": ""}, "config.init_from is missing"),
        ({"init_from": "no/such/place"}, "config.init_from=no/such/place"),
        ({"prompt": ""}, "give either --config.prompt"),
        ({"prompts": ("a",)}, "give either --config.prompt"),
        ({"prompt": "", "prompts": ("a", "")}, "every prompt must be a text"),
        ({"system": "x", "chat": False}, "config.system needs the chat format"),
        ({"thinking": False, "thinking_budget": 4}, "config.thinking_budget needs"),
        ({"chat": False, "thinking_budget": 4}, "config.thinking_budget needs"),
        ({"chat_template": "chatml"}, "--config.chat_template='chatml': write one of hybrid, instruct-2507"),
        (
            {"chat_template": "coder", "thinking": True},
            "kind coder, which never thinks: leave enable_thinking=True",
        ),
        ({"chat_template": "thinking-2507", "thinking": False}, "thinking-2507, which always thinks"),
        ({"chat_template": "instruct-2507", "thinking_budget": 4}, "config.thinking_budget needs a chat that thinks"),
        ({"thinking_budget": -4}, "thinking_budget must be"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"max_new_tokens": 0}, "config.max_new_tokens must be at least 1"),
        ({"max_new_tokens": 250}, r"exceeds the model's 256 positions; write --config.max_new_tokens=2\d\d or less"),
        ({"prompt": "word " * 300}, "and the model takes 256 with the answer"),
        ({"out": "no/such/place/a.jsonl"}, "there is no directory no/such/place"),
        ({"dtype": "int8"}, "config.dtype='int8'"),
    ],
)
def test_bad_configurations_are_named(source, tmp_path, capsys, changes, words):
    with pytest.raises(UserError, match=words):
        run(configure(source, **changes), tmp_path)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_contract_command(source, tmp_path):
    """In a directory of its own, to see that it leaves nothing behind."""
    root = os.getcwd()
    command = [
        sys.executable, f"{root}/launch.py", "--config", f"{root}/experiments/generate.py",
        f"--config.init_from={source[0]}", "--config.prompt=What is é7?", "--config.thinking=True",
        "--config.max_new_tokens=9",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    expected = run(configure(source, max_new_tokens=9), tmp_path)[0].text
    assert done.stdout == expected + "\n"
    assert "new tokens: the first after" in done.stderr
    assert list(tmp_path.iterdir()) == []
