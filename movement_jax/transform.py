"""The optax transformation: how a training step scores weights and keeps masks true."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from movement_jax import position, schedules, selection
from movement_jax import tree as _tree
from movement_jax.allocation import Allocation, Uniform
from movement_jax.criteria import Criterion, EmaMagnitude
from movement_jax.state import (
    Events,
    MovementState,
    PruningConfig,
    Tracked,
    tensors_in,
    tensors_of,
)

_NOISE_DECAY = 0.9  # for criteria that have no memory of their own


def movement_pruning(
    sparsity: optax.ScalarOrSchedule | None = None,
    criterion: Criterion = EmaMagnitude(),
    *,
    allocation: Allocation = Uniform(),
    prunable: Any = None,
    stacked: str | None = None,
    regrow: bool = False,
    inner: optax.GradientTransformation | None = None,
    check_finite: bool = True,
    track_start: bool = False,
    track_noise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scores every weight at every step, and keeps pruned weights at zero.

    Goes last in a chain, or around an optimizer with ``inner=``. It rewrites the
    update of a pruned weight :math:`w` to :math:`-w`, so that ``apply_updates`` gives
    exactly 0.0 whatever momentum and weight decay do, also of one that something else
    brought back to life. If what follows it in a chain undoes that, it notices at the
    next step, counts it in ``events.undone`` and makes up for it: an optimizer that
    follows is given the gradient that takes pruned weights to zero, and scores are
    taken of the weights as they come. :func:`movement_jax.health` then asks for the
    right order, in which zeros are exact. A step whose gradients or updates are not
    finite changes neither scores nor masks; no score is ever NaN.

    Masks change at the start of an update, from the scores that enter it, such that
    after ``k`` updates the sparsity is ``sparsity(k)``; a criterion that accumulates
    has no scores at the first update and prunes from the second on. With
    ``regrow=True`` they change at its end, from the scores that leave it.

    Args:
      sparsity: fraction of the prunable weights to drop, in [0, 1]: None to only
        track (prune with :func:`movement_jax.prune`), a number, a schedule such as
        :func:`movement_jax.cubic`, or any optax schedule (wrapped in
        :class:`movement_jax.Stepwise` to change masks every few steps only).
      criterion: what a weight is worth.
      allocation: how the target is spread over tensors.
      prunable: which leaves: None for kernels and weight matrices, a regular
        expression searched for in the ``/``-joined path, or a tree of bools like
        params or a prefix of it.
      stacked: regular expression for the paths of scan-stacked kernels
        ``(layers, in, out)``, whose layers are ranked separately.
      regrow: keep pruned weights at their dense value, so that they can come back.
        Then evaluate and differentiate the model at
        :func:`movement_jax.effective_params`.
      inner: optimizer to wrap, for criteria that need raw gradients.
      check_finite: look at all updates (and gradients) before each step, so that a bad
        step changes no score and no mask. False saves the optimizer the trip through
        memory that this takes; then only the scores that would not be finite stay as
        they were. Do so inside ``optax.apply_if_finite``, which checks by itself.
      track_start: keep a copy of the initial weights, for
        :func:`movement_jax.health` to report how far training moved.
      track_noise: keep a running mean of every weight (float32), for
        :func:`movement_jax.health` to report the signal-to-noise ratio.

    Returns:
      A transformation whose ``update`` requires ``params``. Its state is a
      :class:`MovementState`.

    Raises:
      ValueError: if the criterion needs gradients and there is no ``inner``, if
        ``sparsity`` is out of range, or, at ``init``, if nothing is prunable.

    Examples:
      >>> import jax.numpy as jnp, optax, movement_jax as mj
      >>> tx = optax.chain(optax.sgd(0.1), mj.movement_pruning(0.5, mj.Magnitude()))
      >>> params = {"kernel": jnp.array([[3.0, -0.1], [0.2, -4.0]])}
      >>> grads = {"kernel": jnp.zeros((2, 2))}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["kernel"])
      [[ 3.  0.]
       [ 0. -4.]]

    References:
      Sanh, Wolf, Rush, *Movement Pruning: Adaptive Sparsity by Fine-Tuning*, 2020,
      `arXiv:2005.07683 <https://arxiv.org/abs/2005.07683>`_
    """
    _check_arguments(sparsity, criterion, allocation, inner)
    config = PruningConfig(
        criterion=criterion,
        allocation=allocation,
        regrow=regrow,
        stacked=stacked,
        prunable=prunable if isinstance(prunable, str) else None,
    )
    wrapped = optax.with_extra_args_support(inner or optax.identity())

    # optax's own type of a state has no place for the static `config`: hence Any.
    def init_fn(params: optax.Params) -> Any:
        weights = _tree.select(params, prunable)
        if jax.tree.leaves(weights):
            _check_stacked(stacked, weights)
            allocation.check(tensors_in(weights, stacked))
        return MovementState(
            step=jnp.zeros([], jnp.int32),
            scores=criterion.init(weights),
            masks=jax.tree.map(lambda w: jnp.ones_like(w, dtype=bool), weights),
            sparsity=jnp.zeros([], jnp.float32),
            events=Events(
                skipped=jnp.zeros([], jnp.int32),
                refused=jnp.zeros([], jnp.int32),
                changes=jnp.zeros([], jnp.int32),
                churn=jnp.zeros([], jnp.float32),
                undone=jnp.zeros([], jnp.int32),
                alive=jnp.zeros([], jnp.float32),
                turned=jnp.zeros([], jnp.int32),
            ),
            tracked=_start_tracking(weights, track_start, track_noise),
            config=config,
            inner_state=wrapped.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError(
                "`movement_pruning` reads the weights: call "
                "`tx.update(updates, state, params)`, got params=None."
            )
        if not isinstance(state, MovementState):
            raise TypeError(
                "`state` must be a `MovementState`: call `tx.update(updates, state, "
                f"params)`, got {type(state).__name__}."
            )
        weights = _tree.punch(state.masks, params, "params")
        grads = None if inner is None else _tree.punch(state.masks, updates, "updates")
        finite = _all_finite(updates) if check_finite else jnp.bool_(True)
        if inner is not None:
            updates = _keep(state.masks, updates)
        updates, inner_state = wrapped.update(
            updates, state.inner_state, params, **extra_args
        )
        if inner is not None and check_finite:
            finite &= _all_finite(updates)
        _tree.punch(state.masks, updates, "updates")
        state = state._replace(inner_state=inner_state)

        if state.config.finalized:
            return position.project(state, updates, params), state

        if not state.config.regrow:
            state = position.look(state, weights)
            state = _on_schedule(state, weights, sparsity, finite)
            updates = position.project(state, updates, params)
        else:
            updates = _keep(state.masks, updates)
        new_weights = _apply(state, params, updates)
        state = _score(state, weights, grads, new_weights, finite)
        if state.config.regrow:
            state = _on_schedule(state, new_weights, sparsity, finite)
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def change_masks(state: MovementState, weights: Any, target: schedules.Target) -> Any:
    """Masks at the given sparsity, from the scores in ``state``.

    Args:
      state: as carried by the optimizer.
      weights: params with holes like ``state.masks``.
      target: fraction to drop, and how far a schedule has come.

    Returns:
      New masks, like ``state.masks``.
    """
    scores = state.config.criterion.scores(state.scores, weights)
    kept = None if state.config.regrow else state.masks
    return masks_from(scores, state, target, kept)


def masks_from(
    scores: Any, state: MovementState, target: schedules.Target, kept: Any = None
) -> Any:
    """Masks of the highest of any scores, spread as ``state`` is configured to.

    Args:
      scores: tree like ``state.masks``.
      state: gives the allocation and the stacked paths.
      target: fraction to drop, and how far a schedule has come.
      kept: masks that may only shrink, or None.

    Returns:
      New masks, like ``state.masks``.
    """
    tensors = tensors_of(state)
    if not tensors:
        return state.masks
    structure = jax.tree.structure(state.masks)
    leaves = structure.flatten_up_to(scores)
    old = None if kept is None else structure.flatten_up_to(kept)
    n_drop, hint = state.config.allocation.n_drop(target, tensors, leaves, old)
    new = selection.keep_masks(leaves, tensors, n_drop, kept=old, hint=hint)
    if old is not None:
        new = [a & b for a, b in zip(new, old)]
    return structure.unflatten(new)


def _on_schedule(
    state: MovementState,
    weights: Any,
    sparsity: optax.ScalarOrSchedule | None,
    finite: jax.Array,
) -> MovementState:
    """Changes the masks if the schedule says so, at no cost if it does not."""
    if sparsity is None:
        return state
    regrow, criterion = state.config.regrow, state.config.criterion
    # At this point of the update the step counter still tells the steps before it,
    # except with regrow, where the step has been counted.
    after = state.step if regrow else state.step + 1
    if isinstance(sparsity, schedules.Polynomial):
        target = sparsity.target(after)
    else:
        target = schedules.Target(sparsity(after) if callable(sparsity) else sparsity)
    if isinstance(target.sparsity, int | float):
        schedules.check_sparsity("sparsity", target.sparsity)
    due = sparsity.due(after) if hasattr(sparsity, "due") else jnp.bool_(True)
    asked = jnp.asarray(target.sparsity, jnp.float32)
    if isinstance(sparsity, schedules.Polynomial):
        # Made up for, if nothing was scored yet when it was due.
        due |= (after >= sparsity.end) & (state.sparsity < asked)
    valid = (asked >= 0) & (asked <= 1)
    scored = (state.step > 0) | (not getattr(criterion, "accumulates", True))
    changes = finite & due & scored
    if not regrow:
        changes &= ~(asked <= state.sparsity)

    def change(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        _, masks, churn, alive = carry
        new = change_masks(state._replace(masks=masks), weights, target)
        if regrow:
            churn = _churn(masks, new)
        else:
            alive = position.after_change(alive, masks, new, weights)
        return jnp.bool_(False), new, churn, alive

    # A loop of zero or one trips: its carry is aliased, so that steps which do not
    # prune touch neither masks nor scores. A conditional copies both.
    _, masks, churn, alive = lax.while_loop(
        lambda carry: carry[0],
        change,
        (changes & valid, state.masks, state.events.churn, state.events.alive),
    )
    done = (changes & valid).astype(jnp.int32)
    events = state.events._replace(
        refused=state.events.refused + (changes & ~valid).astype(jnp.int32),
        changes=state.events.changes + done,
        churn=churn,
        alive=alive,
    )
    reached = jnp.where(changes & valid, asked, state.sparsity)
    return state._replace(masks=masks, sparsity=reached, events=events)


def _score(
    state: MovementState, weights: Any, grads: Any, new_weights: Any, finite: jax.Array
) -> MovementState:
    """Scores the step that was just made, unless it was a bad one."""

    def accept(new: jax.typing.ArrayLike, old: jax.typing.ArrayLike) -> jax.Array:
        new, old, good = jnp.asarray(new), jnp.asarray(old), finite
        if jnp.issubdtype(old.dtype, jnp.inexact):
            good = finite & jnp.isfinite(new)
        return jnp.where(good, new.astype(old.dtype), old)

    scores = state.config.criterion.update(
        state.scores, params=weights, grads=grads, new_params=new_weights
    )
    scores = jax.tree.map(accept, scores, state.scores)
    tracked = jax.tree.map(accept, _track(state, new_weights), state.tracked)
    return state._replace(
        step=jnp.where(finite, optax.safe_increment(state.step), state.step),
        scores=scores,
        tracked=tracked,
        events=state.events._replace(
            skipped=state.events.skipped + (~finite).astype(jnp.int32)
        ),
    )


def _start_tracking(weights: Any, start: bool, noise: bool) -> Tracked:
    # Copies, since the caller may donate params and optimizer state together.
    return Tracked(
        start=jax.tree.map(jnp.copy, weights) if start else (),
        mean=jax.tree.map(lambda w: w.astype(jnp.float32) + 0, weights)
        if noise
        else (),
        variance=jax.tree.map(lambda w: jnp.zeros([], jnp.float32), weights)
        if noise
        else (),
    )


def _track(state: MovementState, new_weights: Any) -> Tracked:
    tracked = state.tracked
    if isinstance(tracked.mean, tuple) and tracked.mean == ():
        return tracked
    decay = noise_decay(state.config.criterion)

    def deviation(variance: Any, mean: Any, weight: Any, mask: Any) -> jax.Array:
        # Pruned weights do not move, and the fall to zero of new ones is no noise.
        square = jnp.where(mask, jnp.square(weight.astype(jnp.float32) - mean), 0)
        kept = jnp.maximum(mask.mean(dtype=jnp.float32), jnp.float32(1e-30))
        return decay * variance + (1 - decay) * square.mean() / kept

    def average(mean: jax.Array, weight: jax.Array) -> jax.Array:
        return decay * mean + (1 - decay) * weight.astype(jnp.float32)

    return tracked._replace(
        variance=jax.tree.map(
            deviation, tracked.variance, tracked.mean, new_weights, state.masks
        ),
        mean=jax.tree.map(average, tracked.mean, new_weights),
    )


def noise_decay(criterion: Criterion) -> float:
    """The decay of the running mean against which noise is measured."""
    if isinstance(criterion, EmaMagnitude) and criterion.decay is not None:
        return criterion.decay
    return _NOISE_DECAY


def _keep(masks: Any, updates: Any) -> Any:
    """Updates that leave pruned weights where they are."""

    def keep(mask: Any, update: Any) -> Any:
        if _tree.is_hole(mask):
            return update
        return jnp.where(mask, update, jnp.zeros_like(update))

    return jax.tree.map(keep, masks, updates, is_leaf=_tree.is_hole)


def _apply(state: MovementState, params: Any, updates: Any) -> Any:
    """The prunable weights after the update; before it, if something changes it."""
    arrives = state.events.undone == 0

    def add(mask: Any, param: Any, update: Any) -> Any:
        if _tree.is_hole(mask):
            return mask
        return jnp.where(arrives, (param + update).astype(param.dtype), param)

    return jax.tree.map(add, state.masks, params, updates, is_leaf=_tree.is_hole)


def _all_finite(tree: Any) -> jax.Array:
    checks = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(getattr(leaf, "dtype", float), jnp.inexact)
    ]
    return jnp.all(jnp.stack(checks)) if checks else jnp.bool_(True)


def _churn(old: Any, new: Any) -> jax.Array:
    """Fraction of the weights that changed places: one dropped, another revived."""
    dropped, revived, total = jnp.float32(0), jnp.float32(0), 0
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new)):
        counts = selection.tally((a & ~b, ~a & b))
        dropped, revived = dropped + counts[0], revived + counts[1]
        total += a.size
    return 2 * jnp.minimum(dropped, revived) / max(total, 1)


def _check_arguments(
    sparsity: Any, criterion: Any, allocation: Any, inner: Any
) -> None:
    if _is_array(sparsity) and not isinstance(sparsity, jax.core.Tracer):
        sparsity = np.asarray(sparsity).item()
    if sparsity is not None and not callable(sparsity) and not _is_array(sparsity):
        schedules.check_sparsity("sparsity", sparsity)
    for name, value, method in (
        ("criterion", criterion, "scores"),
        ("allocation", allocation, "n_drop"),
    ):
        if isinstance(value, type) or not hasattr(value, method):
            raise TypeError(
                f"`{name}` must be an object such as "
                f"`{'EmaMagnitude()' if name == 'criterion' else 'Uniform()'}`, got "
                f"{value!r}."
            )
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"`{name}` must be hashable, as it is kept beside the arrays of the "
                f"state: make {type(value).__name__} a `dataclass(frozen=True)` of "
                "Python numbers."
            ) from None
    highest = getattr(sparsity, "final", sparsity)
    if isinstance(highest, int | float) and highest == 1:
        check_emptying(allocation)
    if inner is not None and not hasattr(inner, "update"):
        raise TypeError(
            f"`inner` must be an optax optimizer, got {inner!r}. For example "
            "`movement_pruning(..., inner=optax.adamw(3e-4))`."
        )
    if inner is None and getattr(criterion, "needs_gradients", False):
        name = type(criterion).__name__
        raise ValueError(
            f"`{name}` needs the raw gradients, which a transformation at the end of a "
            "chain does not see. Wrap the optimizer instead: "
            f"`movement_pruning(sparsity, {name}(), inner=optax.adamw(...))`."
        )


def check_emptying(allocation: Any) -> None:
    """Refuses sparsity 1 unless it was asked for twice."""
    if getattr(allocation, "min_keep", 0):
        name = type(allocation).__name__
        raise ValueError(
            f"`sparsity`=1 would empty every tensor. If you mean it, say so with "
            f"`allocation={name}(min_keep=0)`; else give a fraction below 1."
        )


def _check_stacked(stacked: str | None, weights: Any) -> None:
    if stacked is None:
        return
    try:
        re.compile(stacked)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`stacked` is no regular expression: {stacked!r} ({error})."
        ) from None
    tensors = tensors_in(weights, stacked)
    chosen = [t for t in tensors if t.stacked]
    if not chosen or any(len(t.shape) < 2 for t in chosen):
        listing = "\n  ".join(f"{t.name} {t.shape}" for t in tensors[:20])
        raise ValueError(
            f"`stacked`={stacked!r} must be found in the path of at least one prunable "
            f"tensor with a leading layer axis. Prunable tensors:\n  {listing}"
        )


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")
