"""The model: pure functions of (config, parameters, batch)."""

from qwen3f.model.transformer import (
    EAGER,
    REFERENCE,
    Execution,
    ModelOutput,
    apply,
    head_weight,
    make_forward,
)

__all__ = ["EAGER", "REFERENCE", "Execution", "ModelOutput", "apply", "head_weight", "make_forward"]
