"""Rows that cannot be trained on are refused with file, row and remedy; other chats are kept up to the last answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.data.chat.conversation import Conversation, checked_messages, read_conversation
from qwen3f.data.chat.examples import chat_runs
from qwen3f.data.chat.kinds import HYBRID, THINKING
from qwen3f.data.chat.samples import make_samples, thought_of
from qwen3f.data.chat.template import split_thought
from qwen3f.data.sources.adapters.rows import Row, RowFault
from tests.data.chat.conversations import CASES, TOOLS, answer, call, system, tool, user

Q, A = user("q"), answer("a")
_F = call("f", {"x": 1})
_RESULT = user("<tool_response>\n1\n</tool_response>")


def _read(messages, **more):
    return read_conversation(Row({"messages": messages, **more}, "chats.jsonl:7"))


def test_a_row():
    messages = [system("s"), Q, answer("", "t", [_F]), tool("1"), A]
    found = _read(messages, tools=TOOLS, enable_thinking=True, answer="4")
    assert found == Conversation(tuple(messages), "chats.jsonl:7", tuple(TOOLS), True, ("a", "4"))
    assert _read([Q, A], tools=None, answer=None, enable_thinking=None) == Conversation((Q, A), "chats.jsonl:7")
    assert _read([Q, A], tools=[]).tools is None
    # Parquet gives every message all columns, with null where a message lacks one.
    nulls = {"reasoning_content": None, "tool_calls": None, "reasoning": None, "name": None}
    assert _read([{**Q, **nulls}, {**A, **nulls}]).messages == ({**Q, **nulls}, {**A, **nulls})


def test_what_follows_the_last_answer_is_left_out():
    assert _read([Q, A, user("r")]).messages == (Q, A)
    assert _read([Q, answer("", calls=[_F]), tool("1")]).messages == (Q, answer("", calls=[_F]))


def test_a_question_is_known_with_and_without_switches():
    for content in ("What is 2+2?", " What is 2+2? /no_think", "/think What is 2+2?", "What is 2+2? /no_think /think"):
        assert _read([system("s"), user(content), A]).question == b"What is 2+2?"


WORDS = st.sampled_from(["Is", "2+2?", "(a", "x.", "src/think", "你好", "def f():"])
BLANKS = st.sampled_from([" ", "  ", "\n", "\n\n", "\r\n", "\t", ", ", "\n    "])
SWITCHES = st.sampled_from(["/think", "/no_think", "/no_think /think"])


@given(st.lists(st.tuples(WORDS, BLANKS), min_size=1, max_size=6), st.data(), SWITCHES)
def test_a_question_is_known_with_a_switch_at_any_border_of_its_words(pairs, data, switch):
    number, behind = data.draw(st.integers(0, len(pairs) - 1)), data.draw(st.booleans())
    asked = [word + blank for word, blank in pairs]
    word, blank = pairs[number]
    with_switch = f"{word} {switch}{blank}" if behind else f"{switch} {word}{blank}"
    said = "".join([*asked[:number], with_switch, *asked[number + 1 :]])
    assert _read([user(said), A]).question == "".join(asked).strip().encode()


@pytest.mark.parametrize(
    "said, question",
    [
        ("a\n/think\nb", "a\nb"),
        ("a\r\n/think\r\nb", "a\r\nb"),
        ("a\n/think\n/no_think\nb", "a\nb"),
        ("你好/no_think吗", "你好吗"),
        ("Why?/think And how?", "Why? And how?"),
        ("a  b\n\n\nc", "a  b\n\n\nc"),
    ],
)
def test_one_blank_goes_with_a_switch(said, question):
    assert _read([user(said), A]).question == question.encode()


@pytest.mark.parametrize(
    "written, content",
    [
        (answer("a", " "), "a"),
        (answer("  a", "\r\n"), "  a"),
        (answer("<think>\r\n\r\n</think>\r\n\r\na"), "a"),
        (answer("<think> \t</think>  a"), "a"),
        ({**A, "thinking": "\t"}, "a"),
    ],
)
def test_a_thought_of_blanks_is_none(written, content):
    for messages in ([Q, written], [Q, written, Q, A], [user("q /no_think"), written]):
        found = _read(messages).messages[1]
        assert found == answer(content, "")
        assert not thought_of(found)
    for kind in (HYBRID, THINKING):
        (sample,) = make_samples(_read([Q, written]), kind=kind)
        assert not sample.enable_thinking
        runs = chat_runs(sample.messages, None, False, sample.enable_thinking, kind)
        (trained,) = ["".join(part.text for part in run) for run, is_trained in runs if is_trained]
        assert trained == f"{content}<|im_end|>".lstrip("\n")


@pytest.mark.parametrize(
    "name",
    sorted(set(CASES) - {"arguments as text", "empty answer", "no question, blank line first", "thought of blanks"}),
)
def test_well_formed_conversations_are_kept(name):
    case = CASES[name]
    refused = {"end of thinking alone", "begin of thinking alone", "two ends of thinking", "two beginnings"}
    if name in refused:
        with pytest.raises(RowFault):
            _read(case.messages, tools=case.tools)
    else:
        assert list(_read(case.messages, tools=case.tools).messages) == case.messages


@pytest.mark.parametrize(
    "messages, reason, message",
    [
        ([A], "roles_out_of_order", "Message 0 has the role 'assistant': begin with one system's turn or none"),
        ([tool("1"), A], "roles_out_of_order", "Message 0 has the role 'tool': begin with"),
        ([system("s"), A], "roles_out_of_order", "Message 1 has the role 'assistant' after 'system': write it after"),
        ([system("s"), system("s"), Q, A], "roles_out_of_order", "Message 1 has the role 'system': begin with"),
        ([Q, A, system("s"), A], "roles_out_of_order", "Message 2 has the role 'system'"),
        ([Q, Q, A], "roles_out_of_order", "Message 1 has the role 'user' after 'user': write it after system or"),
        ([Q, A, A], "roles_out_of_order", "Message 2 has the role 'assistant' after 'assistant'"),
        ([Q, tool("1"), A], "roles_out_of_order", "Message 1 has the role 'tool' after 'user'"),
        ([Q, A, tool("1"), A], "roles_out_of_order", "Message 2 is a tool's result, but the answer before it calls"),
        ([Q, answer("", calls=[_F]), tool("1"), Q, A], "roles_out_of_order", "'user' after 'tool'"),
        ([Q], "unanswered", "has no assistant's turn: write the answer"),
        ([system("s"), Q], "unanswered", "has no assistant's turn"),
        ([Q, answer("")], "empty_texts", "Message 1 is an empty answer"),
        ([Q, answer("<think>t</think>\n")], "empty_texts", "Message 1 is an empty answer"),
        ([Q, answer(" \n", "thought")], "empty_texts", "Message 1 is an empty answer"),
        ([Q, answer(None, calls=[_F])], "invalid_rows", "Message 1 has content of type NoneType: write a string"),
        ([user(None), A], "invalid_rows", "Message 0 has content of type NoneType: write a string"),
        ([user([{"type": "text", "text": "q"}]), A], "invalid_rows", "Message 0 has content of type list: write a str"),
        ([{"role": "user"}, A], "invalid_rows", "Message 0 has no content: write a string"),
        ([{"from": "human", "value": "q"}, A], "invalid_rows", "Message 0 has the role None: write one of system"),
        ([Q, answer("", calls=[call("f", '{"x": 1}')])], "invalid_rows", "has arguments as text in tool call 0: write"),
        ([Q, answer("", calls=[_F, call("f", [1])])], "invalid_rows", "has arguments as a list in tool call 1"),
        ([Q, answer("", calls=[call("f", None)])], "invalid_rows", "has arguments as a NoneType in tool call 0"),
        ([Q, {**A, "thought": "t"}], "invalid_rows", "1 has the key 'thought', which .* rename it to reasoning_c"),
        ([Q, {**A, "reasoning": "t", "thinking": "u"}], "invalid_rows", "1 has two thoughts, thinking and reasoning"),
        ([Q, {**A, "thinking": ["t"]}], "invalid_rows", "Message 1 has thinking of type list"),
        ([{**Q, "reasoning": "t"}, A], "invalid_rows", "Message 0 has the key 'reasoning', which the chat templ"),
        ([Q, {**A, "weight": 0}], "invalid_rows", "Message 1 has the key 'weight', which the chat template would drop"),
        ([{**Q, "name": "Ann"}, A], "invalid_rows", "Message 0 has the key 'name', which"),
        ([Q, {**A, "function_call": {"name": "f"}}], "invalid_rows", "Message 1 has the key 'function_call'"),
        ([Q, answer("", calls=[{**_F, "result": 1}])], "invalid_rows", "1, tool call 0 has the key 'result', which"),
        ([Q, answer("<think>\nlong")], "misplaced_thoughts", "Message 1 begins with <think> and never ends it"),
        ([Q, answer("<think>t</think>a", "u")], "misplaced_thoughts", "has a thought in its content beside reason"),
        ([Q, answer("so <think>t</think>a")], "misplaced_thoughts", "Message 1 has text that the chat template"),
        ([Q, answer("<think>t</think>a</think>b"), Q, A], "misplaced_thoughts", "Message 1 has text that the chat"),
        ([Q, answer("<think>s<think>t</think>a")], "misplaced_thoughts", "Message 1 has text that the chat template"),
        ([Q, answer("a", 3)], "invalid_rows", "Message 1 has reasoning_content of type int"),
        ([Q, answer("\ud800")], "invalid_rows", "holds the lone surrogate U\\+D800"),
        ([Q, answer("a", "t\ud800"), Q, A], "invalid_rows", "Message 1 holds the lone surrogate U\\+D800"),
        ([Q, {**A, "thinking": "\udfff"}, Q, A], "invalid_rows", "Message 1 holds the lone surrogate U\\+DFFF"),
        ([Q, answer("<think>\udfff</think>a"), Q, A], "invalid_rows", "Message 1 holds the lone surrogate"),
        ([Q, answer("", calls=[call("f", {"\ud800": 1})]), tool("1"), A], "invalid_rows", "the lone surrogate U"),
        ([_RESULT, A], "invalid_rows", "Message 0 is a tool's result within <tool_response>: begin with a question"),
        ([system("s"), _RESULT, answer("a", "t"), Q, A], "invalid_rows", "Message 1 is a tool's result within"),
        ("q", "invalid_rows", "holds no list of records under 'messages'"),
        (["q"], "invalid_rows", "holds no list of records under 'messages'"),
        (None, "null_values", "has null under 'messages'"),
        ([], "null_values", "has an empty list under 'messages'"),
    ],
)  # fmt: skip
def test_bad_conversations_are_named(messages, reason, message):
    with pytest.raises(RowFault, match=message) as fault:
        _read(messages)
    assert fault.value.reason == reason
    assert "chats.jsonl:7" in fault.value.message
    assert "\n" not in fault.value.message


@pytest.mark.parametrize(
    "more, message",
    [
        ({"tools": "[]"}, "has tools of type str: write a list of objects"),
        ({"tools": ["f"]}, "Tool 0 is a str: write its JSON"),
        ({"enable_thinking": "no"}, "has enable_thinking='no': write true or false"),
        ({"answer": 4}, "has a int under 'answer': write a string"),
    ],
)
def test_bad_columns_are_named(more, message):
    with pytest.raises(RowFault, match=message) as fault:
        _read([Q, A], **more)
    assert "chats.jsonl:7" in fault.value.message


@pytest.mark.parametrize("key", ["reasoning", "thinking", "reasoning_content"])
def test_a_thought_is_read_under_each_of_its_names(key):
    """As in transformers 5.24. Keys that hold nothing (null or empty) and ids of calls may stand beside a thought."""
    (_, read) = checked_messages([Q, {**A, key: "t", "refusal": None, "audio": {}, "reasoning_details": []}], "x:1")
    assert split_thought(read) == ("t", A["content"])
    assert set(read) & {"reasoning", "thinking", "reasoning_content"} == {"reasoning_content"}
    result = {"role": "tool", "content": "1", "tool_call_id": "c", "name": "f"}
    called = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}
    assert len(checked_messages([Q, answer("", calls=[called]), result, A], "x:1")) == 4
