"""What an exchange of weights leaves alone, and what it puts back to its beginning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import movement_jax as mj
import movement_jax.nnx as mnnx
from movement_jax import shrink

EVERY = 3
CRITERIA = {
    "RigL": mj.RigL(None, every=EVERY, drop_fraction=0.5),
    "SET": mj.SET(None, every=EVERY, drop_fraction=0.5),
}
# And how many arrays of a weight's own shape they keep for each.
OPTIMIZERS = {
    "adamw": (optax.adamw(1e-2), 2),
    "momentum": (optax.sgd(0.1, momentum=0.9), 1),
    "lion": (optax.lion(1e-3), 1),
    "rmsprop": (optax.rmsprop(1e-2, initial_scale=0.5, momentum=0.9), 2),
    "adafactor": (optax.adafactor(1e-2, min_dim_size_to_factor=99, momentum=0.9), 2),
    "adafactor, factored": (optax.adafactor(1e-2, min_dim_size_to_factor=1), 0),
}
MORE_OPTIMIZERS = {
    "nothing": (optax.sgd(0.1), 0),
    "adagrad": (optax.adagrad(0.1), 1),
    "amsgrad": (optax.amsgrad(1e-2), 3),
    "adan": (optax.adan(1e-2), 4),
    "lamb": (optax.lamb(1e-2), 2),
    "muon": (optax.contrib.muon(1e-2), 1),
    "chain": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.ema(0.9), optax.adam(0.1)),
        3,
    ),
    "partition": (
        optax.partition(
            {"a": optax.adam(1e-2), "b": optax.sgd(0.1, momentum=0.9)},
            lambda params: {"body": {"kernel": "a", "bias": "b"}, "head": "b"},
        ),
        1.5,
    ),
    "masked": (optax.masked(optax.adam(1e-2), {"body": True, "head": False}), 1),
    "inject": (optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2), 2),
    "finite": (optax.apply_if_finite(optax.adam(1e-2), 3), 2),
    "several steps": (
        optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
        3,
    ),
    "bfloat16": (optax.adam(1e-2, mu_dtype="bfloat16"), 2),
    "lbfgs": (optax.lbfgs(1e-2, linesearch=None, memory_size=2), 4),
}


def make_params(dtype="float32"):
    rng = np.random.default_rng(0)
    draw = {
        "body": {"kernel": rng.normal(size=(12, 10)), "bias": rng.normal(size=10)},
        "head": {"kernel": rng.normal(size=(10, 7))},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), draw)


def gradient(params):
    def of(w):
        place = jnp.arange(w.size, dtype=w.dtype).reshape(w.shape)
        return 0.3 * w - jnp.sin(7 * w + 5 * place)

    return jax.tree.map(of, params)


def step_of(tx):
    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(gradient(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def make(criterion="RigL", inner=None, sparsity=None, **options):
    inner = optax.adam(1e-2) if inner is None else inner
    return mj.movement_pruning(sparsity, CRITERIA[criterion], inner=inner, **options)


def start(tx, steps=0, params=None):
    """Params and state after some dense steps, and pruned then."""
    params = make_params() if params is None else params
    state, step = (params, tx.init(params)), step_of(tx)
    for _ in range(steps):
        state = step(*state)
    return jax.jit(mj.prune)(state, 0.6)


def kernels(tree):
    return [np.asarray(tree[name]["kernel"]) for name in ("body", "head")]


def masks_of(opt_state):
    return kernels(mj.find_state(opt_state).masks)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_the_optimizer_remembers_of_grown_weights_is_as_at_first(name):
    check_memory(*OPTIMIZERS[name])


@pytest.mark.nightly
@pytest.mark.parametrize("name", MORE_OPTIMIZERS)
def test_so_it_is_for_every_other_optimizer(name):
    check_memory(*MORE_OPTIMIZERS[name])


def check_memory(inner, expected):
    tx = make(inner=inner)
    params, state = start(tx, EVERY - 1)
    old, (new_params, new) = masks_of(state), step_of(tx)(params, state)
    grown = [b & ~a for a, b in zip(old, masks_of(new))]
    assert all(g.any() for g in grown)
    # What the optimizer would hold had nothing been exchanged, and what at first.
    grads = gradient(params)
    for part, mask in zip(("body", "head"), old):
        grads[part]["kernel"] = jnp.where(mask, grads[part]["kernel"], 0)
    _, plain = jax.jit(inner.update)(grads, state.inner_state, params)
    found, forgotten = 0, False
    trees = (new.inner_state, plain, inner.init(params))
    for leaves in zip(*map(jax.tree.leaves, trees), strict=True):
        got, kept, begun = (np.asarray(x, np.float32) for x in leaves)
        own = [g for g in grown if got.shape[-2:] == g.shape]
        if own:
            found += 1
            where = np.broadcast_to(own[0], got.shape)
            np.testing.assert_array_equal(got[where], begun[where])
            forgotten |= np.any(kept[where] != begun[where])
            got, kept = got[~where], kept[~where]
        np.testing.assert_allclose(got, kept, rtol=1e-5, atol=1e-6)
    assert found == 2 * expected
    assert forgotten == (expected > 0)
    for g, m, w in zip(grown, masks_of(new), kernels(new_params)):
        assert not np.any(w[g]) and not np.any(w[~m])


def test_adams_moments_of_grown_weights_are_zero_and_the_others_are_not():
    tx = make()
    params, state = start(tx, EVERY - 1)
    old, (_, new) = masks_of(state), step_of(tx)(params, state)
    trees = (state.inner_state[0], new.inner_state[0])
    for before, after in (*zip(trees[0][1:], trees[1][1:]),):
        for a, b, x, y in zip(old, masks_of(new), kernels(before), kernels(after)):
            assert np.all(x != 0)
            assert not np.any(y[b & ~a])
            assert np.all(y[~b | a] != 0)


@pytest.mark.parametrize(
    "criterion, dtype", [("RigL", "bfloat16"), ("RigL", "float16"), ("SET", "float32")]
)
def test_counts_stay_and_grown_weights_start_at_zero_then_move(criterion, dtype):
    tx = make(criterion, optax.sgd(0.1, momentum=0.9))
    params, state = start(tx, params=make_params(dtype))
    step, counts = step_of(tx), [m.sum() for m in masks_of(state)]
    assert counts == [48, 28]
    for t in range(1, 4 * EVERY):
        before, old = kernels(params), masks_of(state)
        params, state = step(params, state)
        new = masks_of(state)
        assert [m.sum() for m in new] == counts
        for a, b, w, was in zip(old, new, kernels(params), before):
            assert not np.any(w[~b])
            if t % EVERY:
                np.testing.assert_array_equal(a, b)
                assert np.any(w != was)
            else:
                assert not np.any(w[b & ~a])
                np.testing.assert_array_equal(w[a & b], was[a & b])
    # The last exchange was two steps ago.
    assert all(np.count_nonzero(w) == n for w, n in zip(kernels(params), counts))
    assert mj.find_state(state).events.undone == 0
    assert mj.find_state(state).events.changes == 4


def exchanged(weights, mask, grads, fraction=0.5):
    """By RigL, from tied weights and gradients: of equals the lower index stays."""
    n, kept = mask.size, int(mask.sum())
    w, g = np.abs(weights).ravel(), np.nan_to_num(np.abs(grads), nan=-1).ravel()
    w = np.where(np.isnan(w), np.inf, w)
    on = np.flatnonzero(mask.ravel())
    order = sorted(on, key=lambda i: (-w[i], i))
    stays = set(order[: kept - round(fraction * kept)])
    rest = sorted(set(range(n)) - stays, key=lambda i: (-g[i], i))
    new = np.zeros(n, bool)
    new[[*stays, *rest[: kept - len(stays)]]] = True
    return new.reshape(mask.shape)


@pytest.mark.parametrize("seed", range(5))
def test_ties_go_to_the_lower_index_and_nan_is_never_grown(seed):
    rng = np.random.default_rng(seed)
    shape, criterion = (9, 11), mj.RigL(None, every=2, drop_fraction=0.5)
    tx = mj.movement_pruning(None, criterion, inner=optax.sgd(0.0), check_finite=False)
    weights = np.round(rng.normal(size=shape), 0).astype(np.float32)
    params, state = mj.prune(
        ({"kernel": jnp.asarray(weights)}, tx.init({"kernel": jnp.asarray(weights)})),
        0.4,
    )
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    mask, grads = np.asarray(state.masks["kernel"]), np.round(rng.normal(size=shape), 0)
    grads[rng.random(shape) < 0.2] = np.nan
    grads[rng.random(shape) < 0.1] = np.inf
    weights = np.array(params["kernel"])
    weights[np.flatnonzero(mask.any(1))[0], np.flatnonzero(mask[0])[:1]] = np.nan
    weights = np.where(mask, weights, 0).astype(np.float32)
    args = ({"kernel": jnp.asarray(x, jnp.float32)} for x in (grads, weights))
    grads_tree, params = args
    _, state = jax.jit(tx.update)(grads_tree, state, params)
    want = exchanged(weights, mask, grads)
    np.testing.assert_array_equal(state.masks["kernel"], want)


@pytest.mark.parametrize("bad", ["gradient", "update"])
def test_a_bad_step_exchanges_nothing_and_the_next_good_one_does(bad):
    def scale(value):
        return optax.stateless(lambda u, _: jax.tree.map(lambda x: x * value, u))

    def run(inner, grads):
        tx = make(inner=inner)
        params, state = start(tx, EVERY - 1)
        return tx.update(grads(params), state, params)[1], state

    def broken(params):
        grads = gradient(params)
        off = jnp.zeros((12, 10), bool).at[0, 0].set(True)
        grads["body"]["kernel"] = jnp.where(off, jnp.nan, grads["body"]["kernel"])
        return grads

    if bad == "gradient":
        after, before = run(optax.sgd(0.1), broken)
    else:
        tx, broke = make(inner=optax.sgd(0.1)), make(inner=scale(jnp.inf))
        params, before = start(tx, EVERY - 1)
        before = before._replace(inner_state=broke.init(params).inner_state)
        after = broke.update(gradient(params), before, params)[1]
        before = before._replace(inner_state=())
    for a, b in zip(masks_of(before), masks_of(after)):
        np.testing.assert_array_equal(a, b)
    assert (after.step, after.events.skipped) == (EVERY - 1, 1)
    assert after.events.changes == before.events.changes
    assert after.scores.step == before.scores.step
    if bad == "gradient":
        tx = make(inner=optax.sgd(0.1))
        params, _ = start(tx, EVERY - 1)
        after = tx.update(gradient(params), after, params)[1]
        assert after.events.changes == before.events.changes + 1


@pytest.mark.parametrize(
    "structure", [mj.Block((3, 2)), mj.Axis(0), {"body": mj.Axis(1)}]
)
def test_blocks_and_slices_are_exchanged_whole(structure):
    tx = make(structure=structure, sparsity=0.6)
    params = make_params()
    state, step = (params, tx.init(params)), step_of(tx)
    seen = set()
    for _ in range(5 * EVERY):
        state = step(*state)
        body, _ = masks_of(state[1])
        if isinstance(structure, dict):
            groups = body.T
        elif isinstance(structure, mj.Axis):
            groups = body
        else:
            groups = body.reshape(4, 3, 5, 2).transpose(0, 2, 1, 3).reshape(20, 6)
        assert np.all(groups.any(1) == groups.all(1))
        assert groups.any(1).sum() == len(groups) - round(0.6 * len(groups))
        seen.add(body.tobytes())
    assert len(seen) > 1


def test_scan_stacked_layers_are_exchanged_one_by_one():
    rng = np.random.default_rng(0)
    params = {
        "layers": {"kernel": jnp.asarray(rng.normal(size=(3, 8, 8)), jnp.float32)}
    }
    tx, seen = make(sparsity=0.6, stacked="layers"), set()
    state, step = (params, tx.init(params)), step_of(tx)
    for _ in range(3 * EVERY):
        state = step(*state)
        mask = np.asarray(mj.find_state(state[1]).masks["layers"]["kernel"])
        np.testing.assert_array_equal(mask.sum((1, 2)), 26)
        seen.add(mask.tobytes())
    assert len(seen) > 1


@pytest.mark.parametrize("criterion", CRITERIA)
def test_in_multi_steps_an_exchange_counts_updates(criterion):
    tx = optax.MultiSteps(make(criterion, sparsity=0.6), 2).gradient_transformation()
    state, step, masks = (make_params(), tx.init(make_params())), step_of(tx), []
    for _ in range(2 * 2 * EVERY):
        state = step(*state)
        masks.append(b"".join(m.tobytes() for m in masks_of(state[1])))
    changed = [t for t in range(1, len(masks)) if masks[t] != masks[t - 1]]
    assert changed == [1, 2 * EVERY - 1, 4 * EVERY - 1]


def test_apply_if_finite_around_it_keeps_masks_and_counts():
    tx = optax.apply_if_finite(make(sparsity=0.6, check_finite=False), 3)
    params = make_params()
    state = tx.init(params)
    for value in (1.0, 1.0, jnp.nan):
        grads = jax.tree.map(lambda g, v=value: g * v, gradient(params))
        _, state = jax.jit(tx.update)(grads, state, params)
    assert mj.find_state(state).step == 2
    _, state = jax.jit(tx.update)(gradient(params), state, params)
    found = mj.find_state(state)
    assert (found.step, found.events.changes) == (3, 2)


def test_the_reports_read_it():
    tx = make(track_noise=True, track_start=True)
    state, step = start(tx), step_of(tx)
    for _ in range(EVERY + 1):
        state = step(*state)
    total = mj.summary(state).total
    assert (total.kept, total.nonfinite) == (48 + 28, 0)
    assert mj.agreement(state, mj.Magnitude(), 0.6).total.jaccard == 1
    health = mj.health(state)
    assert health.ok, str(health)
    logged = mj.metrics(state)
    assert float(logged["pruning/sparsity"]) == pytest.approx(0.6)
    assert 0 < logged["pruning/churn"] <= 2 * 0.5 * 0.4
    params, opt_state = mj.finalize(state)
    masks = masks_of(opt_state)
    for _ in range(EVERY):
        params, opt_state = step(params, opt_state)
    for a, b in zip(masks, masks_of(opt_state)):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_resumes_bit_for_bit(tmp_path):
    tx = make("SET")
    state = start(tx, EVERY + 1)
    mj.checkpoint.save(tmp_path, 4, state)
    resumed = mj.checkpoint.restore(tmp_path, like=start(tx))
    step = step_of(tx)
    for _ in range(2 * EVERY):
        state, resumed = step(*state), step(*resumed)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_nnx_optimizer_trains_with_it():
    model = nnx.Linear(10, 8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(sparsity=0.75), wrt=nnx.Param)
    x, masks = jnp.asarray(np.random.default_rng(0).normal(size=(4, 10))), []
    mnnx.prune(model, optimizer, 0.75)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(EVERY):
        step(model, optimizer)
        state = mj.find_state(mnnx.train_state(model, optimizer)[1])
        masks.append(np.asarray(state.masks["kernel"]))
    grown = masks[-1] & ~masks[-2]
    assert grown.any() and masks[-1].sum() == 20
    assert not np.any(np.asarray(model.kernel[...])[~masks[-1] | grown])
    assert not np.any(np.asarray(state.inner_state[0].mu["kernel"])[grown])


def test_what_belongs_to_dense_leaves_is_left_alone():
    tx = make(prunable="body/kernel")
    params, state = start(tx, EVERY - 1)
    _, plain = optax.adam(1e-2).update(
        mj.apply_masks(gradient(params), state.masks), state.inner_state, params
    )
    _, new = tx.update(gradient(params), state, params)
    for got, want in ((new.inner_state[0].mu, plain[0].mu),):
        np.testing.assert_array_equal(got["head"]["kernel"], want["head"]["kernel"])
        np.testing.assert_array_equal(got["body"]["bias"], want["body"]["bias"])
        assert np.any(np.asarray(got["body"]["kernel"] != want["body"]["kernel"]))


def test_the_longer_path_wins_where_one_ends_with_the_other():
    rng = np.random.default_rng(0)
    leaf = lambda: jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)  # noqa: E731
    params = {"kernel": leaf(), "under": {"kernel": leaf()}}
    tx = mj.movement_pruning(
        None, CRITERIA["RigL"], inner=optax.adam(1e-2), prunable="^kernel"
    )
    state = mj.prune((params, tx.init(params)), 0.5)
    for _ in range(EVERY):
        before, state = state, step_of(tx)(*state)
    mu = state[1].inner_state[0].mu
    assert np.all(np.asarray(mu["under"]["kernel"]) != 0)
    grown = np.asarray(state[1].masks["kernel"] & ~before[1].masks["kernel"])
    assert grown.any() and not np.any(np.asarray(mu["kernel"])[grown])


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"inner": None},
            r"resets what the optimizer .*`movement_pruning\(0.9, {}\(end=7_500\)",
        ),
        ({"regrow": True}, "grows weights by itself.*Leave it out"),
        ({"structure": mj.NM(2, 4)}, "exchanges.*N:M pattern keeps"),
        ({"structure": {"body": mj.NM(2, 4)}}, "exchanges.*N:M pattern keeps"),
        ({"axis_name": "x"}, "looks at whole tensors"),
    ],
)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_where_weights_cannot_start_afresh_it_is_refused(criterion, options, message):
    options = {"inner": optax.adam(1e-2)} | options
    with pytest.raises(ValueError, match=f"`{criterion}` {message.format(criterion)}"):
        mj.movement_pruning(0.9, CRITERIA[criterion], **options)


def test_whole_units_are_refused():
    def apply(params, x):
        return jnp.tanh(x @ params["first"]["kernel"]) @ params["second"]["kernel"]

    params = {
        "first": {"kernel": jnp.ones((4, 6))},
        "second": {"kernel": jnp.ones((6, 2))},
    }
    groups = shrink.find_groups(apply, params, jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="cannot grow whole units"):
        make(structure=groups)
