"""Reference templates that we did not write: TRL's files.

TRL has none for thinking-2507, so it is made here: the hybrid template with another generation prompt at its end.
"""

from importlib import resources

_TRL = resources.files("trl").joinpath("chat_templates")
_HYBRID = _TRL.joinpath("qwen3.jinja").read_text()
_BODY, _END, _ = _HYBRID.rpartition("{%- if add_generation_prompt %}")
assert _END

REFERENCES = {
    "hybrid": _HYBRID,
    "instruct-2507": _TRL.joinpath("qwen3_instruct_2507.jinja").read_text(),
    "thinking-2507": _BODY + _END + "{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}",
}
