"""Rows of a data set streamed from the Hub by `datasets`. No code of a repository is ever run."""

from collections.abc import Iterator
from typing import Any

from qwen3f.data.sources.adapters.registry import HubDataset
from qwen3f.data.sources.adapters.rows import BadRow, Columns, Row, without_nulls
from qwen3f.errors import UserError

_BATCH_ROWS = 64


def hub_rows(dataset: HubDataset, split: str, streaming: bool) -> Iterator[Row | BadRow]:
    """The rows of `split` in the Hub's order, named "hub:owner/name/split:row".

    In a DataLoader's worker every row is read too: `iter()` is used since a plain `for` over a stream of `datasets`
    would give each worker a part of the files, and the caller divides the rows already.

    Raises:
        UserError: the Hub or the data set cannot be reached; the message says how to read a local copy instead.
    """
    where = f"hub:{dataset.hub_id}/{split}"
    columns, number = Columns(dataset.columns), 0
    batches: Iterator[dict[str, list[Any]]] | None = None
    while True:
        try:
            if batches is None:
                batches = iter(_load(dataset, split, streaming).iter(batch_size=_BATCH_ROWS))
            batch = next(batches, None)
        except Exception as error:  # datasets, fsspec, pyarrow and HTTP clients each raise errors of their own
            reason = " ".join(str(error).split())[:200] or "no message"
            raise UserError(
                f"{dataset.hub_id} cannot be read from the Hub, after row {number} ({type(error).__name__}: {reason}): "
                f"copy it to a directory and write {dataset.name}@DIR, or --config.data.root=DIR."
            ) from error
        if batch is None:
            return
        for values in zip(*batch.values()):
            number += 1
            row = Row(dict(zip(batch, map(without_nulls, values))), f"{where}:{number}")
            yield columns.wrong_in(row.values, row.name) or row


def _load(dataset: HubDataset, split: str, streaming: bool) -> Any:
    import datasets  # takes seconds to import, and local copies do without

    if dataset.files:  # a plain list of files: the repository's own description of them cannot be used
        files = f"hf://datasets/{dataset.hub_id}/{dataset.files}"
        return datasets.load_dataset("json", data_files={split: files}, split=split, streaming=streaming)
    return datasets.load_dataset(dataset.hub_id, dataset.config or None, split=split, streaming=streaming)
