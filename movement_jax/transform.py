"""The optax transformation: how a training step scores weights and keeps masks true."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from movement_jax import (
    arguments,
    counting,
    exchange,
    masking,
    packing,
    position,
    schedules,
    scoring,
)
from movement_jax import structure as _structure
from movement_jax import tree as _tree
from movement_jax.allocation import Allocation, ErdosRenyi, Uniform
from movement_jax.criteria import Criterion, EmaMagnitude
from movement_jax.state import (
    Events,
    MovementState,
    PruningConfig,
    scores_of,
    tensors_in,
)
from movement_jax.structure import Structure, Unstructured
from movement_jax.units import HasUnits, Units


def movement_pruning(
    sparsity: optax.ScalarOrSchedule | None = None,
    criterion: Criterion = EmaMagnitude(),
    *,
    allocation: Allocation = Uniform(),
    structure: Structure | Mapping[str, Structure] | Units | HasUnits = Unstructured(),
    prunable: Any = None,
    stacked: str | None = None,
    regrow: bool = False,
    inner: optax.GradientTransformation | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    check_finite: bool = True,
    pack_masks: bool = False,
    track_start: bool = False,
    track_noise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scores every weight at every step, and keeps pruned weights at zero.

    Goes last in a chain, or around an optimizer with ``inner=``. It rewrites the
    update of a pruned weight :math:`w` to :math:`-w`, so that ``apply_updates`` gives
    exactly 0.0 whatever momentum and weight decay do, also of one that something else
    brought back to life. If what follows it in a chain undoes that, it notices
    soon, counts it in ``events.undone`` and makes up for it: an optimizer that
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
        :class:`movement_jax.Stepwise` to change masks every few steps only). None
        too for :class:`movement_jax.SoftMovement`, which decides by itself.
      criterion: what a weight is worth.
      allocation: how the target is spread over tensors.
      structure: what is kept or dropped together: single weights,
        :class:`movement_jax.Block`, :class:`movement_jax.Axis` or
        :class:`movement_jax.NM`, or a mapping of regular expressions to these. The
        first that is found in the ``/``-joined path wins; where none is, weights are
        single. Sparsity then counts the groups of each tensor. Or whole heads, neurons
        and channels: the groups of :func:`movement_jax.shrink.find_groups`, of which
        sparsity counts the units, in all tensors that they span.
      prunable: which leaves: None for kernels and weight matrices (with groups as
        ``structure``: for the leaves that these span, biases too), a regular
        expression searched for in the ``/``-joined path, or a tree of bools like
        params or a prefix of it.
      stacked: regular expression for the paths of scan-stacked kernels
        ``(layers, in, out)``, whose layers are ranked separately.
      regrow: keep pruned weights at their dense value, so that they can come back.
        Then evaluate and differentiate the model at
        :func:`movement_jax.effective_params`.
      inner: optimizer to wrap, for criteria that need raw gradients, or reset what the
        optimizer remembers of a weight.
      axis_name: inside ``shard_map`` or ``pmap``, the mesh axes that params are split
        over. Counts are then summed over them, and of tied scores those on earlier
        devices are kept. Not needed under ``jit``, whatever the sharding.
      check_finite: look at all updates (and gradients) before each step, so that a bad
        step changes no score and no mask. False saves the optimizer the trip through
        memory that this takes; then only the scores that would not be finite stay as
        they were. Do so inside ``optax.apply_if_finite``, which checks by itself.
      pack_masks: keep one bit per weight and not one byte, for tensors with an axis
        that 32 divides. Masks are the same; :func:`movement_jax.find_state` shows them
        as bools, and what is saved, sharded or donated is their words.
      track_start: keep a copy of the initial weights, for
        :func:`movement_jax.health` to report how far training moved.
      track_noise: keep a running mean of every weight (float32), for
        :func:`movement_jax.health` to report the signal-to-noise ratio.

    Returns:
      A transformation whose ``update`` requires ``params``. Its state is a
      :class:`MovementState`.

    Raises:
      ValueError: if the criterion needs an ``inner`` and there is none, if
        ``sparsity`` is out of range or beyond what an N:M pattern reaches, or, at
        ``init``, if nothing is prunable or the structure does not fit a tensor.

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
    _check_arguments(sparsity, criterion, allocation, inner, regrow)
    if axis_name and structure != Unstructured():
        raise ValueError(
            "A `structure` groups weights of whole tensors, which `axis_name` splits. "
            "Use one of them, or `jit` with sharded params, which needs no `axis_name`."
        )
    if axis_name and track_noise:
        raise ValueError(
            "`track_noise` averages over whole tensors, which `axis_name` splits. Use "
            "one of them, or `jit` with sharded params, which needs no `axis_name`."
        )
    if axis_name and getattr(criterion, "whole_tensors", False):
        raise ValueError(
            f"`{type(criterion).__name__}` looks at whole tensors, which `axis_name` "
            "splits. Use another criterion, or `jit` with sharded params, which needs "
            "no `axis_name`."
        )
    config = PruningConfig(
        criterion=criterion,
        allocation=allocation,
        regrow=regrow,
        stacked=stacked,
        prunable=prunable if isinstance(prunable, str) else None,
        axis_name=(axis_name,) if isinstance(axis_name, str) else axis_name or (),
        structure=_structure.checked(structure),
    )
    masking.check_decider(config)
    exchange.check_structure(config)
    _check_units(config)
    highest = _highest(sparsity)
    masking.check_reach(config, None, highest)
    wrapped = optax.with_extra_args_support(inner or optax.identity())

    # optax's own type of a state has no place for the static `config`: hence Any.
    def init_fn(params: optax.Params) -> Any:
        chosen = prunable
        if prunable is None and isinstance(config.structure, Units):
            chosen = config.structure.pattern
        weights, groups = _tree.select(params, chosen), []
        if jax.tree.leaves(weights):
            _check_stacked(stacked, weights)
            tensors = tensors_in(weights, stacked, config.axis_name)
            _structure.check(config.structure, tensors)
            counted = _structure.ranked_groups(config.structure, tensors, windows=True)
            allocation.check(counted)
            masking.check_reach(config, tensors, highest)
            groups = _structure.ranked_groups(config.structure, tensors)
        masks = jax.tree.map(lambda w: jnp.ones_like(w, dtype=bool), weights)
        state = MovementState(
            step=jnp.zeros([], jnp.int32),
            scores=criterion.init(weights),
            masks=packing.pack(masks) if pack_masks else masks,
            thresholds=jnp.full(
                sum(group.segments for group in groups), counting.NO_KEY, jnp.int32
            ),
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
            tracked=scoring.start_tracking(weights, track_start, track_noise),
            config=config,
            inner_state=wrapped.init(params),
        )
        if getattr(criterion, "reads_optimizer", False):
            jax.eval_shape(scores_of, state, weights)  # says now what it misses
        return state

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
        carried = state.masks  # as they are kept from step to step
        state = state._replace(masks=packing.unpack(carried))
        weights = _tree.punch(state.masks, params, "params")
        grads = None if inner is None else _tree.punch(state.masks, updates, "updates")
        axes = state.config.axis_name
        finite = _all_finite(updates, axes) if check_finite else jnp.bool_(True)
        if inner is not None:
            updates = _keep(state.masks, updates)
        updates, inner_state = wrapped.update(
            updates, state.inner_state, params, **extra_args
        )
        if inner is not None and check_finite:
            finite &= _all_finite(updates, axes)
        _tree.punch(state.masks, updates, "updates")
        state = state._replace(inner_state=inner_state)

        if state.config.finalized:
            updates = position.project(state, updates, params)
            return updates, state._replace(masks=carried)

        alive = None
        if not state.config.regrow:
            state, alive = position.look(state, weights)
        state = scoring.score_entering(state, weights, finite)
        if alive is not None:
            state, carried = masking.on_schedule(
                state, carried, weights, sparsity, finite, alive
            )
            state, carried, updates = exchange.on_schedule(
                state, carried, updates, params, weights, grads, wrapped, finite, alive
            )
            state = scoring.score_turned(state, weights, finite)
            updates = position.project(state, updates, params)
        else:
            updates = _keep(state.masks, updates)
        new_weights = _apply(state, params, updates)
        state = scoring.score(state, weights, grads, new_weights, finite)
        if state.config.regrow:
            state, carried = masking.on_schedule(
                state, carried, new_weights, sparsity, finite
            )
        return updates, state._replace(masks=carried)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _keep(masks: Any, updates: Any) -> Any:
    """Updates that leave pruned weights where they are."""

    def keep(mask: Any, update: Any) -> Any:
        if _tree.is_hole(mask):
            return update
        return jnp.where(mask, update, jnp.zeros_like(update))

    return jax.tree.map(keep, masks, updates, is_leaf=_tree.is_hole)


def _apply(state: MovementState, params: Any, updates: Any) -> Any:
    """The prunable weights after the update, as ``optax.apply_updates`` makes them."""

    def add(mask: Any, param: Any, update: Any) -> Any:
        return mask if _tree.is_hole(mask) else (param + update).astype(param.dtype)

    return jax.tree.map(add, state.masks, params, updates, is_leaf=_tree.is_hole)


def _all_finite(tree: Any, axis_name: tuple[str, ...]) -> jax.Array:
    finite = []
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(getattr(leaf, "dtype", float), jnp.inexact):
            here = jnp.all(jnp.isfinite(leaf))
            if axes := counting.split_axes(leaf, axis_name):
                here = counting.sum_over((~here).astype(jnp.int32), axes) == 0
            finite.append(here)
    if not finite:
        all_finite: jax.Array = jnp.bool_(True)
        return all_finite
    # Two reductions at once, where XLA would compute one as a chain for every leaf.
    verdicts = jnp.stack(finite)
    return ~counting.anywhere([~verdicts, verdicts])[0]


def _check_arguments(
    sparsity: Any, criterion: Any, allocation: Any, inner: Any, regrow: bool
) -> None:
    if _is_array(sparsity) and not isinstance(sparsity, jax.core.Tracer):
        sparsity = np.asarray(sparsity).item()
    if sparsity is not None and not callable(sparsity) and not _is_array(sparsity):
        schedules.check_sparsity("sparsity", sparsity)
    for name, value, method, example in (
        ("criterion", criterion, "scores", "EmaMagnitude()"),
        ("allocation", allocation, "n_drop", "Uniform()"),
    ):
        if isinstance(value, type) or not hasattr(value, method):
            raise TypeError(
                f"`{name}` must be an object with a method `{method}`, such as "
                f"`{example}`, got {value!r}."
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
        masking.check_emptying(allocation)
    if inner is not None and not hasattr(inner, "update"):
        raise TypeError(
            f"`inner` must be an optax optimizer, got {inner!r}. For example "
            "`movement_pruning(..., inner=optax.adamw(3e-4))`."
        )
    name = type(criterion).__name__
    if hasattr(criterion, "target") and sparsity is not None:
        raise ValueError(
            f"`{name}` decides by itself how much is dropped, and when: leave out "
            f"`sparsity`, got {sparsity!r}, and give it to the criterion, as in "
            f"`movement_pruning(criterion={name}(target_sparsity=...), ...)`."
        )
    if hasattr(criterion, "target") and not regrow:
        raise ValueError(
            f"`{name}` lets weights cross its threshold both ways: call "
            f"`movement_pruning(criterion={name}(...), inner=optax.adamw(...), "
            "regrow=True)`."
        )
    exchange.check(criterion, inner, regrow)
    needs_gradients = getattr(criterion, "needs_gradients", False)
    if inner is None and needs_gradients:
        raise ValueError(
            f"`{name}` needs the raw gradients, which a transformation at the end of a "
            "chain does not see. Wrap the optimizer instead: "
            f"`movement_pruning(sparsity, {name}(), inner=optax.adamw(...))`."
        )

    if needs_gradients and scoring.score_every(criterion) != 1:
        raise ValueError(
            f"`{name}` needs the gradient of every step, each of which tells another "
            "thing, and takes no `score_every`. `EmaMagnitude(score_every=10)` does."
        )


def _check_units(config: PruningConfig) -> None:
    if not isinstance(config.structure, Units):
        return
    if isinstance(config.allocation, ErdosRenyi):
        raise ValueError(
            "`ErdosRenyi()` reads the shapes of tensors, which the units of a model "
            "span: use `Uniform()`, `Global()` or `PerPath({'name of a group': 0.5})`."
        )
    if config.stacked is not None:
        raise ValueError(
            "`stacked` ranks the layers of a tensor one by one, but the units of "
            "`structure` are the same in all layers of a scan: leave it out, got "
            f"stacked={config.stacked!r}."
        )


def _highest(sparsity: Any) -> Any:
    """The sparsity that is asked for in the end, a number as far as that is known."""
    final = getattr(sparsity, "final", getattr(sparsity, "schedule", sparsity))
    if _is_array(final) and not isinstance(final, jax.core.Tracer):
        return np.asarray(final).item()
    return final


def _check_stacked(stacked: str | None, weights: Any) -> None:
    if stacked is None:
        return
    arguments.compiled("stacked", stacked)
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
