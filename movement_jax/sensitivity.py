"""What a weight is worth by what the loss would change without it."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from movement_jax import arguments
from movement_jax import tree as _tree
from movement_jax.criteria import f32, saliency, zeros


class SensitivityMoments(NamedTuple):
    """State of :class:`Sensitivity`.

    Attributes:
      mean: running average of the sensitivity. Like params, float32.
      uncertainty: running average of how far it is off. Like params, float32.
    """

    mean: Any
    uncertainty: Any


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    r"""Sensitivity of the loss times how uncertain it is (PLATON).

    With :math:`I = |W \odot G|` of every step,
    :math:`\bar I \leftarrow \beta_1 \bar I + (1-\beta_1) I`, then
    :math:`U \leftarrow \beta_2 U + (1-\beta_2) |I - \bar I|`, both from 0, and
    :math:`S = \bar I \odot U`. It needs the raw gradients, so the transformation wraps
    the optimizer: ``movement_pruning(schedule, Sensitivity(), inner=...)``.

    Attributes:
      decay: :math:`\beta_1`, in [0, 1). Default 0.85.
      uncertainty_decay: :math:`\beta_2`, in [0, 1). Default 0.95.

    Raises:
      ValueError: if a decay is out of range.

    Examples:
      >>> import optax, movement_jax as mj
      >>> tx = mj.movement_pruning(
      ...     mj.cubic(0.9, begin=100, end=900), mj.Sensitivity(),
      ...     inner=optax.adamw(3e-5))

    References:
      Zhang et al., *PLATON: Pruning Large Transformer Models with Upper Confidence
      Bound of Weight Importance*, 2022,
      `arXiv:2206.12562 <https://arxiv.org/abs/2206.12562>`_
    """

    decay: float = 0.85
    uncertainty_decay: float = 0.95
    needs_gradients: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        arguments.make_plain(self, "decay", "uncertainty_decay")
        arguments.check_fraction("decay", self.decay)
        arguments.check_fraction("uncertainty_decay", self.uncertainty_decay)

    def init(self, params: Any) -> SensitivityMoments:
        """Zeros like ``params``, float32."""
        return SensitivityMoments(zeros(params), zeros(params))

    def update(
        self, state: SensitivityMoments, *, params: Any, grads: Any, new_params: Any
    ) -> SensitivityMoments:
        """One step of both averages, the mean first."""
        del new_params
        now = jax.tree.map(lambda w, g: jnp.abs(saliency(w, g)), params, grads)
        mean = jax.tree.map(
            lambda m, i: self.decay * m + (1 - self.decay) * i, state.mean, now
        )
        beta = self.uncertainty_decay
        uncertainty = jax.tree.map(
            lambda u, i, m: beta * u + (1 - beta) * jnp.abs(i - m),
            state.uncertainty,
            now,
            mean,
        )
        return SensitivityMoments(mean, uncertainty)

    def scores(self, state: SensitivityMoments, params: Any) -> Any:
        """Mean times uncertainty."""
        del params
        return jax.tree.map(jnp.multiply, state.mean, state.uncertainty)


@dataclasses.dataclass(frozen=True)
class Fisher:
    r"""Second-order change of the loss if the weight were zero, from Adam's own state.

    :math:`S = W^2 \odot v`, with :math:`v` the running mean of squared gradients that
    the wrapped optimizer keeps anyway: the diagonal of the empirical Fisher information
    in place of the Hessian of optimal brain damage. Keeps no state. The optimizer must
    be wrapped (``inner=``) and have a second moment: a state with a field ``nu``, as
    those of ``optax.adam``, ``adamw``, ``nadam``, ``lamb`` and ``rmsprop``, also inside
    ``chain`` and ``partition``. It takes the moment with this step's gradient in it.
    The optimizer sees no gradient of pruned weights, whose moment fades: with
    ``regrow=True`` hardly any comes back, where :class:`Sensitivity` revives many.

    Raises:
      ValueError: at ``init``, if the optimizer has no second moment of a prunable
        tensor, or more than one.

    Examples:
      >>> import jax.numpy as jnp, optax, movement_jax as mj
      >>> tx = mj.movement_pruning(0.5, mj.Fisher(), inner=optax.adam(1e-3))
      >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     _, state = tx.update({"kernel": jnp.array([[9.0, 1.0]])}, state, params)
      >>> print(state.masks["kernel"])
      [[ True False]]

    References:
      LeCun, Denker, Solla, *Optimal Brain Damage*, 1989; Theis et al., *Faster gaze
      prediction with dense networks and Fisher pruning*, 2018,
      `arXiv:1801.05787 <https://arxiv.org/abs/1801.05787>`_
    """

    needs_gradients: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    reads_optimizer: ClassVar[bool] = True

    def init(self, params: Any) -> Any:
        """No state."""
        del params
        return ()

    def update(self, state: Any, *, params: Any, grads: Any, new_params: Any) -> Any:
        """No state."""
        del params, grads, new_params
        return state

    def scores(self, state: Any, params: Any, optimizer_state: Any = None) -> Any:
        """Squared weights times their second moments, float32."""
        del state
        moments = _second_moments(params, optimizer_state)
        return jax.tree.map(lambda w, v: jnp.square(f32(w)) * f32(v), params, moments)


def _second_moments(params: Any, optimizer_state: Any) -> Any:
    """The one second moment of every prunable tensor, found by its path."""
    nodes = jax.tree.leaves(optimizer_state, is_leaf=_has_second_moment)
    # In `optax.partition` every optimizer has its own, with holes where others train.
    tables: list[dict[Any, jax.Array]] = [
        dict(_flat(node.nu)) for node in nodes if _has_second_moment(node)
    ]

    def pick(path: Any, weight: jax.Array) -> jax.Array:
        found = [table[path] for table in tables if path in table]
        if len(found) != 1:
            raise ValueError(
                "`Fisher` reads the second moment of every weight from the wrapped "
                f"optimizer, which keeps {len(found) or 'none'} of "
                f"{_tree.path_name(path)!r}. Wrap one that has it: "
                "`movement_pruning(sparsity, Fisher(), inner=optax.adamw(...))`."
            )
        return found[0]

    return jax.tree_util.tree_map_with_path(pick, params)


def _flat(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _has_second_moment(node: Any) -> bool:
    return hasattr(node, "_fields") and "nu" in node._fields
