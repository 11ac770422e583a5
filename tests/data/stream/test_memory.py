"""Memory does not grow with the data: a stream of many shards through its whole chain."""

import gc
import json
import tracemalloc

import pytest

from qwen3f.data.corpus import DataConfig, prepare
from tests.data.sources.adapters.real_rows import write


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_peak_is_that_of_a_few_shards(tmp_path, small_qwen, packing):
    """From 2 to 12 shards of 0.5 MB, the text grows by 5 MB, the peak by under 1 MiB, the state by under 20 bytes."""
    rows = [{"text": f"{n} the " * 150, "meta": "m"} for n in range(1000, 1400)]
    first = write(rows, tmp_path / "few/00.parquet")
    for folder, count in (("few", 2), ("many", 12)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for n in range(count):
            if not (tmp_path / f"{folder}/{n:02}.parquet").exists():
                (tmp_path / f"{folder}/{n:02}.parquet").hardlink_to(first)

    def peak(folder):
        config = DataConfig(
            mixture=f"slimpajama@{tmp_path / folder}",
            streaming=True,
            shuffle_buffer=200,
            packing=packing,
            max_epochs="1",
            tokenizer=str(small_qwen.path),
            cache=str(tmp_path / "cache"),
            num_threads=1,  # each thread has a table of pieces
        )
        data = prepare(config, 1024, progress=False).train
        gc.collect()  # frees the tokenizer of the previous call
        tracemalloc.reset_peak()
        sizes = [len(json.dumps(state)) for make, state in data.examples(0) if make(0)]
        return tracemalloc.get_traced_memory()[1], len(sizes), sizes[-1]

    tracemalloc.start()
    try:
        peak("few")  # imports and tables
        (few, few_examples, few_state), (many, many_examples, many_state) = peak("few"), peak("many")
    finally:
        tracemalloc.stop()
    assert many_examples > 5 * few_examples
    assert many < few + 2**20
    assert many_state < few_state + 20
