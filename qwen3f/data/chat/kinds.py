"""The kinds of chat template that Qwen3's models have been published with.

    hybrid         Qwen3: thinks unless enable_thinking=False puts an empty thinking block into the prompt
    instruct-2507  Qwen3-…-Instruct-2507: no thoughts and no block
    thinking-2507  Qwen3-…-Thinking-2507: the prompt ends with "<think>", so the model always thinks
    coder          Qwen3-Coder: no thoughts; tools and calls as XML, in a system turn of its own

`recognise` says which one lies beside a tokenizer; `template` writes all of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from qwen3f.errors import UserError


@dataclass(frozen=True)
class TemplateKind:
    """What a chat template can do.

    Attributes:
        name: as `--config.chat_template` names it.
        thinks: answers may have a thought.
        always: every generation prompt ends with "<think>", so the model always thinks.
        xml: tools and calls are XML; else JSON.
    """

    name: str
    thinks: bool = True
    always: bool = False
    xml: bool = False

    @property
    def asks(self) -> bool:
        """Whether the prompt chooses between thinking and none: by enable_thinking, /think and /no_think."""
        return self.thinks and not self.always


HYBRID = TemplateKind("hybrid")
INSTRUCT = TemplateKind("instruct-2507", thinks=False)
THINKING = TemplateKind("thinking-2507", always=True)
CODER = TemplateKind("coder", thinks=False, xml=True)
KINDS = {kind.name: kind for kind in (HYBRID, INSTRUCT, THINKING, CODER)}


def find_kind(name: str) -> TemplateKind:
    """The kind of that name. Raises UserError, with the names, for another."""
    if name not in KINDS:
        raise UserError(f"--config.chat_template={name!r}: write one of {', '.join(KINDS)}.")
    return KINDS[name]


def check_thinking(kind: TemplateKind, enable_thinking: bool | None, flag: str = "") -> bool:
    """Whether the next answer thinks.

    enable_thinking: None: the template's default. flag: the flag that set it, for the message; "" if none did.
    Raises UserError for thinking if the template has no thoughts, and for no thinking if it always thinks.
    """
    if enable_thinking is None or kind.asks:
        return kind.thinks if enable_thinking is None else enable_thinking
    if enable_thinking != kind.thinks:
        fix = f"leave enable_thinking={enable_thinking} out (flags: thinking, eval.modes)"
        raise UserError(
            f"The model's chat template is of the kind {kind.name}, which {'always' if kind.thinks else 'never'} "
            f"thinks: {f'write {flag}={kind.thinks}' if flag else fix}, or choose a template that can, "
            f"--config.chat_template={HYBRID.name}."
        )
    return enable_thinking


def check_chosen(name: str, modes: Iterable[bool | None], flag: str = "") -> None:
    """`check_thinking` of config.chat_template for each of `modes`, before a tokenizer is read.

    name: "" leaves the kind to the tokenizer, and passes. Raises UserError also as `find_kind`.
    """
    for mode in modes if name else ():
        check_thinking(find_kind(name), mode, flag)
