"""The safetensors files of a directory: which tensor lies where, checked before a byte of the weights is read.

Nothing is unpickled. Files may be symlinks (the Hugging Face cache is made of them), but a name in the index must be
a plain file name: it can't point out of the directory.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors

from qwen3f.errors import UserError
from qwen3f.strict_json import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape and safetensors' name of its dtype, such as "BF16"."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """Key -> tensor, of `model.safetensors` or of the files that `model.safetensors.index.json` names.

    Other files are ignored. Reads headers only. An index may name model.safetensors itself, as mlx writes it.

    Raises UserError naming file and key: no weights or two sets of them, a broken file, a file name in the index that
    is no plain name, a missing file, a key stored twice or in another file than the index says.
    """
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).exists():
            raise UserError(_no_weights(directory))
        return dict(_headers(directory / SINGLE))
    weight_map = _read_index(index)
    if (directory / SINGLE).exists() and SINGLE not in weight_map.values():
        raise UserError(
            f"{directory} holds both {SINGLE} and {INDEX}, which does not name it; remove the one that is out of date"
        )
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        for key, tensor in _headers(directory / name):
            if key in found:
                raise UserError(f"{key} is stored twice, in {found[key].file} and {name}; remove one of the two")
            if weight_map.get(key) != name:
                raise UserError(
                    f"{directory / name} stores {key}, which {INDEX} puts in {weight_map.get(key, 'no file')}; write "
                    "the index again"
                )
            found[key] = tensor
    for key, name in weight_map.items():
        if key not in found:
            raise UserError(f"{index} puts {key} in {name}, which doesn't store it; write the index again")
    return found


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped. Raises UserError if it is missing, broken, or cannot be opened."""
    try:
        if not path.is_file():
            raise UserError(f"there is no file {path}; copy or download it")
        opened = safetensors.safe_open(path, framework="pt", device="cpu")
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror or error}); copy or download it again") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error
    try:
        with opened as file:
            yield file
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error


def _headers(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    with open_file(path) as file:
        for key in file.keys():  # noqa: SIM118
            entry = file.get_slice(key)
            yield key, StoredTensor(path, tuple(entry.get_shape()), entry.get_dtype())


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map (an object of tensor names to file names); write the index again")
    for key, name in weight_map.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set(name) & {"/", "\\", "\0"}
        if not plain:
            raise UserError(f"{path} puts {key} in {name!r}; the name of a .safetensors file beside it is needed")
    return weight_map


def _no_weights(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a directory; give one with config.json and {SINGLE}"
    names = sorted(path.name for path in directory.iterdir())
    if parts := [name for name in names if name.endswith(".safetensors")]:
        return f"{directory} holds {parts[0]} but neither {SINGLE} nor {INDEX}; add the index"
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        return (
            f"{directory} holds {pickled[0]}, a pickle, which can run code when loaded and is never opened; convert it "
            "to safetensors (transformers: from_pretrained, then save_pretrained)"
        )
    return f"{directory} holds no weights; give a directory with {SINGLE} or {INDEX}"
