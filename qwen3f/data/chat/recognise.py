"""Which kind of chat template lies beside a tokenizer, and whether the tokenizer can write its chats."""

import functools
import json
import shutil
import weakref
from pathlib import Path

from qwen3f.data.chat.kinds import HYBRID, KINDS, TemplateKind, find_kind
from qwen3f.data.chat.template import THINK, THOUGHTS, render
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.files import decode_text, read_bounded, write_atomically
from qwen3f.processes.killable import Killable, Outcome

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
SECONDS = 10.0  # a template may take this long for all probes
TRIES = 3  # of a template in a process; the machine may have been slow for a moment
_OURS = Path(__file__).with_name("jinja")
_TURNS = ("<|im_start|>", "<|im_end|>")
_THOUGHT = ("<think>", "</think>")

# Conversations that tell the kinds apart, and from other models' templates.
_CALL = {"name": "f", "arguments": {"x": [1, "é"], "y": "s"}}
_PROBES = [
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "old"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [_CALL, {"function": _CALL}]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "d"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nold\n</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>\nt\n</think>\n\nd", "tool_calls": [_CALL]},
    ],
    [{"role": "user", "content": "a"}],
]
_FIELD = {"type": "string", "description": " d ", "enum": ["a", "b"]}
_PARAMETERS = {"type": "object", "properties": {"x": _FIELD}, "required": ["x"]}
_TOOL = {"type": "function", "function": {"name": "f", "description": "g", "parameters": _PARAMETERS}}
_OPTIONS = [
    {},
    {"tools": [_TOOL]},
    {"add_generation_prompt": True},
    {"add_generation_prompt": True, "enable_thinking": False},
]
_KINDS: weakref.WeakKeyDictionary[Tokenizer, TemplateKind] = weakref.WeakKeyDictionary()


def kind_of(tokenizer: Tokenizer) -> TemplateKind:
    """The kind of chats that the tokenizer's model was trained on: the chosen one, else that of the template beside it.

    A template is compared by what it makes of conversations with tools, results and thoughts, not by its text: Qwen3
    has been published with several texts of the same meaning. Without a template it is hybrid.

    Raises UserError for a template of no known kind, and for the name of a kind that does not exist.
    """
    if tokenizer.chat_template:
        return find_kind(tokenizer.chat_template)
    if tokenizer not in _KINDS:
        found = own_template(_directory(tokenizer))
        _KINDS[tokenizer] = HYBRID if found is None else _recognise(*found)
    return _KINDS[tokenizer]


def opening(tokenizer: Tokenizer) -> str:
    """The beginning of an answer that the generation prompt already holds: THINK for a kind that always thinks, else
    "".

    Put it before what the model wrote, so that a judge sees the whole answer.
    """
    return THINK if kind_of(tokenizer).always else ""


def check_chat_tokenizer(tokenizer: Tokenizer) -> TemplateKind:
    """`kind_of`; also raises UserError if the tokenizer lacks a special token that chats of this kind need."""
    kind = kind_of(tokenizer)
    for name in _TURNS + (_THOUGHT if kind.thinks else ()):
        try:
            tokenizer.special_id(name)
        except UserError:
            raise UserError(
                f"The tokenizer {tokenizer.path} has no token {name}, which Qwen3's chats need: give "
                "--config.data.tokenizer Qwen3's, or one that was trained here."
            ) from None
    return kind


def own_template(directory: Path) -> tuple[Path, str] | None:
    """The template in a tokenizer's directory, with its file; transformers, too, reads chat_template.jinja first.

    Raises UserError for a file that can't be read, and for several templates without a default one.
    """
    path = directory / TEMPLATE
    try:
        if path.is_file():
            return path, decode_text(read_bounded(path))
        path = directory / CONFIG
        if not path.is_file():
            return None
        template = json.loads(read_bounded(path)).get("chat_template")
        if isinstance(template, list):  # several by name: the default one is used
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        if not isinstance(template, str | None):
            raise TypeError(f"chat_template is a {type(template).__name__}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 ({error}): copy it again.") from error
    except KeyError as error:
        raise UserError(f"{path} has several chat templates and none named default: keep one of them.") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no JSON object with a chat template ({error}): copy it again.") from error
    return None if template is None else (path, template)


def write_template(tokenizer: Tokenizer, directory: Path, *, always: bool) -> None:
    """Write a tokenizer's chat template into `directory`, beside the tokenizer's files there.

    If a kind was chosen, its template is written, over any that is there. Else a template that is there stays; if there
    is none, the one beside the original tokenizer is copied. always: if that is missing too, write that of the kind
    hybrid.
    """
    kind = find_kind(tokenizer.chat_template) if tokenizer.chat_template else None
    if kind is None and own_template(directory) is not None:
        return
    if kind is None and (found := own_template(_directory(tokenizer))) is not None:
        write_atomically(directory / TEMPLATE, found[1].encode())
    elif kind is not None or always:
        shutil.copyfile(_OURS / f"{(kind or HYBRID).name}.jinja", directory / TEMPLATE)


def _directory(tokenizer: Tokenizer) -> Path:
    return tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent


def _recognise(path: Path, template: str) -> TemplateKind:
    made = _rendered(template)
    for kind in KINDS.values():
        if made.value == _expected(kind):
            return kind
    fails = f", as it fails ({made.failure})" if made.failure else ""
    raise UserError(
        f"The chat template in {path} is of no kind that is known ({', '.join(KINDS)}){fails}, so chats would be "
        "written otherwise than the model was trained on: choose the nearest kind with --config.chat_template=KIND, or "
        "give --config.data.tokenizer a directory with a template of Qwen3's."
    )


def _rendered(template: str) -> Outcome:
    """What a template renders for the probes, as a list of texts. A failure if it raises (a template of another format
    may need other keys) or takes longer than SECONDS; later calls try again, until it has been tried TRIES times."""
    tries = _tries(template)
    if not tries or (tries[-1].failure and len(tries) < TRIES):
        with Killable(1, SECONDS) as process:
            function = "qwen3f.data.chat.rendering:rendered"
            tries.append(process.call(function, template=template, chats=_PROBES, options=_OPTIONS))
    return tries[-1]


@functools.lru_cache(maxsize=16)
def _tries(template: str) -> list[Outcome]:
    """The outcomes of a template in this process so far."""
    return []


def _expected(kind: TemplateKind) -> list[str]:
    """What a template of a kind makes of the probes: it drops what it has no place for."""
    texts = []
    for probe in _PROBES:
        dropped = () if kind.thinks else THOUGHTS
        messages = [{key: value for key, value in message.items() if key not in dropped} for message in probe]
        for options in _OPTIONS:
            known = {key: value for key, value in options.items() if kind.asks or key != "enable_thinking"}
            texts.append(render(messages, kind=kind, **known))
    return texts
