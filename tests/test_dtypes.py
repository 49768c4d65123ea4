"""Zeros are exact and scores do not stall, whatever the params are made of."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import movement_jax as mj

HALF = ["bfloat16", "float16"]
FLOATS = [*HALF, "float32"]


@contextlib.contextmanager
def x64():
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def make_params(dtype):
    rng = np.random.default_rng(0)
    return {"kernel": jnp.asarray(rng.normal(size=(16, 12)), dtype)}


def bits_of(array):
    width = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[array.dtype.itemsize]
    return np.asarray(jax.lax.bitcast_convert_type(array, width))


def train(tx, params, update_dtype):
    """The kernel after two steps, the second of which prunes, and the state."""
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        grads = jax.tree.map(lambda p: (0.7 * p).astype(update_dtype), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(2):
        params, opt_state = step(params, opt_state)
    return params["kernel"], mj.find_state(opt_state)


@functools.cache
def trained(dtype, update_dtype):
    tx = optax.chain(optax.scale(-0.37), mj.movement_pruning(0.5))
    return train(tx, make_params(dtype), update_dtype)


@pytest.mark.parametrize("update_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_pruned_weights_have_no_bit_set_but_the_sign(dtype, update_dtype):
    kernel, state = trained(dtype, update_dtype)
    dropped = ~np.asarray(state.masks["kernel"])
    magnitude = bits_of(jnp.abs(kernel))
    assert dropped.sum() == dropped.size // 2
    np.testing.assert_array_equal(magnitude[dropped], 0)
    assert np.all(magnitude[~dropped] != 0)


@pytest.mark.parametrize("update_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_params_keep_their_dtype(dtype, update_dtype):
    kernel, _ = trained(dtype, update_dtype)
    assert kernel.dtype == dtype


@pytest.mark.parametrize(
    "criterion",
    [mj.EmaMagnitude(), mj.Movement(), mj.Movement(optax.sgd(1.0)), mj.Taylor()],
    ids=["ema", "movement", "movement by sgd", "taylor"],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_scores_are_float32(dtype, criterion):
    tx = mj.movement_pruning(0.5, criterion, inner=optax.sgd(0.1))
    _, state = train(tx, make_params(dtype), dtype)
    floats = [
        leaf.dtype
        for leaf in jax.tree.leaves(state.scores)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert floats and set(floats) == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "criterion", [mj.Magnitude(), mj.Random()], ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_scores_made_on_the_spot_are_float32(dtype, criterion):
    scores = criterion.scores((), make_params(dtype))
    assert scores["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", HALF)
def test_a_slow_average_of_half_precision_weights_does_not_stall(dtype):
    # Kept in bfloat16, the average of constant weights of .04 stops at .0156.
    steps, weight = 3000, jnp.asarray(0.04, dtype)
    params = {"kernel": jnp.full((4, 4), weight)}
    tx = mj.movement_pruning(None, mj.EmaMagnitude(0.999))

    @jax.jit
    def score(params):
        def step(state, _):
            return tx.update(jax.tree.map(jnp.zeros_like, params), state, params)[1], _

        return jax.lax.scan(step, tx.init(params), length=steps)[0]

    want = float(weight) * (1 - 0.999**steps)
    np.testing.assert_allclose(score(params).scores["kernel"], want, rtol=1e-4)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_weights_are_ranked_by_their_float32_magnitude(dtype):
    params = make_params(dtype)
    tx = mj.movement_pruning(None, mj.Magnitude())
    pruned, _ = mj.prune((params, tx.init(params)), 0.25)
    score = np.abs(np.asarray(params["kernel"], np.float32)).ravel()
    order = np.argsort(-score, kind="stable")
    want = np.ones(score.size, bool)
    want[order[score.size - score.size // 4 :]] = False
    np.testing.assert_array_equal(np.asarray(pruned["kernel"] != 0).ravel(), want)


def test_double_precision_params_are_pruned_to_exact_zeros():
    with x64():
        kernel, state = trained("float64", "float64")
        dropped = ~np.asarray(state.masks["kernel"])
        magnitude = bits_of(jnp.abs(kernel))
    assert kernel.dtype == jnp.float64
    np.testing.assert_array_equal(magnitude == 0, dropped)


def test_double_precision_changes_no_dtype_of_the_state():
    with x64():
        params = make_params("float64")
        tx = mj.movement_pruning(
            mj.cubic(0.5, begin=1, end=3),
            mj.Movement(),
            inner=optax.sgd(0.1, momentum=0.9),
            track_start=True,
            track_noise=True,
        )
        before = tx.init(params)
        _, after = jax.eval_shape(tx.update, params, before, params)
        types = [
            [(x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
            for tree in (jax.eval_shape(tx.init, params), after)
        ]
        assert types[0] == types[1]
        assert before.scores.values["kernel"].dtype == jnp.float32
