"""A tokenizer that cannot write Qwen3's chats is refused: by its tokens, and by another template beside it."""

import json
import shutil
from importlib import resources

import pytest

from qwen3f.data.chat.qwen_template import check_chat_tokenizer
from qwen3f.data.tokenizers.qwen_tokenizer import QwenTokenizer
from qwen3f.errors import UserError
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
    # Another text of the same meaning, as TRL keeps it.
    content = _templates().joinpath("qwen3.jinja").read_bytes()
    for written in (content, b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")):  # as some editors save it
        (directory / "chat_template.jinja").write_bytes(written)
        check_chat_tokenizer(QwenTokenizer.load(directory))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_training", "llama3", "deepseekv3", "gemma3", "qwen3_instruct_2507"])
def test_other_templates_are_refused(name, directory):
    file = _templates().joinpath(f"{name}.jinja")
    if not file.is_file():
        pytest.fail(f"trl has no template {name}: choose another")
    shutil.copyfile(str(file), directory / "chat_template.jinja")
    with pytest.raises(
        UserError, match=r"template in .*chat_template.jinja is not Qwen3's, .*give --config.data.tokenizer"
    ):
        check_chat_tokenizer(QwenTokenizer.load(directory))


@pytest.mark.parametrize("template", ["{{ broken", "{{ messages[0].absent.more }}", "{{ raise_exception('no') }}", "x"])
def test_broken_templates_are_refused(template, directory):
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(UserError, match=r"template in .*tokenizer_config.json is not Qwen3's"):
        check_chat_tokenizer(QwenTokenizer.load(directory))


def test_a_broken_config_is_named(directory):
    tokenizer = QwenTokenizer.load(directory)
    for content in ("{", "[]"):
        (directory / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match="tokenizer_config.json is no JSON object"):
            check_chat_tokenizer(tokenizer)


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
