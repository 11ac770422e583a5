"""The stage generate on a tiny model with a real tokenizer: what is printed, the settings of each mode, the errors."""

import json
import os
import subprocess
import sys

import pytest
import torch

from qwen3f.data.chat.template import encode_chat
from qwen3f.errors import UserError
from qwen3f.infer.generate import generate
from qwen3f.infer.run import check, run
from qwen3f.infer.sampling import NON_THINKING, THINKING
from qwen3f.infer.text_generator import Answer
from qwen3f.infer.thinking import CLOSING
from qwen3f.interop import hf


@pytest.fixture
def answers(configure, capsys, tmp_path):
    """A function that runs the stage and returns what it has printed, and its summary."""

    def answers(**changes):
        summary = run(configure(**{"prompt": "What is é7?", **changes}), tmp_path / "unused")
        assert not (tmp_path / "unused").exists()
        return capsys.readouterr(), summary

    return answers


@pytest.mark.parametrize("thinking", [True, False])
def test_chat_answers_what_generate_answers(source, answers, thinking):
    _, cfg, p, tokenizer = source
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is é7?"}]
    ids = encode_chat(tokenizer, messages, add_generation_prompt=True, enable_thinking=thinking)
    kind = THINKING if thinking else NON_THINKING
    values = {name: getattr(kind, name) for name in ("temperature", "top_k", "top_p", "presence_penalty")}
    new = generate(cfg, p, torch.tensor([ids]), max_new_tokens=20, seed=5, stop_ids=tokenizer.stop_ids, **values)
    new = new[0, len(ids) :].tolist()
    stopped = [i for i, token in enumerate(new) if token in tokenizer.stop_ids]
    printed, summary = answers(thinking=thinking, system="Be brief.", seed=5)
    assert printed.out == tokenizer.decode(new[: stopped[0] if stopped else None]) + "\n"
    assert (summary.answered, summary.prompt_tokens) == (1, len(ids))
    assert summary.tokens == (stopped[0] + 1 if stopped else 20)
    assert f"{summary.tokens} new tokens: the first after" in printed.err
    assert f"({len(ids)} prompt tokens)" in printed.err
    assert "tokens/s" in printed.err


def test_tools_come_from_a_file(configure, tmp_path):
    file = tmp_path / "tools.json"
    for text, words in (
        ("[", "is not JSON"),
        ("{}", "holds a JSON dict; write a list"),
        ('["t"]', "config.tools 0 is a str"),
        ('[{"x": NaN}]', "config.tools holds a number"),
        (r'[{"name": "\ud800"}]', "config.tools: .* lone surrogate"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            check(configure(prompt="a", tools=str(file)))
    for place, words in (("/dev/zero", "config.tools: /dev/zero is no file"), (str(tmp_path), "Is a directory")):
        with pytest.raises(UserError, match=words):
            check(configure(prompt="a", tools=place))
    file.write_text('[{"name": "t"}]')
    assert check(configure(prompt="a", tools=str(file))).tools == ({"name": "t"},)


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_model_writes_does_nothing_to_a_terminal(answers, monkeypatch, terminal):
    monkeypatch.setattr(Answer, "read", lambda self: "\x1b[2J" if self.finish_reason else "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    printed, _ = answers(prompt="", prompts=("\x1b[1m", "b"), chat=False)
    text, prompt = ("\\x1b[2J", "\\x1b[1m") if terminal else ("\x1b[2J", "\x1b[1m")
    assert printed.out == f"--- {prompt}\n{text}\n--- b\n{text}\n"


def test_several_answers_come_in_order_each_under_its_prompt(source, answers, tmp_path):
    _, cfg, p, tokenizer = source
    prompts = ("The answer", "T", "The answer to question 12 is")
    expected = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        new = generate(cfg, p, torch.tensor([ids]), max_new_tokens=20, stop_ids=tokenizer.stop_ids)[0, len(ids) :]
        expected.append(tokenizer.decode([i for i in new.tolist() if i not in tokenizer.stop_ids]))
    options = {"prompt": "", "prompts": prompts, "chat": False}
    out = "".join(f"--- {prompt}\n{text}\n" for prompt, text in zip(prompts, expected))
    assert answers(**options)[0].out == out
    assert answers(**options, batch_size=1)[0].out == out
    printed, _ = answers(**options, out=str(tmp_path / "out.jsonl"))
    assert printed.out == ""
    lines = sorted(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()), key=lambda line: line["row"])
    assert [(line["row"], line["answer"]) for line in lines] == list(enumerate(expected))


def test_answers_end_at_stop_ids_and_stop_texts(source, answers, tmp_path):
    """The weights of the head for <|im_end|> and for a word of the first answer are swapped. So the model writes
    <|im_end|> where it wrote that word before."""
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
    out = tmp_path / "out.jsonl"
    options = {"prompt": "", "prompts": prompts, "chat": False}
    answers(**options, init_from=str(place), out=str(out))
    lines = sorted(map(json.loads, out.read_text().splitlines()), key=lambda line: line["row"])
    for line, wanted in zip(lines, free):
        stopped = word in wanted
        length = wanted.index(word) if stopped else 20
        assert (line["finish_reason"], line["tokens"]) == ("stop" if stopped else "length", length + stopped)
        assert line["answer"] == tokenizer.decode(wanted[:length])
    assert {line["finish_reason"] for line in lines} == {"stop", "length"}
    texts = [tokenizer.decode(wanted) for wanted in free]
    stop = texts[0][7:9]
    expected = [text.split(stop)[0] for text in texts]
    printed, _ = answers(**options, stop=(stop, "never said"))
    assert printed.out == "".join(f"--- {prompt}\n{text}\n" for prompt, text in zip(prompts, expected))
    assert len(expected[0]) <= 7


def test_thinking_ends_at_the_budget(source, answers):
    tokenizer = source[3]
    free, _ = answers(max_new_tokens=100, seed=1)
    budget, _ = answers(max_new_tokens=100, seed=1, thinking_budget=5)
    before, _, after = budget.out.partition(CLOSING)
    assert after
    assert free.out.startswith(before)
    closing = tokenizer.encode(CLOSING, allow_special=True)
    assert closing.count(tokenizer.special_id("</think>")) == 1
    assert tokenizer.decode(closing) == CLOSING


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"init_from": ""}, "config.init_from is missing"),
        ({"init_from": "no/such/place"}, "config.init_from=no/such/place"),
        ({"prompt": ""}, "give --config.prompt=.*or for a chat a terminal, a pipe or a file on stdin"),
        ({"prompt": "", "chat": False}, "config.chat=False and config.out need questions"),
        ({"prompt": "", "out": "x.jsonl"}, "config.chat=False and config.out need questions"),
        ({"prompts": ("a",)}, "give --config.prompt=.*only one of them"),
        ({"input": "a.jsonl"}, "give --config.prompt=.*only one of them"),
        ({"prompt": "", "input": "no/such.jsonl"}, "config.input=no/such.jsonl: there is no such file"),
        ({"prompt": "", "input": "~no-such-user/a"}, "config.input: there is no home directory for ~no-such-user"),
        ({"out": "~no-such-user/a"}, "config.out: there is no home directory for ~no-such-user"),
        ({"prompt": "", "prompts": ("a", "")}, "every prompt must be a text"),
        ({"system": "x", "chat": False}, "config.system needs the chat format"),
        ({"tools": "none.json"}, "config.tools=none.json: No such file"),
        ({"thinking": True, "chat": False}, "config.thinking=True needs the chat format"),
        ({"thinking": False, "thinking_budget": 4}, "config.thinking_budget needs"),
        ({"chat": False, "thinking_budget": 4}, "config.thinking_budget needs"),
        ({"chat_template": "chatml"}, "--config.chat_template='chatml': write one of hybrid, instruct-2507"),
        (
            {"chat_template": "coder", "thinking": True},
            "kind coder, which never thinks: write --config.thinking=False, or choose",
        ),
        ({"chat_template": "thinking-2507", "thinking": False}, "thinking-2507, which always thinks"),
        ({"chat_template": "instruct-2507", "thinking_budget": 4}, "config.thinking_budget needs a model that thinks"),
        ({"thinking_budget": -4}, "thinking_budget must be"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"max_new_tokens": 0}, "config.max_new_tokens must be at least 1"),
        (
            {"max_new_tokens": 250},
            r"^config.prompt: config.max_new_tokens=250 .* exceeds the model's 256 positions; write 2\d\d or less",
        ),
        ({"prompt": "word " * 300}, "config.prompt: a prompt has .* and the model takes 256 with the answer"),
        ({"out": "no/such/place/a.jsonl"}, "there is no directory no/such/place"),
        ({"stop": ("a", "")}, "config.stop must be texts that are not empty"),
        ({"stop": ("a", "\ud800")}, "config.stop: Character 0 .* lone surrogate"),
        ({"system": "\ud800"}, "config.system: Character 0 .* lone surrogate"),
        ({"prompt": "\ud800"}, "config.prompt: .* lone surrogate"),
        ({"batch_size": 0}, "config.batch_size must be at least 1"),
        ({"max_tokens": -1}, "config.max_tokens must be at least 0"),
        ({"on_bad_row": "stop"}, "config.on_bad_row='stop': write error or skip"),
        ({"dtype": "int8"}, "config.dtype='int8'"),
        ({"mesh": "dp2"}, "config.mesh=dp2: generation has only tp; write --config.mesh=tp2"),
        ({"mesh": "tp4"}, r"tp=4 does not divide the model's 2 key/value heads; write --config.mesh=tp1 or tp2"),
    ],
)
def test_bad_configurations_are_named(configure, tmp_path, capsys, changes, words):
    with pytest.raises(UserError, match=words):
        run(configure(**{"prompt": "What is é7?", **changes}), tmp_path)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_chat_over_several_devices_is_refused(configure, tmp_path, monkeypatch):
    monkeypatch.setattr("qwen3f.infer.run._stdin_is_given", lambda: True)
    with pytest.raises(UserError, match=r"config\.mesh=tp2: a chat over stdin runs on one device; leave out"):
        run(configure(mesh="tp2"), tmp_path)


def test_an_answer_that_is_no_number_or_does_not_fit_is_an_error(source, answers, tmp_path):
    _, cfg, p, tokenizer = source
    place = tmp_path / "nan"
    hf.save_pretrained(place, cfg, {**p, "lm_head.weight": p["lm_head.weight"] * float("nan")}, tokenizer)
    with pytest.raises(UserError, match="logits are not finite at new token 1; check its weights"):
        answers(init_from=str(place))
    with pytest.raises(UserError, match="does not fit the cache of 64; raise config.max_tokens"):
        answers(max_tokens=16, max_new_tokens=100)


def test_the_contract_command(source, answers, tmp_path):
    """The command of the project's description. It runs in an empty directory and must leave no file there."""
    root = os.getcwd()
    command = [
        sys.executable, f"{root}/launch.py", "--config", f"{root}/experiments/generate.py",
        f"--config.init_from={source[0]}", "--config.prompt=What is é7?", "--config.thinking=True",
        "--config.max_new_tokens=9",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == answers(max_new_tokens=9)[0].out
    assert "new tokens: the first after" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_model_cut_over_two_ranks_answers_the_same(source, answers, tmp_path):
    """Several prompts, answered into a file that has one of the answers already. The program starts the ranks, and only
    rank 0 writes."""
    prompts, out = ("What is é7?", "T", "The answer to question 12 is"), tmp_path / "out.jsonl"
    options = {"prompt": "", "chat": False, "max_new_tokens": 9, "temperature": 0.8, "out": str(out)}
    answers(**options, prompts=prompts)
    expected = {json.loads(line)["row"]: line for line in out.read_text().splitlines()}
    out.write_text(expected[1] + "\n")
    root = os.getcwd()
    command = [
        sys.executable, f"{root}/launch.py", "--config", f"{root}/experiments/generate.py", "--config.device=cpu",
        f"--config.init_from={source[0]}", f"--config.prompts={prompts!r}", "--config.chat=False",
        "--config.max_new_tokens=9", "--config.temperature=0.8", f"--config.out={out}", "--config.mesh=tp2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = out.read_text().splitlines()
    assert {json.loads(line)["row"]: line for line in lines} == expected
    assert len(lines) == 3
    assert done.stderr.count("new tokens: the first after") == 1
