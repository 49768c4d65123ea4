"""Rules for primitives that are not JAX's own."""

from movement_jax.shrink import flows, rewriting, rules, zero_rules


def register_rule(
    primitive: str,
    *,
    dims: rules.DimsRule,
    zero_flow: flows.ZeroRule | None = None,
    rewrite: rewriting.Emit | None = None,
) -> None:
    """Teaches :func:`movement_jax.shrink.find_groups` a primitive.

    Without a rule, all axes of a primitive (a kernel of Pallas, a foreign function) are
    pinned.

    Args:
      primitive: its name in the jaxpr.
      dims: ``(site, layouts of the operands) -> layouts of the results``: one layout
        an axis. ``site.unify(a, b)`` equates axes and ``site.pin(a, reason)`` pins one;
        ``site.params`` are the params of the equation and ``site.shapes`` the shapes of
        its results.
      zero_flow: ``(exactness, site, flows, before, after) -> flows``, what is known
        of zeros in the results. None: nothing, and axes that disappear make their group
        inexact.
      rewrite: ``(cutter, site, values, before, after) -> values`` runs it on arrays
        that have been cut. None: as it was, right if its params mention no shape.

    Raises:
      ValueError: if there is a rule for the primitive.

    Examples:
      >>> from movement_jax import shrink
      >>> from movement_jax.shrink import rules
      >>> shrink.register_rule("my_scaled_tanh", dims=rules.elementwise)
    """
    if primitive in rules.RULES:
        raise ValueError(
            f"`primitive`={primitive!r} has a rule already. Register a rule once, and "
            "under a name that is no primitive of JAX."
        )
    rules.RULES[primitive] = dims
    if zero_flow is not None:
        zero_rules.RULES[primitive] = zero_flow
    if rewrite is not None:
        rewriting.EMITS[primitive] = rewrite
