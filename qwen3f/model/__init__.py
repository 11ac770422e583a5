"""The model: pure functions of (config, parameters, batch)."""

from qwen3f.model.cached import apply_cached, make_cached_forward, make_cached_hidden
from qwen3f.model.execution import EAGER, REFERENCE, Execution
from qwen3f.model.kv_cache import KVCache, init_cache
from qwen3f.model.moe import RouterStats
from qwen3f.model.transformer import ModelOutput, apply, head_weight, make_forward, make_outer, real_tokens

__all__ = [
    "EAGER",
    "REFERENCE",
    "Execution",
    "KVCache",
    "ModelOutput",
    "RouterStats",
    "apply",
    "apply_cached",
    "head_weight",
    "init_cache",
    "make_cached_forward",
    "make_cached_hidden",
    "make_forward",
    "make_outer",
    "real_tokens",
]
