"""Every model of the zoo: its groups by name, and masked equal to shrunk."""

import expected
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from movement_jax import shrink

SLOW = {"cnn", "linen_transformer", "linen_scan_remat", "unet"}


@pytest.fixture(autouse=True)
def _float64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def half(group, rng):
    keep = np.zeros(group.size, bool)
    keep[rng.permutation(group.size)[: max(1, group.size // 2)]] = True
    return keep


def compare(fn, params, groups, keep, inputs):
    """By hand: masks on the dense model, and the cut; not by `verify`."""
    masks = groups.masks(keep)
    masked = jax.tree.map(lambda x, m: jnp.where(m, x, 0), params, masks)
    plan = groups.plan(keep)
    got = jax.jit(shrink.shrunk(fn, plan))(plan.shrink(params), *inputs)
    for a, b in zip(
        jax.tree.leaves(jax.jit(fn)(masked, *inputs)), jax.tree.leaves(got)
    ):
        tolerance = 1e-10 if a.dtype == jnp.float64 else 1e-4
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * np.abs(a).max())
    return plan


@pytest.mark.parametrize("name", zoo.MODELS)
def test_groups_are_the_expected_and_cut_together_exactly(name):
    fn, params, inputs = zoo.MODELS[name]()
    groups = shrink.find_groups(fn, params, *inputs)
    by_status = {"prunable": {}, "inexact": {}, "pinned": {}}
    for group in groups.groups:
        by_status[group.status][group.name] = group.size
    assert by_status["prunable"] == expected.PRUNABLE[name]
    assert set(by_status["inexact"]) == expected.INEXACT.get(name, set())
    rng = np.random.default_rng(0)
    keep = {group.name: half(group, rng) for group in groups.prunable}
    plan = compare(fn, params, groups, keep, inputs)
    summary = plan.summary()
    assert summary.after == sum(x.size for x in jax.tree.leaves(plan.shrink(params)))
    assert summary.after < summary.before


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in zoo.MODELS],
)
def test_each_group_alone_is_cut_exactly(name):
    fn, params, inputs = zoo.MODELS[name]()
    groups = shrink.find_groups(fn, params, *inputs)
    rng = np.random.default_rng(1)
    for group in groups.prunable:
        compare(fn, params, groups, {group.name: half(group, rng)}, inputs)


@pytest.mark.parametrize("name", expected.INEXACT)
def test_inexact_groups_would_change_the_result(name):
    fn, params, inputs = zoo.MODELS[name]()
    groups = shrink.find_groups(fn, params, *inputs)
    for group in expected.INEXACT[name]:
        keep = {group: half(groups[group], np.random.default_rng(0))}
        with pytest.raises(ValueError, match="inexact"):
            groups.plan(keep)
        plan = groups.plan(keep, allow_inexact=True)
        with pytest.raises(ValueError, match="not the masked one"):
            shrink.verify(fn, params, plan, *inputs)


@pytest.mark.parametrize(
    "name", ["mlp", "gqa_decoder_scan", "own_derivatives", "mamba"]
)
def test_gradients_are_those_of_the_masked_model(name):
    fn, params, inputs = zoo.MODELS[name]()
    groups = shrink.find_groups(fn, params, *inputs)
    rng = np.random.default_rng(2)
    plan = groups.plan({group.name: half(group, rng) for group in groups.prunable})

    def loss(params, *inputs):
        return (fn(params, *inputs) ** 2).mean()

    def small_loss(params, *inputs):
        return (shrink.shrunk(fn, plan)(params, *inputs) ** 2).mean()

    want = plan.shrink(jax.jit(jax.grad(loss))(plan.mask(params), *inputs))
    small = plan.shrink(params)
    inside = jax.jit(shrink.shrunk(jax.grad(loss), plan))(small, *inputs)
    through = jax.jit(jax.grad(small_loss))(small, *inputs)
    for got in (inside, through):
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
            np.testing.assert_allclose(
                b, a, rtol=0, atol=1e-10 * np.abs(a).max() + 1e-13
            )


def test_gradients_of_grouped_convolutions():
    fn, params, inputs = zoo.squeeze_excite()
    groups = shrink.find_groups(fn, params, *inputs)
    rng = np.random.default_rng(2)
    plan = groups.plan({group.name: half(group, rng) for group in groups.prunable})

    def loss(params, x):
        return (fn(params, x) ** 2).sum()

    want = plan.shrink(jax.jit(jax.grad(loss))(plan.mask(params), *inputs))
    got = jax.jit(shrink.shrunk(jax.grad(loss), plan))(plan.shrink(params), *inputs)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-10 * np.abs(a).max() + 1e-13)


@pytest.mark.parametrize("name", ["gqa_decoder", "linen_scan_remat"])
def test_other_batch_sizes_and_lengths(name):
    fn, params, _ = zoo.MODELS[name]()
    groups = shrink.find_groups(fn, params, zoo.tokens(2, 5))
    rng = np.random.default_rng(3)
    keep = {group.name: half(group, rng) for group in groups.prunable}
    compare(fn, params, groups, keep, [zoo.tokens(3, 9, seed=1)])
