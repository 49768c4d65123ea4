"""What a weight is worth by how it behaved: peaks, uncertainty and dormancy."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from movement_jax import arguments
from movement_jax.criteria import f32, zeros

_RESOLUTION = 1e-3  # differences of dormancy below it say less than the magnitude


@dataclasses.dataclass(frozen=True)
class PeakMagnitude:
    r"""The largest magnitude a weight ever had, slowly forgotten.

    After every optimizer step :math:`P \leftarrow \max(\gamma P, |W|)`, from
    :math:`P=0`. A weight that spiked and returned keeps its rank for about a half-life,
    where the average of :class:`EmaMagnitude` never saw more than a step of it.

    Attributes:
      decay: :math:`\gamma`, in [0, 1). Default 0.999.
      half_life: the same as a number of steps, :math:`\gamma = 2^{-1/h}`. Give one of
        the two.

    Raises:
      ValueError: if decay and half-life are both given, or something is out of range.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> peak, weights = mj.PeakMagnitude(decay=0.5), jnp.array([0.0, -4.0])
      >>> state = peak.init(weights)
      >>> for w in (weights, jnp.array([1.0, 0.0])):
      ...     state = peak.update(state, params=w, grads=None, new_params=w)
      >>> print(peak.scores(state, w))
      [1. 2.]

    References:
      A decayed maximum in place of the mean, as AdaMax has it in place of Adam's:
      Kingma, Ba, *Adam: A Method for Stochastic Optimization*, 2015,
      `arXiv:1412.6980 <https://arxiv.org/abs/1412.6980>`_
    """

    decay: float | None = None
    half_life: float | None = None
    needs_gradients: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.resolve_decay(self, default=0.999)

    def init(self, params: Any) -> Any:
        """Zeros like ``params``, float32."""
        return zeros(params)

    def update(self, state: Any, *, params: Any, grads: Any, new_params: Any) -> Any:
        """The larger of the decayed peak and the magnitude after the step."""
        del params, grads
        assert self.decay is not None
        decay = self.decay
        return jax.tree.map(
            lambda p, w: jnp.maximum(decay * p, jnp.abs(f32(w))), state, new_params
        )

    def scores(self, state: Any, params: Any) -> Any:
        """The decayed peak."""
        del params
        return state


class MagnitudeMoments(NamedTuple):
    """State of :class:`UpperConfidence`.

    Attributes:
      mean: running mean of the magnitude. Like params, float32.
      variance: running variance around it. Like params, float32.
    """

    mean: Any
    variance: Any


@dataclasses.dataclass(frozen=True)
class UpperConfidence:
    r"""How large a weight may be: mean of its magnitude, plus its spread.

    With :math:`\mu` and :math:`\sigma^2` the exponentially weighted mean and variance
    of :math:`|W|` after every step, from :math:`|W_0|` and 0,
    :math:`S = \mu + \kappa \sigma`. Weights that move much are given the benefit of
    the doubt; :math:`\kappa = 0` is a running average.

    Attributes:
      decay: of both averages, in [0, 1). Default 0.99.
      half_life: the same as a number of steps. Give one of the two.
      kappa: :math:`\kappa`, how many standard deviations count. Default 1.

    Raises:
      ValueError: if decay and half-life are both given, or something is out of range.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> bound, weights = mj.UpperConfidence(decay=0.5), jnp.array([3.0, 3.0])
      >>> state = bound.init(weights)
      >>> w = jnp.array([3.0, 1.0])
      >>> state = bound.update(state, params=weights, grads=None, new_params=w)
      >>> print(bound.scores(state, w))
      [3. 3.]

    References:
      Auer, Cesa-Bianchi, Fischer, *Finite-time Analysis of the Multiarmed Bandit
      Problem*, 2002, for optimism under uncertainty; in pruning, Zhang et al.,
      *PLATON*, 2022, `arXiv:2206.12562 <https://arxiv.org/abs/2206.12562>`_
    """

    decay: float | None = None
    half_life: float | None = None
    kappa: float = 1.0
    needs_gradients: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.make_plain(self, "kappa")
        arguments.resolve_decay(self, default=0.99)
        arguments.check_not_negative("kappa", self.kappa)

    def init(self, params: Any) -> MagnitudeMoments:
        """The magnitude of ``params``, and no spread."""
        mean = jax.tree.map(lambda w: jnp.abs(f32(w)), params)
        return MagnitudeMoments(mean, zeros(params))

    def update(
        self, state: MagnitudeMoments, *, params: Any, grads: Any, new_params: Any
    ) -> MagnitudeMoments:
        """One step of both averages."""
        del params, grads
        assert self.decay is not None
        decay = self.decay

        def average(mean: jax.Array, weight: jax.Array) -> jax.Array:
            return mean + (1 - decay) * (jnp.abs(f32(weight)) - mean)

        def spread(
            variance: jax.Array, mean: jax.Array, weight: jax.Array
        ) -> jax.Array:
            deviation = jnp.abs(f32(weight)) - mean
            return decay * (variance + (1 - decay) * jnp.square(deviation))

        return MagnitudeMoments(
            jax.tree.map(average, state.mean, new_params),
            jax.tree.map(spread, state.variance, state.mean, new_params),
        )

    def scores(self, state: MagnitudeMoments, params: Any) -> Any:
        """Mean plus ``kappa`` standard deviations."""
        del params
        return jax.tree.map(
            lambda m, v: m + self.kappa * jnp.sqrt(v), state.mean, state.variance
        )


@dataclasses.dataclass(frozen=True)
class Dormancy:
    r"""Weights that stayed small for most of the time go first.

    After every optimizer step :math:`D \leftarrow \beta D + (1-\beta)
    [\,|W| < \alpha \,\mathrm{rms}(W)\,]`, from :math:`D=0`, with the root mean square
    over the weights of the tensor that are not zero, so that pruning does not lower it.
    The most dormant are pruned. A weight that oscillates between :math:`\pm a` is as
    awake as one that stays at :math:`a`, as for every score of magnitudes; one that
    visits zero rarely is not taken for one that lives there.

    Many weights are equally dormant. The score, :math:`-D + 10^{-3} |W| / (|W| +
    \mathrm{rms})`, ranks those that differ by less than a thousandth by magnitude.

    Attributes:
      alpha: what counts as small, in units of the tensor's root mean square. Default
        0.1. As normally distributed weights fall below 0.1 of it at 8 % of the time,
        higher sparsities want a higher one.
      decay: :math:`\beta`, in [0, 1). Default 0.99.
      half_life: the same as a number of steps. Give one of the two.

    Raises:
      ValueError: if decay and half-life are both given, or something is out of range.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> dormancy, weights = mj.Dormancy(decay=0.5), jnp.array([3.0, 0.1])
      >>> state = dormancy.init(weights)
      >>> state = dormancy.update(state, params=weights, grads=None, new_params=weights)
      >>> print(state)
      [0.  0.5]

    References:
      Sokar et al., *The Dormant Neuron Phenomenon in Deep Reinforcement Learning*,
      2023, `arXiv:2302.12902 <https://arxiv.org/abs/2302.12902>`_, of neurons
    """

    alpha: float = 0.1
    decay: float | None = None
    half_life: float | None = None
    needs_gradients: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True
    whole_tensors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.make_plain(self, "alpha")
        arguments.check_positive("alpha", self.alpha)
        arguments.resolve_decay(self, default=0.99)

    def init(self, params: Any) -> Any:
        """Zeros like ``params``, float32."""
        return zeros(params)

    def update(self, state: Any, *, params: Any, grads: Any, new_params: Any) -> Any:
        """One step of the running average of being small."""
        del params, grads
        assert self.decay is not None
        decay = self.decay

        def average(dormant: jax.Array, weight: jax.Array) -> jax.Array:
            small = jnp.abs(f32(weight)) < self.alpha * _rms(weight)
            return decay * dormant + (1 - decay) * small.astype(jnp.float32)

        return jax.tree.map(average, state, new_params)

    def scores(self, state: Any, params: Any) -> Any:
        """Minus the dormancy; the magnitude decides between equals."""

        def score(dormant: jax.Array, weight: jax.Array) -> jax.Array:
            size = jnp.abs(f32(weight))
            scale = jnp.maximum(_rms(weight), jnp.finfo(jnp.float32).tiny)
            return _RESOLUTION * size / (size + scale) - dormant

        return jax.tree.map(score, state, params)


def _rms(weight: jax.Array) -> jax.Array:
    """Of the weights that are not zero. Shape ``()``, float32."""
    squares = jnp.sum(jnp.square(f32(weight)))
    alive = jnp.sum((weight != 0).astype(jnp.float32))
    return jnp.sqrt(squares / jnp.maximum(alive, 1))
