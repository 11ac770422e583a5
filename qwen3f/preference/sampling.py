"""Answers of the model in training: each rank of a run generates a share of them with a whole copy of the weights."""

import dataclasses
from collections.abc import Sequence

from qwen3f import rng
from qwen3f.config import ModelConfig
from qwen3f.data.chat.recognise import opening
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import TrainingError
from qwen3f.infer.engine import Engine, EngineOptions
from qwen3f.infer.on_ranks import generate_on_ranks
from qwen3f.infer.sampling import SamplingParams
from qwen3f.params import Params
from qwen3f.preference.online_rows import Written
from qwen3f.train.stage import Run
from sharding.state import whole_params


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """max_new_tokens: tokens of an answer, at most. cache_tokens: Engine's max_tokens, on a rank.
    key: the flag that sets cache_tokens, for errors. rows: answers that a rank generates at a time."""

    max_new_tokens: int
    cache_tokens: int
    key: str = "cache_tokens"
    rows: int = EngineOptions.rows


class Sampler:
    """Answers prompts on all ranks together; all ranks get all answers. The first call makes the engine."""

    def __init__(self, run: Run, cfg: ModelConfig, tokenizer: Tokenizer, options: SamplerOptions) -> None:
        self._run, self._tokenizer, self._options = run, tokenizer, options
        self._cfg = dataclasses.replace(cfg, gradient_checkpointing="none")
        self._engine: Engine | None = None

    def answers(
        self, params: Params, prompts: Sequence[Sequence[int]], count: int, temperature: float, *key: int | str
    ) -> list[list[Written]]:
        """`count` answers to each prompt, by the policy with `params`, which are sharded as in the run's state.

        The random stream of answer j to prompt i depends on (key, i, j), not on the rank that writes it. temperature: 0
        is greedy. Raises UserError for a prompt that the engine cannot answer, TrainingError if the model's logits are
        not finite.
        """
        setup = self._run.setup
        engine = self._updated(whole_params(self._cfg, params, setup.layout, setup.compute_dtype))
        streams = [[rng.key(*key, i * count + j) for j in range(count)] for i in range(len(prompts))]
        sampling = SamplingParams(temperature=temperature)
        told = generate_on_ranks(self._run.world, engine, prompts, streams, sampling, self._options.max_new_tokens)
        return [[self._written(one.ids, one.finish_reason) for one in group] for group in told]

    def _updated(self, params: Params) -> Engine:
        if self._engine is None:
            self._engine = Engine(
                self._cfg,
                params,
                max_tokens=self._options.cache_tokens,
                execution=self._run.setup.execution,
                tokenizer=self._tokenizer,
                options=EngineOptions(rows=self._options.rows, room=self._options.key),
            )
        else:
            self._engine.update(params)
        return self._engine

    def _written(self, ids: list[int], reason: str) -> Written:
        if reason.startswith("error"):
            raise TrainingError(f"an answer could not be written: {reason}")
        ended = reason == "stop"
        text = opening(self._tokenizer) + self._tokenizer.decode(ids[:-1] if ended else ids)
        return Written(tuple(ids), text, ended)
