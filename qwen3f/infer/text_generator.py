"""Text in, text out: answers as they grow, on the engine.

gen = TextGenerator(cfg, params, tokenizer)
print(gen.generate("What is the meaning of life?", max_new_tokens=256))
print(gen.generate("Solve x^2 - 5x + 6 = 0", max_new_tokens=512, thinking=True))
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qwen3f import model
from qwen3f import params as P
from qwen3f.config import ModelConfig
from qwen3f.data.tokenizers.token_text import StreamDecoder
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.engine import DEFAULT, Engine, EngineOptions
from qwen3f.infer.request import Request, Row
from qwen3f.infer.text_request import Content, TextOptions, make_request


class Answer:
    """A row's text as it grows.

    text: what `read` has given so far. A stop id is no part of it, nor is a stop text and what stands behind it.
    """

    def __init__(self, row: Row, tokenizer: Tokenizer) -> None:
        self.row, self.text = row, ""
        self._decoder = StreamDecoder(tokenizer)
        self._tokens = 0
        self._held = ""  # may be the beginning of a stop text

    @property
    def finish_reason(self) -> str:
        """ "" while it grows; then as a Completion's, or "cancelled"."""
        return self.row.finish_reason

    @property
    def tokens(self) -> int:
        """Of the answer, the stop id included."""
        return self.row.answered

    @property
    def prompt_tokens(self) -> int:
        return len(self.row.request.prompt)

    def read(self) -> str:
        """The text that has come since the last call.

        Held back is what may turn out to be the beginning of a stop text or half a character; the answer's end decides:
        half a character becomes U+FFFD.
        """
        asked, ended = self.row.request, bool(self.finish_reason)
        start = len(asked.prompt) + self._tokens
        new = self.row.tokens[start:]
        self._tokens += len(new)
        text = self._held + "".join(self._decoder.push(token) for token in new if token not in asked.stop_ids)
        if ended:
            text += self._decoder.finish()
        found = [place for stop in asked.stop_texts if (place := text.find(stop)) >= 0]
        piece, self._held = text, ""
        if found:
            piece = text[: min(found)]
        elif not ended:
            cut = _held_from(text, asked.stop_texts)
            piece, self._held = text[:cut], text[cut:]
        self.text += piece
        return piece


def _held_from(text: str, stops: Sequence[str]) -> int:
    """Where the longest end of `text` begins that a stop text begins with; len(text) if there is none."""
    longest = max(map(len, stops), default=1) - 1
    first = max(0, len(text) - longest)
    return next((i for i in range(first, len(text)) if any(s.startswith(text[i:]) for s in stops)), len(text))


class TextGenerator:
    """Answers texts. Every answer is as it is alone, whatever else is answered beside it.

    Args:
      cfg, params, tokenizer: of the model; the dtype of params is that of the computation.
      execution, max_tokens, options: as Engine has them.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: P.Params,
        tokenizer: Tokenizer,
        *,
        max_tokens: int = 0,
        execution: model.Execution = model.EAGER,
        options: EngineOptions = DEFAULT,
    ) -> None:
        self.cfg, self.tokenizer, self.rows = cfg, tokenizer, options.rows
        self._engine = Engine(
            cfg, params, max_tokens=max_tokens, execution=execution, tokenizer=tokenizer, options=options
        )

    def generate(self, text: Content, **options: Any) -> str:
        """The answer to a text or to a chat's messages.

        options: fields of TextOptions: max_new_tokens, thinking, temperature, seed, stop, chat=False to go on with the
        text, … With thinking the answer begins with its <think> block. Raises UserError for what cannot be answered,
        and if the model's logits are not finite.
        """
        return "".join(self.stream(text, **options))

    def stream(self, text: Content, **options: Any) -> Iterator[str]:
        """The same answer in pieces, as they come; leaving it early ends the answer. Raises UserError at once."""
        return self._pieces(make_request(self.cfg, self.tokenizer, text, TextOptions().changed(**options)))

    def _pieces(self, asked: Request) -> Iterator[str]:
        for (answer,) in self.answer([asked]):
            if piece := answer.read():
                yield piece
            raise_error(answer)

    def answer(self, requests: Iterable[Request]) -> Iterator[list[Answer]]:
        """After each pass the answers under way, in the order of the requests, and those that the pass has ended.

        Requests are taken when there is room for them, twice as many as are computed at a time. If taking one raises,
        that is passed on when the answers under way have ended. Leaving early, or any other error, ends all.
        """
        coming, failure = iter(requests), None
        under_way: list[Answer] = []
        try:
            while True:
                while coming is not None and len(under_way) < 2 * self.rows:
                    try:
                        asked = next(coming, None)
                    except UserError as error:
                        asked, failure = None, error
                    if asked is None:
                        coming = None
                        break
                    under_way.append(Answer(self._submit(asked), self.tokenizer))
                if not under_way:
                    break
                self._engine.step()
                yield list(under_way)
                under_way = [answer for answer in under_way if not answer.finish_reason]
        except BaseException:
            self.cancel(under_way)
            raise
        if failure is not None:
            raise failure

    def _submit(self, asked: Request) -> Row:
        """A row; one that has failed already if the cache can never hold it."""
        try:
            return self._engine.submit([asked])[0]
        except UserError as error:
            row = Row(asked, -1)
            row.finish_reason = f"error: {error}"
            return row

    def cancel(self, answers: Iterable[Answer]) -> None:
        """End answers that have not ended, with finish_reason "cancelled"."""
        self._engine.cancel([answer.row for answer in answers])


def raise_error(answer: Answer) -> None:
    """Raises UserError for an answer that could not be computed."""
    if answer.finish_reason.startswith("error"):
        raise UserError(answer.finish_reason.removeprefix("error: "))
