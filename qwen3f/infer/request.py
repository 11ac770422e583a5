"""What is asked of the engine, and what comes back."""

import dataclasses
from array import array
from collections.abc import Callable

from qwen3f.infer.pictures import Pictures, Places
from qwen3f.infer.sampling import GREEDY, SamplingParams
from qwen3f.infer.thinking import ThinkingBudget
from qwen3f.vision.deepstack import Features


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to one prompt.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: the answer ends there, if not before.
      sampling: how tokens are chosen.
      seed, stream: name the random stream: the token at a place depends on (seed, stream, place) and its logits alone,
        so never on what else is in the batch. seed: the engine's by default.
      stop_ids: the answer ends with any of these, which it keeps.
      stop_texts: the answer ends with the token that completes one of these texts; needs the engine's tokenizer.
      budget: a limit on thinking.
      pictures: images and videos, whose placeholders the prompt holds, as many as merged features.
      on_token: called with (token id, log-probability) as they come, between two passes; it may cancel rows. What it
        raises ends the call that computes, once the pass's other tokens have been handed out.
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
      logprobs: of each token, natural, under the distribution that it was drawn from: temperature and filters (top-k,
        top-p, min-p, penalty) included. A greedy token's is at temperature 1. A token that the thinking budget set has
        the one that the model gave it.
      finish_reason: "stop" (an id or a text), "length" (max_new_tokens), or "error: …".
      prompt_index, sample_index: which prompt it answers, and which of its n answers it is.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_index: int
    sample_index: int


class Row:
    """A request on its way.

    number: its place in the order of arrival. stream: its random stream, see sampling.streams_at. places: where the
    prompt's tokens stand, of a model with a vision tower; None: one behind the other. features: what the tower says of
    its pictures, from their first token to their last.
    tokens: prompt and answer so far, as far as known to the host. cached: tokens whose keys lie in pages, or will when
    what has been launched is done. launched: tokens of the answer that have been launched. checked: whether a token has
    been drawn from the pages that it has; then all that it has written there is finite. waits_for: a row that is to be
    checked first, since this one begins like it.
    """

    def __init__(self, request: Request, number: int, stream: int = 0, places: Places | None = None) -> None:
        self.request, self.number, self.stream, self.places = request, number, stream, places
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
        """The answer's tokens, each once. Only what is new since the last time is looked at."""
        for token in self.tokens[self._read :]:
            if token not in self._told:
                self._told.add(token)
                self._different.append(token)
        self._read = len(self.tokens)
        return self._different
