"""The reference's log-probabilities: from a file that is made once, or from its weights in memory beside the policy's.

A file holds one number for each token of a token cache. Its name has a digest of everything that the numbers depend on:
the tokens (and so data and tokenizer), the weights' files, the model, the dtype of the computation, and seq_len. If one
of them changes, the name changes, so a file is never read for other settings.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen3f.config import ModelConfig
from qwen3f.data.cache.column import Column, new_column
from qwen3f.data.cache.token_cache import TokenCache
from qwen3f.data.chat.corpus import ChatCorpus
from qwen3f.data.packing.pair_dataset import PairDataset
from qwen3f.data.sources.documents import stable_hash
from qwen3f.errors import UserError
from qwen3f.interop import source
from qwen3f.params import Params
from qwen3f.preference.corpus import with_parts
from qwen3f.preference.passes import Values, evaluation_outputs, passes
from qwen3f.train.objective import Batch
from qwen3f.train.outputs import make_outputs
from qwen3f.train.setup import Setup
from qwen3f.train.stage import Run
from sharding.state import as_dtensors

_FORMAT = 1  # format of the files; raise it when a change of code gives other numbers for the same weights


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference model: config.dpo.reference, or the model of config.init_from when the run began.

    place: as in init_from, pinned to a step. digest: of its weights' files. cfg: the model.
    """

    place: str
    digest: str
    cfg: ModelConfig

    def params(self, run: Run) -> Params:
        """Its weights in the dtype of the forward pass, sharded as the policy's."""
        setup = run.setup
        backend = setup.config.checkpoint.backend
        params = source.read_params(
            self.place, self.cfg, setup.device, setup.compute_dtype, backend, setup.layout, run.world
        )
        return params if run.world.mesh is None else as_dtensors(params, self.cfg, setup.layout, run.world.mesh)


def find_reference(run: Run) -> Reference:
    """The reference of a run's configuration; the same on all ranks. Raises UserError as `source` does."""
    config = run.setup.config
    named, flag = config.dpo.reference or config.init_from, "dpo.reference" if config.dpo.reference else "init_from"
    place, digest = find_weights(run, named, f"config.{flag}")
    cfg = run.setup.model if not config.dpo.reference else source.read_model_config(place)
    return Reference(place, digest, dataclasses.replace(cfg, gradient_checkpointing="none"))


def find_weights(run: Run, named: str, flag: str) -> tuple[str, str]:
    """(the place that `flag` names, pinned to a step; the digest of its weights' files); the same on all ranks.

    Raises UserError as `source` does.
    """

    def find() -> tuple[str, str]:
        place = source.pinned(named, flag)
        return place, source.weights_digest(place)

    return run.world.first(run.world.together(lambda: find() if run.world.main else None, UserError))


def check_reference(before: Mapping[str, Any], now: Mapping[str, str], place: str, flag: str) -> None:
    """Raises UserError if a run resumes with another reference than it began with.

    before: from the run's checkpoint. place: of the reference. flag: the flag that names it.
    """
    if before.get("reference", now["reference"]) != now["reference"]:
        raise UserError(
            f"{place} has other weights than the reference that this run began with; write {flag}=…/checkpoints/N with "
            "the step of the old weights, or choose another --workdir"
        )


def check_vocabulary(place: str, setup: Setup) -> None:
    """Raises UserError unless the model at `place` writes text with the run's vocabulary."""
    there = source.read_model_config(place, "--config.dpo.reference")
    if there.scalar_head or there.vocab_size != setup.model.vocab_size:
        raise UserError(
            f"--config.dpo.reference={place} has "
            f"{'a scalar head' if there.scalar_head else f'a vocabulary of {there.vocab_size}'}, the policy a "
            f"vocabulary of {setup.model.vocab_size}: name a model that writes text, with the same vocabulary"
        )


def file_of(reference: Reference, cache: TokenCache, seq_len: int, dtype: torch.dtype) -> Path:
    """The file for the reference's log-probabilities of a cache's tokens, in the directory of the cache."""
    known = (_FORMAT, cache.path.name, reference.digest, json.dumps(reference.cfg.to_dict()), seq_len, str(dtype))
    return cache.path.with_name(f"reference-{stable_hash(repr(known).encode()):016x}.npy")


def with_log_probs(run: Run, reference: Reference, corpus: ChatCorpus) -> tuple[ChatCorpus, list[str]]:
    """(the corpus with ref_logprobs from files in its rows, lines to print). All ranks call this together.

    Files that are missing are made first. Only in that case the reference's weights are read; they are freed again.
    """
    seq_len, dtype = run.setup.config.seq_len, run.setup.compute_dtype
    datasets = (*corpus.heldout.values(), *corpus.parts)
    files = [file_of(reference, dataset.cache, seq_len, dtype) for dataset in datasets]
    there = [all(on_ranks) for on_ranks in zip(*run.world.gather([file.exists() for file in files]))]
    if not all(there):
        params = reference.params(run)
        outputs = evaluation_outputs(dataclasses.replace(run.setup, model=reference.cfg), "log_probs")
        for dataset, file, found in zip(datasets, files, there):
            if not found:
                write = functools.partial(_write, file, _compute(run, dataset, params, outputs))
                run.world.together(write if run.world.local_rank == 0 else lambda: None, UserError)
    columns = {dataset.cache.path: Column(file, dataset.cache.num_tokens) for dataset, file in zip(datasets, files)}
    lines = [
        f"reference: {reference.place}, log-probabilities {'from' if found else 'written to'} {file}"
        for file, found in zip(files, there)
    ]

    def change(dataset: PairDataset) -> PairDataset:
        return dataclasses.replace(dataset, ref_logprobs=columns[dataset.cache.path])

    return with_parts(corpus, change), lines


def _compute(run: Run, dataset: PairDataset, params: Params, outputs: Values) -> np.ndarray:
    """[tokens of the token cache]: the log-probability of each token that is in a row and predicted, else 0."""
    found: np.ndarray | None = None
    for rows, values in _numbered(run, dataset, params, outputs):
        if run.stopping():
            raise UserError("stopped while the reference's log-probabilities were computed; run again")
        if found is None:
            found = np.zeros(dataset.cache.num_tokens, values.numpy().dtype)
        for row, of_row in zip(rows, values.numpy()):
            begin = 0
            for start, places in dataset.spans(row):
                found[start + 1 : start + places + 1] = of_row[begin : begin + places]
                begin += places
    return found


def _numbered(run: Run, dataset: PairDataset, params: Params, outputs: Values) -> Iterator[tuple[range, Tensor]]:
    first = 0
    for batch, values in passes(run, dataset, 0, lambda own: outputs(params, own)):
        yield range(first, min(first + len(values), len(dataset))), values
        first += len(batch["tokens"])


def _write(path: Path, values: np.ndarray) -> None:
    try:
        with new_column(path, len(values), values.dtype) as column:
            column[:] = values
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error}): make room, or write --config.dpo.reference_log_probs=live"
        ) from error


class Live:
    """The reference's weights in memory, sharded as the policy's; any mesh."""

    def __init__(self, run: Run, reference: Reference) -> None:
        self._setup = dataclasses.replace(run.setup, model=reference.cfg)
        self.cfg, self.params = reference.cfg, reference.params(run)
        self._of_evaluation = evaluation_outputs(self._setup, "log_probs")
        self._of_steps: dict[int, Values] = {}

    def add_to(self, batch: Batch) -> dict[str, Tensor]:
        """A step's batch with ref_logprobs, computed in the same micro-batches as the step uses."""
        parts = len(batch["tokens"]) // microbatch_rows(self._setup)
        if parts not in self._of_steps:
            self._of_steps[parts] = make_outputs(
                self.cfg,
                self._setup.execution,
                self._setup.layout,
                "log_probs",
                microbatches=parts,
                compute_dtype=self._setup.compute_dtype,
            )
        return {**batch, "ref_logprobs": self._of_steps[parts](self.params, batch)}

    def before(self, values: Values) -> Values:
        """`values`, a function of batches with ref_logprobs, as a function of evaluation batches, which have none."""
        return lambda params, batch: values(params, {**batch, "ref_logprobs": self._of_evaluation(self.params, batch)})


def microbatch_rows(setup: Setup) -> int:
    """Rows of a micro-batch on a rank."""
    return setup.config.batch_size // (setup.layout.axes.rows[1] * setup.microbatches)
