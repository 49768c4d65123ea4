"""Soft movement pruning, against NumPy and on the way to its target."""

import functools
import gzip
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import PARAMS, AdamByHand, gradients, kernels, train

import movement_jax as mj

DIGITS = pathlib.Path(__file__).parents[2] / "shared" / "data" / "mnist10k"
LOGIT = np.log(0.1 / 0.9)
SIZE = sum(w.size for w in kernels(PARAMS))
TARGETS = [0.5, 0.8, 0.9, 0.95, 0.97]


def soft(inner=None, **options):
    return mj.movement_pruning(
        criterion=mj.SoftMovement(**options), inner=inner or optax.sgd(0.5), regrow=True
    )


def cubic(t, final, begin=5, end=40):
    return final * (1 - (1 - np.clip((t - begin) / (end - begin), 0, 1)) ** 3)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slope(x):
    return sigmoid(x) * (1 - sigmoid(x))


def by_hand(constrain=None, penalty=0.0, start=None):
    """The method in NumPy: weights, scores and masks after each of 50 steps."""
    weights = kernels(PARAMS)
    scores = [np.zeros_like(w) for w in weights] if start is None else start
    masks = [np.ones(w.shape, bool) for w in weights]
    adam = AdamByHand(weights)
    for t in range(1, 51):
        grads = gradients([m * w for m, w in zip(masks, weights)])
        push = cubic(t, 0.45) / 0.45 * penalty / len(weights)
        moves = adam(
            [
                w * g + push * slope(s) / s.size
                for w, g, s in zip(weights, grads, scores)
            ]
        )
        weights = [w - 0.5 * m * g for w, m, g in zip(weights, masks, grads)]
        scores = [s + d for s, d in zip(scores, moves)]
        if constrain is None:
            tau = cubic(t, 0.45)
            margins = [sigmoid(s) - tau for s in scores]
        else:
            scores = constrain(scores, t)
            margins = [s - LOGIT for s in scores]
        if t > 5 or constrain is None:  # at step 5 a schedule begins with 0
            masks = [m > 0 for m in margins]
        yield weights, scores, masks, margins


def compare(tx, reference):
    """Runs both; the masks of every step, by hand."""
    history = []
    for (params, state), want in zip(train(tx), reference, strict=True):
        weights, scores, masks, margins = want
        for i in range(2):
            np.testing.assert_allclose(kernels(params)[i], weights[i], atol=1e-5)
            got = kernels(state.scores.values)[i]
            np.testing.assert_allclose(got, scores[i], atol=1e-5)
            clear = np.abs(margins[i]) > 1e-5  # not at the threshold itself
            assert np.sum(~clear) <= 1
            np.testing.assert_array_equal(
                kernels(state.masks)[i][clear], masks[i][clear]
            )
        history.append(np.concatenate([m.ravel() for m in masks]))
    return np.array(history)


def test_the_papers_form_equals_numpy_over_fifty_steps():
    # A high threshold, which the scores come to in so few steps.
    tx = soft(penalty=2.0, threshold=mj.cubic(0.45, begin=5, end=40))
    masks = compare(tx, by_hand(penalty=2.0))
    assert masks[:6].all()
    assert 0.1 < masks[-1].mean() < 0.9
    assert np.any(masks[1:] > masks[:-1])  # some came back


def test_the_penalty_for_a_target_equals_numpy_over_fifty_steps():
    target = 0.6

    def constrain(scores, t):
        lowest = np.sort(np.concatenate([s.ravel() for s in scores]))
        quantile = lowest[max(round(float(cubic(t, target)) * SIZE), 1) - 1]
        gap = quantile - LOGIT
        penalty = np.clip(gap / slope(quantile), -9, 9)
        rest = gap - penalty * slope(quantile)
        return [s - penalty * slope(s) - rest for s in scores]

    start = [LOGIT + np.abs(w) / np.abs(w).mean() for w in kernels(PARAMS)]
    tx = soft(target_sparsity=mj.cubic(target, begin=5, end=40))
    masks = compare(tx, by_hand(constrain, start=start))
    assert masks[:4].all()
    assert abs(masks[-1].mean() - 0.4) < 1.5 / SIZE
    assert np.any(masks[1:] > masks[:-1])


def network(key, sizes):
    keys = jax.random.split(key, len(sizes))
    return {
        f"layer{i}": {"kernel": jax.random.normal(k, (a, b)) / np.sqrt(a)}
        for i, (k, a, b) in enumerate(zip(keys, sizes, sizes[1:]))
    }


def loss(params, x, y):
    *hidden, last = [params[name]["kernel"] for name in sorted(params)]
    for kernel in hidden:
        x = jax.nn.relu(x @ kernel)
    return optax.softmax_cross_entropy_with_integer_labels(x @ last, y).mean()


def sparsities(tx, params, x, y, steps, batch=32):
    """The sparsity after every step of training on a data set."""
    rows = np.random.default_rng(0).integers(0, len(x), (steps, batch))

    @jax.jit
    def run(params):
        def step(carry, row):
            params, opt_state = carry
            seen = mj.effective_params(params, opt_state)
            grads = jax.grad(loss)(seen, x[row], y[row])
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), mj.sparsity_of(opt_state)

        return jax.lax.scan(step, (params, tx.init(params)), rows)

    (params, opt_state), reached = run(params)
    return params, opt_state, np.asarray(reached)


@functools.cache
def generated():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1024, 32)).astype(np.float32)
    x[:, :6] = 0  # inputs that never say anything, whose weights get no gradient
    y = np.argmax(np.tanh(x @ rng.normal(size=(32, 16))) @ rng.normal(size=(16, 5)), 1)
    return jnp.asarray(x), jnp.asarray(y)


@functools.cache
def digits():
    def read(name, skip):
        return np.frombuffer(gzip.open(DIGITS / name).read()[skip:], np.uint8)

    x = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 784)
    return jnp.asarray(x / 255, jnp.float32), jnp.asarray(
        read("t10k-labels-idx1-ubyte.gz", 8), jnp.int32
    )


def check_target(target, reached, end):
    """Met at the end and at every step from then on, and nearly on the way."""
    assert abs(reached[-1] - target) <= 0.005
    assert np.max(np.abs(reached[end:] - target)) <= 0.005
    way = [cubic(t + 1, target, 20, end) for t in range(end)]
    assert np.max(np.abs(reached[:end] - way)) <= 0.005


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_reached_on_generated_data(target):
    schedule = mj.cubic(target, begin=20, end=150)
    params = network(jax.random.key(0), (32, 64, 5))
    tx = soft(target_sparsity=schedule, inner=optax.adam(1e-3))
    *_, reached = sparsities(tx, params, *generated(), steps=220)
    check_target(target, reached, 150)


@pytest.mark.slow
@pytest.mark.skipif(not DIGITS.exists(), reason=f"needs handwritten digits in {DIGITS}")
@pytest.mark.computes
@pytest.mark.parametrize("rate", [1e-3, 1e-1])
@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_reached_on_handwritten_digits(target, rate):
    schedule = mj.cubic(target, begin=20, end=400)
    params = network(jax.random.key(0), (784, 32, 10))
    tx = soft(target_sparsity=schedule, learning_rate=rate, inner=optax.adamw(1e-3))
    *_, reached = sparsities(tx, params, *digits(), steps=500)
    check_target(target, reached, 400)


def test_a_target_is_reached_from_scores_far_above_the_threshold():
    # Where the sigmoid is flat, no penalty would move them.
    params = network(jax.random.key(0), (32, 64, 5))
    tx = soft(target_sparsity=0.9, from_magnitude=100.0)
    _, state, reached = sparsities(tx, params, *generated(), steps=3)
    assert np.max(np.abs(reached - 0.9)) <= 0.005
    assert all(np.all(np.isfinite(s)) for s in jax.tree.leaves(state.scores))


def test_without_a_gradient_the_smallest_weights_go_first():
    x, y = generated()
    tx = soft(target_sparsity=mj.cubic(0.5, begin=20, end=80))
    params, state, _ = sparsities(
        tx, network(jax.random.key(0), (32, 64, 5)), x, y, steps=100
    )
    silent = np.abs(np.asarray(params["layer0"]["kernel"][:6]))
    mask = np.asarray(state.masks["layer0"]["kernel"][:6])
    assert 0 < mask.mean() < 1
    assert silent[~mask].max() <= silent[mask].min()


def test_a_larger_penalty_drops_more_and_the_sparsity_is_told():
    levels = []
    for penalty in (0.0, 30.0, 3000.0):
        tx = soft(
            penalty=penalty, threshold=mj.cubic(0.1, 10, 80, every=7), learning_rate=0.1
        )
        *_, state, reached = sparsities(
            tx, network(jax.random.key(0), (32, 64, 5)), *generated(), steps=100
        )
        np.testing.assert_allclose(state.sparsity, reached[-1], atol=1e-6)
        levels.append(float(reached[-1]))
    assert levels[0] < levels[1] < levels[2]


def test_prune_ranks_the_same_scores_exactly():
    tx = mj.movement_pruning(
        criterion=mj.SoftMovement(target_sparsity=0.5),
        allocation=mj.Global(),
        inner=optax.sgd(0.5),
        regrow=True,
    )
    params, state = train(tx, 5)[-1]
    params, state = mj.prune((params, state), 0.8)
    scores = np.concatenate([s.ravel() for s in kernels(state.scores.values)])
    masks = np.concatenate([m.ravel() for m in kernels(state.masks)])
    assert masks.sum() == SIZE - round(0.8 * SIZE)
    assert scores[masks == 0].max() <= scores[masks == 1].min()
    final, state = mj.finalize((params, state))
    assert all(np.sum(w != 0) for w in kernels(final))
    assert state.scores == ()


def test_every_tensor_keeps_its_floor():
    tx = mj.movement_pruning(
        criterion=mj.SoftMovement(target_sparsity=0.97),
        allocation=mj.Uniform(min_keep=3),
        inner=optax.sgd(0.5),
        regrow=True,
    )
    _, state = train(tx, 5)[-1]
    assert [int(m.sum()) for m in kernels(state.masks)] == [3, 3]


@pytest.mark.parametrize("allocation", [mj.Global(0.02), mj.Uniform(0.02)])
def test_a_floor_does_not_make_it_miss_the_target(allocation):
    x, y = generated()
    params = network(jax.random.key(0), (32, 64, 5))
    params["layer1"]["kernel"] *= 1e-3  # nearly all of it would go
    tx = mj.movement_pruning(
        criterion=mj.SoftMovement(mj.cubic(0.97, begin=20, end=80), learning_rate=0.1),
        allocation=allocation,
        inner=optax.sgd(1e-3),
        regrow=True,
    )
    _, state, reached = sparsities(tx, params, x, y, steps=100)
    small = state.masks["layer1"]["kernel"]
    assert int(small.sum()) >= 6  # .02 of 320
    n = 32 * 64 + 64 * 5
    assert reached[-1] == pytest.approx(round(0.97 * n) / n, abs=1e-6)


@pytest.mark.computes
@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.9])
def test_equal_scores_do_not_make_it_miss_the_target(target):
    # Weights of one magnitude without a gradient, and half of them dead.
    signs = np.where(np.arange(300).reshape(30, 10) % 3, 1.0, -1.0)
    signs[15:] = 0
    params = {"kernel": jnp.asarray(signs, jnp.float32)}
    tx = soft(target_sparsity=target)
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    mask = np.asarray(state.masks["kernel"])
    assert np.sum(~mask) == round(target * 300)
    # The dead go first, and of equals those that come last.
    assert np.all(
        mask
        == (
            np.argsort(np.argsort(-np.abs(signs).ravel(), kind="stable")).reshape(
                30, 10
            )
            < mask.sum()
        )
    )


def test_masks_change_when_the_schedule_says():
    tx = soft(target_sparsity=mj.cubic(0.6, begin=4, end=18, every=5))
    history = [
        np.concatenate([m.ravel() for m in kernels(s.masks)]) for _, s in train(tx, 22)
    ]
    changed = [t for t in range(2, 23) if np.any(history[t - 1] != history[t - 2])]
    assert set(changed) <= {4, 9, 14, 18, 19}
    assert {9, 14, 18} <= set(changed)


@pytest.mark.parametrize("options", [{"target_sparsity": 0.5}, {"penalty": 1.0}])
def test_a_bad_step_changes_nothing(options):
    tx = soft(**options)
    _, before = train(tx, 3)[-1]
    for bad in (np.nan, np.inf):
        grads = jax.tree.map(lambda p, bad=bad: jnp.full_like(p, bad), PARAMS)
        _, after = jax.jit(tx.update)(grads, before, PARAMS)
        for field in ("step", "scores", "masks", "sparsity"):
            pair = getattr(before, field), getattr(after, field)
            for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_half_precision_weights_have_float32_scores(dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    tx = soft(target_sparsity=0.5)
    step = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(params)
    for _ in range(3):
        _, state = step(params, state, params)
    assert {s.dtype.name for s in jax.tree.leaves(state.scores.values)} == {"float32"}
    assert abs(float(mj.sparsity_of(state)) - 0.5) < 1.5 / SIZE


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: mj.SoftMovement(), ValueError, "takes one of .*None and None. For ex"),
        (lambda: mj.SoftMovement(0.5, 1.0), ValueError, "one of .*0.5 and 1.0"),
        (lambda: mj.SoftMovement(80), ValueError, "got 80. Did you mean 0.8?"),
        (lambda: mj.SoftMovement(1.0), ValueError, "must be below 1.*SoftMovement"),
        (lambda: mj.SoftMovement(penalty=-1), ValueError, "`penalty`.*least 0, got -1"),
        (
            lambda: mj.SoftMovement(0.5, threshold=1.0),
            ValueError,
            r"`threshold` must be in \(0, 1\), got 1.0",
        ),
        (
            lambda: mj.SoftMovement(0.5, threshold="a"),
            TypeError,
            "`threshold`.*got 'a'",
        ),
        (
            lambda: mj.SoftMovement(0.5, threshold=mj.cubic(0.1, 0, 9)),
            ValueError,
            "`threshold` must be a number beside `target_sparsity`",
        ),
        (lambda: mj.SoftMovement(0.5, from_magnitude=-1), ValueError, "`from_magn"),
        (lambda: mj.SoftMovement(0.5, learning_rate=0), ValueError, "positive, got 0"),
        (
            lambda: mj.movement_pruning(0.9, mj.SoftMovement(0.9), inner=optax.sgd(1)),
            ValueError,
            r"leave out `sparsity`, got 0.9.*criterion=SoftMovement\(target_sparsity",
        ),
        (
            lambda: mj.movement_pruning(
                criterion=mj.SoftMovement(0.9), inner=optax.sgd(1)
            ),
            ValueError,
            r"both ways.*inner=optax.adamw\(...\), regrow=True\)`",
        ),
        (
            lambda: mj.movement_pruning(
                criterion=mj.SoftMovement(0.9),
                inner=optax.sgd(1),
                regrow=True,
                axis_name="x",
            ),
            ValueError,
            "`SoftMovement` looks at whole tensors",
        ),
        (
            lambda: mj.movement_pruning(
                criterion=mj.SoftMovement(0.5),
                inner=optax.sgd(1),
                regrow=True,
                structure={"first": mj.Block((2, 2))},
            ),
            ValueError,
            r"single weights.*got structure=.*use `Movement\(\)`",
        ),
    ],
)
def test_a_wrong_argument_is_refused_with_the_right_call(make, error, message):
    with pytest.raises(error, match=message):
        make()
