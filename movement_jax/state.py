"""What is carried from step to step, and how it is found inside any optimizer state."""

import dataclasses
import re
from typing import Any, NamedTuple

import jax

from movement_jax import counting, packing
from movement_jax import tree as _tree
from movement_jax.allocation import Allocation
from movement_jax.criteria import Criterion
from movement_jax.structure import Rules, Structure, Unstructured
from movement_jax.units import Units

# These optimizers evaluate the model at other weights than those they step from.
_OTHER_PARAMS = {"ScheduleFreeState": "schedule_free", "MechanicState": "mechanize"}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PruningConfig:
    """What a :class:`MovementState` was made with; static, without arrays.

    ``flax.serialization`` has to be told once that there is nothing in it to save:
    ``register_serialization_state(PruningConfig, lambda c: {}, lambda c, _: c)``.

    Attributes:
      criterion: what a weight is worth.
      allocation: how the target is spread over tensors.
      regrow: whether pruned weights keep their dense value and may come back.
      stacked: regular expression for paths whose leading axis indexes layers.
      prunable: the regular expression that selected the tensors, if one was given.
      structure: what is kept or dropped together; pairs of pattern and structure if it
        was given as a mapping.
      finalized: whether :func:`movement_jax.finalize` has fixed the masks.
      axis_name: manual mesh axes that tensors are split over.
    """

    criterion: Criterion
    allocation: Allocation
    regrow: bool = False
    stacked: str | None = None
    prunable: str | None = None
    finalized: bool = False
    axis_name: tuple[str, ...] = ()
    structure: Structure | Rules | Units = Unstructured()


TURNED = 1  # of Events.turned: an optimizer follows


class Events(NamedTuple):
    """What happened along the way, for :func:`movement_jax.health` and loggers.

    Attributes:
      skipped: steps left out because gradients or updates were not finite. Shape
        ``()``, int32.
      refused: mask changes refused because the sparsity asked for was NaN or outside
        [0, 1], or nothing was scored. Shape ``()``, int32.
      changes: times the masks changed. Shape ``()``, int32.
      churn: fraction of the weights whose mask flipped at the last change beyond what
        the change of sparsity explains. 0 unless ``regrow``, or the criterion lets
        weights grow. Shape ``()``, float32.
      undone: times that pruned weights were alive again after an update had sent them
        to zero, because something follows in the chain. Shape ``()``, int32.
      alive: sum of the magnitudes of pruned weights when they were first seen alive;
        0 while they are zero, infinite after a mask change. Shape ``()``, float32.
      turned: 0 while pruned weights are sent to zero, ``TURNED`` after an optimizer was
        found to follow, 2 if that was wrong: as 0, for good. Shape ``()``, int32.
    """

    skipped: jax.Array
    refused: jax.Array
    changes: jax.Array
    churn: jax.Array
    undone: jax.Array
    alive: jax.Array
    turned: jax.Array


class Tracked(NamedTuple):
    """Extra measurements, opted in because they cost memory; ``()`` where not.

    Attributes:
      start: the weights at ``init``. Like params.
      mean: running average of the weights. Like params, float32.
      variance: running average per tensor of the mean square deviation from ``mean``
        of the weights that are kept, before bias correction. Shapes ``()``, float32.
    """

    start: Any = ()
    mean: Any = ()
    variance: Any = ()


class MovementState(NamedTuple):
    """State of :func:`movement_jax.movement_pruning`.

    Trees have ``optax.MaskedNode`` in place of leaves that stay dense.

    Attributes:
      step: optimizer steps scored so far; bad steps do not count. Shape ``()``, int32.
      scores: state of the criterion; for most, a tree like params in float32.
      masks: True where a weight is kept. Like params, bool; with ``pack_masks=True``
        bits of uint32, which :func:`find_state` unpacks.
      thresholds: where each ranking found its threshold, for the next one to start
        from; keys of :mod:`movement_jax.counting`. Shape ``(rankings,)``, int32.
      sparsity: fraction asked for at the last mask change, which an N:M pattern may
        fall short of (:func:`movement_jax.sparsity_of` tells what was reached); where
        none is, because what lies below a threshold goes, the fraction that went.
        Shape ``()``, float32.
      events: what happened along the way.
      tracked: extra measurements.
      config: what the transformation was made with; no arrays.
      inner_state: state of the wrapped optimizer, or ``optax.EmptyState()``.
    """

    step: jax.Array
    scores: Any
    masks: Any
    thresholds: jax.Array
    sparsity: jax.Array
    events: Events
    tracked: Tracked
    config: PruningConfig
    inner_state: Any


def find_state(opt_state: Any) -> MovementState:
    """Finds the one :class:`MovementState` inside an optimizer state.

    It is found through ``optax.chain``, ``named_chain``, ``partition``, ``masked``,
    ``inject_hyperparams``, ``apply_if_finite``, ``MultiSteps`` and other wrappers whose
    state is a pytree; not through ``optax.flatten``, which drops the paths.

    Args:
      opt_state: an optimizer state, or a tree that holds one.

    Returns:
      That state, with masks that are bools.

    Raises:
      ValueError: if there is none, or more than one.

    Examples:
      >>> import jax.numpy as jnp, optax, movement_jax as mj
      >>> tx = optax.chain(optax.adam(1e-3), mj.movement_pruning())
      >>> state = mj.find_state(tx.init({"kernel": jnp.ones((2, 2))}))
      >>> print(state.step)
      0
    """
    return shown(find_stored(opt_state))


def find_stored(opt_state: Any) -> MovementState:
    """The same, with masks as they are kept: packed, if they are."""
    found = _states_in(opt_state)
    found += [y for x in found for y in _states_in(x.inner_state)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"Found {len(found)} `movement_pruning` states in the optimizer state. Use "
            "one `movement_pruning` for the whole model: `prunable=` says what it "
            "prunes, and `allocation=PerPath({...})` gives parts their own sparsity."
        )
    raise ValueError(
        "Found no `movement_pruning` state in the optimizer state. Make the optimizer "
        "with `optax.chain(optax.adamw(...), movement_pruning())`. (`optax.flatten` "
        "hides it; put `movement_pruning` outside of it.)"
    )


def replace_state(opt_state: Any, new: MovementState) -> Any:
    """Returns ``opt_state`` with its :class:`MovementState` replaced by ``new``."""

    def replaced(old: Any) -> Any:
        if not is_state(old):
            return old
        return new._replace(masks=packing.like(old.masks, new.masks))

    return jax.tree.map(replaced, opt_state, is_leaf=is_state)


def check_trained_params(opt_state: Any) -> None:
    """Refuses optimizers that step other params than the ones they show."""

    def visit(node: Any) -> bool:
        name = _OTHER_PARAMS.get(type(node).__name__)
        if name:
            raise ValueError(
                f"`optax.contrib.{name}` keeps the weights it trains in its own state, "
                "and masking the params it shows would not last. Prune without it."
            )
        return False

    jax.tree.leaves(opt_state, is_leaf=visit)


def scores_of(state: MovementState, weights: Any) -> Any:
    """The scores that a state ranks its weights by.

    Args:
      state: as carried by the optimizer.
      weights: params with holes like ``state.masks``.
    """
    criterion: Any = state.config.criterion
    if getattr(criterion, "reads_optimizer", False):
        return criterion.scores(
            state.scores, weights, optimizer_state=state.inner_state
        )
    return criterion.scores(state.scores, weights)


def tensors_of(state: MovementState) -> list[counting.Tensor]:
    """The tensors that a state prunes, in flatten order."""
    return tensors_in(state.masks, state.config.stacked, state.config.axis_name)


def tensors_in(
    tree: Any, stacked: str | None, axis_name: tuple[str, ...] = ()
) -> list[counting.Tensor]:
    """The tensors of a tree with holes, in flatten order."""
    return [
        counting.Tensor(
            name,
            tuple(leaf.shape),
            int(stacked is not None and re.search(stacked, name) is not None),
            axes=counting.split_axes(leaf, axis_name),
        )
        for name, leaf in _tree.named_leaves(tree)
    ]


def is_state(node: Any) -> bool:
    """True for the state of ``movement_pruning``."""
    return isinstance(node, MovementState)


def shown(state: MovementState) -> MovementState:
    """The same state with masks that are bools."""
    if not packing.has_packed(state.masks):
        return state
    return state._replace(masks=packing.unpack(state.masks))


def _states_in(tree: Any) -> list[MovementState]:
    leaves = jax.tree.leaves(tree, is_leaf=is_state)
    return [x for x in leaves if isinstance(x, MovementState)]
