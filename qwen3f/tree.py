"""Pytrees: nested dicts, tuples and NamedTuples of tensors. Short names for functions of torch's pytree library."""

from collections.abc import Callable
from typing import Any

from torch.utils import _pytree as pytree

leaves = pytree.tree_leaves
flatten = pytree.tree_flatten
unflatten = pytree.tree_unflatten


def map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """fn over the leaves of one or more trees of the same structure."""
    return pytree.tree_map(fn, tree, *rest)


def named_leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """Path -> leaf. A path has fields of NamedTuples, keys of dicts, indices: ("params", "model.norm.weight")."""
    pairs, _ = pytree.tree_flatten_with_path(tree)
    return {tuple(_key_name(key) for key in path): leaf for path, leaf in pairs}


def _key_name(key: Any) -> str:
    match key:
        case pytree.MappingKey():
            return str(key.key)
        case pytree.SequenceKey():
            return str(key.idx)
        case pytree.GetAttrKey():
            return key.name
    raise TypeError(f"a path can't name the pytree key {key!r}: use dicts, NamedTuples, tuples and lists")
