"""The model of a run that starts from weights: the weights' own model, except for keys set on the command line.

The preset then only decides how the run trains (steps, rates, lengths). Its model settings, such as the rotary base,
would be wrong for weights that were trained with others.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.interop import source
from qwen3f.train import workdir as W


def inherit_model(config: ConfigDict, workdir: Path, chosen: Collection[str] = ()) -> ConfigDict:
    """`config` with the model of config.init_from; unchanged if init_from is empty.

    chosen: keys that the user has set, such as "model.rope_theta"; they keep the user's values. Unchanged are also how
    the model is trained (workdir.TRAINING_FIELDS) and parts that the weights may lack (source.PARTS, e.g. a vision
    tower). With config.abf (stage 3) a lower rotary base and a shorter context are raised to config.model's, and a
    rope_scaling of config.model is kept.
    Raises UserError as source.read_model_config, unless `workdir` already has a run: that run has its own model.
    """
    if not config.init_from:
        return config
    return inherit_from(config, _read(config.init_from, workdir), chosen)


def inherit_from(config: ConfigDict, theirs: ModelConfig, chosen: Collection[str] = ()) -> ConfigDict:
    """As inherit_model, for weights whose model is `theirs`."""
    kept = {key.split(".")[1] for key in chosen if key.startswith("model.")} | W.TRAINING_FIELDS | set(source.PARTS)
    if not theirs.vision_enabled:
        kept |= source.OF_VISION
    ours = config.model.to_dict()
    values = {name: value for name, value in theirs.to_dict().items() if name not in kept}
    gets_tower = ours["vision_enabled"] and not theirs.vision_enabled
    if gets_tower and theirs.head_dim != ours["head_dim"] and "model.mrope_section" not in chosen:
        values["mrope_section"] = _sections(theirs.head_dim)
    if config.get("abf", False):
        values = {name: _raised(name, value, ours[name]) for name, value in values.items()}
    out = config.copy_and_resolve_references()
    with out.unlocked(), out.ignore_type():
        out.model = ConfigDict({**ours, **values})
    return out


def _sections(head_dim: int) -> tuple[int, int, int]:
    """How many rotary pairs encode time, height and width, in Qwen3-VL's proportions: 24, 20 and 20 of 64."""
    of_side = head_dim // 2 * 5 // 16
    return head_dim // 2 - 2 * of_side, of_side, of_side


def _raised(name: str, theirs: Any, ours: Any) -> Any:
    if name in ("rope_theta", "max_position_embeddings"):
        return max(theirs, ours)
    return ours if name == "rope_scaling" and ours is not None else theirs


def _read(place: str, workdir: Path) -> ModelConfig:
    try:
        return source.read_model_config(place)
    except UserError:
        if (there := W.read_config(workdir)) is None:
            raise
        return ModelConfig.from_dict(there["model"])
