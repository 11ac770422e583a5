"""In transformers, an exported directory renders chats as ours do and gives the same ids."""

import json

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from qwen3f import params
from qwen3f.config import ModelConfig
from qwen3f.data.chat.kinds import KINDS
from qwen3f.data.chat.template import encode_chat, render
from qwen3f.data.tokenizers.bpe_export import write_vocabulary
from qwen3f.data.tokenizers.bpe_files import find_form, read_vocabulary
from qwen3f.data.tokenizers.sentencepiece_tokenizer import train_sentencepiece
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.interop import hf
from tests.data.tokenizers.small_bpe import small_tokenizer_json

CFG = ModelConfig(num_hidden_layers=2, hidden_size=16, head_dim=8, intermediate_size=24, vocab_size=400)
_TEXT = st.lists(
    st.sampled_from(
        ["", "a", " b", "\n", "\n\n", "<think>", "</think>", "é中", "'", '"', "<&>", "\\", "{{ x }}", "{%"]
    ),
    max_size=4,
).map("".join)
_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from([0.5, 1e-9]) | _TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_TEXT, inner, max_size=2),
    max_leaves=4,
)
_CALL = st.fixed_dictionaries({"name": _TEXT, "arguments": _VALUE})
_CALL |= st.builds(lambda call: {"type": "function", "id": "c", "function": call}, _CALL)
_ANSWER = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": _TEXT},
    optional={
        "reasoning_content": st.none() | _TEXT,
        "tool_calls": st.none() | st.lists(_CALL, max_size=2),
    },
)
_RESPONSE = "<tool_response>\nx\n</tool_response>"
_OTHER = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "tool"]), "content": _TEXT | st.just(_RESPONSE)}
)
CHATS = st.lists(_OTHER | _ANSWER, min_size=1, max_size=6)
TOOL_LISTS = st.none() | st.lists(st.dictionaries(_TEXT, _VALUE, max_size=2), max_size=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"def f{i}(x):\n    return x + {i}  # das Maß\n" for i in range(40)]
    return train_sentencepiece(texts, 350, tmp_path_factory.mktemp("tokenizer") / "code.model")


def apply_template(template, messages, **options):
    """What transformers makes of a chat."""
    return render_jinja_template([messages], chat_template=template, **options)[0][0]


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    """The exported directory of each kind, opened by transformers."""
    found = {}
    for kind in KINDS:
        place = tmp_path_factory.mktemp("export") / "out"
        hf.save_pretrained(place, CFG, params.init_params(CFG, 0), load_tokenizer(tokenizer.path, kind))
        found[kind] = transformers.AutoTokenizer.from_pretrained(place)
    return found


@settings(max_examples=60, deadline=None)
@given(CHATS, TOOL_LISTS, st.booleans(), st.booleans())
@example(
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nt\n</think>\n\na"}], None, True, False
)
@pytest.mark.parametrize("name", KINDS)
def test_chats_are_rendered_alike(tokenizer, theirs, name, messages, tools, prompt, think):
    """Text and ids are equal. Inputs avoid our errors: no thoughts where a kind drops them, named arguments for XML."""
    kind, options = KINDS[name], {"tools": tools, "add_generation_prompt": prompt}
    if kind.asks:
        options["enable_thinking"] = think
    if not kind.thinks:
        messages = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in messages]
    if kind.xml:
        messages = [_with_objects(message) for message in messages]
        options["tools"] = [{"name": "f", **tool} for tool in tools or []]
    text = render(messages, kind=kind, **options)
    assert theirs[name].apply_chat_template(messages, tokenize=False, **options) == text
    ids = theirs[name].apply_chat_template(messages, **options)["input_ids"]
    chosen = load_tokenizer(tokenizer.path, name)
    assert ids == encode_chat(chosen, messages, trust_content=True, **options)


def _with_objects(message):
    """The message with its calls' arguments as objects."""
    calls = [json.loads(json.dumps(entry)) for entry in message.get("tool_calls") or []]
    for entry in calls:
        call = entry.get("function") or entry
        call["arguments"] = {"x": call["arguments"]}
    return {**message, "tool_calls": calls} if calls else message


def test_a_role_that_does_not_exist(theirs):
    for message in ({"role": "bot", "content": "x"}, {"content": "x"}):
        with pytest.raises(Exception, match="write system, user, assistant or tool"):
            theirs["hybrid"].apply_chat_template([{"role": "user", "content": "a"}, message], tokenize=False)


def test_a_directory_s_own_template_is_kept(tmp_path):
    """Our template is written only if the tokenizer's files have none, as with qwen.tiktoken."""
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    (vocabulary / "tokenizer.json").write_text(json.dumps(small_tokenizer_json()))
    p = params.init_params(CFG, 0)
    hf.save_pretrained(tmp_path / "none", CFG, p, load_tokenizer(vocabulary))
    chat = [{"role": "user", "content": "hi"}]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "none").apply_chat_template(
        chat, tokenize=False
    ) == render(chat)

    (vocabulary / "chat_template.jinja").write_text("theirs")
    hf.save_pretrained(tmp_path / "file", CFG, p, load_tokenizer(vocabulary))
    assert (tmp_path / "file" / "chat_template.jinja").read_text() == "theirs"

    (vocabulary / "chat_template.jinja").unlink()
    write_vocabulary(read_vocabulary(find_form(vocabulary)), vocabulary)
    config = json.loads((vocabulary / "tokenizer_config.json").read_text())
    (vocabulary / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "in the config"}))
    hf.save_pretrained(tmp_path / "config", CFG, p, load_tokenizer(vocabulary))
    assert not (tmp_path / "config" / "chat_template.jinja").exists()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "config").chat_template == "in the config"
