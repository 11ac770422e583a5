"""Reads untrusted JSON files: they must be an object of bounded size without repeated keys. A UTF-8 BOM is allowed."""

import json
from pathlib import Path
from typing import Any

from qwen3f.errors import UserError
from qwen3f.files import read_bounded
from qwen3f.limits import FILE_BYTES, Limit


def read_object(path: Path, most: Limit = FILE_BYTES) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError for a file that is missing, too large, not JSON, or repeats a key."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a directory that holds it")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise UserError(f"{path} has the key '{key}' twice; remove one of the two")
                seen.add(key)
        return values

    try:
        values = json.loads(read_bounded(path, most), object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); copy or download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__} where an object is expected; copy it again")
    return values
