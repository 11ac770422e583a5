"""Completions of prompts by the policy: the engine on whole weights, each rank its share, all of them on every rank.

A completion depends on the weights, the seed and its name alone (its prompt's place in the data order, and which of the
prompt's completions it is): never on the batch, the mesh, or how often a run was killed.
"""

import dataclasses
from collections.abc import Sequence

from qwen3f import model
from qwen3f.config import ModelConfig
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.engine import Engine, EngineOptions
from qwen3f.infer.on_ranks import generate_on_ranks
from qwen3f.infer.pictures import Pictures
from qwen3f.infer.sampling import SamplingParams
from qwen3f.params import Params
from qwen3f.processes.world import World

Shown = Sequence[Pictures | None] | None


@dataclasses.dataclass(frozen=True)
class Rollout:
    """ids: what was sampled, the stop id that ended it included. logprobs: of each, under what it was drawn from.
    ended: by a stop id, not by its length."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """samples: of a prompt. max_new_tokens, temperature: of each. rows: at a time on a rank. seed: of all.
    cache_tokens: room of the engine's cache, on a rank; 0: what a device has free."""

    samples: int
    max_new_tokens: int
    temperature: float
    rows: int
    seed: int
    cache_tokens: int = 0


class Sampler:
    """Makes completions; the engine is made with the first weights, and kept."""

    def __init__(
        self, cfg: ModelConfig, tokenizer: Tokenizer, execution: model.Execution, world: World, options: RolloutOptions
    ) -> None:
        self._cfg, self._tokenizer = dataclasses.replace(cfg, gradient_checkpointing="none"), tokenizer
        self._execution, self._world, self.options = execution, world, options
        self._engine: Engine | None = None

    def update(self, params: Params) -> None:
        """The weights from here on: whole, of the compute dtype (`whole_params`)."""
        if self._engine is not None:
            self._engine.update(params)
            return
        self._engine = Engine(
            self._cfg,
            params,
            max_tokens=self.options.cache_tokens,
            seed=self.options.seed,
            execution=self._execution,
            tokenizer=self._tokenizer,
            options=EngineOptions(rows=self.options.rows, room="config.rollout.cache_tokens"),
        )

    def __call__(
        self, prompts: Sequence[Sequence[int]], places: Sequence[int], pictures: Shown = None
    ) -> list[list[Rollout]]:
        """`samples` completions of each prompt. places: their names, which must differ from step to step. pictures: of
        each prompt."""
        options = self.options
        sampling = SamplingParams(temperature=options.temperature)
        names = [[place * options.samples + number for number in range(options.samples)] for place in places]
        return self._shared(prompts, names, sampling, options.max_new_tokens, pictures)

    def answers(
        self, prompts: Sequence[Sequence[int]], temperature: float, max_new_tokens: int, pictures: Shown = None
    ) -> list[Rollout]:
        """One completion of each prompt, for an evaluation."""
        names = [[-1 - number] for number in range(len(prompts))]  # no training step's
        found = self._shared(prompts, names, SamplingParams(temperature=temperature), max_new_tokens, pictures)
        return [group[0] for group in found]

    def _shared(
        self,
        prompts: Sequence[Sequence[int]],
        names: list[list[int]],
        sampling: SamplingParams,
        max_new_tokens: int,
        pictures: Shown,
    ) -> list[list[Rollout]]:
        told = generate_on_ranks(self._world, self._engine, prompts, names, sampling, max_new_tokens, pictures)
        if failed := next((one for group in told for one in group if one.finish_reason.startswith("error")), None):
            raise UserError(f"a rollout failed: {failed.finish_reason.removeprefix('error: ')}")
        return [[Rollout(tuple(x.ids), tuple(x.logprobs), x.finish_reason == "stop") for x in group] for group in told]
