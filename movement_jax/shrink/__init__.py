"""From masks to a smaller, faster model: coupled dimensions, and the exact cut.

``find_groups`` reads the jaxpr of any pure function and finds which slices of which
parameters go together; ``movement_pruning(structure=groups)`` prunes them whole;
``choose`` picks units by score; ``cut`` checks and gives the small params and function.
"""

from movement_jax.shrink.choosing import choose
from movement_jax.shrink.finding import find_groups
from movement_jax.shrink.groups import Group, Groups, Member
from movement_jax.shrink.plan import Plan, PlanSummary
from movement_jax.shrink.registry import register_rule
from movement_jax.shrink.shrinking import Verified, cut, shrunk, verify
from movement_jax.units import Units

__all__ = [
    "Group",
    "Groups",
    "Member",
    "Plan",
    "PlanSummary",
    "Units",
    "Verified",
    "choose",
    "cut",
    "find_groups",
    "register_rule",
    "shrunk",
    "verify",
]
