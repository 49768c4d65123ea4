"""What a weight is worth: criteria that turn a training run into scores.

A criterion is any hashable object with the three methods of :class:`Criterion`.
"""

import dataclasses
import zlib
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from movement_jax import arguments, rounding
from movement_jax import tree as _tree


@runtime_checkable
class Criterion(Protocol):
    """What the transformation asks of a criterion.

    All trees have the structure of the params, with ``optax.MaskedNode`` in place of
    the leaves that stay dense, so ``jax.tree.map`` visits the prunable leaves only.

    A class may set ``needs_gradients = True`` (default False) to be given gradients,
    ``accumulates = False`` (default True) if its scores mean something before the
    first update, and ``score_every = k`` (default 1) to be updated at the first and
    every ``k``-th step only, at no cost between, without gradients, with the weights
    as they enter the step. With ``reads_optimizer = True`` (default False)
    its ``scores`` are given ``optimizer_state=``, that of the wrapped optimizer; with
    ``whole_tensors = True`` (default False) it must not see parts of tensors, and
    ``axis_name=`` is refused.

    One that decides by itself how much is dropped, and when, has two methods more:
    ``target(state)``, a :class:`movement_jax.schedules.Target`, and ``due(step)``,
    whether masks change. It takes the place of a schedule, and needs
    ``regrow=True`` and single weights.

    One that drops and grows has two others: ``exchange(step)``, the fraction of the
    kept weights that change places at a step, 0 at most of them, and ``growth(state,
    params, grads)``, one float per weight: of those that are off, the highest grow. The
    lowest magnitudes make way for them. It needs ``inner=``, and no ``regrow``.
    """

    def init(self, params: Any) -> Any:
        """Returns the criterion's state for ``params``, in fresh buffers."""
        ...

    def update(self, state: Any, *, params: Any, grads: Any, new_params: Any) -> Any:
        """Returns the state after one optimizer step.

        Args:
          state: as returned by ``init`` or the previous ``update``.
          params: the weights at which ``grads`` were taken.
          grads: raw gradients, or None where there are none.
          new_params: the weights after the step.
        """
        ...

    def scores(self, state: Any, params: Any) -> Any:
        """Returns one float per weight, ranked as float32; the highest are kept."""
        ...


@dataclasses.dataclass(frozen=True)
class EmaMagnitude:
    r"""Running average of the weights' magnitude.

    After every optimizer step :math:`S \leftarrow \beta S + (1-\beta)|W|`, from
    :math:`S=0`. With :math:`\beta=0.9` a step is half forgotten after 6.6 steps, and
    the ranking is close to that of :class:`Magnitude`; a long half-life remembers
    where the weights came from.

    Attributes:
      decay: :math:`\beta`, in [0, 1). Default 0.9.
      half_life: the same as a number of steps, :math:`\beta = 2^{-1/h}`. Give one of
        the two. Beyond 100 000 steps float32 averages to about a hundredth only.
      scores_dtype: how scores are stored, "float32" or "bfloat16". The latter takes
        two bytes a weight; it is rounded such that the average does not stall, as
        rounding to nearest would from a decay of 0.9 on.
      score_every: average over the weights as they enter the first step and every
        ``score_every``-th, with :math:`\beta` to that power, which forgets as fast.
        The other steps do not touch the scores. Default 1: after every step.

    Raises:
      ValueError: if decay and half-life are both given, or something is out of range.

    Examples:
      >>> import movement_jax as mj
      >>> mj.EmaMagnitude().decay
      0.9
      >>> round(mj.EmaMagnitude(half_life=100).decay, 5)
      0.99309
      >>> cheap = mj.EmaMagnitude(
      ...     half_life=1000, scores_dtype="bfloat16", score_every=10)
    """

    decay: float | None = None
    half_life: float | None = None
    scores_dtype: str = "float32"
    score_every: int = 1
    needs_gradients: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.make_plain(self, "score_every")
        object.__setattr__(
            self, "scores_dtype", rounding.check_dtype(self.scores_dtype)
        )
        arguments.check_every("score_every", self.score_every)
        arguments.resolve_decay(self, default=0.9)

    def init(self, params: Any) -> Any:
        """Zeros like ``params`` in ``scores_dtype``."""
        return rounding.zeros(params, self.scores_dtype)

    def update(self, state: Any, *, params: Any, grads: Any, new_params: Any) -> Any:
        """``score_every`` steps of the running average at once."""
        del params, grads
        assert self.decay is not None
        decay = self.decay**self.score_every

        def average(score: jax.Array, weight: jax.Array) -> jax.Array:
            return decay * score + (1 - decay) * jnp.abs(f32(weight))

        return rounding.update(average, state, new_params)

    def scores(self, state: Any, params: Any) -> Any:
        """The running average, in ``scores_dtype``."""
        del params
        return rounding.values_of(state)


@dataclasses.dataclass(frozen=True)
class Magnitude:
    r"""Magnitude of the weights as they are now, :math:`S = |W|`. Keeps no state.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> print(mj.Magnitude().scores((), jnp.array([-2.0, 1.0])))
      [2. 1.]

    References:
      Han et al., *Learning both Weights and Connections for Efficient Neural
      Networks*, 2015, `arXiv:1506.02626 <https://arxiv.org/abs/1506.02626>`_
    """

    needs_gradients: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False

    def init(self, params: Any) -> Any:
        """No state."""
        del params
        return ()

    def update(self, state: Any, *, params: Any, grads: Any, new_params: Any) -> Any:
        """No state."""
        del params, grads, new_params
        return state

    def scores(self, state: Any, params: Any) -> Any:
        """``|W|`` in float32."""
        del state
        return magnitude(params)


class MovementScores(NamedTuple):
    """State of :class:`Movement`.

    Attributes:
      values: the scores. Like params, float32.
      optimizer_state: state of the optimizer that trains them.
    """

    values: Any
    optimizer_state: Any


@dataclasses.dataclass(frozen=True)
class Movement:
    r"""Hard movement pruning: weights that training moves away from zero are kept.

    The scores are trained beside the weights. With :math:`G` the gradient at the
    masked weights, the gradient of the scores is :math:`W \odot G` for all entries
    (straight-through), so the score of a weight rises while training moves it away
    from zero. It needs the raw gradients, so the transformation wraps the optimizer:
    ``movement_pruning(schedule, Movement(), inner=optax.adamw(3e-5), regrow=True)``.

    Attributes:
      optimizer: any optax transformation to train the scores with. Default
        ``optax.adam(learning_rate)``, as the paper's authors run it.
        ``optax.sgd(1.0)`` gives the plain sum that the paper writes.
      learning_rate: of the default Adam; a number or a schedule. Default 1e-2.
      from_magnitude: scores start at this times :math:`|W| / \mathrm{mean}|W|` of the
        tensor. Default 0, as in the paper, where they are tied until the first
        gradient; with 1 training starts from the ranking by magnitude.

    Raises:
      ValueError: if both an optimizer and a learning rate are given, or a number is
        out of range.

    Examples:
      >>> import optax, movement_jax as mj
      >>> mj.Movement()
      Movement(optimizer=None, learning_rate=0.01, from_magnitude=0.0)
      >>> tx = mj.movement_pruning(
      ...     mj.cubic(0.9, begin=100, end=900), mj.Movement(),
      ...     inner=optax.adamw(3e-5), regrow=True)

    References:
      Sanh, Wolf, Rush, *Movement Pruning: Adaptive Sparsity by Fine-Tuning*, 2020,
      `arXiv:2005.07683 <https://arxiv.org/abs/2005.07683>`_
    """

    optimizer: optax.GradientTransformation | None = None
    learning_rate: optax.ScalarOrSchedule | None = None
    from_magnitude: float = 0.0
    needs_gradients: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        resolve_optimizer(self)
        arguments.make_plain(self, "from_magnitude")
        arguments.check_not_negative("from_magnitude", self.from_magnitude)

    def init(self, params: Any) -> MovementScores:
        """Scores to begin with, and the state of their optimizer."""
        values = scaled_magnitude(params, self.from_magnitude)
        return MovementScores(values, optimizer_of(self).init(values))

    def update(
        self, state: MovementScores, *, params: Any, grads: Any, new_params: Any
    ) -> MovementScores:
        """One optimizer step on the scores, with gradient ``W * G``."""
        del new_params
        gradient = jax.tree.map(saliency, params, grads)
        updates, optimizer_state = optimizer_of(self).update(
            gradient, state.optimizer_state, state.values
        )
        values = optax.apply_updates(state.values, updates)
        return MovementScores(values, optimizer_state)

    def scores(self, state: MovementScores, params: Any) -> Any:
        """The trained scores."""
        del params
        return state.values


@dataclasses.dataclass(frozen=True)
class Taylor:
    r"""First-order change of the loss if the weight were zero, with momentum.

    :math:`S \leftarrow \mu S + |W \odot G|`. It needs the raw gradients, so the
    transformation wraps the optimizer (``inner=``).

    Attributes:
      momentum: :math:`\mu`, in [0, 1). 0 gives the saliency of the last batch alone.
      scores_dtype: how scores are stored, "float32" or "bfloat16", as for
        :class:`EmaMagnitude`.

    Examples:
      >>> import optax, movement_jax as mj
      >>> tx = mj.movement_pruning(0.5, mj.Taylor(), inner=optax.sgd(0.1))

    References:
      Molchanov et al., *Pruning Convolutional Neural Networks for Resource Efficient
      Inference*, 2016, `arXiv:1611.06440 <https://arxiv.org/abs/1611.06440>`_
    """

    momentum: float = 0.9
    scores_dtype: str = "float32"
    needs_gradients: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.make_plain(self, "momentum")
        object.__setattr__(
            self, "scores_dtype", rounding.check_dtype(self.scores_dtype)
        )
        arguments.check_fraction("momentum", self.momentum)

    def init(self, params: Any) -> Any:
        """Zeros like ``params`` in ``scores_dtype``."""
        return rounding.zeros(params, self.scores_dtype)

    def update(self, state: Any, *, params: Any, grads: Any, new_params: Any) -> Any:
        """Adds this step's saliency."""
        del new_params

        def add(score: jax.Array, weight: jax.Array, grad: jax.Array) -> jax.Array:
            return self.momentum * score + jnp.abs(saliency(weight, grad))

        return rounding.update(add, state, params, grads)

    def scores(self, state: Any, params: Any) -> Any:
        """The decayed sum of saliencies, in ``scores_dtype``."""
        del params
        return rounding.values_of(state)


@dataclasses.dataclass(frozen=True)
class Random:
    """Seeded noise: the baseline that every criterion has to beat. Keeps no state.

    A weight's score depends on the seed, its path and its index alone, so the masks
    of a rising schedule are nested and the same on every device.

    Attributes:
      seed: any integer.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> scores = mj.Random(seed=1).scores((), {"kernel": jnp.zeros((2, 2))})
      >>> scores["kernel"].shape
      (2, 2)
    """

    seed: int = 0
    needs_gradients: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        arguments.make_plain(self, "seed")
        arguments.check_seed(self.seed)

    def init(self, params: Any) -> Any:
        """No state."""
        del params
        return ()

    def update(self, state: Any, *, params: Any, grads: Any, new_params: Any) -> Any:
        """No state."""
        del params, grads, new_params
        return state

    def scores(self, state: Any, params: Any) -> Any:
        """Uniform noise in [0, 1)."""
        del state
        return seeded_noise(jax.random.key(self.seed), params)


def resolve_optimizer(criterion: Any) -> None:
    """Sets the learning rate of a frozen dataclass that takes it or ``optimizer``.

    Raises:
      ValueError: if both are given, or the learning rate is not positive.
    """
    name = type(criterion).__name__
    if criterion.optimizer is not None:
        if criterion.learning_rate is not None:
            raise ValueError(
                f"`{name}` takes `optimizer` or `learning_rate`, not both: give the "
                f"learning rate to the optimizer, as in "
                f"`{name}(optimizer=optax.sgd(0.1))`."
            )
        if not hasattr(criterion.optimizer, "update"):
            raise TypeError(
                "`optimizer` must be an optax transformation, got "
                f"{criterion.optimizer!r}. For a learning rate write "
                f"`{name}(learning_rate=1e-2)`."
            )
        return
    given = arguments.plain(criterion.learning_rate)
    rate = 1e-2 if given is None else given
    if not callable(rate):
        arguments.check_positive("learning_rate", rate)
    object.__setattr__(criterion, "learning_rate", rate)


def optimizer_of(criterion: Any) -> optax.GradientTransformation:
    """The optimizer that trains a criterion's scores."""
    if criterion.optimizer is not None:
        return criterion.optimizer
    return optax.adam(criterion.learning_rate)


def zeros(params: Any) -> Any:
    """Zeros like ``params``, float32."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)


def magnitude(params: Any) -> Any:
    """The magnitude of every entry, float32."""
    return jax.tree.map(lambda weight: jnp.abs(f32(weight)), params)


def seeded_noise(key: jax.Array, params: Any) -> Any:
    """Uniform noise in [0, 1) like ``params``, float32, by key, path and index."""

    def noise(path: Any, weight: jax.Array) -> jax.Array:
        name = _tree.path_name(path).encode()
        own = jax.random.fold_in(key, zlib.crc32(name))
        drawn: jax.Array = _noise_like(own, weight)
        return drawn

    return jax.tree_util.tree_map_with_path(noise, params)


@jax.jit  # which takes the devices from `weight`; the draw alone has none
def _noise_like(key: jax.Array, weight: jax.Array) -> jax.Array:
    """Uniform noise, drawn where the weight lies."""
    sharding = jax.typeof(weight).sharding
    explicit = any(axis is not None for axis in sharding.spec)
    drawn = jax.random.uniform(
        key, weight.shape, jnp.float32, out_sharding=sharding if explicit else None
    )
    return jnp.where(True, drawn, f32(weight))


def scaled_magnitude(params: Any, scale: float, base: float = 0.0) -> Any:
    """``base + scale * |W| / mean|W|`` of every tensor, float32."""

    def start(weight: jax.Array) -> jax.Array:
        size = jnp.abs(f32(weight))
        mean = jnp.maximum(jnp.mean(size), jnp.finfo(jnp.float32).tiny)
        return base + scale * size / mean

    return jax.tree.map(start, params)


def f32(x: jax.Array) -> jax.Array:
    """What scores are computed from and kept in."""
    return x.astype(jnp.float32)


def saliency(weight: jax.Array, grad: jax.Array) -> jax.Array:
    """``W * G`` in float32."""
    return f32(weight) * f32(grad)
