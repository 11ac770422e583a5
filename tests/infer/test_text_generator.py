"""Text in, text out: the calls of the project's description, streaming in pieces, stop texts, characters that are cut
in two; how a text becomes a request."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.data.chat.template import encode_chat
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.generate import generate
from qwen3f.infer.prompts import encode_shown
from qwen3f.infer.request import Request, Row
from qwen3f.infer.sampling import GREEDY, NON_THINKING, THINKING, SamplingParams
from qwen3f.infer.text_generator import Answer, TextGenerator
from qwen3f.infer.text_request import TextOptions, choose_sampling, make_request


@pytest.fixture(scope="module")
def generator(source):
    _, cfg, p, tokenizer = source
    return TextGenerator(cfg, p, tokenizer)


@pytest.mark.parametrize("options", [{}, {"thinking": True}, {"chat": False}], ids=["plain", "thinking", "text"])
def test_the_descriptions_calls(source, generator, options):
    """gen.generate("…", max_new_tokens=256), and the same with thinking=True. Compared with the tokens that `generate`
    draws, without the stop id."""
    _, cfg, p, tokenizer = source
    text = "What is the answer to question 5?"
    ids = tokenizer.encode(text)
    if options.get("chat", True):
        messages, thinking = [{"role": "user", "content": text}], options.get("thinking", False)
        ids = encode_chat(tokenizer, messages, add_generation_prompt=True, enable_thinking=thinking)
        kind = THINKING if thinking else NON_THINKING
    else:
        kind = GREEDY
    values = {name: getattr(kind, name) for name in ("temperature", "top_k", "top_p", "presence_penalty")}
    new = generate(cfg, p, torch.tensor([ids]), max_new_tokens=40, seed=3, stop_ids=tokenizer.stop_ids, **values)
    expected = tokenizer.decode([i for i in new[0, len(ids) :].tolist() if i not in tokenizer.stop_ids])
    assert generator.generate(text, max_new_tokens=40, seed=3, **options) == expected
    pieces = list(generator.stream(text, max_new_tokens=40, seed=3, **options))
    assert "".join(pieces) == expected
    assert len(pieces) > 5
    if options.get("chat", True):
        assert generator.generate(messages, max_new_tokens=40, seed=3, **options) == expected


def test_a_stream_that_is_left_early_ends_its_answer(generator):
    for _ in generator.stream("What?", max_new_tokens=200, temperature=0.0):
        break
    assert not generator._engine.step()


def test_an_interrupted_answer_ends(source, monkeypatch):
    """Ctrl-C in a cell of a notebook: the next cell works as if the stopped one had never run."""
    _, cfg, p, tokenizer = source
    gen = TextGenerator(cfg, p, tokenizer)
    expected = gen.generate("What?", max_new_tokens=20)
    launch, passes = gen._engine._device.launch, []

    def interrupted(*plan):
        passes.append(None)
        if len(passes) == 5:
            raise KeyboardInterrupt
        return launch(*plan)

    monkeypatch.setattr(gen._engine._device, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gen.generate("Hello", max_new_tokens=200)
    assert not gen._engine.step()
    assert gen.generate("What?", max_new_tokens=20) == expected


class Bytes:
    """A tokenizer whose id i is byte i."""

    def token_bytes(self, token, skip_special=False):
        return bytes([token])


STOP_ID = 0


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("abé€", max_size=12),
    torn=st.sampled_from([b"", b"\xc3", b"\xe2\x82"]),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3).map(tuple),
    end=st.sampled_from(["stop id", "length", "cancelled"]),
    sizes=st.lists(st.integers(1, 4), max_size=30),
)
def test_pieces_join_to_the_text_before_the_first_stop_text(text, torn, stops, end, sizes):
    """However many tokens arrive between two reads. An incomplete character at the end of the answer becomes one
    U+FFFD. A piece before the end never has one."""
    raw = text.encode() + torn
    whole = raw.decode(errors="replace")
    row = Row(Request((1,), 99, stop_ids=(STOP_ID,), stop_texts=stops), 0)
    answer, pieces, tokens = Answer(row, Bytes()), [], [*raw, *([STOP_ID] if end == "stop id" else [])]
    for size in sizes:
        row.tokens += tokens[:size]
        del tokens[:size]
        decoded = bytes(row.tokens[1:]).decode(errors="ignore")
        if any(stop in decoded for stop in stops) or not tokens:
            break
        pieces.append(answer.read())
        assert whole.startswith("".join(pieces))
    row.tokens += tokens if not any(stop in bytes(row.tokens[1:]).decode(errors="ignore") for stop in stops) else []
    row.finish_reason = "stop"
    pieces.append(answer.read())
    said = bytes(token for token in row.tokens[1:] if token != STOP_ID).decode(errors="replace")
    cut = min((place for stop in stops if (place := said.find(stop)) >= 0), default=len(said))
    assert "".join(pieces) == answer.text == said[:cut]
    assert answer.read() == ""


def test_settings_override_the_recommendation_one_by_one():
    options = TextOptions(thinking=True)
    assert choose_sampling(options, True) == THINKING
    options = options.changed(temperature=0.0)
    assert choose_sampling(options, True) == SamplingParams(0.0, 20, 0.95)
    options = options.changed(thinking=False, min_p=0.1)
    assert choose_sampling(options, False) == SamplingParams(0.0, 20, 0.8, 0.1, 1.5)
    assert choose_sampling(options.changed(chat=False, temperature=None), False) == SamplingParams(min_p=0.1)
    # as a row with chat=False in a batch file of chats
    text = TextOptions(thinking=True, thinking_budget=4).changed(chat=False)
    assert (text.thinking, text.thinking_budget) == (None, None)


def test_stop_texts_may_be_a_list():
    assert TextOptions().changed(stop=["###"]) == TextOptions(stop=["###"]) == TextOptions(stop=("###",))


@pytest.mark.parametrize(
    "text, thinking, thinks",
    [
        ("a", True, True),
        ("a /no_think", True, False),
        ("/no_think a /think", True, True),
        ("a", False, False),
        ("a /think", False, False),
        ("a", None, True),
        ("a /no_think", None, False),
    ],
)
def test_soft_switches_decide_only_where_thinking_is_allowed(source, text, thinking, thinks):
    _, cfg, _, tokenizer = source
    asked = make_request(cfg, tokenizer, text, TextOptions(thinking=thinking, max_new_tokens=9))
    messages = [{"role": "user", "content": text}]
    ids = encode_chat(tokenizer, messages, add_generation_prompt=True, enable_thinking=thinks)
    assert list(asked.prompt) == ids
    assert asked.sampling == (THINKING if thinks else NON_THINKING)


@pytest.mark.parametrize("kind", ["instruct-2507", "thinking-2507", "coder"])
def test_a_kind_of_chats_that_does_not_ask_has_no_switches(source, kind):
    directory, cfg, _, _ = source
    tokenizer = load_tokenizer(directory, kind)
    thinks = kind == "thinking-2507"
    for text in ("a /think", "a /no_think"):
        for thinking in (None, thinks):
            asked = make_request(cfg, tokenizer, text, TextOptions(thinking=thinking, max_new_tokens=9))
            messages = [{"role": "user", "content": text}]
            assert list(asked.prompt) == encode_chat(tokenizer, messages, add_generation_prompt=True)
            assert asked.sampling == (THINKING if thinks else NON_THINKING)
        with pytest.raises(UserError, match=f"of the kind {kind}, which"):
            make_request(cfg, tokenizer, text, TextOptions(thinking=not thinks, max_new_tokens=9))


def test_a_system_message_is_the_options_where_the_chat_has_none(source):
    _, cfg, _, tokenizer = source
    system, own, user = ({"role": r, "content": c} for r, c in (("system", "S"), ("system", "T"), ("user", "a")))
    options = TextOptions(system="S", max_new_tokens=9)

    def prompt(content):
        return list(make_request(cfg, tokenizer, content, options).prompt)

    def ids(messages):
        return encode_chat(tokenizer, messages, add_generation_prompt=True, enable_thinking=False)

    assert prompt("a") == prompt([user]) == ids([system, user])
    assert prompt([own, user]) == ids([own, user])


TOOLS = [
    {"type": "function", "function": {"name": "area", "parameters": {"properties": {"side": {"type": "number"}}}}},
    {"name": "now"},
]


def test_tools_are_in_the_prompt(source):
    """For every answer, beside a system message, and with images."""
    _, cfg, _, tokenizer = source
    cfg = cfg.replace(max_position_embeddings=4096)
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    asked = make_request(cfg, tokenizer, "a", TextOptions(system="S", tools=TOOLS))
    ids = encode_chat(tokenizer, turns, tools=TOOLS, add_generation_prompt=True, enable_thinking=False)
    assert list(asked.prompt) == ids
    assert len(ids) > len(make_request(cfg, tokenizer, "a", TextOptions(system="S")).prompt)
    assert encode_shown(tokenizer, turns, [], tools=TOOLS, thinking=False) == ids


@pytest.mark.parametrize(
    "text, options, words",
    [
        ("a", {"tools": TOOLS, "chat": False}, "tools needs the chat format"),
        ("a", {"tools": "area"}, "tools must be a list of objects, got 'area'"),
        ("a", {"tools": TOOLS[0]}, "tools must be a list of objects"),
        ("a", {"tools": [TOOLS[0], "now"]}, "tools 1 is a str"),
        ("a", {"tools": [{"name": {1}}]}, "tools 0 cannot be written as JSON"),
        ("", {}, "a prompt is empty"),
        ("", {"chat": False}, "a prompt is empty"),
        ("word " * 300, {}, "a prompt has .* tokens and the model takes 256 with the answer"),
        ("a", {"max_new_tokens": 250}, r"max_new_tokens=250 after a prompt of .* exceeds .*; write 2\d\d or less"),
        ("a\ud800", {}, "lone surrogate"),
        ("a", {"stop": ("\udfff",)}, "lone surrogate"),
        ("a", {"stop": ("",)}, "stop must be texts that are not empty"),
        ("a", {"stop": "###"}, "stop must be a list of texts"),
        ("a", {"temperatur": 1.0}, "temperatur is unknown; write one of chat, system"),
        ("a", {"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ("a", {"temperature": float("nan")}, "temperature must be a number"),
        ("a", {"temperature": 10**400}, "temperature must be a number"),
        ("a", {"top_p": 10**400}, "top_p must be a number"),
        ("a", {"min_p": -(10**400)}, "min_p must be a number"),
        ("a", {"presence_penalty": 10**400}, "presence_penalty must be a number"),
        ("a", {"top_k": 5.0}, "top_k must be a whole number"),
        ("a", {"stop": ["a", 3]}, "stop must be texts that are not empty"),
        ("a", {"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ("a", {"thinking": 1}, "thinking must be true or false"),
        ("a", {"seed": 2**64}, "seed must be a whole number from"),
        ("a", {"thinking_budget": 3}, "thinking_budget needs chat and thinking"),
        ([], {}, "A chat needs a list of at least one message"),
        ([{"role": "user"}], {}, "Message 0 has no content"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], {}, "end with the user's"),
        ([{"role": "user", "content": "a"}], {"chat": False}, "messages need the chat format"),
    ],
)
def test_bad_input_is_named_at_once(generator, text, options, words):
    with pytest.raises(UserError, match=words):
        generator.stream(text, **{"max_new_tokens": 8, **options})


def test_stop_texts_that_no_token_begins_never_stop(generator):
    free = generator.generate("What?", max_new_tokens=30, seed=1)
    assert generator.generate("What?", max_new_tokens=30, seed=1, stop=("≠ unknown ≠", "<|no such token|>")) == free


def test_the_name_of_a_special_token_is_a_stop_text(source, tmp_path):
    """The head is 0 except for <think>, so the model writes nothing else."""
    _, cfg, p, tokenizer = source
    head = torch.zeros_like(p["lm_head.weight"])
    head[tokenizer.special_id("<think>")] = 1
    p = {**p, "lm_head.weight": head, "model.norm.weight": torch.ones_like(p["model.norm.weight"])}
    gen = TextGenerator(cfg, p, tokenizer)
    free = gen.generate("a", max_new_tokens=3, temperature=0.0, presence_penalty=0.0)
    if free != "<think>" * 3:  # the logit of <think> is negative, so change its sign
        p["lm_head.weight"] = -head
        gen = TextGenerator(cfg, p, tokenizer)
        free = gen.generate("a", max_new_tokens=3, temperature=0.0, presence_penalty=0.0)
    assert free.startswith("<think>")
    assert gen.generate("a", max_new_tokens=3, temperature=0.0, presence_penalty=0.0, stop=("<think>",)) == ""


def test_a_seed_of_a_request_is_its_own(source):
    _, cfg, p, tokenizer = source
    gen = TextGenerator(cfg, p, tokenizer)
    asks = [("Q", 1, 0), ("Q", 2, 0), ("Q", 1, 1), ("Q", 1, 0)]
    requests = [
        make_request(cfg, tokenizer, text, TextOptions(seed=seed, max_new_tokens=30), stream)
        for text, seed, stream in asks
    ]
    rows = {}
    for answers in gen.answer(requests):
        for answer in answers:
            answer.read()
            rows[id(answer.row.request)] = answer.text
    texts = [rows[id(request)] for request in requests]
    assert texts[0] == texts[3] == gen.generate("Q", seed=1, max_new_tokens=30)
    assert len({*texts}) == 3
