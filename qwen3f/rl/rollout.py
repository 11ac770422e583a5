"""Completions of prompts by the policy. Each rank generates a share with whole weights; all ranks get all completions.

A completion depends only on the weights, the seed and its name: the place of its prompt in the data order, and its
number among the prompt's completions. It never depends on the batch, the mesh, or how often the run was resumed.
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
    """A completion. ids: the sampled tokens, with the stop id that ended it. logprobs: of each token, under the
    distribution that it was drawn from. ended: whether a stop id ended it, not max_new_tokens."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """samples: completions of each prompt. max_new_tokens, temperature: of a completion. rows: completions that a rank
    generates at a time. seed: of all random streams. cache_tokens: Engine's max_tokens, on a rank."""

    samples: int
    max_new_tokens: int
    temperature: float
    rows: int
    seed: int
    cache_tokens: int = 0


class Sampler:
    """Generates completions. The first call of `update` makes the engine; later ones give it new weights."""

    def __init__(
        self, cfg: ModelConfig, tokenizer: Tokenizer, execution: model.Execution, world: World, options: RolloutOptions
    ) -> None:
        self._cfg, self._tokenizer = dataclasses.replace(cfg, gradient_checkpointing="none"), tokenizer
        self._execution, self._world, self.options = execution, world, options
        self._engine: Engine | None = None

    def update(self, params: Params) -> None:
        """Use these weights from now on: whole tensors in the compute dtype (`whole_params`)."""
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
        """`samples` completions of each prompt.

        places: a number for each prompt that names its random streams; numbers must differ from step to step. pictures:
        of each prompt.
        """
        options = self.options
        sampling = SamplingParams(temperature=options.temperature)
        names = [[place * options.samples + number for number in range(options.samples)] for place in places]
        return self._shared(prompts, names, sampling, options.max_new_tokens, pictures)

    def answers(
        self, prompts: Sequence[Sequence[int]], temperature: float, max_new_tokens: int, pictures: Shown = None
    ) -> list[Rollout]:
        """One completion of each prompt, for an evaluation."""
        names = [[-1 - number] for number in range(len(prompts))]  # negative: no training step has these streams
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
