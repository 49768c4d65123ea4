"""From masks to a smaller, faster model: coupled dimensions, and the exact cut.

``find_groups`` reads the jaxpr of any pure function and finds which slices of which
parameters go together; ``choose`` picks units by score; ``shrunk`` runs the same
function on what is left.
"""

from movement_jax.shrink.choosing import choose
from movement_jax.shrink.groups import Group, Groups, Member, find_groups
from movement_jax.shrink.plan import Plan, PlanSummary
from movement_jax.shrink.registry import register_rule
from movement_jax.shrink.shrinking import Verified, shrunk, verify
from movement_jax.shrink.training import mask_units

__all__ = [
    "Group",
    "Groups",
    "Member",
    "Plan",
    "PlanSummary",
    "Verified",
    "choose",
    "find_groups",
    "mask_units",
    "register_rule",
    "shrunk",
    "verify",
]
