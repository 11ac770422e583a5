"""Reads every token cache in a directory against its checksums: python -m qwen3f.data.cache.check [DIR]

DIR is what `data.cache` was in the run, by default the default directory. Prints a line for each cache. If a file is
damaged, the line names it, and the exit code is 2.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from absl import app

from qwen3f.cli import report
from qwen3f.data.cache.token_cache import open_cache, verify
from qwen3f.data.corpus import cache_directory
from qwen3f.errors import UserError


def check(directory: Path) -> Iterator[str | UserError]:
    """For each token cache in `directory`, by name: a line that says what it holds, or the error found."""
    for path in sorted(directory.glob("tokens-*")):
        try:
            cache = open_cache(path)
            verify(cache)
        except UserError as error:
            yield error
        else:
            yield (
                f"{path}: {cache.num_tokens:,} tokens in {cache.num_docs:,} documents, shards: {len(cache.shards)}, "
                "every checksum as written"
            )


def main(argv: list[str]) -> int:
    code = 0
    for found in check(cache_directory(*argv[1:2])):
        if isinstance(found, UserError):
            code = report(found, 2)
        else:
            print(found, flush=True)
    return code


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
