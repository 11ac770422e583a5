"""Applies a function of the model to a dataset's rows, batch by batch on all ranks; every rank gets all results.

R rows of a batch over all ranks · B of this rank · T places · S documents of a row at most
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qwen3f.data.chat.heldout import measured_rows
from qwen3f.data.loader import Share
from qwen3f.data.packing.pair_dataset import PairDataset
from qwen3f.eval.heldout import batches_of_one_shape
from qwen3f.params import Params
from qwen3f.preference.rows import counted, sums_of
from qwen3f.train.microbatches import evaluation_parts
from qwen3f.train.objective import Batch
from qwen3f.train.outputs import make_outputs
from qwen3f.train.setup import Setup
from qwen3f.train.stage import Run

Values = Callable[[Params, Batch], Tensor]


def evaluation_outputs(setup: Setup, output: str) -> Values:
    """outputs(params, batch) -> [B, T] for batches of config.eval.batch_size rows; see train.outputs.make_outputs."""
    parts = evaluation_parts(setup.config.eval.batch_size, setup.microbatches, setup.layout.axes)
    return make_outputs(
        setup.model,
        setup.execution,
        setup.layout,
        output,
        microbatches=parts,
        compute_dtype=setup.compute_dtype,
    )


def log_ratios(outputs: Values) -> Values:
    """(params, batch) -> [B, S]: log π − log π_ref of each document, from outputs of log-probabilities."""

    def values(params: Params, batch: Batch) -> Tensor:
        found = outputs(params, batch)
        return sums_of(counted(batch) * (found - batch["ref_logprobs"].to(found.dtype)), batch)

    return values


def passes(
    run: Run, dataset: PairDataset, most: int, values: Callable[[Batch], Tensor]
) -> Iterator[tuple[Batch, Tensor]]:
    """Yields (a batch of R rows, its values [R, …] joined from all ranks), both on the CPU, for `measured_rows`.

    The last batch is filled up with rows of padding. All ranks iterate together. most: rows, at most; 0: all, in order.
    values: gets this rank's rows on the device.
    """
    rows = (dataset[i] for i in measured_rows(dataset, most))
    for batch in batches_of_one_shape(rows, run.setup.config.eval.batch_size):
        yield batch, joined_rows(run, batch, values)


def joined_rows(run: Run, batch: Batch, values: Callable[[Batch], Tensor]) -> Tensor:
    """Applies `values` to this rank's share of a batch of R rows; joins the results of all ranks: [R, …] on the CPU."""
    setup, world, size = run.setup, run.world, len(batch["tokens"])
    place = setup.layout.axes.rows
    own = torch.from_numpy(Share(*place).rows(size))
    found = values({key: x[own].to(setup.device) for key, x in batch.items()}).cpu()
    if world.size == 1:
        return found
    owners = world.gather(place[0])  # ranks that differ in other axes have the same rows
    sends = owners.index(owners[world.rank]) == world.rank
    told = world.gather_bytes(found.contiguous().numpy().tobytes() if sends else b"")
    whole = torch.empty(size, *found.shape[1:], dtype=found.dtype)
    for index in set(owners):
        part = torch.frombuffer(bytearray(told[owners.index(index)]), dtype=found.dtype)
        rows = torch.from_numpy(Share(index, place[1]).rows(size))
        whole[rows] = part.view(-1, *found.shape[1:])
    return whole
