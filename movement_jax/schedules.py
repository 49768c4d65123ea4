"""Sparsity as a function of the step, and on which steps masks change."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from movement_jax.arguments import check_every, make_plain, plain

_RUN_FRACTION = "a step, or a fraction of `total_steps`"


class Target(NamedTuple):
    """What one change of the masks aims at.

    Attributes:
      sparsity: fraction to drop, a Python number or a traced scalar; None to drop what
        scores at or below zero, however much that is.
      final: the Python number that ``sparsity`` is at the end of a schedule. Its counts
        are exact where those of a float32 are not; None if there is no end.
      progress: how far the schedule has come towards ``final``, in [0, 1].
      shared: one threshold for all tensors; of the allocation only ``min_keep`` holds.
      now: whether the counts are used: `Global` reads no scores for those that are not.
    """

    sparsity: Any
    final: float | None = None
    progress: Any = 1.0
    shared: bool = False
    now: Any = True


@dataclasses.dataclass(frozen=True)
class Polynomial:
    r"""Sparsity that rises along a polynomial between two steps.

    It is ``initial`` at ``begin``, ``final`` from ``end`` on, and between them
    :math:`s_f + (s_i - s_f)\,(1 - (t - b)/(e - b))^p`. Make one with :func:`cubic`,
    :func:`linear` or :func:`one_shot`.

    Attributes:
      final: sparsity from ``end`` on, in [0, 1].
      begin: first step at which masks change.
      end: step at which ``final`` is reached, on the grid or not.
      every: masks change every so many steps from ``begin`` on, and at ``end``.
      initial: sparsity that the masks start with at ``begin``; before it they do not
        change.
      power: of the polynomial.
    """

    final: float
    begin: int
    end: int
    every: int = 1
    initial: float = 0.0
    power: float = 3.0

    def __post_init__(self) -> None:
        make_plain(self, "final", "begin", "end", "every", "initial", "power")
        for name in ("final", "initial"):
            check_sparsity(name, getattr(self, name))
        for name, least in (("begin", 0), ("end", 0), ("every", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"`{name}` must be an integer of at least {least}, got {value!r}. "
                    f"Fractions of a run need its length: `cubic(0.9, begin=0.1, "
                    f"end=0.9, every=0.01, total_steps=1000)`."
                )
        if self.begin > self.end:
            raise ValueError(
                f"`begin` must not come after `end`, got {self.begin} > {self.end}."
            )
        if self.initial > self.final:
            raise ValueError(
                "`initial` must not exceed `final`, got "
                f"{self.initial} > {self.final}. "
                "For a sparsity that falls, pass an optax schedule."
            )

    def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Sparsity after ``step`` optimizer steps. Shape ``()``, float32."""
        step = jnp.asarray(step)
        t = step.astype(jnp.float32)
        left = jnp.clip(1 - (t - self.begin) / max(self.end - self.begin, 1), 0, 1)
        rising = self.final + (self.initial - self.final) * left**self.power
        value = jnp.where(step <= self.begin, self.initial, rising)
        return jnp.where(step >= self.end, self.final, value).astype(jnp.float32)

    def target(self, step: jax.typing.ArrayLike) -> Target:
        """What masks aim at after ``step`` optimizer steps."""
        level = self(step)
        progress = jnp.clip(level / self.final, 0, 1) if self.final else 0.0
        return Target(level, self.final, progress)

    def due(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Whether masks change at ``step``. Shape ``()``, bool."""
        step = jnp.asarray(step)
        on_grid = (step - self.begin) % self.every == 0
        return (step >= self.begin) & (on_grid | (step == self.end))


@dataclasses.dataclass(frozen=True)
class Stepwise:
    """Any schedule, with masks that change every few steps only.

    Attributes:
      schedule: an optax schedule of the sparsity, or a float.
      every: masks change at multiples of this many steps.

    Examples:
      >>> import optax, movement_jax as mj
      >>> schedule = mj.Stepwise(optax.linear_schedule(0.0, 0.9, 1000), every=100)
      >>> print(schedule(500), schedule.due(500), schedule.due(501))
      0.45 True False
    """

    schedule: Callable[[Any], Any] | float
    every: int

    def __post_init__(self) -> None:
        make_plain(self, "schedule", "every")
        if isinstance(self.schedule, Polynomial):
            raise ValueError(
                "`Stepwise` would miss the end of a schedule that has a grid of its "
                f"own: write `cubic(..., every={self.every})`."
            )
        check_every("every", self.every)
        if not callable(self.schedule):
            check_sparsity("schedule", self.schedule)

    def __call__(self, step: jax.typing.ArrayLike) -> Any:
        """Sparsity after ``step`` optimizer steps."""
        return self.schedule(step) if callable(self.schedule) else self.schedule

    def due(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Whether masks change at ``step``. Shape ``()``, bool."""
        return jnp.asarray(step) % self.every == 0


def cubic(
    final: float,
    begin: float,
    end: float,
    every: float = 1,
    *,
    initial: float = 0.0,
    total_steps: int | None = None,
) -> Polynomial:
    """Rises fast at first and slowly towards the end, the usual pruning schedule.

    Steps count optimizer updates, not micro-batches. Masks change on the grid and at
    ``end``, so ``final`` is reached wherever the grid falls.

    Args:
      final: sparsity from ``end`` on, in [0, 1].
      begin: first step at which masks change, or a fraction of ``total_steps``.
      end: step at which ``final`` is reached, or a fraction of ``total_steps``.
      every: steps between mask changes, or a fraction of ``total_steps``.
      initial: sparsity that the masks start with at ``begin``; before it they do not
        change.
      total_steps: length of the run, if known.

    Returns:
      A schedule: call it with a step to get the sparsity.

    Raises:
      ValueError: if a value is out of range, or ``end`` lies beyond the run.

    Examples:
      >>> import movement_jax as mj
      >>> schedule = mj.cubic(0.8, begin=0, end=100, every=10)
      >>> print(schedule(50))
      0.7
      >>> mj.cubic(0.9, begin=0.1, end=0.9, every=0.01, total_steps=1000).end
      900

    References:
      Zhu, Gupta, *To prune, or not to prune*, 2017,
      `arXiv:1710.01878 <https://arxiv.org/abs/1710.01878>`_
    """
    return _polynomial(3.0, final, begin, end, every, initial, total_steps)


def linear(
    final: float,
    begin: float,
    end: float,
    every: float = 1,
    *,
    initial: float = 0.0,
    total_steps: int | None = None,
) -> Polynomial:
    """Rises by the same amount at every step. Arguments as for :func:`cubic`.

    Examples:
      >>> import movement_jax as mj
      >>> print(mj.linear(0.8, begin=0, end=100)(50))
      0.4
    """
    return _polynomial(1.0, final, begin, end, every, initial, total_steps)


def one_shot(
    final: float, step: float, *, total_steps: int | None = None
) -> Polynomial:
    """Prunes once, at the given step.

    Examples:
      >>> import movement_jax as mj
      >>> schedule = mj.one_shot(0.5, step=100)
      >>> print(schedule(99), schedule(100))
      0.0 0.5
    """
    return _polynomial(1.0, final, step, step, 1, 0.0, total_steps)


def check_sparsity(name: str, value: Any) -> None:
    """Refuses a Python number that is no fraction, saying what was meant."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"`{name}` must be a fraction of the weights to drop, in [0, 1], got "
            f"{value!r} of type {type(value).__name__}. For example `{name}=0.8`."
        )
    if math.isnan(value) or not 0 <= value <= 1:
        meant = f" Did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise ValueError(
            f"`{name}` is the fraction of weights to drop and must be in [0, 1], got "
            f"{value}.{meant}"
        )


def _polynomial(
    power: float,
    final: float,
    begin: float,
    end: float,
    every: float,
    initial: float,
    total_steps: int | None,
) -> Polynomial:
    begin, end, every = plain(begin), plain(end), plain(every)
    total_steps = plain(total_steps)
    fraction = isinstance(every, float) and every > 0
    begin, end, every = (
        _steps(name, value, total_steps)
        for name, value in (("begin", begin), ("end", end), ("every", every))
    )
    if total_steps is not None and end > total_steps:
        raise ValueError(
            f"`end` must not lie beyond the run: got end={end} with total_steps="
            f"{total_steps}; the final sparsity would never be reached."
        )
    every = max(every, 1) if fraction else every
    return Polynomial(final, begin, end, every, initial, power)


def _steps(name: str, value: Any, total_steps: int | None) -> int:
    if not isinstance(value, float) or value.is_integer() and value != 1.0:
        return int(value) if isinstance(value, float) else value
    if total_steps is None:
        raise ValueError(
            f"`{name}` must be {_RUN_FRACTION}: got {value} and no `total_steps`."
        )
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be {_RUN_FRACTION}, got {value}.")
    return round(value * total_steps)
