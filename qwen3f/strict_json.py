"""JSON files from strangers: an object, no key twice, of a bounded size."""

import json
from pathlib import Path
from typing import Any

from qwen3f.errors import UserError

MAX_BYTES = 64 * 2**20  # the index of the largest Qwen3 has 4 MB


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError naming the file: missing, too large, no JSON, or a key twice."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a directory that holds it")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, over the {MAX_BYTES:,} that are read")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{path} has the key '{twice}' twice; remove one of the two")
        return values

    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); copy or download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__} where an object is expected; copy it again")
    return values
