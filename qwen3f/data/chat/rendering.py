"""What a chat template makes of conversations. A template is a program, which may run for ever or take all memory: this
is for a process that can be killed, and loads little."""

import json
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment


def rendered(template: str, chats: list[list[dict[str, Any]]], options: list[dict[str, Any]]) -> list[str]:
    """The text of each chat with each of the options, as transformers renders it. Raises whatever the template does."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _json
    compiled = environment.from_string(template)
    return [compiled.render(messages=chat, **chosen) for chat in chats for chosen in options]


def _json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """As transformers writes it: jinja2's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
