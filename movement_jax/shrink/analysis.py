"""A function traced and walked: its frame, and what its arguments are called."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from movement_jax import tree as _tree
from movement_jax.shrink import dims, flows, jaxprs, zero
from movement_jax.shrink.frames import Frame, Walk
from movement_jax.shrink.rules import Axes


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """A function of params and inputs.

    Attributes:
      frame: of its program.
      names: paths of the params, in flatten order.
      axes: layouts of the axes of every param.
      tree: structure of the params.
      out_tree: structure of what it returns.
      out_names: paths of the results.
    """

    frame: Frame
    names: tuple[str, ...]
    axes: tuple[Axes, ...]
    tree: Any
    out_tree: Any
    out_names: tuple[str, ...]

    def exactness(self, values: Sequence[Any] | None = None) -> flows.Exactness:
        """What can be cut exactly: the first part of :meth:`follow`."""
        return self.follow(values)[0]

    def follow(
        self, values: Sequence[Any] | None = None
    ) -> tuple[flows.Exactness, list[flows.Flow]]:
        """What can be cut exactly, and what is known of the results.

        Args:
          values: of the params, for the units that are zero already; None for units
            that would be zeroed.
        """
        found = flows.Exactness()
        known = [
            flows.parameter(axes, None if values is None else values[i])
            for i, axes in enumerate(self.axes)
        ]
        rest = len(self.frame.program.invars) - len(known)
        return found, zero.follow(self.frame, known + [flows.Flow()] * rest, found)


def analyse(
    function: Callable[..., Any], params: Any, inputs: Sequence[Any]
) -> Analysis:
    """Traces and walks ``function(params, *inputs)``; pins the axes of the inputs.

    Args:
      function: pure.
      params: tree of anything with a shape and a dtype.
      inputs: its other arguments.
    """
    named = named_params(params)
    program, out = jaxprs.trace(function, params, *inputs)
    axes = [tuple(dims.new(d) for d in shape_dtype(x).shape) for _, x in named]
    rest = program.invars[len(axes) :]
    given = jax.tree_util.tree_flatten_with_path(list(inputs))[0]
    ins: list[Axes] = list(axes)
    for var, (path, _) in zip(rest, given):
        layouts = tuple(dims.new(d) for d in jaxprs.shape_of(var))
        for i, layout in enumerate(layouts):
            dims.pin(layout, f"axis {i} of input {_tree.path_name(path)}")
        ins.append(layouts)
    frame = Walk().frame(program, ins)
    flat, out_tree = jax.tree_util.tree_flatten_with_path(out)
    names = tuple(_tree.path_name(path) for path, _ in flat)
    tree = jax.tree.structure(params)
    own = tuple(name for name, _ in named)
    return Analysis(frame, own, tuple(axes), tree, out_tree, names)


def named_params(params: Any) -> list[tuple[str, Any]]:
    """Leaves with their paths.

    Raises:
      ValueError: if one is no array, or two have the same path.
    """
    named, seen = _tree.named_leaves(params), set()
    if not named:
        raise ValueError(
            "`params` has no arrays. Give the tree of parameters first, as in "
            "`find_groups(model.apply, variables, x)`."
        )
    for name, leaf in named:
        try:
            shape_dtype(leaf)
        except TypeError:
            raise ValueError(
                f"`params` has a leaf that is no array: {leaf!r} at {name!r}. Close "
                "over it; of an Equinox module take `params, static = "
                "eqx.partition(model, eqx.is_array)` and `eqx.combine` in `fn`."
            ) from None
        if name in seen:
            raise ValueError(
                f"`params` has two leaves with the path {name!r}. Rename one of them."
            )
        seen.add(name)
    return named


def abstract(params: Any) -> Any:
    """The same tree of shapes and dtypes, so that no value is needed."""
    named_params(params)
    return jax.tree.map(shape_dtype, params)


def shape_dtype(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, of a number or of what stands for an array.

    Raises:
      TypeError: if it is none of these.
    """
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)
    if isinstance(x, bool | int | float | complex):
        return jax.ShapeDtypeStruct((), jnp.result_type(x), weak_type=True)
    raise TypeError(f"{x!r} is no array, no number and nothing with a shape.")
