"""Masking whole units of a model while it trains."""

from typing import Any

import jax.tree_util

from movement_jax import state as _state
from movement_jax import tree
from movement_jax.prune import apply_masks, unpack
from movement_jax.shrink.groups import Groups, Keep


def mask_units(state: Any, groups: Groups, keep: Keep) -> Any:
    """Prunes units in a train state, for ``movement_pruning`` to keep them at zero.

    Structured movement pruning is a track of scores, a choice, and this::

        tx = optax.chain(optax.adamw(3e-4), mj.movement_pruning(prunable="."))
        ...
        scores = groups.unit_scores(mj.find_state(state.opt_state).scores)
        state = mask_units(state, groups, choose(groups, scores, 0.5))

    Called again with a higher sparsity, say every 100 steps, it follows a schedule.
    What was pruned before stays pruned.

    Args:
      state: a train state or a pair, as for :func:`movement_jax.prune`.
      groups: found for ``fn(params, ...)`` with the params of the state.
      keep: units that stay.

    Returns:
      The state with the weights and the masks of all other units at zero.

    Raises:
      ValueError: if a parameter of a unit that goes is not prunable: a bias that
        training brings back would make the cut change the result.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, movement_jax as mj
      >>> from movement_jax import shrink
      >>> def model(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((3, 2)), "down": jnp.ones((2, 2))}
      >>> groups = shrink.find_groups(model, params, jnp.ones((1, 3)))
      >>> state = params, mj.movement_pruning(prunable=".").init(params)
      >>> state = shrink.mask_units(state, groups, {"up:1": jnp.array([True, False])})
      >>> print(state[0]["down"])
      [[1. 1.]
       [0. 0.]]
    """
    params, opt_state, rebuild = unpack(state)
    found = _state.find_state(opt_state)
    masks = dict(tree.named_leaves(groups.masks(keep)))
    tracked = {name for name, _ in tree.named_leaves(found.masks)}
    left = [n for n, mask in masks.items() if n not in tracked and not mask.all()]
    if left:
        raise ValueError(
            f"`keep` drops units with weights in {left[:5]}, which `movement_pruning` "
            'leaves dense: make it with `prunable="."`.'
        )

    def both(path: Any, mask: Any) -> Any:
        return mask & masks[tree.path_name(path)]

    new = jax.tree_util.tree_map_with_path(both, found.masks)
    params = apply_masks(params, new)
    new_state = found._replace(masks=new)
    return rebuild(params, _state.replace_state(opt_state, new_state))
