"""What `--config.init_from=SOURCE` names: a Hugging Face directory, a workdir, or a workdir's checkpoints/N.

One place for every stage that starts from another model. Weights, config and tokenizer only: no optimizer state.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen3f.checkpoint import manifest
from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.checkpoint.shards import param_shards, shards
from qwen3f.config import ModelConfig
from qwen3f.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError
from qwen3f.files import user_path
from qwen3f.interop import hf
from qwen3f.interop.config import check_size
from qwen3f.params import Params, abstract_params
from qwen3f.processes.world import ALONE, World
from qwen3f.strict_json import read_object
from qwen3f.train import workdir as W
from sharding.layout import ONE_DEVICE, Layout

# These fields may differ from the model that a run starts from, since the same weights fit. A difference is printed.
CHANGEABLE = ("rope_theta", "rope_scaling", "max_position_embeddings", "rms_norm_eps")
# Fields that say how a model is trained may differ too; that is not printed.
FREE_FIELDS = W.TRAINING_FIELDS | set(CHANGEABLE)


# Parts that a model may have although the one it starts from lacks them: they are initialised. A scalar head replaces
# the head over the vocabulary.
PARTS = ("scalar_head", "vision_enabled")


OF_VISION = frozenset(
    name
    for name in (field.name for field in dataclasses.fields(ModelConfig))
    if name.startswith("vision_") or name in ("image_token_id", "video_token_id", "mrope_section")
)


class Source(NamedTuple):
    """A place on disk. step: which checkpoint of a workdir; None: its last."""

    directory: Path
    is_hf: bool
    step: int | None = None


def locate(source: str, flag: str = "config.init_from", own: bool = False) -> Source:
    """What kind of place `source` is. Its config.json decides, not its name or its other files.

    own: a Hugging Face directory is refused too. Raises UserError, with the `flag` that gave it, if it is none of the
    three.
    """
    wanted = "give a workdir or its checkpoints/N" + ("" if own else ", or a Hugging Face directory")
    place = user_path(source, flag)
    has_checkpoints = (place / W.CHECKPOINTS).is_dir()
    if _is_hf(place / hf.CONFIG, strict=not has_checkpoints):
        if own:
            raise UserError(f"{flag}={source} is a Hugging Face directory; {wanted}")
        return Source(place, is_hf=True)
    if has_checkpoints:
        return Source(place, is_hf=False)
    full = place.absolute()  # "." may be a checkpoint, too
    if full.parent.name == W.CHECKPOINTS and full.name.isdecimal():
        return Source(full.parent.parent, is_hf=False, step=int(full.name))
    config = "" if own else f" and no {place / hf.CONFIG} with a model_type"
    raise UserError(f"{flag}={source}: there is no {place / W.CHECKPOINTS}{config}; {wanted}")


def pinned(source: str, flag: str = "config.init_from") -> str:
    """`source` as a path that keeps its meaning: for a workdir, the path of the checkpoint that is its last one now.

    Raises UserError as `locate` does, and for a workdir without a checkpoint.
    """
    directory, is_hf, step = locate(source, flag)
    if is_hf:
        return str(directory)
    with _checkpoints(directory) as checkpoints:
        return str(directory / W.CHECKPOINTS / str(_step(checkpoints, step)))


def read_model_config(source: str, flag: str = "config.init_from") -> ModelConfig:
    """The model at `source`. Raises UserError as `locate` and hf.read_config do, or if there is no checkpoint."""
    directory, is_hf, step = locate(source, flag)
    if is_hf:
        return hf.read_config(directory)
    with _checkpoints(directory) as checkpoints:
        step = _step(checkpoints, step)
        config = checkpoints.read_meta(step).get("config", {})
    if "model" not in config:
        raise UserError(f"{directory / W.CHECKPOINTS / str(step)} does not say which model it is of; give another one")
    cfg = ModelConfig.from_dict(config["model"])
    check_size(cfg, str(directory / W.CHECKPOINTS / str(step)))
    return cfg


def check_same_model(source: str, cfg: ModelConfig) -> None:
    """Raises UserError naming the fields in which `cfg` is another model than the one there.

    FREE_FIELDS may differ, and `cfg` may have more of PARTS.
    """
    there = read_model_config(source)
    here, other = _meaningful(_without_new_parts(cfg, there)), _meaningful(there)
    differing = [name for name in here | other if here.get(name) != other.get(name)]
    if differing:
        shown = ", ".join(f"{name} is {getattr(there, name)} there and {getattr(cfg, name)} here" for name in differing)
        overrides = " ".join(f"--config.model.{name}={getattr(there, name)}" for name in differing)
        raise UserError(f"config.init_from={source} holds another model than config.model: {shown}; write {overrides}")


def read_params(
    source: str,
    cfg: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    backend: str = "orbax",
    layout: Layout = ONE_DEVICE,
    world: World = ALONE,
) -> Params:
    """The parameters at `source`, for the model `cfg`, on `device`; on a mesh this rank's shards.

    dtype: None keeps the dtypes that a Hugging Face directory stores, and gives a workdir's parameters those of the
        parameter table.
    backend: "dcp" also opens checkpoints that hold a pickle; see Checkpointer.
    layout, world: of the mesh, whose ranks all call this together. Each rank reads only what it needs.
    The result has no parameters for the PARTS that `cfg` has and `source` lacks.
    Raises UserError naming the fields in which `cfg` is another model than the one there (FREE_FIELDS may differ), and
    as hf.load_pretrained and Checkpointer.restore do.
    """
    check_same_model(source, cfg)
    wanted = abstract_params(cfg)
    cfg = _without_new_parts(cfg, read_model_config(source))
    directory, is_hf, step = locate(source)
    if is_hf:
        params = hf.load_pretrained(directory, dtype, device, layout)[1]
        return {path: leaf for path, leaf in params.items() if path in wanted}
    table, shapes, shard_of = abstract_params(cfg), {}, None
    if world.size > 1:
        shapes = {path: shard.local for path, shard in param_shards(cfg, layout).items()}
        shard_of = shards(cfg, layout)
    like = {
        path: torch.empty(shapes.get(path, spec.shape), dtype=spec.dtype, device="meta") for path, spec in table.items()
    }
    with Checkpointer(
        directory / W.CHECKPOINTS, every=0, keep=0, backend=backend, world=world, shard_of=shard_of
    ) as checkpoints:
        params, _ = checkpoints.restore_part("params", like, step, cast=True)

    def moved(path: str) -> Tensor:
        return params.pop(path).to(device, dtype)  # popped: a cast copy and the whole model would not fit side by side

    return {path: moved(path) for path in like if path in wanted}


def weights_digest(source: str) -> str:
    """A digest of the weights at `source`, hex: a hash of the sha256 of their files.

    For a checkpoint these are taken from its manifest, with those of the optimizer's files; the files are compared with
    the manifest when they are read. The files of a Hugging Face directory are read here. Raises UserError as `locate`
    does, for a workdir without a checkpoint or one without a manifest.
    """
    directory, is_hf, step = locate(source)
    if is_hf:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
        found = {name: entry["sha256"] for name, entry in manifest.describe(directory, [hf.CONFIG, *names]).items()}
    else:
        with _checkpoints(directory) as checkpoints:
            place = checkpoints.path(_step(checkpoints, step))
        found = {name: digest for name, (_, digest) in manifest.entries(place).items()}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def read_tokenizer(source: str) -> Tokenizer:
    """The tokenizer kept at `source`. Raises UserError if there is none."""
    return load_tokenizer(tokenizer_path(source))


def tokenizer_path(source: str) -> Path:
    """What load_tokenizer opens for `source`: a workdir's tokenizer, or a Hugging Face directory's files.

    Raises UserError naming a file of a workdir's tokenizer that is not as its checkpoint was trained with.
    """
    directory, is_hf, step = locate(source)
    if is_hf:
        return directory
    with _checkpoints(directory) as checkpoints:
        W.check_tokenizer(directory, checkpoints.read_meta(_step(checkpoints, step)))
    return directory / W.TOKENIZER


def changes(source: str, cfg: ModelConfig) -> list[str]:
    """'rope_theta: there -> here' for each of CHANGEABLE in which `cfg` departs from the model at `source`."""
    there = read_model_config(source)
    pairs = {name: (getattr(there, name), getattr(cfg, name)) for name in CHANGEABLE}
    return [f"{name}: {old} -> {new}" for name, (old, new) in pairs.items() if old != new]


def _without_new_parts(cfg: ModelConfig, there: ModelConfig) -> ModelConfig:
    """`cfg` without the PARTS that the model `there` lacks."""
    return cfg.replace(**{name: False for name in PARTS if getattr(cfg, name) and not getattr(there, name)})


def _is_hf(config: Path, strict: bool) -> bool:
    """Whether `config` is a Hugging Face config.json. strict: raise UserError for a file that can't be read. In a
    workdir that is no error, since the file is only a copy of what the checkpoints hold."""
    try:
        return config.is_file() and "model_type" in read_object(config)
    except UserError:
        if strict:
            raise
        return False


def _meaningful(cfg: ModelConfig) -> dict[str, Any]:
    """The fields that shape `cfg`'s function or parameters: those of parts it doesn't have are left out."""
    values = {name: value for name, value in cfg.to_dict().items() if name not in FREE_FIELDS}
    if not cfg.vision_enabled:
        values = {name: value for name, value in values.items() if name not in OF_VISION}
    if not cfg.dense_layers:
        del values["intermediate_size"]
    if not cfg.sparse_layers:
        for name in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
            del values[name]
    for name in ("num_experts", "decoder_sparse_step", "mlp_only_layers"):
        if not cfg.num_experts:
            del values[name]
    return values


def _checkpoints(workdir: Path) -> Checkpointer:
    return Checkpointer(workdir / W.CHECKPOINTS, every=0, keep=0)


def _step(checkpoints: Checkpointer, step: int | None) -> int:
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise UserError(f"{checkpoints.directory} holds no checkpoint; give a workdir that has trained")
    return step
