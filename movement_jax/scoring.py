"""What a good step adds to the scores and to what is measured beside them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from movement_jax.criteria import Criterion, EmaMagnitude
from movement_jax.state import TURNED, MovementState, Tracked

_NOISE_DECAY = 0.9  # for criteria that have no memory of their own


def score_entering(
    state: MovementState, weights: Any, finite: jax.Array
) -> MovementState:
    """Scores the weights as they enter a step, if not at every step.

    Args:
      state: before its masks change in this step.
      weights: params with holes like ``state.masks``.
      finite: whether the step is a good one. Shape ``()``, bool.

    Returns:
      ``state`` with new scores at the first step and every ``score_every``-th.
    """
    every = score_every(state.config.criterion)
    if every == 1:
        return state
    due = (state.step == 0) | ((state.step + 1) % every == 0)
    return _score_entering(state, weights, finite & due)


def score_turned(
    state: MovementState, weights: Any, finite: jax.Array
) -> MovementState:
    """Scores the weights that enter a step if an optimizer follows.

    The weights that leave it are not known then. Masks are ranked by scores of the
    weights that entered the step before.

    Args:
      state: after its masks have changed in this step.
      weights: params with holes like ``state.masks``.
      finite: whether the step is a good one. Shape ``()``, bool.
    """
    criterion = state.config.criterion
    if score_every(criterion) > 1 or _needs_gradients(criterion):
        return state
    # What is never negative comes out of the loop that changes masks, and `turned` out
    # of this one, into the updates: loops in no order would have copies of what they
    # read, for whichever comes last.
    due = (state.events.turned == TURNED) & ~(state.events.alive < 0)
    return _score_entering(state, weights, finite & due)


def _score_entering(
    state: MovementState, weights: Any, due: jax.Array
) -> MovementState:
    criterion = state.config.criterion
    if not jax.tree.leaves(state.scores):
        return state

    def update(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        _, old, turned = carry
        new = criterion.update(old, params=weights, grads=None, new_params=weights)
        new = _accept(new, old, jnp.bool_(True))
        return jnp.bool_(False), new, jnp.maximum(turned, 0)  # as it was

    # Zero or one trips, as for masks: the other steps leave the scores where they are.
    carry = (due, state.scores, state.events.turned)
    _, scores, turned = lax.while_loop(lambda carry: carry[0], update, carry)
    return state._replace(scores=scores, events=state.events._replace(turned=turned))


def score(
    state: MovementState, weights: Any, grads: Any, new_weights: Any, finite: jax.Array
) -> MovementState:
    """Scores the step that was just made, unless it was a bad one."""
    criterion = state.config.criterion
    # A choice between old and new weights would do as well, but XLA for CPU would copy
    # the old ones first, and the step take three times as long.
    arrives = finite & (state.events.turned != TURNED)
    scores = state.scores
    if score_every(criterion) == 1:
        scores = criterion.update(
            scores, params=weights, grads=grads, new_params=new_weights
        )
        good = finite if _needs_gradients(criterion) else arrives
        scores = _accept(scores, state.scores, good)
    tracked = _accept(_track(state, new_weights), state.tracked, arrives)
    return state._replace(
        step=jnp.where(finite, optax.safe_increment(state.step), state.step),
        scores=scores,
        tracked=tracked,
        events=state.events._replace(
            skipped=state.events.skipped + (~finite).astype(jnp.int32)
        ),
    )


def score_every(criterion: Criterion) -> int:
    """Steps from one update of the scores to the next."""
    return getattr(criterion, "score_every", 1)


def start_tracking(weights: Any, start: bool, noise: bool) -> Tracked:
    """Copies of weights, as the caller may donate params and state together."""
    return Tracked(
        start=jax.tree.map(jnp.copy, weights) if start else (),
        mean=jax.tree.map(lambda w: w.astype(jnp.float32) + 0, weights)
        if noise
        else (),
        variance=jax.tree.map(lambda w: jnp.zeros([], jnp.float32), weights)
        if noise
        else (),
    )


def noise_decay(criterion: Criterion) -> float:
    """The decay of the running mean against which noise is measured."""
    if isinstance(criterion, EmaMagnitude) and criterion.decay is not None:
        return criterion.decay
    return _NOISE_DECAY


def _needs_gradients(criterion: Criterion) -> bool:
    return getattr(criterion, "needs_gradients", False)


def _accept(new: Any, old: Any, finite: jax.Array) -> Any:
    """What is new where it is finite, and the step is a good one."""

    def accept(new: jax.typing.ArrayLike, old: jax.typing.ArrayLike) -> jax.Array:
        new, old, good = jnp.asarray(new), jnp.asarray(old), finite
        if jnp.issubdtype(old.dtype, jnp.inexact):
            good = finite & jnp.isfinite(new)
        return jnp.where(good, new.astype(old.dtype), old)

    return jax.tree.map(accept, new, old)


def _track(state: MovementState, new_weights: Any) -> Tracked:
    tracked = state.tracked
    if isinstance(tracked.mean, tuple) and tracked.mean == ():
        return tracked
    decay = noise_decay(state.config.criterion)

    def deviation(
        variance: jax.Array, mean: jax.Array, weight: jax.Array, mask: jax.Array
    ) -> jax.Array:
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
