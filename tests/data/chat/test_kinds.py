"""Chats of each kind of template are rendered as the template writes them; the kind decides what is trained."""

import pytest
from hypothesis import given, settings

from qwen3f.data.chat.conversation import Conversation
from qwen3f.data.chat.examples import chat_tokens
from qwen3f.data.chat.kinds import CODER, HYBRID, INSTRUCT, KINDS, THINKING
from qwen3f.data.chat.samples import make_samples
from qwen3f.data.chat.template import NO_THINKING, render
from qwen3f.data.sources.adapters.rows import RowFault
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.errors import UserError
from tests.data.chat.conversations import END, answer, call, system, tool, user
from tests.data.chat.references import REFERENCES
from tests.interop.test_chat_template import CHATS, TOOL_LISTS, apply_template

_SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Look it up. ",
        "parameters": {
            "type": "object",
            "properties": {"q": {"type": "string", "description": " what\n", "enum": ["a", "é"]}, "n": {}},
            "required": ["q"],
        },
        "strict": True,
    },
}


@settings(max_examples=80)
@given(CHATS, TOOL_LISTS)
@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_any_chat_equals_the_reference(name, messages, tools):
    kind = KINDS[name]
    if not kind.thinks:
        messages = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in messages]
    for prompt in (False, True):
        theirs = apply_template(REFERENCES[name], messages, tools=tools, add_generation_prompt=prompt)
        assert render(messages, tools=tools, add_generation_prompt=prompt, kind=kind) == theirs


def test_coder_writes_xml():
    """Expected text by hand from the template of Qwen3-Coder-30B-A3B-Instruct: no package of our tests has the file."""
    messages = [
        user("q"),
        answer(" Looking. ", calls=[call("search", {"q": "é", "n": 3, "l": [1, "é"], "b": True, "none": None})]),
        tool("1"),
        tool("2"),
        answer("", calls=[call("search", {}), call("search", {"q": "x\ny"}, wrapped=False)]),
        tool("3"),
        answer(" done "),
        system("late"),
    ]
    text = render(messages, tools=[_SEARCH, {"name": "f"}], add_generation_prompt=True, kind=CODER)
    head, _, rest = text.partition("</IMPORTANT>")
    assert head.startswith(
        "<|im_start|>system\nYou are Qwen, a helpful AI assistant that can interact with a computer to solve tasks.\n\n"
        "# Tools\n\nYou have access to the following tools:\n\n<tools>\n<function>\n<name>search</name>\n"
        "<description>Look it up.</description>\n<parameters>\n<parameter>\n<name>q</name>\n<type>string</type>\n"
        '<description>what</description>\n<enum>["a", "é"]</enum>\n</parameter>\n<parameter>\n<name>n</name>\n'
        '</parameter>\n<required>["q"]</required>\n</parameters>\n<strict>True</strict>\n</function>\n<function>\n'
        "<name>f</name>\n<parameters>\n</parameters>\n</function>\n</tools>\n\nIf you choose to call a tool ONLY reply"
    )
    assert rest == (
        "<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\nLooking.\n\n<tool_call>\n<function=search>\n<parameter=q>\né\n</parameter>\n"
        '<parameter=n>\n3\n</parameter>\n<parameter=l>\n[1, "é"]\n</parameter>\n<parameter=b>\nTrue\n</parameter>\n'
        "<parameter=none>\nNone\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>\n<|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>\n<function=search>\n</function>\n</tool_call>\n<tool_call>\n"
        "<function=search>\n<parameter=q>\nx\ny\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<|im_end|>\n<|im_start|>assistant\n done <|im_end|>\n"
        "<|im_start|>system\nlate<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render([system("s"), user("q")], kind=CODER) == render([system("s"), user("q")])
    with pytest.raises(UserError, match="Tool call 0 has arguments of type str: write a dict"):
        render([user("q"), answer("", calls=[call("f", "{}")])], kind=CODER)


@pytest.mark.parametrize("kind", [INSTRUCT, CODER], ids=lambda kind: kind.name)
def test_where_there_are_no_thoughts_none_is_written_trained_or_dropped(kind, qwen, qwen_files):
    tokenizer = load_tokenizer(qwen_files, kind.name)
    chat = [user("q"), answer("old"), user("r /no_think"), answer("a")]
    text = render(chat, kind=kind)
    assert "<think>" not in text
    ids, trained = chat_tokens(tokenizer, chat)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([i for i, bit in zip(ids, trained) if bit]) == f"a{END}"
    whole, bits = chat_tokens(tokenizer, chat, all_turns=True)
    assert tokenizer.decode([i for i, bit in zip(whole, bits) if bit]) == f"old{END}a{END}"
    for enable in (None, False, True):
        samples = make_samples(Conversation(tuple(chat), "x:1", None, enable), kind=kind)
        assert [sample.text for sample in samples] == [render(chat[:2], kind=kind), text]
    with pytest.raises(UserError, match=rf"Message 1 has a thought, and .* kind {kind.name}, has no place for one"):
        chat_tokens(tokenizer, [user("q"), answer("a", "t"), user("r"), answer("b")])
    for one in (answer("a", "t"), answer("<think>\nt\n</think>\n\na"), answer("<think>\n\n</think>\n\na")):
        with pytest.raises(RowFault, match=rf"x:1: Message 1 has a thought, and .*{kind.name}.*chat_template=hybrid"):
            make_samples(Conversation((user("q"), one), "x:1"), kind=kind)
    with pytest.raises(UserError, match="which never thinks"):
        render(chat[:1], add_generation_prompt=True, enable_thinking=True, kind=kind)


def test_where_the_prompt_opens_the_thought_its_opening_is_not_trained(qwen_files):
    tokenizer = load_tokenizer(qwen_files, THINKING.name)
    prompt = render([user("q")], add_generation_prompt=True, kind=THINKING)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")

    def trained(*messages, **options):
        ids, bits = chat_tokens(tokenizer, messages, **options)
        assert tokenizer.decode(ids) == render(messages, kind=THINKING)
        return tokenizer.decode([i for i, bit in zip(ids, bits) if bit])

    assert trained(user("q"), answer("a", "t")) == f"t\n</think>\n\na{END}"
    assert trained(user("q"), answer("a")) == f"\n</think>\n\na{END}"
    assert trained(user("q"), answer("a"), enable_thinking=False) == f"a{END}"
    # In training data, an answer without a thought must not teach to skip thinking, whatever the user writes.
    for text in ("q", "q /no_think", "q /think"):
        (sample,) = make_samples(Conversation((user(text), answer("a")), "x:1"), kind=THINKING)
        assert not sample.enable_thinking
    (sample,) = make_samples(Conversation((user("q /no_think"), answer("a", "t")), "x:1"), kind=THINKING)
    assert sample.enable_thinking
    (sample,) = make_samples(Conversation((user("q"), answer("a")), "x:1"), kind=HYBRID)
    assert NO_THINKING in sample.text
    with pytest.raises(UserError, match="which always thinks"):
        render([user("q")], add_generation_prompt=True, enable_thinking=False, kind=THINKING)
    with pytest.raises(UserError, match="needs a user's turn before the answer"):
        chat_tokens(tokenizer, [answer("a")])
