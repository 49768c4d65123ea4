"""Soft movement pruning: a threshold on learned scores, and a penalty on keeping."""

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from movement_jax import allocation as _allocation
from movement_jax import arguments, counting, schedules, selection, wide
from movement_jax import tree as _tree
from movement_jax.criteria import (
    optimizer_of,
    resolve_optimizer,
    saliency,
    scaled_magnitude,
)
from movement_jax.schedules import Polynomial

_NO_THRESHOLD = 1e-30  # stands for 0, whose logit is infinite; no score comes near
# The slope of the sigmoid changes by at most 1 / (6 * sqrt(3)) a unit: up to this
# penalty a step keeps the order of the scores, and so the count below the threshold.
_STEEPEST = 9.0


class SoftScores(NamedTuple):
    """State of :class:`SoftMovement`.

    Attributes:
      values: the scores. Like params, float32.
      optimizer_state: state of the optimizer that trains them.
      penalty: the penalty of the last step. Shape ``()``, float32.
      step: steps scored. Shape ``()``, int32.
    """

    values: Any
    optimizer_state: Any
    penalty: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class SoftMovement:
    r"""Soft movement pruning: a weight is kept while :math:`\sigma(S) > \tau`.

    The scores :math:`S` are trained beside the weights, with the gradient
    :math:`W \odot G` of :class:`Movement` and a penalty on keeping. The threshold is
    one for all tensors; how much of each is kept, training decides. Nothing is added to
    the loss: ``movement_pruning(criterion=SoftMovement(...), inner=optax.adamw(3e-5),
    regrow=True)``, without a ``sparsity``. Give one of the two:

    ``target_sparsity``. The penalty is found such that it is reached. After the step
    of the scores' optimizer, :math:`S \leftarrow S - \lambda_t \sigma'(S)`, apart from
    the optimizer as AdamW decays weights, with the :math:`\lambda_t`, of either sign,
    that brings the score at the wanted quantile to :math:`\mathrm{logit}(\tau)`: dual
    ascent, with the multiplier solved for at every step. Where the sigmoid is flat and
    :math:`|\lambda_t|` would exceed 9, all scores are shifted by the rest. Both keep
    the order of the scores; the masks are those of one global threshold, so that every
    step meets the sparsity of all tensors together exactly, with ties and floors too.

    ``penalty``. The paper's form: the gradient of :math:`\lambda_t \,\mathrm{mean}_l
    \,\mathrm{mean}\, \sigma(S_l)` over tensors :math:`l` is added to :math:`W \odot G`
    before the optimizer, with :math:`\lambda_t = \lambda \tau_t / \tau_T`. What
    sparsity comes of it is known afterwards.

    Later, ``prune(state, 0.95)`` ranks the same scores by the allocation, exactly. In
    training the allocation gives ``min_keep`` only.

    Attributes:
      target_sparsity: fraction of all prunable weights to drop: a number in [0, 1), or
        :func:`movement_jax.cubic` and its like, whose steps are also those at which
        masks change.
      penalty: :math:`\lambda`, at least 0.
      threshold: :math:`\tau`, in (0, 1). A number, or with ``penalty`` a schedule such
        as ``cubic(0.1, begin=100, end=900)``. Default 0.1.
      from_magnitude: scores start at this times :math:`|W| / \mathrm{mean}|W|`, above
        0 with ``penalty`` and above :math:`\mathrm{logit}(\tau)` with a target.
        Default 0 with ``penalty``, as in the paper, where scores are tied until the
        first gradient; else 1.
      optimizer: any optax transformation to train the scores with. Default
        ``optax.adam(learning_rate)``.
      learning_rate: of the default Adam; a number or a schedule. Default 1e-2.

    Raises:
      ValueError: if not one of the two is given, or something is out of range.

    Examples:
      >>> import jax.numpy as jnp, optax, movement_jax as mj
      >>> tx = mj.movement_pruning(
      ...     criterion=mj.SoftMovement(target_sparsity=0.5),
      ...     inner=optax.adamw(3e-5), regrow=True)
      >>> params = {"kernel": jnp.array([[3.0, -0.1], [0.2, -4.0]])}
      >>> grads = {"kernel": jnp.zeros((2, 2))}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(mj.effective_params(params, state)["kernel"])
      [[ 3.  0.]
       [ 0. -4.]]

    References:
      Sanh, Wolf, Rush, *Movement Pruning: Adaptive Sparsity by Fine-Tuning*, 2020,
      `arXiv:2005.07683 <https://arxiv.org/abs/2005.07683>`_
    """

    target_sparsity: float | Polynomial | None = None
    penalty: float | None = None
    threshold: float | Polynomial = 0.1
    from_magnitude: float | None = None
    optimizer: optax.GradientTransformation | None = None
    learning_rate: optax.ScalarOrSchedule | None = None
    needs_gradients: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    whole_tensors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        names = ("target_sparsity", "penalty", "threshold", "from_magnitude")
        arguments.make_plain(self, *names)
        resolve_optimizer(self)
        if (self.target_sparsity is None) == (self.penalty is None):
            raise ValueError(
                "`SoftMovement` takes one of `target_sparsity` and `penalty`, got "
                f"{self.target_sparsity!r} and {self.penalty!r}. For example "
                "`SoftMovement(target_sparsity=cubic(0.9, begin=100, end=900))`."
            )
        if self.penalty is None:
            _check_target(self.target_sparsity)
            if isinstance(self.threshold, Polynomial):
                raise ValueError(
                    "`threshold` must be a number beside `target_sparsity`, whose "
                    f"schedule says when it is met: got {self.threshold!r}."
                )
        else:
            arguments.check_not_negative("penalty", self.penalty)
        highest = self._final_threshold
        arguments.check_number("threshold", highest)
        if not 0 < highest < 1:
            raise ValueError(f"`threshold` must be in (0, 1), got {highest}.")
        if self.from_magnitude is None:
            start = 1.0 if self.penalty is None else 0.0
            object.__setattr__(self, "from_magnitude", start)
        arguments.check_not_negative("from_magnitude", self.from_magnitude)

    def init(self, params: Any) -> SoftScores:
        """Scores from the magnitudes, and the state of their optimizer."""
        assert self.from_magnitude is not None
        base = self._level if self.penalty is None else 0.0
        values = scaled_magnitude(params, self.from_magnitude, base)
        return SoftScores(
            values,
            optimizer_of(self).init(values),
            penalty=jnp.zeros([], jnp.float32),
            step=jnp.zeros([], jnp.int32),
        )

    def update(
        self, state: SoftScores, *, params: Any, grads: Any, new_params: Any
    ) -> SoftScores:
        """One step on the scores, and the penalty."""
        del new_params
        step = state.step + 1
        gradient = jax.tree.map(saliency, params, grads)
        penalty = jnp.float32(0)
        if self.penalty is not None:
            penalty = self.penalty * self._threshold(step) / self._final_threshold
            gradient = _add_penalty(gradient, state.values, penalty)
        updates, optimizer_state = optimizer_of(self).update(
            gradient, state.optimizer_state, state.values
        )
        values = optax.apply_updates(state.values, updates)
        if self.penalty is None:
            values, penalty = self._constrain(values, step)
        return SoftScores(values, optimizer_state, penalty, step)

    def scores(self, state: SoftScores, params: Any) -> Any:
        """How far each score lies above the threshold."""
        del params
        level = _logit(jnp.maximum(self._threshold(state.step), _NO_THRESHOLD))
        return jax.tree.map(lambda s: s - level, state.values)

    def target(self, state: SoftScores) -> schedules.Target:
        """All that is not above the threshold is to go."""
        if self.penalty is None:
            return self._wanted(state.step)
        return schedules.Target(None, shared=True)

    def due(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Whether masks change at ``step``."""
        schedule = self.target_sparsity if self.penalty is None else self.threshold
        if isinstance(schedule, Polynomial):
            return schedule.due(step)
        always: jax.Array = jnp.bool_(True)
        return always

    @property
    def _final_threshold(self) -> Any:
        schedule = self.threshold
        return schedule.final if isinstance(schedule, Polynomial) else schedule

    @property
    def _level(self) -> float:
        return float(np.float32(_logit(self._final_threshold)))

    def _threshold(self, step: jax.Array) -> jax.Array:
        if isinstance(self.threshold, Polynomial):
            return self.threshold(step)
        fixed: jax.Array = jnp.float32(self.threshold)
        return fixed

    def _wanted(self, step: jax.Array) -> schedules.Target:
        if isinstance(self.target_sparsity, Polynomial):
            return self.target_sparsity.target(step)._replace(shared=True)
        return schedules.Target(self.target_sparsity, shared=True)

    def _constrain(self, values: Any, step: jax.Array) -> tuple[Any, jax.Array]:
        """Brings the score at the wanted quantile to the threshold; by what penalty."""
        named = _tree.named_leaves(values)
        tensors = [counting.Tensor(name, value.shape) for name, value in named]
        sizes = counting.sizes(tensors)
        n_drop = _allocation.drop_total(self._wanted(step), int(sizes.sum()))
        # Before anything is to go the lowest score is held there.
        one = wide.from_int(1)
        n_drop = jax.tree.map(
            lambda a, b: jnp.where(wide.at_least(n_drop, one), a, b), n_drop, one
        )
        _, key = selection.common_threshold(
            [value for _, value in named],
            tensors,
            n_drop,
            most=jnp.asarray(sizes, jnp.int32),
            hint=jnp.int32(counting.key_of(self._level)),
        )
        # Any key between two scores counts as many: take the score below it.
        at_most = counting.to_float(key)
        highest = [jnp.max(jnp.where(v <= at_most, v, -jnp.inf)) for _, v in named]
        quantile = functools.reduce(jnp.maximum, highest)
        gap = quantile - self._level
        slope = jnp.maximum(_slope(quantile), jnp.finfo(jnp.float32).tiny)
        penalty = jnp.clip(gap / slope, -_STEEPEST, _STEEPEST)
        rest = gap - penalty * slope
        values = jax.tree.map(lambda s: s - penalty * _slope(s) - rest, values)
        return values, penalty


def _check_target(value: Any) -> None:
    final = value.final if isinstance(value, Polynomial) else value
    schedules.check_sparsity("target_sparsity", final)
    if final == 1:
        raise ValueError(
            "`target_sparsity` must be below 1: nothing would be left. For example "
            "`SoftMovement(target_sparsity=0.97)`."
        )


def _add_penalty(gradient: Any, scores: Any, penalty: jax.Array) -> Any:
    """Adds the gradient of the penalty times the mean over tensors of mean sigmoids."""
    n = max(len(jax.tree.leaves(scores)), 1)
    return jax.tree.map(
        lambda g, s: g + penalty * _slope(s) / float(n * s.size), gradient, scores
    )


def _slope(score: jax.Array) -> jax.Array:
    """Derivative of the sigmoid."""
    kept = jax.nn.sigmoid(score)
    return kept * (1 - kept)


def _logit(fraction: Any) -> Any:
    if isinstance(fraction, int | float):
        return math.log(fraction / (1 - fraction))
    return jnp.log(fraction) - jnp.log1p(-fraction)
