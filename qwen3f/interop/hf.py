"""Hugging Face directories of Qwen3 and Qwen3-VL, dense and sparse: read into (cfg, params) and written from them.

Both stream: weights are mapped into memory file by file and copied tensor by tensor into their final place, or written
one by one. Beyond the model itself, one tensor is in memory.
"""

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3f.checkpoint.shards import param_shards
from qwen3f.config import ModelConfig
from qwen3f.data.chat.recognise import write_template
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.interop import config as C
from qwen3f.interop import keys, shards, vision_config, writer
from qwen3f.params import EMBED, HEAD, Params, check_params
from qwen3f.strict_json import read_object
from sharding.layout import ONE_DEVICE, Layout

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
PREPROCESSOR = "preprocessor_config.json"
MAX_SHARD_BYTES = 5 * 10**9
_MAPPED_BYTES = 2**28
# A config.json that needs over _FAR times the stored tensors is of another model; else the missing ones are named.
_FAR = 4
DTYPES = {name: dtype for dtype, name in writer.DTYPE_NAMES.items()}


def read_config(directory: str | Path) -> ModelConfig:
    """The model that `directory`/config.json describes. Raises UserError, see qwen3f.interop.config.from_hf."""
    path = Path(directory) / CONFIG
    values = read_object(path)
    read = vision_config.from_hf if values.get("model_type") in list(vision_config.ARCHITECTURES) else C.from_hf
    return read(values, str(path))


def _to_hf(cfg: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    return (vision_config.to_hf if cfg.vision_enabled else C.to_hf)(cfg, dtype)


def load_pretrained(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layout: Layout = ONE_DEVICE,
) -> tuple[ModelConfig, Params]:
    """The model in a Hugging Face directory, as (cfg, params).

    directory: holds config.json and model.safetensors, or shards and their index. Only safetensors are read.
    dtype: the dtype of all parameters; None keeps each as stored.
    layout: of a mesh; only this rank's shards are read, and padding is zero.

    Raises UserError, before weights are read, for what qwen3f.interop.config and .shards refuse, and naming the key for
    a tensor that is missing, unknown, of another shape or not floating-point, and for a tied head that differs from the
    embedding; afterwards for weights that float16 cannot hold.
    """
    directory = Path(directory)
    if dtype is not None:
        _check_dtype(dtype, "weights", "loaded")
    cfg = read_config(directory)
    stored = shards.read_directory(directory)
    if (needed := keys.count(cfg)) > _FAR * len(stored):  # a short file must not ask for much memory
        raise UserError(
            f"{directory / CONFIG} describes a model of {needed:,} tensors, but only {len(stored):,} are stored; "
            "config and weights belong to different models"
        )
    slots = keys.slots(cfg, keys.are_transposed(cfg, {key: tensor.shape for key, tensor in stored.items()}))
    _check_stored(cfg, slots, stored, directory)
    own = param_shards(cfg, layout)
    dtypes = _leaf_dtypes(slots, stored) if dtype is None else dict.fromkeys(own, dtype)
    params = {path: torch.empty(shard.local, dtype=dtypes[path], device=device) for path, shard in own.items()}
    if layout.axes.pp.size > 1:
        params = {path: leaf.zero_() for path, leaf in params.items()}
    by_file: dict[Path, dict[str, writer.TensorSpec]] = defaultdict(dict)
    for key, slot in slots.items():
        by_file[stored[key].file][key] = writer.TensorSpec(slot.shape, DTYPES[stored[key].dtype])
    for file, specs in by_file.items():
        # Mapped pages count as ours until the file is closed: closing it now and then keeps them from adding up.
        for part in writer.cut(specs, _MAPPED_BYTES):
            with shards.open_file(file) as opened:
                for key in part:
                    keys.fill(slots[key], params, opened.get_tensor(key), own)
    if dtype == torch.float16:  # whose range is the narrowest: 65,504
        check_finite(params)
    return cfg, params


def check_finite(params: Params) -> None:
    """Raises UserError, naming the parameter, where one holds a weight that is not finite."""
    for path, leaf in params.items():
        if not writer.is_finite(leaf):
            raise UserError(
                f"{path} holds weights that are not finite as {str(leaf.dtype).removeprefix('torch.')}; write "
                "--config.dtype=bfloat16 or --config.dtype=float32, whose range is wider (in Python dtype=…), or give "
                "another checkpoint"
            )


def save_pretrained(
    directory: str | Path,
    cfg: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json, weights and tokenizer so that transformers loads them.

    directory: must not exist or be empty, or be a link to an empty one; appears by one rename when everything is
      written.
    tokenizer: its files are written beside the weights, its end and padding tokens into the configs. AutoTokenizer
      gives the same ids. The chat template is the tokenizer's own; if it has none, that of its kind (data.chat.kinds).
    dtype: the dtype of the stored weights; None keeps each parameter's.
    max_shard_bytes: weights beyond it are cut into several files with an index.

    Raises UserError, leaving nothing behind, for a directory in use, a model that Hugging Face can't express,
    parameters that are not the config's or too large for the dtype that they are stored in, and a disk that fails.
    """
    check_writable(Path(directory))
    directory = Path(directory).resolve()  # a rename would not follow a link
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    check_params(cfg, params)
    slots = keys.slots(cfg)
    for path, leaf in params.items():
        _check_dtype(dtype or leaf.dtype, f"parameter {path}", "written")
    specs = {key: writer.TensorSpec(slot.shape, dtype or params[slot.parts[0][0]].dtype) for key, slot in slots.items()}
    config = _to_hf(cfg, dtype or params[EMBED].dtype)
    generation: dict[str, Any] = {"use_cache": True}
    if tokenizer is not None:
        if tokenizer.vocab_size > cfg.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model only {cfg.vocab_size}")
        config |= {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        generation |= {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}

    def write(place: Path) -> None:
        _write_json(place / CONFIG, config)
        _write_json(place / GENERATION_CONFIG, generation)
        if tokenizer is not None:
            tokenizer.export(place)
            write_template(tokenizer, place, always=True)
        if cfg.vision_enabled:
            _write_json(place / PREPROCESSOR, vision_config.preprocessor(cfg))
        _write_weights(place, specs, lambda key: keys.fetch(slots[key], params), max_shard_bytes)

    _write_directory(directory, write)


def check_writable(directory: Path, given: str = "") -> None:
    """Raises UserError unless `directory` is free to be written: absent, or an empty directory and no mount point.

    given: the flag that named it, for the message.
    """
    given = given or str(directory)
    if directory.is_dir():
        if any(directory.iterdir()):
            raise UserError(f"{given} is not empty, and nothing is overwritten; choose another directory")
        if directory.resolve().is_mount():
            raise UserError(
                f"{given} is a mount point, which no finished directory can replace; choose one inside it, such as "
                f"{directory / 'model'}"
            )
    elif directory.exists() or directory.is_symlink():
        raise UserError(f"{given} is not a directory; choose another one")


def _check_stored(
    cfg: ModelConfig, slots: dict[str, keys.Slot], stored: dict[str, shards.StoredTensor], directory: Path
) -> None:
    missing = [key for key in slots if key not in stored]
    extra = [key for key in stored if key not in slots and not keys.is_ignored(cfg, key)]
    for names, what in ((missing, "are missing"), (extra, "don't belong to the model of its config.json")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{directory}: these tensors {what}: {', '.join(names[:3])}{more}")
    wanted = {key: slot.shape for key, slot in slots.items()}
    embedding = keys.hf_name(cfg, EMBED)
    if keys.is_tied_head(cfg, HEAD) and HEAD in stored:
        wanted[HEAD] = wanted[embedding]
    for key, shape in wanted.items():
        tensor = stored[key]
        if tensor.shape != shape:
            raise UserError(f"{tensor.file}: {key} has shape {list(tensor.shape)}, config.json needs {list(shape)}")
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{tensor.file}: {key} is stored as {tensor.dtype}; only {', '.join(DTYPES)} can be read: give the "
                "directory of the unquantised weights"
            )
    if HEAD in wanted and cfg.tie_word_embeddings and not _same_bits(stored[HEAD], stored[embedding], embedding):
        raise UserError(
            f"{directory}: tie_word_embeddings is true, but {HEAD} differs from {embedding}; set it to false in "
            "config.json to use both, or remove the head"
        )


def _same_bits(head: shards.StoredTensor, embedding: shards.StoredTensor, name: str) -> bool:
    if head.dtype != embedding.dtype:
        return False
    with shards.open_file(head.file) as a, shards.open_file(embedding.file) as b:
        return torch.equal(a.get_tensor(HEAD).view(torch.uint8), b.get_tensor(name).view(torch.uint8))


def _leaf_dtypes(slots: dict[str, keys.Slot], stored: dict[str, shards.StoredTensor]) -> dict[str, torch.dtype]:
    """The stored dtype of each of our parameters. Raises UserError if the layers of one are stored differently."""
    first: dict[str, str] = {}
    for key, path in ((key, path) for key, slot in slots.items() for path, _ in slot.parts):
        other = first.setdefault(path, key)
        if stored[key].dtype != stored[other].dtype:
            raise UserError(
                f"{stored[key].file}: {key} is {stored[key].dtype}, but {other} is {stored[other].dtype}; "
                "load all as one dtype: write --config.dtype=float32 or another, or load_pretrained(…, dtype=…)"
            )
    return {path: DTYPES[stored[key].dtype] for path, key in first.items()}


def _check_dtype(dtype: torch.dtype, what: str, done: str) -> None:
    if dtype not in writer.DTYPE_NAMES:
        raise UserError(f"{what} can't be {done} as {dtype}; use one of {', '.join(map(str, writer.DTYPE_NAMES))}")


def _write_weights(
    directory: Path, specs: dict[str, writer.TensorSpec], fetch: Callable[[str], Tensor], max_bytes: int
) -> None:
    parts = writer.cut(specs, max_bytes)
    if len(parts) == 1:
        writer.write_file(directory / shards.SINGLE, specs, fetch)
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        writer.write_file(directory / name, {key: specs[key] for key in part}, fetch)
        weight_map |= dict.fromkeys(part, name)
    total = sum(spec.nbytes for spec in specs.values())
    _write_json(directory / shards.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a new directory beside `directory`, then rename it to that. A failure leaves nothing behind."""
    place: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Not a suffix of the name alone: two processes may write at once, and only one rename can win.
        place = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        (inside := place / directory.name).mkdir()  # mkdtemp's own directory is closed to everyone else
        write(inside)
        inside.rename(directory)
    except OSError as error:
        raise UserError(f"{directory} could not be written ({error}); nothing was left behind") from error
    finally:
        if place is not None:
            shutil.rmtree(place)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
