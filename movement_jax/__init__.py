"""Movement pruning for JAX: scores carried in the training state, masks kept true."""

from movement_jax.allocation import Allocation, ErdosRenyi, Global, PerPath, Uniform
from movement_jax.criteria import (
    Criterion,
    EmaMagnitude,
    Magnitude,
    Movement,
    MovementScores,
    Random,
    Taylor,
)
from movement_jax.prune import (
    apply_masks,
    effective_params,
    finalize,
    metrics,
    prune,
    sparsity_of,
)
from movement_jax.schedules import Polynomial, Stepwise, cubic, linear, one_shot
from movement_jax.selection import Tensor, keep_top
from movement_jax.state import Events, MovementState, PruningConfig, Tracked, find_state
from movement_jax.transform import movement_pruning

__version__ = "0.1.0"

__all__ = [
    "Allocation",
    "Criterion",
    "EmaMagnitude",
    "ErdosRenyi",
    "Events",
    "Global",
    "Magnitude",
    "Movement",
    "MovementScores",
    "MovementState",
    "PerPath",
    "Polynomial",
    "PruningConfig",
    "Random",
    "Stepwise",
    "Taylor",
    "Tensor",
    "Tracked",
    "Uniform",
    "apply_masks",
    "cubic",
    "effective_params",
    "finalize",
    "find_state",
    "keep_top",
    "linear",
    "metrics",
    "movement_pruning",
    "one_shot",
    "prune",
    "sparsity_of",
]
