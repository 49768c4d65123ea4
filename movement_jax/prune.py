"""Pruning by hand: find the scores inside any train state, and mask its params now."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from movement_jax import counting, masking, schedules
from movement_jax import state as _state
from movement_jax import tree as _tree
from movement_jax.state import MovementState

TrainStateT = TypeVar("TrainStateT")


def prune(state: TrainStateT, sparsity: jax.typing.ArrayLike) -> TrainStateT:
    """Drops the weights with the lowest scores, now.

    A pure function: call it as it is, under ``jit`` with a traced sparsity, or under
    ``vmap``. Later train steps keep the pruned weights at exactly zero.

    Weights that are pruned already stay pruned and count, so asking for less than is
    pruned changes nothing. With ``regrow=True`` the masks are chosen afresh and params
    stay dense: use :func:`effective_params`.

    Args:
      state: Flax's ``TrainState``, any dataclass, NamedTuple or dict with ``params``
        and ``opt_state``, or a pair ``(params, opt_state)``.
      sparsity: fraction of the prunable weights to drop, in [0, 1]. May be traced; a
        traced value that is NaN or out of range leaves the masks as they are and is
        counted in ``events.refused``.

    Returns:
      A state of the same type, with params masked.

    Raises:
      ValueError: if there is no pruning state in the optimizer state or more than one,
        nothing has been scored yet, or ``sparsity`` is out of range or beyond what
        an N:M pattern reaches.

    Examples:
      >>> import jax.numpy as jnp, optax, movement_jax as mj
      >>> tx = optax.chain(optax.sgd(0.1), mj.movement_pruning())
      >>> params = {"kernel": jnp.array([[3.0, -0.1], [0.2, -4.0]])}
      >>> opt_state = tx.init(params)
      >>> grads = {"kernel": jnp.zeros((2, 2))}
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> params, opt_state = mj.prune((params, opt_state), 0.5)
      >>> print(params["kernel"])
      [[ 3.  0.]
       [ 0. -4.]]
    """
    params, opt_state, rebuild = unpack(state)
    _state.check_trained_params(opt_state)
    found = _state.find_state(opt_state)
    if found.config.finalized:
        raise ValueError(
            "This state was finalized: its scores are gone and its masks fixed. Call "
            "`prune` before `finalize`."
        )
    sparsity = _checked(sparsity, found)
    accumulates = getattr(found.config.criterion, "accumulates", True)
    scored = (found.step > 0) | (not accumulates)
    if not isinstance(scored, jax.core.Tracer) and not scored:
        raise ValueError(
            "Nothing has been scored yet: `prune` ranks weights by scores that "
            "training steps accumulate. Train first, or use the criterion "
            "`Magnitude()`."
        )
    weights = _tree.punch(found.masks, params, "params")
    asked = jnp.asarray(sparsity, jnp.float32)
    accepted = scored & (asked >= 0) & (asked <= 1)
    masks, thresholds = jax.tree.map(
        lambda new, old: jnp.where(accepted, new, old),
        masking.change_masks(found, weights, schedules.Target(sparsity)),
        (found.masks, found.thresholds),
    )
    if not found.config.regrow:
        params = apply_masks(params, masks)
        asked = jnp.maximum(asked, found.sparsity)
    events = found.events._replace(
        refused=found.events.refused + (~accepted).astype(jnp.int32),
        changes=found.events.changes + accepted.astype(jnp.int32),
    )
    new = found._replace(
        masks=masks,
        thresholds=thresholds,
        sparsity=jnp.where(accepted, asked, found.sparsity),
        events=events,
    )
    pruned: TrainStateT = rebuild(params, _state.replace_state(opt_state, new))
    return pruned


def apply_masks(params: Any, masks: Any) -> Any:
    """Sets the weights whose mask is False to exactly zero.

    Whatever the weight is: a NaN or an infinity becomes zero too.

    Args:
      params: tree of arrays.
      masks: bools like ``params``, with ``optax.MaskedNode`` for leaves left alone.

    Returns:
      A tree like ``params``.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> print(mj.apply_masks(jnp.array([jnp.nan, 2.0]), jnp.array([False, True])))
      [0. 2.]
    """
    _tree.punch(masks, params, "params")

    def zero(mask: Any, param: Any) -> Any:
        if _tree.is_hole(mask):
            return param
        return jnp.where(mask, param, jnp.zeros_like(param))

    return jax.tree.map(zero, masks, params, is_leaf=_tree.is_hole)


def effective_params(params: Any, opt_state: Any) -> Any:
    """The weights that the model computes with: params seen through the masks.

    With ``regrow=True`` params stay dense, and gradients must be taken *at* the
    effective params, not through the masking: the scores of pruned weights need the
    gradient that these weights would get.

    Args:
      params: as passed to ``tx.update``.
      opt_state: state of an optimizer with :func:`movement_pruning` in it.

    Returns:
      A tree like ``params``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, movement_jax as mj
      >>> tx = mj.movement_pruning(
      ...     0.5, mj.Movement(), inner=optax.sgd(0.1), regrow=True)
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> opt_state = tx.init(params)
      >>> loss = lambda params: jnp.sum(params["kernel"] ** 2)
      >>> grads = jax.grad(loss)(mj.effective_params(params, opt_state))
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> params = optax.apply_updates(params, updates)
    """
    return apply_masks(params, _state.find_state(opt_state).masks)


def finalize(state: TrainStateT) -> TrainStateT:
    """Drops the bookkeeping and keeps the zeros.

    Scores and tracked measurements go; the masks stay, fixed, so that the same train
    step can go on fine-tuning and keeps the pruned weights at zero. The params of the
    result are all that is needed to ship the model.

    Args:
      state: as for :func:`prune`.

    Returns:
      A state of the same type, with params masked.

    Examples:
      >>> import jax.numpy as jnp, optax, movement_jax as mj
      >>> tx = optax.chain(optax.sgd(0.1), mj.movement_pruning(0.5, mj.Magnitude()))
      >>> params = {"kernel": jnp.array([[3.0, -0.1], [0.2, -4.0]])}
      >>> state = mj.prune((params, tx.init(params)), 0.5)
      >>> params, opt_state = mj.finalize(state)
      >>> mj.find_state(opt_state).scores
      ()
    """
    params, opt_state, rebuild = unpack(state)
    found = _state.find_state(opt_state)
    config = dataclasses.replace(found.config, finalized=True, regrow=False)
    new = found._replace(scores=(), tracked=_state.Tracked(), config=config)
    params = apply_masks(params, found.masks)
    final: TrainStateT = rebuild(params, _state.replace_state(opt_state, new))
    return final


def sparsity_of(state: Any) -> jax.Array:
    """Fraction of the prunable weights that are pruned.

    Args:
      state: as for :func:`prune`, or an optimizer state alone.

    Returns:
      Shape ``()``, float32.

    Examples:
      >>> import jax.numpy as jnp, optax, movement_jax as mj
      >>> tx = mj.movement_pruning()
      >>> print(mj.sparsity_of(tx.init({"kernel": jnp.ones((2, 2))})))
      0.0
    """
    masks: list[jax.Array] = jax.tree.leaves(_find(state).masks)
    dropped = sum(map(_dropped, masks), start=jnp.float32(0))
    return dropped / float(max(sum(mask.size for mask in masks), 1))


def metrics(state: Any) -> dict[str, jax.Array]:
    """What to log at every step: a flat dict of scalars, for any logger.

    Works under ``jit``.

    Args:
      state: as for :func:`prune`, or an optimizer state alone.

    Returns:
      ``sparsity`` (reached), ``sparsity_asked``, ``lowest_density`` (of any tensor),
      ``mask_changes``, ``churn``, ``skipped_steps``, ``refused_changes``,
      ``undone_updates`` and ``scored_steps``, each with the prefix ``pruning/`` and
      shape ``()``.

    Examples:
      >>> import jax.numpy as jnp, optax, movement_jax as mj
      >>> tx = mj.movement_pruning()
      >>> logged = mj.metrics(tx.init({"kernel": jnp.ones((2, 2))}))
      >>> print(logged["pruning/lowest_density"])
      1.0
    """
    found = _find(state)
    masks = jax.tree.leaves(found.masks)
    densities = [jnp.float32(1)]
    densities += [1 - _dropped(mask) / float(mask.size) for mask in masks]
    values = {
        "sparsity": sparsity_of(found),
        "sparsity_asked": found.sparsity,
        "lowest_density": jnp.min(jnp.stack(densities)),
        "mask_changes": found.events.changes,
        "churn": found.events.churn,
        "skipped_steps": found.events.skipped,
        "refused_changes": found.events.refused,
        "undone_updates": found.events.undone,
        "scored_steps": found.step,
    }
    return {f"pruning/{name}": value for name, value in values.items()}


def _find(state: Any) -> MovementState:
    # A dataclass that is no pytree hides its optimizer state.
    return _state.find_state(getattr(state, "opt_state", state))


def _dropped(mask: jax.Array) -> jax.Array:
    return counting.tally_all((mask, ~mask))[1]


def unpack(state: Any) -> tuple[Any, Any, Callable[[Any, Any], Any]]:
    """Takes a train state apart.

    Args:
      state: as for :func:`prune`.

    Returns:
      Its params, its optimizer state, and a function that makes a state of the same
      type from new ones.

    Raises:
      ValueError: if it is no state of a known kind; the message shows the kinds.
    """
    if hasattr(state, "params") and hasattr(state, "opt_state"):
        if hasattr(state, "_replace"):
            replace = state._replace
        elif hasattr(state, "replace"):
            replace = state.replace
        elif dataclasses.is_dataclass(state):
            replace = functools.partial(dataclasses.replace, state)
        else:
            raise _unknown(state)
        return (
            state.params,
            state.opt_state,
            lambda params, opt_state: replace(params=params, opt_state=opt_state),
        )
    if isinstance(state, Mapping) and {"params", "opt_state"} <= set(state):
        mapping: Any = type(state)
        return (
            state["params"],
            state["opt_state"],
            lambda params, opt_state: mapping(
                {**state, "params": params, "opt_state": opt_state}
            ),
        )
    pair = isinstance(state, tuple) and len(state) == 2
    if pair and not isinstance(state, MovementState) and not hasattr(state, "_fields"):
        return state[0], state[1], lambda params, opt_state: (params, opt_state)
    raise _unknown(state)


def _unknown(state: Any) -> ValueError:
    return ValueError(
        "`state` must be a train state with `params` and `opt_state` that can be "
        "replaced, or a pair `(params, opt_state)`; got "
        f"{type(state).__name__}. For example `prune((params, opt_state), 0.8)`; for "
        "`nnx.Optimizer` see `movement_jax.nnx`."
    )


def _checked(sparsity: Any, found: MovementState) -> Any:
    if hasattr(sparsity, "dtype"):
        if jnp.shape(sparsity) != ():
            raise ValueError(
                f"`sparsity` must be a scalar, got shape {jnp.shape(sparsity)}. For a "
                "sparsity per tensor use `allocation=PerPath({...})`."
            )
        if isinstance(sparsity, jax.core.Tracer):
            return sparsity.astype(jnp.promote_types(sparsity.dtype, jnp.float32))
        sparsity = float(sparsity)
    schedules.check_sparsity("sparsity", sparsity)
    masking.check_reach(found.config, _state.tensors_of(found), sparsity)
    if sparsity == 1:
        masking.check_emptying(found.config.allocation)
    return sparsity
