"""The same verbs for Flax NNX: modules and optimizers that change in place.

Import it by name, ``import movement_jax.nnx``: ``import movement_jax`` alone does not
load NNX. The transformation is the same, so are the paths that ``prunable=`` and
``stacked=`` are searched for in, and reports take what :func:`train_state` gives::

    optimizer = nnx.Optimizer(
        model, optax.chain(optax.adamw(3e-4), mj.movement_pruning()), wrt=nnx.Param)
    ...                                             # train as before
    movement_jax.nnx.prune(model, optimizer, 0.8)   # later steps keep the zeros
"""

from typing import Any, TypeVar

import jax
from flax import nnx

import movement_jax as mj

ModuleT = TypeVar("ModuleT")


def train_state(model: Any, optimizer: nnx.Optimizer[Any]) -> tuple[Any, Any]:
    """The arrays of a model and its optimizer, as every function of the package takes.

    Args:
      model: the module that the optimizer trains.
      optimizer: made with :func:`movement_jax.movement_pruning` in its transformation.

    Returns:
      The pair ``(params, opt_state)``, without variables. It is not tied to the model:
      changing one leaves the other alone.

    Examples:
      >>> import movement_jax as mj, movement_jax.nnx, optax
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, mj.movement_pruning(), wrt=nnx.Param)
      >>> params, opt_state = mj.nnx.train_state(model, optimizer)
      >>> mj.find_state(opt_state).masks["kernel"].shape
      (4, 2)
    """
    return _arrays(nnx.state(model, optimizer.wrt)), _arrays(optimizer.opt_state)


def prune(
    model: Any, optimizer: nnx.Optimizer[Any], sparsity: jax.typing.ArrayLike
) -> None:
    """Drops the weights with the lowest scores, now and in place.

    Works as it is or inside ``nnx.jit``, where ``sparsity`` may be traced. Later calls
    of ``optimizer.update`` keep the pruned weights at exactly zero. With
    ``regrow=True`` the params stay dense: compute with :func:`effective_model`.

    Args:
      model: the module that the optimizer trains.
      optimizer: made with :func:`movement_jax.movement_pruning` in its transformation.
      sparsity: as for :func:`movement_jax.prune`.

    Raises:
      ValueError: as :func:`movement_jax.prune`.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj, movement_jax.nnx, optax
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> model.kernel[...] = jnp.array([[3.0, -0.1], [0.2, -4.0]])
      >>> tx = optax.chain(optax.adamw(1e-3), mj.movement_pruning(None, mj.Magnitude()))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> mj.nnx.prune(model, optimizer, 0.5)
      >>> print(model.kernel[...])
      [[ 3.  0.]
       [ 0. -4.]]
    """
    params, opt_state = mj.prune(train_state(model, optimizer), sparsity)
    nnx.update(model, params)
    nnx.update(optimizer.opt_state, nnx.state(opt_state))


def effective_model(model: ModuleT, optimizer: nnx.Optimizer[Any]) -> ModuleT:
    """The model seen through the masks, to compute and differentiate with.

    With ``regrow=True`` the params stay dense. Take the gradient of the loss at this
    model and give it to ``optimizer.update(model, grads)``.

    Only the params are copies. Everything else, such as batch statistics and the
    counters of random numbers, is shared with ``model``: it advances there when the
    effective model is called.

    Args:
      model: the module that the optimizer trains.
      optimizer: made with :func:`movement_jax.movement_pruning` in its transformation.

    Returns:
      A module like ``model``.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj, movement_jax.nnx, optax
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> tx = mj.movement_pruning(
      ...     0.5, mj.Movement(), inner=optax.adamw(1e-3), regrow=True)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> loss = lambda model: jnp.mean(model(jnp.ones((1, 4))) ** 2)
      >>> grads = nnx.grad(loss)(mj.nnx.effective_model(model, optimizer))
      >>> _ = optimizer.update(model, grads)
      >>> pruned = mj.nnx.effective_model(model, optimizer)
      >>> print(jnp.sum(pruned.kernel[...] == 0), jnp.sum(model.kernel[...] == 0))
      4 0
    """
    masked = mj.effective_params(*train_state(model, optimizer))
    graphdef, params, *rest = nnx.split(model, optimizer.wrt, ...)
    # Unflattening makes new variables with the same metadata; `rest` keeps the old.
    params = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(masked))
    pruned: ModuleT = nnx.merge(graphdef, params, *rest)
    return pruned


def finalize(model: Any, optimizer: nnx.Optimizer[Any]) -> None:
    """Drops the bookkeeping and keeps the zeros, in place.

    Scores and tracked measurements leave ``optimizer.opt_state``; the masks stay,
    fixed, so that training can go on. The model is all that is needed to ship.

    Args:
      model: the module that the optimizer trains.
      optimizer: made with :func:`movement_jax.movement_pruning` in its transformation.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj, movement_jax.nnx, optax
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> tx = optax.chain(optax.sgd(0.1), mj.movement_pruning(None, mj.Magnitude()))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> mj.nnx.prune(model, optimizer, 0.5)
      >>> mj.nnx.finalize(model, optimizer)
      >>> mj.find_state(optimizer.opt_state).scores
      ()
    """
    params, opt_state = mj.finalize(train_state(model, optimizer))
    nnx.update(model, params)
    # What stays keeps its value: its variables move over into the smaller tree.
    leaves_with_path = jax.tree_util.tree_leaves_with_path
    variables = dict(leaves_with_path(optimizer.opt_state, is_leaf=_is_variable))
    optimizer.opt_state = nnx.data(
        jax.tree_util.tree_map_with_path(lambda path, _: variables[path], opt_state)
    )


def sparsity_of(optimizer: nnx.Optimizer[Any]) -> jax.Array:
    """Fraction of the prunable weights that are pruned.

    Args:
      optimizer: made with :func:`movement_jax.movement_pruning` in its transformation.

    Returns:
      Shape ``()``, float32.

    Examples:
      >>> import movement_jax as mj, movement_jax.nnx
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> tx = mj.movement_pruning(None, mj.Magnitude())
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> mj.nnx.prune(model, optimizer, 0.75)
      >>> print(mj.nnx.sparsity_of(optimizer))
      0.75
    """
    return mj.sparsity_of(_arrays(optimizer.opt_state))


def metrics(optimizer: nnx.Optimizer[Any]) -> dict[str, jax.Array]:
    """What to log at every step: the scalars of :func:`movement_jax.metrics`.

    Args:
      optimizer: made with :func:`movement_jax.movement_pruning` in its transformation.

    Examples:
      >>> import movement_jax as mj, movement_jax.nnx
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, mj.movement_pruning(), wrt=nnx.Param)
      >>> print(mj.nnx.metrics(optimizer)["pruning/sparsity"])
      0.0
    """
    return mj.metrics(_arrays(optimizer.opt_state))


def _arrays(tree: Any) -> Any:
    """The tree with every variable replaced by its array."""
    return jax.tree.map(
        lambda x: x[...] if _is_variable(x) else x, tree, is_leaf=_is_variable
    )


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
