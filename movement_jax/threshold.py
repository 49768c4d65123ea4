"""What lies at or below a threshold, however much it is."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from movement_jax import counting
from movement_jax.allocation import Allocation, most_dropped
from movement_jax.counting import Tensor


def drop_at_zero(
    allocation: Allocation,
    tensors: Sequence[Tensor],
    scores: Sequence[jax.Array],
    kept: Sequence[jax.Array] | None,
    starts: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """How many scores of every segment lie at or below zero.

    Args:
      allocation: bounds how many that may be.
      tensors: what is to be pruned.
      scores: one array per tensor.
      kept: masks so far, or None.
      starts: from :func:`movement_jax.counting.segment_starts`.

    Returns:
      As :meth:`Allocation.n_drop`.
    """
    sizes, zero = counting.sizes(tensors), jnp.int32(0)
    ranked, own = counting.apart(counting.Ranked(scores, kept, tensors, starts))
    ranked = ranked._replace(tensors=own)
    below = counting.count(ranked, jnp.broadcast_to(zero, (1, len(sizes))))[0]
    return jnp.minimum(below, most_dropped(sizes, allocation)), zero
