"""The model: pure functions of (config, parameters, batch)."""

from qwen3f.model.cached import make_cached_forward
from qwen3f.model.execution import EAGER, INVARIANT, REFERENCE, Execution
from qwen3f.model.kv_cache import KVCache, init_cache
from qwen3f.model.moe import RouterStats
from qwen3f.model.transformer import (
    ModelOutput,
    apply,
    check_tokens,
    head_weight,
    make_forward,
    make_outer,
    real_tokens,
)

__all__ = [
    "EAGER",
    "INVARIANT",
    "REFERENCE",
    "Execution",
    "KVCache",
    "ModelOutput",
    "RouterStats",
    "apply",
    "check_tokens",
    "head_weight",
    "init_cache",
    "make_cached_forward",
    "make_forward",
    "make_outer",
    "real_tokens",
]
