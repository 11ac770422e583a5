"""The kind of a tokenizer's chat template is recognised by the text that it renders. Unknown templates are refused, and
so are tokenizers without the special tokens of chats.
"""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest

from qwen3f.data.chat import kinds, recognise
from qwen3f.data.chat.kinds import KINDS
from qwen3f.data.chat.recognise import check_chat_tokenizer, kind_of
from qwen3f.data.tokenizers.qwen_tokenizer import QwenTokenizer
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.errors import UserError
from qwen3f.processes.killable import Outcome
from tests.data.chat.references import REFERENCES
from tests.data.tokenizers.small_bpe import small_tokenizer_json


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_tokenizer_json()))
    return tmp_path


def _templates():
    return resources.files("trl").joinpath("chat_templates")


def test_qwen3_s_own_files_and_trained_tokenizers_are_fine(qwen, small_qwen, tokenizer, qwen_files, directory):
    for each in (qwen, small_qwen, tokenizer):
        check_chat_tokenizer(each)
    own = json.loads((qwen_files / "tokenizer_config.json").read_bytes())["chat_template"]
    for config in ({"chat_template": own}, {"chat_template": [{"name": "default", "template": own}]}, {}):
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        check_chat_tokenizer(QwenTokenizer.load(directory))
    # TRL's file is written differently but renders the same.
    content = _templates().joinpath("qwen3.jinja").read_bytes()
    for written in (content, b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")):  # also with BOM and CR LF
        (directory / "chat_template.jinja").write_bytes(written)
        check_chat_tokenizer(QwenTokenizer.load(directory))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_training", "llama3", "deepseekv3", "gemma3", "qwen3_5_think"])
def test_other_templates_are_refused(name, directory):
    file = _templates().joinpath(f"{name}.jinja")
    if not file.is_file():
        pytest.fail(f"trl has no template {name}: choose another")
    shutil.copyfile(str(file), directory / "chat_template.jinja")
    with pytest.raises(
        UserError,
        match=r"template in .*chat_template.jinja is of no kind .*the nearest kind with --config.chat_",
    ):
        check_chat_tokenizer(QwenTokenizer.load(directory))


@pytest.mark.parametrize(
    "template",
    ["{{ broken", "{{ messages[0].absent.more }}", "{{ raise_exception('no') }}", "x", "{{ 1 / 0 }}", "{{ 1e999 }}",
     "{{ '{}'.format() }}", "{{ cycler().next() }}", "{{ 'ab'.encode('none') }}", "{{ 'a' * 10 ** 13 }}"],
)  # fmt: skip
def test_broken_templates_are_refused(template, directory):
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(UserError, match=r"template in .*tokenizer_config.json is of no kind that is known"):
        check_chat_tokenizer(QwenTokenizer.load(directory))


@pytest.mark.parametrize("late, tries", [(0, 1), (2, 3), (9, 3)])
def test_a_template_that_was_late_is_tried_again_at_most_twice(directory, monkeypatch, late, tries):
    """The machine may have been slow for a moment. One that never ends must not cost a deadline for each chat."""
    called, expected = [], recognise._expected(KINDS["coder"])

    def call(self, *_, **__):
        called.append(1)
        return Outcome(failure="took longer than 10 s") if len(called) <= late else Outcome(expected)

    monkeypatch.setattr(recognise.Killable, "call", call)
    (directory / "chat_template.jinja").write_text(f"late {late}")
    tokenizer = load_tokenizer(directory)
    for attempt in range(5):
        if attempt < late:
            with pytest.raises(UserError, match="took longer than 10 s"):
                kind_of(tokenizer)
        else:
            assert kind_of(tokenizer) is KINDS["coder"]
    assert len(called) == tries


def test_a_template_that_runs_for_ever_is_ended(directory, monkeypatch):
    monkeypatch.setattr(recognise, "SECONDS", 0.5)
    endless = "{% for i in range(9 ** 5) %}{% for j in range(9 ** 5) %}{% endfor %}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": endless}))
    with pytest.raises(UserError, match=r"is of no kind that is known .*, as it fails \(took longer than 0.5 s\)"):
        check_chat_tokenizer(QwenTokenizer.load(directory))


def test_a_broken_config_is_named(directory):
    several = json.dumps({"chat_template": [{"name": "tool_use", "template": "x"}]})
    for content, words in (
        ("{", "is no JSON object"), ("[]", "is no JSON object"), ("[" * 10**5, "is no JSON object"),
        ('{"chat_template": 3}', "chat_template is a int"), ('{"chat_template": [3]}', "is no JSON object"),
        (several, "several chat templates and none named default"),
    ):  # fmt: skip
        (directory / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match=f"tokenizer_config.json .*{words}"):
            check_chat_tokenizer(QwenTokenizer.load(directory))
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="chat_template.jinja is no UTF-8"):
        check_chat_tokenizer(QwenTokenizer.load(directory))


@pytest.mark.parametrize("missing", ["<think>", "</think>"])
def test_a_tokenizer_without_the_chat_s_tokens(missing, directory):
    content = small_tokenizer_json()
    for token in content["added_tokens"]:
        if token["content"] == missing:
            token["content"] = "<other>"
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=f"The tokenizer .* has no token {missing}, which Qwen3's chats need: give --con"
    ):
        check_chat_tokenizer(QwenTokenizer.load(directory))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_each_kind_is_found(kind, directory):
    """By our template file and, where TRL has one, by TRL's. --config.chat_template overrides the file."""
    shutil.copyfile(Path(kinds.__file__).parent / "jinja" / f"{kind.name}.jinja", directory / "chat_template.jinja")
    (directory / "tokenizer_config.json").write_text('{"chat_template": "read by nobody, beside the other file"}')
    assert kind_of(QwenTokenizer.load(directory)) is kind
    if kind.name in REFERENCES:
        (directory / "chat_template.jinja").write_text(REFERENCES[kind.name])
        assert kind_of(QwenTokenizer.load(directory)) is kind
    (directory / "chat_template.jinja").write_text("another model's")
    assert kind_of(load_tokenizer(directory, kind.name)) is kind
    with pytest.raises(UserError, match="--config.chat_template='chatml': write one of hybrid, "):
        kind_of(load_tokenizer(directory, "chatml"))


def test_tokens_of_thoughts_are_needed_where_there_are_thoughts(directory):
    content = small_tokenizer_json()
    for token in content["added_tokens"]:
        token["content"] = token["content"].replace("think", "other")
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert check_chat_tokenizer(load_tokenizer(directory, "coder")) is KINDS["coder"]
    with pytest.raises(UserError, match="has no token <think>"):
        check_chat_tokenizer(load_tokenizer(directory, "thinking-2507"))
