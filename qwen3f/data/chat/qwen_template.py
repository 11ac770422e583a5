"""Whether a tokenizer can write Qwen3's chats: it has their tokens, and no other template lies beside it."""

import json
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen3f.data.chat.template import render
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError

_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"

_CALL = {"name": "f", "arguments": {"x": [1, "é"]}}
_PROBE = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "old"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [_CALL, {"function": _CALL}]},
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "d"},
]
_OPTIONS = [
    {},
    {"tools": [{"name": "f"}]},
    {"add_generation_prompt": True},
    {"add_generation_prompt": True, "enable_thinking": False},
]


def check_chat_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises UserError for a tokenizer without the chat's tokens, or with another model's template beside it.

    A template is compared by what it makes of a conversation with tools, results and thoughts, not by its text: Qwen3
    has been published with several texts of the same meaning. A tokenizer without a template is fine.
    """
    for name in _TOKENS:
        try:
            tokenizer.special_id(name)
        except UserError:
            raise UserError(
                f"The tokenizer {tokenizer.path} has no token {name}, which Qwen3's chats need: give "
                "--config.data.tokenizer Qwen3's, or one that was trained here."
            ) from None
    directory = tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent
    for path, template in _templates(directory):
        if not _is_qwen3(template):
            raise UserError(
                f"The chat template in {path} is not Qwen3's, so chats would be written otherwise than it says: give "
                "--config.data.tokenizer a directory with Qwen3's, or take the template out of the file."
            )


def _templates(directory: Path) -> list[tuple[Path, str]]:
    """The templates that lie in a directory of a tokenizer, with their files."""
    found = []
    if (path := directory / _TEMPLATE).is_file():
        found.append((path, path.read_text(encoding="utf-8-sig")))
    if (path := directory / _CONFIG).is_file():
        try:
            template = json.loads(path.read_bytes()).get("chat_template")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is no JSON object ({error}): copy it again.") from error
        if isinstance(template, list):  # several by name: the default one is used
            template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
        if template is not None:
            found.append((path, template))
    return found


def _is_qwen3(template: str) -> bool:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _json
    try:
        compiled = environment.from_string(template)
        return all(compiled.render(messages=_PROBE, **options) == render(_PROBE, **options) for options in _OPTIONS)
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError):  # as other formats need other keys
        return False


def _json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """As transformers writes it: jinja2's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
