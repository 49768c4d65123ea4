"""Paths, prunable leaves, and the holes that stand for all the others."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from movement_jax.arguments import compiled

_SHOWN_PATHS = 20
_DENSE_WEIGHTS = re.compile(r"embed|norm", re.IGNORECASE)


def is_hole(node: Any) -> bool:
    """True for the ``optax.MaskedNode`` that stands for a leaf left dense."""
    return isinstance(node, optax.MaskedNode)


def is_box(node: Any) -> bool:
    """True for a container that wraps one array with metadata.

    These are ``flax.linen.Partitioned`` and its kin, and ``nnx.Variable``. They are
    told by what they offer, so that no Flax module is imported here.
    """
    return hasattr(node, "replace_boxed") or any(
        base.__name__ == "Variable" and base.__module__.startswith("flax.nnx")
        for base in type(node).__mro__
    )


def path_name(path: tuple[Any, ...]) -> str:
    """Names a leaf the same way whatever container its params came in.

    Args:
      path: key path as given by ``jax.tree_util.tree_flatten_with_path``.

    Returns:
      The keys joined with ``/``, without the ``.value`` that boxes add.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> tree = {"blocks": [{"kernel": jnp.ones(2)}]}
      >>> (path, _), = jax.tree_util.tree_flatten_with_path(tree)[0]
      >>> path_name(path)
      'blocks/0/kernel'
    """
    last = path[-1] if path else None
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name in (
        "value",
        "raw_value",
    ):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """All array leaves of a tree with their ``/``-joined paths, in flatten order."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(path_name(path), leaf) for path, leaf in flat]


def select(params: Any, prunable: Any = None) -> Any:
    """Keeps the prunable leaves of a tree and replaces the others by holes.

    By default these are the float leaves with at least two axes whose path ends in
    ``kernel``, ``w`` or ``weight``, except a ``weight`` under an embedding or norm.

    Args:
      params: tree of arrays, boxes allowed.
      prunable: None, a regular expression searched for in the ``/``-joined path, or
        a tree of bools with the structure of ``params`` or a prefix of it.

    Returns:
      ``params`` with ``optax.MaskedNode()`` in place of every leaf left dense.

    Raises:
      ValueError: if nothing is selected; the message lists the paths.
    """
    if prunable is None or isinstance(prunable, str | re.Pattern):
        rule = _default_rule if prunable is None else _search_rule(prunable)
        selected = _select_by_name(params, rule)
    else:
        selected = _select_by_flags(params, prunable)
    if jax.tree.leaves(params) and not jax.tree.leaves(selected):
        raise ValueError(_nothing_selected(params, prunable))
    return selected


def punch(template: Any, tree: Any, what: str) -> Any:
    """Puts holes into ``tree`` where ``template`` has them, checking every shape.

    Args:
      template: tree with holes, as carried in the pruning state.
      tree: params or updates of the same structure, without the holes.
      what: what to call ``tree`` in an error message.

    Raises:
      ValueError: if structure or shapes differ; the message names the path.
    """

    def pick(path: Any, ours: Any, theirs: Any) -> Any:
        if is_hole(ours):
            return ours
        if ours.shape != jnp.shape(theirs):
            raise ValueError(
                f"`{what}` does not fit the pruning state: leaf {path_name(path)!r} "
                f"has shape {jnp.shape(theirs)}, the state was initialised with "
                f"{ours.shape}. Call `tx.init(params)` again for a changed model."
            )
        return theirs

    try:
        structure: Any = jax.tree.structure(template, is_leaf=is_hole)
        structure.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        ours, theirs = ({name for name, _ in named_leaves(t)} for t in (template, tree))
        raise ValueError(
            f"`{what}` does not fit the pruning state: its structure is not that of "
            f"the params given to `tx.init`. Missing: {sorted(ours - theirs)[:5]}; "
            f"the first difference JAX reports is: {error}"
        ) from None
    return jax.tree_util.tree_map_with_path(pick, template, tree, is_leaf=is_hole)


def _default_rule(name: str, leaf: Any) -> bool:
    *parents, last = name.split("/")
    if leaf.ndim < 2:
        return False
    if last == "weight":
        return not any(_DENSE_WEIGHTS.search(parent) for parent in parents)
    return last in ("kernel", "w")


def _search_rule(pattern: str | re.Pattern[str]) -> Callable[[str, Any], bool]:
    regex = compiled("prunable", pattern)
    return lambda name, leaf: regex.search(name) is not None


def _is_float(leaf: Any) -> bool:
    return (
        hasattr(leaf, "dtype")
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        and leaf.size > 0
    )


def _select_by_name(params: Any, rule: Callable[[str, Any], bool]) -> Any:
    def pick(path: Any, node: Any) -> Any:
        leaves = jax.tree.leaves(node)
        name = path_name(path)
        chosen = leaves and all(_is_float(x) and rule(name, x) for x in leaves)
        return node if chosen else optax.MaskedNode()

    return jax.tree_util.tree_map_with_path(pick, params, is_leaf=is_box)


def _select_by_flags(params: Any, flags: Any) -> Any:
    for name, flag in named_leaves(flags):
        if getattr(flag, "dtype", type(flag)) not in (bool, jnp.bool_):
            raise ValueError(
                f"`prunable` must be a regular expression or a tree of bools, got "
                f"{flag!r} at {name!r}."
            )

    def pick(flag: Any, node: Any) -> Any:
        return _select_by_name(node, lambda name, leaf: bool(flag))

    try:
        return jax.tree.map(pick, flags, params)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`prunable` is a tree of bools that does not fit `params`: give it the "
            f"structure of `params` or a prefix of it. JAX reports: {error}"
        ) from None


def _nothing_selected(params: Any, prunable: Any) -> str:
    names = [name for name, _ in named_leaves(params)]
    more = len(names) - _SHOWN_PATHS
    listing = "\n  ".join(names[:_SHOWN_PATHS]) + (
        f"\n  ... and {more} more" if more > 0 else ""
    )
    rule = (
        "no float leaf with two or more axes ends in 'kernel', 'w' or 'weight'"
        if prunable is None
        else f"`prunable`={prunable!r} selects no float leaf"
    )
    return (
        f"There is nothing to prune: {rule}. Give a regular expression that is found "
        f'in the paths to prune, such as `prunable="dense.*kernel"`. Paths:\n'
        f"  {listing}"
    )
