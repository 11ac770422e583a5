"""Requests to the engine, their answers, and the engine's state of a request."""

import dataclasses
from array import array
from collections.abc import Callable

from qwen3f.config import ModelConfig
from qwen3f.data.tokenizers.token_text import check_encodable
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.pictures import Pictures, Places, check_pictures
from qwen3f.infer.sampling import GREEDY, SamplingParams, is_plain
from qwen3f.infer.thinking import ThinkingBudget
from qwen3f.vision.deepstack import Features


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to one prompt.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: the answer has at most this many tokens.
      sampling: how tokens are chosen.
      seed, stream: name the random stream. The token at a place depends only on (seed, stream, place) and its logits,
        never on other requests in the batch. seed: the engine's by default.
      stop_ids: the answer ends with the first of these ids, and keeps it.
      stop_texts: the answer ends with the token that completes one of these texts; needs the engine's tokenizer.
      budget: a limit on thinking.
      pictures: images and videos. The prompt must hold one placeholder for each of their merged features.
      on_token: called with (token id, log-probability) of each new token, between two passes; it may cancel rows. If it
        raises, the other tokens of the pass are still delivered; then the running step, run or generate raises.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    seed: int | None = None
    stream: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    budget: ThinkingBudget | None = None
    on_token: Callable[[int, float], None] | None = None
    pictures: Pictures | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
      ids: its tokens, without the prompt; a stop id that ended it is the last of them.
      logprobs: natural log-probability of each token under the distribution that it was drawn from, with temperature
        and filters (top-k, top-p, min-p, penalty). Greedy tokens have their value at temperature 1; so have tokens that
        the thinking budget forced.
      finish_reason: "stop" (a stop id or stop text), "length" (max_new_tokens), or "error: …".
      prompt_index, sample_index: which prompt it answers, and which of its n answers it is.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_index: int
    sample_index: int


class Row:
    """The engine's state of a request that waits or is being computed.

    Attributes:
      number: its place in the order of arrival.
      stream: its random stream, see sampling.streams_at.
      plain: whether the sampler of a CUDA graph can draw its tokens. inverse_temperature: for that sampler.
      places: positions of the prompt's tokens, for a model with a vision tower; None: 0, 1, 2, …
      features: output of the vision tower for its pictures; kept while tokens of a picture are still to be computed.
      tokens: prompt and answer so far, as known to the host.
      cached: number of tokens whose keys are in pages, or will be once the passes in flight are done.
      launched: number of tokens of the answer whose pass has been launched.
      checked: whether a token has been drawn from its pages. Then all that it wrote there is finite.
      waits_for: a row with the same beginning; this row waits until that one is checked, to share its pages.
      answered: number of tokens of the answer that the host knows.
    """

    def __init__(self, request: Request, number: int, stream: int = 0, places: Places | None = None) -> None:
        self.request, self.number, self.stream, self.places = request, number, stream, places
        self.plain = is_plain(request.sampling)
        self.inverse_temperature = (
            1 / request.sampling.temperature if self.plain and request.sampling.temperature else 0.0
        )
        self.features: Features | None = None
        self.tokens = list(request.prompt if places is None else places.tokens)
        self.logprobs: list[float] = []
        self.pages: list[int] = []
        self.cached = 0
        self.launched = 0
        self.checked = False
        self.waits_for: Row | None = None
        self.thinks = request.budget is not None
        self.finish_reason = ""
        self._told, self._different, self._read = set[int](), array("q"), len(request.prompt)

    @property
    def answered(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def different(self) -> array:
        """The distinct tokens of the answer. A call only scans the tokens that are new since the last call."""
        for token in self.tokens[self._read :]:
            if token not in self._told:
                self._told.add(token)
                self._different.append(token)
        self._read = len(self.tokens)
        return self._different


def check_request(asked: Request, cfg: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raises UserError for a request that this model cannot answer."""
    length, room = len(asked.prompt), cfg.max_position_embeddings
    if not length:
        raise UserError("a prompt is empty; give it one token at least, e.g. <|endoftext|>")
    if length > room:
        raise UserError(f"a prompt has {length} tokens and the model's max_position_embeddings is {room}; shorten it")
    if asked.max_new_tokens < 0:
        raise UserError(f"max_new_tokens must not be negative, got {asked.max_new_tokens}")
    low, high = min(asked.prompt), max(asked.prompt)
    if low < 0 or high >= cfg.vocab_size:
        raise UserError(
            f"a prompt has token id {low if low < 0 else high}, ids of this model are 0 to {cfg.vocab_size - 1}; use "
            "the tokenizer that belongs to it"
        )
    for name, ids in (("stop_ids", asked.stop_ids), ("budget", asked.budget.closing_ids if asked.budget else ())):
        if any(not 0 <= i < cfg.vocab_size for i in ids):
            raise UserError(f"{name}: {list(ids)} must be token ids below the vocabulary's {cfg.vocab_size}")
    if asked.pictures is not None:
        check_pictures(asked.pictures, cfg)
    if asked.stop_texts and tokenizer is None:
        raise UserError("stop_texts need the tokenizer: Engine(cfg, params, tokenizer=…)")
    if isinstance(asked.stop_texts, str) or any(not isinstance(text, str) or not text for text in asked.stop_texts):
        raise UserError(f"stop_texts: {asked.stop_texts!r} must be a list of texts that are not empty")
    for text in asked.stop_texts:
        check_encodable(text)
