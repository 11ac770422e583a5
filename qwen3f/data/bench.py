"""How fast text becomes batches, and in how much memory: python -m qwen3f.data.bench --tokenizer=DIR [PART …]

The text is the standard library's. `cache` and `stream` read it from `--shards` parquet files, all links to one file,
as they would read a data set of that many files. Each part runs in a process of its own:

    tokenise  texts to ids to examples of 4,096 tokens, in one thread
    cache     building a token cache of half of the shards and of all, with one thread, two, and two worker processes
              (including their start), with the peak memory; reading it into batches of 64 × 4,096
    stream    the shards through a shuffle buffer of 1,000 documents into such batches, and the peak memory after a
              tenth of the tokens and after all

MB are 10⁶ bytes of UTF-8 text. Rates are per second by the clock; in brackets, per second of the process's own
processor time (without its workers'), which other programs disturb less. The first line gives the machine's load.
"""

import itertools
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from absl import app, flags

from qwen3f.data.cache.token_cache import TokenCache, build_or_open
from qwen3f.data.corpus import DataConfig, prepare
from qwen3f.data.loader import Dataset, Loader, LoaderOptions
from qwen3f.data.packing.concat import PackedDataset
from qwen3f.data.sources.documents import Document
from qwen3f.data.sources.embedded import open_embedded
from qwen3f.data.sources.registry import open_source
from qwen3f.data.stream.rows import best_fit_rows
from qwen3f.data.stream.tokens import tokenised
from qwen3f.data.stream.windows import windows
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.errors import UserError

_TOKENIZER = flags.DEFINE_string("tokenizer", None, "A sentencepiece .model or a directory with Qwen's tokenizer.")
_SHARDS = flags.DEFINE_integer("shards", 20, "Parquet files of 11 MB of text each; at least 2.")

_SEQ_LEN, _ROWS = 4096, 64
_HOLDOUT = 0.01


def tokenise(tokenizer_path: str, texts: list[str]) -> Iterator[str]:
    """A line for each packing."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for name, pack in (("concat", windows), ("best_fit", best_fit_rows)):
        tokenizer = load_tokenizer(tokenizer_path)  # a new one, whose table of pieces is empty
        watches = []
        for _ in range(4):
            watches.append(_Watch())
            documents = ((Document(text, ""), None) for text in texts)
            for index, (make, _) in enumerate(pack(tokenised(documents, tokenizer, workers=0), _SEQ_LEN)):
                make(index)
            watches[-1].stop()
        best = min(watches[1:], key=lambda watch: watch.seconds)
        yield (
            f"tokenise and pack by {name}: {watches[0].rate(megabytes)} MB/s the first time, then "
            f"{best.rate(megabytes)}"
        )


def cache(tokenizer_path: str, texts: list[str], shards: int, batches: int = 200) -> Iterator[str]:
    """A line for each way of building, and of reading `batches` batches."""
    tokenizer = load_tokenizer(tokenizer_path)
    with tempfile.TemporaryDirectory() as directory:
        for count, threads, workers in ((shards // 2, 1, 0), (shards, 1, 0), (shards, 2, 0), (shards, 1, 2)):
            corpus = write_shards(texts, count, Path(directory, f"corpus-{count}"))
            source = open_source(f"fineweb@{corpus}", holdout=_HOLDOUT)
            watch = _Watch()
            place = Path(directory, f"{count}-{threads}-{workers}")
            built = build_or_open(source, "train", tokenizer, place, threads, workers)
            watch.stop()
            yield (
                f"build a cache of {_size(built)}, {_where(threads, workers)}: "
                f"{watch.rate(built.stats['bytes'] / 1e6)} MB/s, peak {_peak_megabytes()} MB"
            )
        for workers in (0, 2):
            watch = _read(PackedDataset(built, _SEQ_LEN), built.vocab_size, batches, workers)
            rate = watch.rate(batches * _ROWS * _SEQ_LEN / 1e6)
            yield f"read a cache of {_size(built)} into batches, {_where(1, workers)}: {rate}M tokens/s"


def stream(tokenizer_path: str, texts: list[str], shards: int) -> Iterator[str]:
    """A line."""
    with tempfile.TemporaryDirectory() as directory:
        config = DataConfig(
            mixture=f"fineweb@{write_shards(texts, shards, Path(directory, 'corpus'))}",
            streaming=True,
            shuffle_buffer=1_000,
            max_epochs="1",
            holdout=_HOLDOUT,
            tokenizer=tokenizer_path,
            cache=str(Path(directory, "cache")),
            num_threads=1,
        )
        corpus = prepare(config, _SEQ_LEN, progress=False)
        batch_millions, peaks = _ROWS * _SEQ_LEN / 1e6, []
        watch = _Watch()
        with Loader(corpus.train, _ROWS, 0, 0, "cpu", corpus.tokenizer.vocab_size) as loader:
            try:
                for _ in loader:
                    peaks.append(_peak_megabytes())
            except UserError:  # the end of the only epoch
                pass
            state = len(str(loader.state))
        watch.stop()
        tenth = max(1, len(peaks) // 10)
        yield (
            f"stream {shards} shards: {watch.rate(len(peaks) * batch_millions)}M tokens/s; peak {peaks[tenth - 1]} MB "
            f"after {tenth * batch_millions:.0f}M tokens, {peaks[-1]} MB after {len(peaks) * batch_millions:.0f}M; the "
            f"state is {state} characters"
        )


def write_shards(texts: list[str], count: int, directory: Path) -> Path:
    """Write `count` parquet files of the texts, all links to one file; returns their directory."""
    directory.mkdir(exist_ok=True)
    first = directory / "00000.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), first, row_group_size=64)
    for number in range(1, count):
        link = directory / f"{number:05}.parquet"
        link.unlink(missing_ok=True)
        link.hardlink_to(first)
    return directory


class _Watch:
    """Runs from when it is made until `stop`."""

    def __init__(self) -> None:
        self._begin = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.seconds, self.processor = (
            now - begin for now, begin in zip((time.perf_counter(), time.process_time()), self._begin)
        )

    def rate(self, amount: float) -> str:
        return f"{amount / self.seconds:.1f} ({amount / self.processor:.1f})"


def _read(dataset: Dataset, vocab_size: int, batches: int, workers: int) -> _Watch:
    """The time of `batches` batches, after the first 8, which the start of the workers delays."""
    with Loader(dataset, _ROWS, 0, 0, "cpu", vocab_size, LoaderOptions(workers=workers)) as loader:
        for _ in range(8):
            next(loader)
        watch = _Watch()
        for _ in itertools.islice(loader, batches):
            pass
        watch.stop()
    return watch


def _size(built: TokenCache) -> str:
    return f"{built.num_tokens / 1e6:.0f}M tokens in {len(built.shards)} shard{'s' * (len(built.shards) > 1)}"


def _where(threads: int, workers: int) -> str:
    number, kind = (workers, "worker process") if workers else (threads, "thread")
    return f"{number} {kind}{('es' if workers else 's') * (number > 1)}"


def _peak_megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000


def _print(part: str, tokenizer_path: str, shards: int) -> None:
    torch.set_num_threads(1)
    texts = [document.text for document in open_embedded(holdout=0.0).documents("train")]
    lines = tokenise(tokenizer_path, texts) if part == "tokenise" else PARTS[part](tokenizer_path, texts, shards)
    for line in lines:
        print(line, flush=True)


PARTS = {"tokenise": tokenise, "cache": cache, "stream": stream}


def main(argv: list[str]) -> None:
    names = argv[1:] or list(PARTS)
    if unknown := set(names) - PARTS.keys():
        raise SystemExit(f"There is no part {', '.join(unknown)}: write some of {', '.join(PARTS)}.")
    if _SHARDS.value < 2:
        raise SystemExit(f"--shards={_SHARDS.value}: give at least 2.")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before it begins", flush=True)
    for name in names:
        process = multiprocessing.get_context("spawn").Process(
            target=_print, args=(name, _TOKENIZER.value, _SHARDS.value)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    flags.mark_flag_as_required("tokenizer")
    app.run(main)
