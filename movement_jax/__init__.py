"""Movement pruning for JAX: scores carried in the training state, masks kept true."""

from movement_jax import checkpoint, plot
from movement_jax.agreement import Agreement, Disputed, TensorAgreement, agreement
from movement_jax.allocation import Allocation, ErdosRenyi, Global, PerPath, Uniform
from movement_jax.counting import Tensor
from movement_jax.criteria import (
    Criterion,
    EmaMagnitude,
    Magnitude,
    Movement,
    MovementScores,
    Random,
    Taylor,
)
from movement_jax.dynamics import (
    Dormancy,
    MagnitudeMoments,
    PeakMagnitude,
    UpperConfidence,
)
from movement_jax.findings import Finding, Health, TensorHealth
from movement_jax.fingerprint import assert_same_everywhere, fingerprint
from movement_jax.growth import SET, GrowthState, RigL
from movement_jax.health import health
from movement_jax.prune import (
    apply_masks,
    effective_params,
    finalize,
    metrics,
    prune,
    sparsity_of,
)
from movement_jax.report import Summary, TensorSummary, summary
from movement_jax.rounding import RoundedScores
from movement_jax.schedules import Polynomial, Stepwise, cubic, linear, one_shot
from movement_jax.selection import keep_top
from movement_jax.sensitivity import Fisher, Sensitivity, SensitivityMoments
from movement_jax.soft import SoftMovement, SoftScores
from movement_jax.state import Events, MovementState, PruningConfig, Tracked, find_state
from movement_jax.stepdirs import CheckpointError
from movement_jax.structure import NM, Axis, Block, Unstructured
from movement_jax.transform import movement_pruning

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "Allocation",
    "Axis",
    "Block",
    "CheckpointError",
    "Criterion",
    "Disputed",
    "Dormancy",
    "EmaMagnitude",
    "ErdosRenyi",
    "Events",
    "Finding",
    "Fisher",
    "Global",
    "GrowthState",
    "Health",
    "Magnitude",
    "MagnitudeMoments",
    "Movement",
    "MovementScores",
    "MovementState",
    "NM",
    "PeakMagnitude",
    "PerPath",
    "Polynomial",
    "PruningConfig",
    "Random",
    "RigL",
    "RoundedScores",
    "SET",
    "Sensitivity",
    "SensitivityMoments",
    "SoftMovement",
    "SoftScores",
    "Stepwise",
    "Summary",
    "Taylor",
    "Tensor",
    "TensorAgreement",
    "TensorHealth",
    "TensorSummary",
    "Tracked",
    "Uniform",
    "Unstructured",
    "UpperConfidence",
    "agreement",
    "apply_masks",
    "assert_same_everywhere",
    "checkpoint",
    "cubic",
    "effective_params",
    "finalize",
    "find_state",
    "fingerprint",
    "health",
    "keep_top",
    "linear",
    "metrics",
    "movement_pruning",
    "one_shot",
    "plot",
    "prune",
    "sparsity_of",
    "summary",
]
