"""Which files of a local copy hold a split, in which order."""

import fnmatch
import os
import re
from collections import Counter
from pathlib import Path

from qwen3f.data.sources.adapters.registry import HubDataset
from qwen3f.errors import UserError
from qwen3f.files import user_path

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst")
TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.zst")

# Written beside the data by `save_to_disk`, by the Hub, and by rejection sampling.
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "rejection_summary.json"}
_SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev")


def split_files(dataset: HubDataset, root: str, split: str) -> list[Path]:
    """The data files of `split` in the copy below `root`, sorted by directory, then by name.

    The copy may be laid out as on the Hub, as `save_to_disk` writes, or in any other way. A file belongs to `split` if
    a directory of its path, or a part of its name (cut at "-" and "."), is called so. If no path names any split, every
    file is read as the training split.

    Raises:
        UserError: no such directory, no data file in it, or no file of that split though others are named.
    """
    return _split(dataset, root, split)[0]


def left_out(dataset: HubDataset, root: str, split: str) -> Counter[str]:
    """How many files of the copy `split_files` leaves out, by what they are, such as ".md"."""
    return _split(dataset, root, split)[1]


def _split(dataset: HubDataset, root: str, split: str) -> tuple[list[Path], Counter[str]]:
    """The files of the split, and what the others are."""
    base = user_path(root, f"{dataset.name}@DIR, or config.data.root")
    if not base.is_dir():
        raise UserError(
            f"There is no directory {base} for {dataset.name}: give an existing one, {dataset.name}@DIR or "
            "--config.data.root=DIR."
        )
    folder = base / dataset.folder
    top = folder if dataset.folder and folder.is_dir() else base
    files, others = data_files(top, SUFFIXES)
    if not files:
        raise UserError(f"No {', '.join(SUFFIXES)} file lies below {top}: put the files of {dataset.hub_id} there.")
    if dataset.files:
        pattern = dataset.files.rsplit("/", 1)[-1]
        matching = [path for path in files if fnmatch.fnmatch(path.name, pattern)] or files
        others[f"besides {pattern}"] += len(files) - len(matching)
        files = matching
    words = {path: _split_words(path.relative_to(top), split) for path in files}
    if not any(words.values()):
        if split == dataset.split:
            return files, +others
        raise UserError(f"No file below {top} names the split {split!r}: {dataset.name} there has one split only.")
    chosen = [path for path in files if split in words[path]]
    if not chosen:
        found = sorted(set().union(*words.values()))
        raise UserError(f"No file below {top} is of the split {split!r}; there are {', '.join(found)}.")
    others.update(f"of {', '.join(sorted(words[path])) or 'no split'}" for path in files if path not in set(chosen))
    return chosen, +others


def data_files(top: Path, suffixes: tuple[str, ...]) -> tuple[list[Path], Counter[str]]:
    """The files below `top` with one of `suffixes`, by directory, then by name; and how many others there are, by kind.

    A kind is a suffix, such as ".md"; or "hidden", for files and directories with a leading dot. Metadata files that
    `datasets`, the Hub and rejection sampling write are neither read nor counted. Links to directories are followed,
    except to a directory that was read already.

    Raises:
        UserError: a directory that cannot be listed.
    """

    def unreadable(error: OSError) -> None:
        raise UserError(f"The directory {error.filename} cannot be read ({error.strerror}): mend it, or move it away.")

    found: list[Path] = []
    others: Counter[str] = Counter()
    seen: set[str] = set()
    for directory, subdirectories, names in os.walk(top, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:  # links can go in circles
            others["linked twice"] += 1
            subdirectories.clear()
            continue
        seen.add(real)
        others["hidden"] += sum(name.startswith(".") for name in (*subdirectories, *names))
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            if name.startswith(".") or name in _METADATA:
                continue
            if not path.is_file():  # a link to nothing, a pipe
                others[f"{path.suffix.lower()}, no file"] += 1
            elif name.lower().endswith(suffixes):
                found.append(path)
            else:
                others[path.suffix.lower() or "no suffix"] += 1
    return found, +others


def _split_words(path: Path, split: str) -> set[str]:
    """The splits that a relative path names: "train", "train_sft", …"""
    words = {word for part in path.parts for word in re.split(r"[.-]", part.lower())}
    return {word for word in words if word == split or word.split("_")[0] in _SPLIT_WORDS}
