"""Samples of a conversation: one for each answer or one for all answers; when the prompt holds the empty thinking
block; the switches /think and /no_think.
"""

import numpy as np
import pytest

from qwen3f.data.chat.conversation import Conversation
from qwen3f.data.chat.examples import chat_tokens
from qwen3f.data.chat.samples import Sample, make_samples
from qwen3f.data.chat.template import last_switch
from qwen3f.data.sources.adapters.rows import RowFault
from tests.data.chat.conversations import CASES, TOOLS, answer, call, tool, user


def _of(*messages, **more):
    return Conversation(tuple(messages), "x:1", **more)


def test_one_sample_an_answer_with_what_stands_before():
    messages = (user("a"), answer("b", "t"), user("c"), answer("", "u", [call("f", {})]), tool("1"), answer("d", "v"))
    samples = make_samples(_of(*messages, tools=tuple(TOOLS)))
    assert samples == [Sample(messages[:n], "x:1", tuple(TOOLS)) for n in (2, 4, 6)]
    (whole,) = make_samples(_of(*messages), turns="all")
    assert whole == Sample(messages, "x:1", all_turns=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("all_turns", [False, True])
def test_tokens_end_with_the_last_trained_one(name, all_turns, small_qwen, tokenizer):
    case = CASES[name]
    samples = [Sample(tuple(case.messages), "x", case.tools, all_turns, case.enable_thinking)] * 2
    if all_turns and name == "thinking off, history":
        return  # refused: with all turns the thought in the history would be trained too
    for each in (small_qwen, tokenizer):
        options = {"all_turns": all_turns, "enable_thinking": case.enable_thinking}
        ids, trained = chat_tokens(each, case.messages, case.tools, **options)
        for found, marks in zip(*Sample.tokenise(samples, each, 2), strict=True):
            assert found.tolist() == ids[:-1]
            assert marks.tolist() == trained[:-1]
            assert (found.dtype, marks.dtype) == (np.uint32, bool)
            assert marks[-1]
            assert found[-1] == each.special_id("<|im_end|>")


_PLAIN, _THOUGHT = answer("a"), answer("a", "t")


@pytest.mark.parametrize(
    "messages, more, enable_thinking",
    [
        ([user("q"), _THOUGHT], {}, True),
        ([user("q"), _PLAIN], {}, False),  # the prompt holds the block: do not teach to skip thinking unasked
        ([user("q"), answer("a", "\n")], {}, False),
        ([user("q /no_think"), _PLAIN], {}, True),  # asked not to think, the model writes the empty block
        ([user("q /think"), _PLAIN], {}, False),
        ([user("q /no_think /think"), _THOUGHT], {}, True),
        ([user("q /no_think"), _PLAIN, user("r"), _PLAIN], {}, True),  # the switch of an earlier turn still holds
        ([user("q"), _PLAIN], {"enable_thinking": True}, True),
        ([user("q /no_think"), _PLAIN], {"enable_thinking": False}, False),
        ([user("q"), answer("", "t", [call("f", {})]), tool("/no_think"), _PLAIN], {}, False),
    ],
)
def test_whether_the_prompt_holds_the_block(messages, more, enable_thinking):
    assert make_samples(_of(*messages, **more))[-1].enable_thinking is enable_thinking


@pytest.mark.parametrize(
    "messages, enable_thinking",
    [
        ([user("q"), _PLAIN, user("r"), _PLAIN], False),
        ([user("q"), _PLAIN, user("r"), _THOUGHT], True),
        ([user("q"), _THOUGHT, user("r"), _PLAIN], True),
        ([user("q"), _PLAIN, user("r /no_think"), _PLAIN], True),
    ],
)
def test_whether_the_prompts_of_all_turns_hold_it(messages, enable_thinking):
    assert make_samples(_of(*messages), turns="all")[0].enable_thinking is enable_thinking


@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize(
    "messages, more, message",
    [
        ([user("q /no_think"), _THOUGHT], {}, "x:1: Message 1 has a thought after /no_think"),
        ([user("q /no_think"), _THOUGHT, user("r /think"), _THOUGHT], {}, "Message 1 has a thought after /no_think"),
        ([user("q"), _THOUGHT], {"enable_thinking": False}, "Message 1 has a thought, but enable_thinking is false"),
        ([user("q /no_think"), answer("t</think>a")], {}, "has a thought after /no_think: leave one of them out"),
    ],
)
def test_a_thought_that_is_not_asked_for(messages, more, message, turns):
    with pytest.raises(RowFault, match=message) as fault:
        make_samples(_of(*messages, **more), turns)
    assert fault.value.reason == "misplaced_thoughts"


def test_switches_say_the_mode_of_their_share():
    share, count = 0.4, 2000
    said, both = {True: 0, False: 0}, 0
    for number in range(count):
        thinks = bool(number % 2)
        conversation = _of(user("before"), answer("b"), user(f"q{number}"), answer("a", "t" if thinks else None))
        plain, sample = (make_samples(conversation, switches=s)[-1] for s in (0.0, share))
        assert sample == make_samples(conversation, switches=share)[-1]
        assert plain.messages == conversation.messages
        switch = last_switch(sample.messages[:-1])
        if switch is None:
            assert sample == plain
        else:
            said[thinks] += 1
            assert switch is thinks  # if there are two, the last one counts and is right
            assert sample.enable_thinking
            content = sample.messages[2]["content"]
            own, other = ("/think", "/no_think") if thinks else ("/no_think", "/think")
            assert content in (f"q{number} {own}", f"q{number} {other} {own}")
            both += content.count("/") == 2
            assert (*sample.messages[:2], sample.messages[3]) == (*conversation.messages[:2], conversation.messages[3])
    total = sum(said.values())
    # Binomial counts: within five standard deviations of the mean.
    for found, p, n in ((said[True], share, count / 2), (said[False], share, count / 2), (both, 0.25, total)):
        assert abs(found - p * n) < 5 * (n * p * (1 - p)) ** 0.5


def test_switches_leave_alone_what_has_its_own_or_a_mode():
    for messages, more in (
        ([user("q /no_think"), _PLAIN], {}),
        ([user("q"), _PLAIN], {"enable_thinking": True}),
        ([user("<tool_response>\n1\n</tool_response>"), _THOUGHT], {}),
    ):
        (sample,) = make_samples(_of(*messages, **more), switches=1.0)
        assert list(sample.messages) == messages
    (sample,) = make_samples(_of(user("q"), answer("", "t", [call("f", {})])), switches=1.0)
    assert sample.messages[0]["content"].startswith("q /")


@pytest.mark.parametrize("thought, last", [("t", None), (None, "t")])
def test_switches_leave_alone_answers_beside_a_call_of_the_other_mode(thought, last):
    """An added switch would stand before the call too, and the call does not do what that switch asks for."""
    asked = (user("q"), answer("", thought, [call("f", {})]), tool("1"))
    called, answered = make_samples(_of(*asked, answer("a", last)), switches=1.0)
    assert last_switch(called.messages[:-1]) is bool(thought)
    assert answered.messages == (*asked, answer("a", last))
    assert answered.enable_thinking is bool(last)
    again = make_samples(_of(*asked, answer("a", last), user("r"), answer("b", last)), switches=1.0)[-1]
    assert last_switch(again.messages[:-1]) is bool(last)  # calls before the last question do not matter
    for mode in (None, "t"):
        same = make_samples(_of(user("q"), answer("", mode, [call("f", {})]), tool("1"), answer("a", mode)), switches=1)
        assert [last_switch(sample.messages[:-1]) for sample in same] == [bool(mode)] * 2
