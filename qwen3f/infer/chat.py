"""An interactive chat: one question per line, answers printed while they are written, with the history of the chat.

    /think, /no_think   in a question: Qwen3's soft switches, for this answer and those that follow; alone on a line
                        they are added to the next question
    /reset              forget the history
    /quit               end the chat, as the end of the input does
    Ctrl-C              stop the answer; the part that was written stays in the history

The history has the form that the model knows from training: the chat template leaves out the thoughts of earlier turns,
so a thought that was stopped leaves nothing in it. A turn's prompt begins like that of the turn before, so the engine
finds its keys in the cache.
"""

import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from qwen3f.data.chat.kinds import HYBRID, TemplateKind
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.chat.template import THINK, Message, last_switch, split_thought
from qwen3f.errors import UserError
from qwen3f.infer.request import Request
from qwen3f.infer.text_generator import Answer, TextGenerator, raise_error
from qwen3f.infer.text_request import TextOptions, make_request
from qwen3f.terminal import shown

SWITCHES = ("/think", "/no_think")


class Chat:
    """The state of a chat.

    Args:
      options: for every answer; with thinking=False switches have no effect.
      out: where answers are printed.
      interrupted: called after each pass of the engine; True stops the answer.
    """

    def __init__(
        self, generator: TextGenerator, options: TextOptions, out: TextIO, interrupted: Callable[[], bool]
    ) -> None:
        self.messages: list[Message] = []
        self._generator, self._options = generator, options
        self._kind = kind_of(generator.tokenizer)
        self._out, self._interrupted = out, interrupted
        self._switch = ""  # for the next question
        self._turn = 0

    def enter(self, line: str) -> bool:
        """Answer a question or obey a command; False: the chat has ended."""
        line = line.strip()
        if line == "/quit":
            return False
        if line == "/reset":
            self.messages, self._switch, self._turn = [], "", 0
            _note("the history is empty now")
        elif line in SWITCHES:
            self._set_switch(line)
        elif line:
            try:
                self._ask(line)
            except UserError as error:
                _note(f"error: {' '.join(str(error).split())}")
        return True

    def _set_switch(self, switch: str) -> None:
        if not self._kind.asks:
            often = "always" if self._kind.always else "never"
            _note(f"this model {often} thinks: its chat template, {self._kind.name}, has no switches")
            return
        if self._options.thinking is False:
            _note("config.thinking is False, so the model never thinks, and switches have no effect")
            return
        self._switch = switch
        _note(f"{switch} will be added to your next question")

    def _ask(self, question: str) -> None:
        """Ask, print the answer, and add both to the history; nothing is added if this raises."""
        if self._switch and last_switch([{"role": "user", "content": question}]) is None:
            question = f"{question} {self._switch}"
        messages = [*self.messages, {"role": "user", "content": question}]
        for (answer,) in self._generator.answer([self._request(messages)]):
            self._show(answer)
            if not answer.finish_reason and self._interrupted():
                self._generator.cancel([answer])
                self._show(answer)
                break
        print(file=self._out, flush=True)
        raise_error(answer)
        if answer.finish_reason == "cancelled":
            _note("stopped")
        elif answer.finish_reason == "length":
            _note(f"cut after {answer.tokens} tokens; --config.max_new_tokens allows more where the model has room")
        self.messages = [*messages, said(answer.text, self._kind)]
        self._switch = ""
        self._turn += 1

    def _show(self, answer: Answer) -> None:
        print(shown(answer.read(), self._out), end="", file=self._out, flush=True)

    def _request(self, messages: list[Message]) -> Request:
        """The request for an answer. It gets fewer than max_new_tokens tokens if the chat leaves no more room."""
        generator, options = self._generator, self._options
        try:
            asked = make_request(
                generator.cfg, generator.tokenizer, messages, options.changed(max_new_tokens=1), self._turn
            )
        except UserError as error:
            raise UserError(f"{error}, or write /reset" if self.messages else str(error)) from error
        room = generator.cfg.max_position_embeddings - len(asked.prompt)
        return dataclasses.replace(asked, max_new_tokens=min(options.max_new_tokens, room))


def said(text: str, kind: TemplateKind = HYBRID) -> Message:
    """An answer as a message of the history. A thought that was cut off counts as a thought too.

    kind: of the model's chat template. If it always thinks, the prompt already holds the `<think>`.
    """
    if not kind.thinks:
        return {"role": "assistant", "content": text}
    text = THINK + text if kind.always else text
    if "</think>" not in text and text.lstrip().startswith("<think>"):
        return {"role": "assistant", "content": "", "reasoning_content": text.lstrip().removeprefix("<think>").strip()}
    thought, content = split_thought({"content": text})
    return {"role": "assistant", "content": content, "reasoning_content": thought}


def run_chat(generator: TextGenerator, options: TextOptions) -> None:
    """Run a chat over stdin and stdout until it ends. Remarks go to stderr.

    Ctrl-C while no answer is being written clears the line at a terminal; else it ends the process with code 130.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (editing and history of lines, by being imported)

        _note("/think, /no_think, /reset, /quit; Ctrl-C stops an answer")
    with _interrupts() as interrupts:
        chat = Chat(generator, options, sys.stdout, lambda: interrupts.stop)
        for line in _lines(terminal):
            interrupts.stop, interrupts.answering = False, True
            goes_on = chat.enter(line)
            interrupts.answering = False
            if not goes_on:
                break


class _Interrupts:
    """Handler of Ctrl-C. While an answer is written, the first one sets `stop`, which is read between two passes; the
    second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.answering = self.stop = False

    def __call__(self, *_: object) -> None:
        if not self.answering or self.stop:
            raise KeyboardInterrupt
        self.stop = True


@contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    interrupts = _Interrupts()
    before = signal.signal(signal.SIGINT, interrupts)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(terminal: bool) -> Iterator[str]:
    """Lines of stdin. Lines that are not UTF-8 are left out, with a note on stderr."""
    while True:
        try:
            line = input("> ").encode("utf-8", "surrogateescape") if terminal else sys.stdin.buffer.readline()
        except EOFError:
            print(flush=True)
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(flush=True)
            continue
        if not line and not terminal:
            return
        try:
            yield line.decode()
        except UnicodeDecodeError:
            _note("error: the line is not UTF-8, so it was left out")


def _note(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)
