"""Text in, text out: answers by the engine, also piece by piece while they are written.

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
    """The text of an answer while it is written.

    text: all text that `read` has returned so far. It ends before a stop id or stop text.
    """

    def __init__(self, row: Row, tokenizer: Tokenizer) -> None:
        self.row, self.text = row, ""
        self._decoder = StreamDecoder(tokenizer)
        self._tokens = 0
        self._held = ""  # may be the beginning of a stop text

    @property
    def finish_reason(self) -> str:
        """ "" while the answer is written; then as Completion.finish_reason, or "cancelled"."""
        return self.row.finish_reason

    @property
    def tokens(self) -> int:
        """Number of tokens of the answer, the stop id included."""
        return self.row.answered

    @property
    def prompt_tokens(self) -> int:
        return len(self.row.request.prompt)

    def read(self) -> str:
        """The new text since the last call.

        Text that may be the beginning of a stop text, and half a character, are held back until later tokens, or the
        end of the answer, decide. At the end half a character becomes U+FFFD.
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
    """Index of the longest suffix of `text` that is the beginning of a stop text; len(text) if there is none."""
    longest = max(map(len, stops), default=1) - 1
    first = max(0, len(text) - longest)
    return next((i for i in range(first, len(text)) if any(s.startswith(text[i:]) for s in stops)), len(text))


class TextGenerator:
    """Answers texts. An answer does not depend on the other requests that are answered at the same time.

    Args:
      cfg, params, tokenizer: of the model; it computes in the dtype of params.
      execution, max_tokens, options: as for Engine.
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

        options: fields of TextOptions: max_new_tokens, thinking, temperature, seed, stop, chat=False to continue the
        text, … With thinking the answer begins with its <think> block; with thinking_budget=0 the prompt opens it,
        and the answer begins with the sentence that closes it. Raises UserError for a request that cannot be
        answered, and if the model's logits are not finite.
        """
        return "".join(self.stream(text, **options))

    def stream(self, text: Content, **options: Any) -> Iterator[str]:
        """The same answer in pieces, while it is written. Leaving the loop cancels it. Raises UserError at once."""
        return self._pieces(make_request(self.cfg, self.tokenizer, text, TextOptions().changed(**options)))

    def _pieces(self, asked: Request) -> Iterator[str]:
        for (answer,) in self.answer([asked]):
            if piece := answer.read():
                yield piece
            raise_error(answer)

    def answer(self, requests: Iterable[Request]) -> Iterator[list[Answer]]:
        """Yields after each pass the unfinished answers and those that it finished, in the order of the requests.

        Takes requests from the iterable when there is room, up to twice as many as run at a time. If the iterable
        raises UserError, the answers in progress are finished first, then the error is raised. Leaving the loop early,
        or any other error, cancels all answers.
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
        """The row of a request. If the cache can never hold it, the row has an error as its finish_reason."""
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
