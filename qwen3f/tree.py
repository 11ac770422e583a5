"""Pytrees: nested dicts, tuples and NamedTuples of tensors. A thin, named face over torch's own pytree library."""

from collections.abc import Callable
from typing import Any

from torch.utils import _pytree as pytree

leaves = pytree.tree_leaves
flatten = pytree.tree_flatten
unflatten = pytree.tree_unflatten


def map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """fn over the leaves of one or more trees of the same structure."""
    return pytree.tree_map(fn, tree, *rest)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(name, leaf) pairs; a name joins the keys on the way with '/', e.g. 'params/model.norm.weight'."""
    pairs, _ = pytree.tree_flatten_with_path(tree)
    return [("/".join(_key_name(k) for k in path), leaf) for path, leaf in pairs]


def _key_name(key: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)
