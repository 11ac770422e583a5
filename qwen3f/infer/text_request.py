"""Turns a text or a chat with options into a request to the engine: chat format, sampling, length of the answer."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3f import rng
from qwen3f.config import ModelConfig
from qwen3f.data.chat.kinds import HYBRID, check_thinking
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.chat.template import Message, check_tools, encode_chat, thinking_mode
from qwen3f.data.tokenizers.token_text import check_encodable
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.finite import as_finite
from qwen3f.infer.prompts import Shown, encode_shown, pictures_of
from qwen3f.infer.request import Request, check_request
from qwen3f.infer.sampling import GREEDY, NON_THINKING, THINKING, SamplingParams
from qwen3f.infer.thinking import CLOSING, ThinkingBudget

Content = str | Sequence[Message]
"""A user's text (with chat=False a text to continue), or the messages of a chat that ends with a user's turn."""

NO_CHAT = "messages need the chat format; write chat=True, or a prompt that is a text"

_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """How a text is answered. The names are those of experiments/generate.py and of a batch file's rows.

    Attributes:
      chat: the text is a user's turn in Qwen3's chat format; False: text to continue.
      system: system message, for a chat that does not begin with one.
      tools: JSON descriptions of functions that the model may call, for a chat. Calls are part of the answer's text.
      thinking: True lets the model think first, unless the last soft switch in the chat is /no_think. False: never;
        switches then have no effect, as in Qwen3. None: the default of the model's chat template. Models that always
        think, or never, have no switches. (After /no_think Qwen3 writes an empty thinking block itself; here the block
        is in the prompt, with the same tokens.)
      thinking_budget: after this many tokens, thinking ends with Qwen3's closing sentence.
      max_new_tokens: the answer has at most this many tokens.
      temperature … presence_penalty: None means what Qwen3 recommends for the mode, and greedy without chat.
      seed: of the random stream.
      stop: the answer ends before the first of these texts, even if it begins within a token.
    Lists become tuples.
    Raises UserError for a bad value; the message begins with the name of the field.
    """

    chat: bool = True
    system: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool | None = False
    thinking_budget: int | None = None
    max_new_tokens: int = 512
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tools", "stop"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_kinds(self)
        check_tools(self.tools, "tools")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        rng.check_seed(self.seed)
        for name, given in (("system", self.system), ("tools", self.tools), ("thinking=True", self.thinking)):
            if given and not self.chat:
                raise UserError(f"{name} needs the chat format; leave it out, or write chat=True")
        if self.thinking_budget is not None:
            if not self.chat or self.thinking is False:
                raise UserError("thinking_budget needs chat and thinking; set both to True, or leave it out")
            if self.thinking_budget < 0:
                raise UserError(f"thinking_budget must be a number of tokens from 0 on, got {self.thinking_budget}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop must be texts that are not empty, got {self.stop!r}")
        texts = [("system", self.system), ("tools", _as_json(self.tools)), *(("stop", text) for text in self.stop)]
        for name, text in texts:
            try:
                check_encodable(text)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        choose_sampling(self, self.thinking is not False)

    def changed(self, **values: Any) -> "TextOptions":
        """A copy with other values. Raises UserError for an unknown name or a bad value."""
        if unknown := [name for name in values if name not in FIELDS]:
            raise UserError(f"{unknown[0]} is unknown; write one of {', '.join(FIELDS)}")
        if values.get("chat") is False:
            values.setdefault("thinking", None)
        if values.get("thinking") is False or values.get("chat") is False:
            values.setdefault("thinking_budget", None)
        return dataclasses.replace(self, **values)


FIELDS = tuple(field.name for field in dataclasses.fields(TextOptions))


def choose_sampling(options: TextOptions, thinks: bool) -> SamplingParams:
    """Qwen3's recommendation for the mode (greedy without chat), where each value that the options set replaces its."""
    base = (THINKING if thinks else NON_THINKING) if options.chat else GREEDY
    given = {name: getattr(options, name) for name in _SAMPLING}
    return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})


def make_request(
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    content: Content,
    options: TextOptions,
    stream: int = 0,
    shown: Sequence[Shown] = (),
) -> Request:
    """The request for an answer to `content`.

    Args:
      stream: requests with the same seed and different streams draw differently.
      shown: images and videos, placed at the beginning of the chat's first question.
    Raises UserError for a text that is empty or not UTF-8; for malformed messages; for a prompt and answer that exceed
    the model's positions; for thinking if the model's chat template has none, or the reverse; and as
    qwen3f.data.chat.recognise.kind_of does.
    """
    thinks = False
    if not options.chat:
        if not isinstance(content, str):
            raise UserError(NO_CHAT)
        ids = tokenizer.encode(_not_empty(content))
    else:
        messages = chat_messages(content, options.system)
        thinks = check_kind(tokenizer, options)
        if thinks and kind_of(tokenizer).asks:
            thinks = thinking_mode(messages)
        if shown:
            texts = [one.text for one in shown]
            ids = encode_shown(tokenizer, messages, texts, tools=options.tools, thinking=thinks)
        else:
            ids = encode_chat(
                tokenizer, messages, tools=options.tools, add_generation_prompt=True, enable_thinking=thinks
            )
    budget = None
    if thinks and options.thinking_budget is not None:
        closing = tuple(tokenizer.encode(CLOSING, allow_special=True))
        budget = ThinkingBudget(options.thinking_budget, tokenizer.special_id("</think>"), closing)
    check_length(cfg, len(ids), options.max_new_tokens)
    asked = Request(
        prompt=tuple(ids),
        max_new_tokens=options.max_new_tokens,
        sampling=choose_sampling(options, thinks),
        seed=options.seed,
        stream=stream,
        stop_ids=tuple(tokenizer.stop_ids),
        stop_texts=options.stop,
        budget=budget,
        pictures=pictures_of(shown),
    )
    check_request(asked, cfg, tokenizer)
    return asked


def check_kind(tokenizer: Tokenizer, options: TextOptions) -> bool:
    """Whether the model thinks with these options, if no switch says otherwise. Raises UserError for options that the
    kind of its chat template does not have."""
    kind = kind_of(tokenizer)
    thinks = check_thinking(kind, options.thinking)
    if options.thinking_budget is not None and not thinks:
        raise UserError(
            f"thinking_budget needs a model that thinks, and chats of the kind {kind.name} never do: leave it out, or "
            f"write --config.chat_template={HYBRID.name}"
        )
    return thinks


def chat_messages(content: Content, system: str) -> list[Message]:
    """The messages of a chat. Raises UserError for an empty text, or a chat that does not end with a user's turn."""
    messages = [{"role": "user", "content": _not_empty(content)}] if isinstance(content, str) else list(content)
    if system and messages and isinstance(messages[0], Mapping) and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") in ("system", "assistant"):
        raise UserError(f"messages end with a turn of the {messages[-1]['role']}; end with the user's, to be answered")
    return messages


def check_length(cfg: ModelConfig, prompt_tokens: int, max_new_tokens: int, name: str = "max_new_tokens") -> None:
    """Raises UserError for a prompt that leaves no room for its answer. name: what sets max_new_tokens."""
    room = cfg.max_position_embeddings
    if prompt_tokens >= room:
        raise UserError(f"a prompt has {prompt_tokens} tokens and the model takes {room} with the answer; shorten it")
    if prompt_tokens + max_new_tokens > room:
        raise UserError(
            f"{name}={max_new_tokens} after a prompt of {prompt_tokens} tokens exceeds the model's {room} "
            f"positions; write {room - prompt_tokens} or less"
        )


def _as_json(tools: Sequence[Mapping[str, Any]]) -> str:
    try:
        return json.dumps(tools, ensure_ascii=False, allow_nan=False)
    except ValueError as error:  # Python's json reads NaN, and a number such as 1e999 as infinite
        raise UserError("tools holds a number that JSON cannot write: write it as a text") from error


def _not_empty(text: str) -> str:
    if not text:
        raise UserError("a prompt is empty; write a text")
    return text


def _check_kinds(options: TextOptions) -> None:
    """Checks the types of all fields: values may come from JSON, where nothing else does."""
    kinds = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}
    lists = {"tools": "a list of objects", "stop": "a list of texts"}
    for field in dataclasses.fields(options):
        value, optional = getattr(options, field.name), field.default is None or field.name == "thinking"
        if value is None and optional:
            continue
        kind = _KINDS[field.name]
        fits = as_finite(value) is not None if kind is float else isinstance(value, kind)
        if not fits or (kind is int and isinstance(value, bool)):
            raise UserError(f"{field.name} must be {lists.get(field.name) or kinds[kind]}, got {value!r}")


_KINDS: dict[str, type] = {
    "chat": bool, "system": str, "tools": tuple, "thinking": bool, "thinking_budget": int, "max_new_tokens": int,
    "temperature": float, "top_k": int, "top_p": float, "min_p": float, "presence_penalty": float, "seed": int,
    "stop": tuple,
}  # fmt: skip
