"""Criteria that train sparsely from the start: weights are dropped, others grown."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from movement_jax import arguments, tracing
from movement_jax.criteria import magnitude, seeded_noise


class GrowthState(NamedTuple):
    """State of :class:`RigL` and :class:`SET`.

    Attributes:
      step: steps so far. Shape ``()``, int32.
    """

    step: jax.Array


@tracing.once()
def _noise_or_magnitude(first: jax.Array, key: jax.Array, weights: Any) -> Any:
    return lax.cond(first, lambda w: seeded_noise(key, w), magnitude, weights)


@dataclasses.dataclass(frozen=True)
class _DropAndGrow:
    """What both have in common: all but where weights grow."""

    end: int | None
    every: int = 100
    drop_fraction: float = 0.3
    seed: int = 0
    accumulates: ClassVar[bool] = False
    whole_tensors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.make_plain(self, "end", "every", "drop_fraction", "seed")
        if self.end is not None:
            arguments.check_every("end", self.end)
        arguments.check_every("every", self.every)
        if self.every == 1:
            raise ValueError(
                "`every` must be at least 2 steps: weights stand still in a step that "
                "exchanges some of them, so with every=1 nothing would be trained."
            )
        arguments.check_fraction("drop_fraction", self.drop_fraction)
        arguments.check_seed(self.seed)

    def init(self, params: Any) -> GrowthState:
        """Nothing but a counter."""
        del params
        return GrowthState(jnp.zeros([], jnp.int32))

    def update(
        self, state: GrowthState, *, params: Any, grads: Any, new_params: Any
    ) -> GrowthState:
        """Counts the step."""
        del params, grads, new_params
        return GrowthState(state.step + 1)

    def scores(self, state: GrowthState, params: Any) -> Any:
        """Noise until a step was made, so that masks begin at random; then ``|W|``."""
        return _noise_or_magnitude(state.step == 0, jax.random.key(self.seed), params)

    def exchange(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Fraction of the kept weights that is exchanged at ``step``: mostly 0."""
        step = jnp.asarray(step)
        due = (step > 0) & (step % self.every == 0)
        fraction = jnp.float32(self.drop_fraction)
        if self.end is not None:
            due &= step < self.end
            way = step.astype(jnp.float32) / self.end
            fraction *= (1 + jnp.cos(math.pi * way)) / 2
        return jnp.where(due, fraction, 0)


@dataclasses.dataclass(frozen=True)
class RigL(_DropAndGrow):
    r"""Sparse from the start; small weights make way for those with large gradients.

    Masks begin at random, with as many weights of each tensor as the allocation says.
    At every ``every``-th step :math:`t` before ``end``, of the :math:`n` weights that a
    tensor keeps, the :math:`k = \mathrm{round}(n\,\tfrac{\alpha}{2}(1 + \cos(\pi t /
    \mathrm{end})))` smallest are dropped, and of all that are then off the :math:`k`
    with the largest gradient are grown. The number of weights stays the same::

        movement_pruning(0.9, RigL(end=7_500), allocation=ErdosRenyi(),
                         inner=optax.adamw(1e-3))

    As in the paper, a weight just dropped can be grown again, and has then never been
    away; any other starts at exactly 0; and a step that exchanges weights moves none of
    the tensors that are pruned. The optimizer counts this step, though, and takes its
    gradient. What it remembers of a weight that grows (any array of the weight's own
    shape, as Adam's moments) is put back to what ``inner.init`` gives it. Adafactor's
    rows and columns are shared with other weights, and stay.

    The first update drops the first weights. To begin with those that are left, call
    ``params, opt_state = prune((params, opt_state), 0.9)`` before it. A sparsity that
    rises (:func:`movement_jax.cubic`), and a later ``prune``, drop by magnitude.

    Attributes:
      end: step from which masks stay as they are; about three quarters of the run.
        None to go on exchanging the fraction ``drop_fraction``.
      every: steps from one exchange to the next, at least 2. Default 100.
      drop_fraction: :math:`\alpha`, in [0, 1). Default 0.3. With 0 masks stay as they
        began: the control.
      seed: of the masks to begin with, any integer.

    Raises:
      ValueError: if something is out of range. At construction of the transformation,
        if it has no ``inner``, or has ``regrow``, ``axis_name``, or a structure of N:M
        patterns or of the units of a model.

    Examples:
      >>> import jax.numpy as jnp, optax, movement_jax as mj
      >>> tx = mj.movement_pruning(
      ...     0.5, mj.RigL(end=100, every=2, drop_fraction=0.5), inner=optax.sgd(0.5))
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> params, state = mj.prune((params, tx.init(params)), 0.5)
      >>> print(params["kernel"])
      [[0. 0.]
       [3. 4.]]
      >>> grads = {"kernel": jnp.array([[0.0, 8.0], [0.0, 0.0]])}
      >>> for _ in range(3):  # at step 2 the 3 makes way for the large gradient
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params["kernel"])
      [[ 0. -4.]
       [ 0.  4.]]

    References:
      Evci et al., *Rigging the Lottery: Making All Tickets Winners*, 2019,
      `arXiv:1911.11134 <https://arxiv.org/abs/1911.11134>`_
    """

    needs_gradients: ClassVar[bool] = True

    def growth(self, state: GrowthState, params: Any, grads: Any) -> Any:
        """``|G|``, float32."""
        del state, params
        return magnitude(grads)


@dataclasses.dataclass(frozen=True)
class SET(_DropAndGrow):
    """Sparse from the start; small weights make way for others, at random.

    As :class:`RigL`, with noise in place of the gradient. Its authors exchange the same
    fraction after every epoch to the end (``end=None``); drop the smallest positive and
    the largest negative weights, where this takes both together by magnitude; and start
    new ones at random, where this starts them at 0, as the comparison in RigL's paper.

    Attributes:
      end: step from which masks stay as they are. The fraction falls towards it as for
        :class:`RigL`; None to go on at ``drop_fraction``.
      every: steps from one exchange to the next, at least 2. Default 100.
      drop_fraction: of the kept weights, in [0, 1). Default 0.3.
      seed: of all that is random, any integer.

    Raises:
      ValueError: as :class:`RigL`.

    Examples:
      >>> import optax, movement_jax as mj
      >>> tx = mj.movement_pruning(
      ...     0.9, mj.SET(end=None, every=500), allocation=mj.ErdosRenyi(),
      ...     inner=optax.adamw(1e-3))

    References:
      Mocanu et al., *Scalable Training of Artificial Neural Networks with Adaptive
      Sparse Connectivity inspired by Network Science*, 2018,
      `arXiv:1707.04780 <https://arxiv.org/abs/1707.04780>`_
    """

    needs_gradients: ClassVar[bool] = False

    def growth(self, state: GrowthState, params: Any, grads: Any) -> Any:
        """Uniform noise in [0, 1), another at every step."""
        del grads
        key = jax.random.fold_in(jax.random.key(self.seed), state.step + 1)
        return seeded_noise(key, params)
