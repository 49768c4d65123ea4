"""Many random cases in one program each: bad values, counts, shardings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import movement_jax as mj

from . import naive
from .subjects import both

CASES = 1000
STEPS = 12
SPARSITY = 0.5
RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"kernel": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32)},
    "b": {"kernel": jnp.asarray(RNG.normal(size=(2, 11)), jnp.float32)},
    "bias": jnp.asarray(RNG.normal(size=6), jnp.float32),
}
KEPT = {"a": 10, "b": 11}
ASKED = mj.cubic(SPARSITY, begin=1, end=8, every=2)
# An optimizer with moments has to be kept from what is not finite, as always.
FORMS = {
    "sgd": lambda: optax.chain(optax.sgd(0.1), mj.movement_pruning(ASKED)),
    "unchecked": lambda: optax.chain(
        optax.sgd(0.1), mj.movement_pruning(ASKED, check_finite=False)
    ),
    "adam": lambda: optax.apply_if_finite(
        optax.chain(optax.adam(1e-2), mj.movement_pruning(ASKED)), 100
    ),
    "taylor": lambda: optax.apply_if_finite(
        mj.movement_pruning(ASKED, mj.Taylor(), inner=optax.adam(1e-2)), 100
    ),
    "movement": lambda: mj.movement_pruning(
        ASKED, mj.Movement(), inner=optax.sgd(0.1), regrow=True
    ),
}


def cases():
    """Where each case has its bad values, which, and how often; some have several."""
    rng = np.random.default_rng(1)
    return {
        "leaf": rng.integers(0, 3, CASES),
        "place": rng.random(CASES),
        "value": np.float32([np.nan, np.inf, -np.inf])[rng.integers(0, 3, CASES)],
        "in_weights": rng.random(CASES) < 0.3,
        "steps": rng.random((CASES, STEPS)) < rng.uniform(0.05, 0.5, (CASES, 1)),
    }


def spoil(tree, case, now):
    """One entry of one leaf becomes NaN or infinite."""

    def one(number, leaf):
        index = (case["place"] * leaf.size).astype(int)
        hit = now & (case["leaf"] == number) & (jnp.arange(leaf.size) == index)
        return jnp.where(hit.reshape(leaf.shape), case["value"], leaf)

    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([one(i, leaf) for i, leaf in enumerate(leaves)])


def survive(tx):
    """All cases at once: the state that each of them ends with."""

    def run(case):
        def step(carry, bad):
            params, opt_state = carry
            seen = spoil(params, case, bad & case["in_weights"])
            grads = jax.tree.map(lambda p: 0.3 * p - 0.1 * jnp.sin(9 * p), params)
            grads = spoil(grads, case, bad & ~case["in_weights"])
            updates, opt_state = tx.update(grads, opt_state, seen)
            good = jax.tree.map(lambda u: jnp.isfinite(u).all(), updates)
            good = functools.reduce(jnp.logical_and, jax.tree.leaves(good))
            applied = optax.apply_updates(params, updates)
            params = jax.tree.map(lambda a, p: jnp.where(good, a, p), applied, params)
            return (params, opt_state), None

        # Ends with enough good steps for the masks to catch up with the schedule.
        steps = jnp.concatenate([case["steps"], jnp.zeros(8, bool)])
        (_, opt_state), _ = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), steps)
        return opt_state

    return jax.jit(jax.vmap(run))(cases())


def survivors(opt_state, find):
    state = find(opt_state)
    good = np.ones(CASES, bool)
    for name, kept in KEPT.items():
        mask = np.asarray(state.masks[name]["kernel"])
        good &= mask.sum(axis=(1, 2)) == kept
    for leaf in jax.tree.leaves(state.scores):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            good &= np.isfinite(leaf).reshape(CASES, -1).all(axis=1)
    return good


@pytest.mark.parametrize("form", FORMS)
def test_a_thousand_trainings_with_bad_values_end_at_the_exact_sparsity(
    form, record_property
):
    good = survivors(survive(FORMS[form]()), mj.find_state)
    record_property("R2", (int(CASES - good.sum()), CASES))
    assert good.sum() == CASES, np.flatnonzero(~good)[:10]


def test_naive_trainings_with_bad_values_do_not():
    tx = optax.chain(optax.sgd(0.1), naive.pruning())

    @jax.vmap
    def prune(opt_state):
        return naive.prune((PARAMS, opt_state), SPARSITY)[1]

    good = survivors(prune(survive(tx)), naive.find_state)
    unharmed = ~cases()["steps"].any(axis=1)
    assert good[unharmed].all() and unharmed.sum() > 10
    assert not good[~unharmed & (cases()["leaf"] < 2)].any()


SIZE = (8, 16)
KINDS = ["any", "ties", "few", "special", "nan", "infinite", "subnormal", "constant"]
BATCH = 56
SHAPES = {2: (2, 1), 4: (2, 2), 8: (4, 2)}
LAYOUTS = {
    "rows": P(None, ("x", "y")),
    "columns": P(None, None, ("x", "y")),
    "both": P(None, "x", "y"),
}


def score_batch(seed):
    """Scores of every kind, and how many of each to keep."""
    rng = np.random.default_rng(seed)
    batch = rng.normal(size=(BATCH, *SIZE)).astype(np.float32)
    for number, kind in enumerate(np.resize(KINDS, BATCH)):
        x, some = batch[number], rng.random(SIZE) < rng.uniform(0.1, 0.9)
        values = {
            "any": x,
            "ties": np.round(x, 1),
            "few": np.sign(np.round(x)),
            "special": rng.choice(np.float32([0, -0.0, 1, -1, 3e38, -3e38]), SIZE),
            "nan": np.where(some, np.nan, np.round(x, 1)),
            "infinite": np.where(some, np.inf * np.sign(x), x),
            "subnormal": np.where(some, x * np.float32(1e-40), 0),
            "constant": np.full(SIZE, x[0, 0]),
        }
        batch[number] = values[kind]
    return batch, rng.integers(0, batch[0].size + 1, BATCH).astype(np.int32)


def by_numpy(scores, n_keep):
    """Keeps the highest and every NaN; of ties, and of all near zero, the first."""
    x = scores.ravel().astype(np.float64)
    x[np.abs(x) < np.finfo(np.float32).tiny] = 0
    order = np.lexsort((-np.arange(x.size), x))
    order = order[~np.isnan(x[order])]
    mask = np.ones(x.size, bool)
    mask[order[: x.size - n_keep]] = False
    return mask.reshape(scores.shape)


keep_each = jax.jit(jax.vmap(mj.keep_top))


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("devices", SHAPES)
def test_masks_of_sharded_scores_are_those_of_a_sort(devices, layout, record_property):
    seed = 4 * devices + [*LAYOUTS].index(layout)
    scores, n_keep = score_batch(seed)
    want = np.stack([by_numpy(x, n) for x, n in zip(scores, n_keep)])
    mesh = jax.make_mesh(
        SHAPES[devices],
        ("x", "y"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
    )
    placed = jax.device_put(scores, NamedSharding(mesh, LAYOUTS[layout]))
    parts = {str(shard.index) for shard in placed.addressable_shards}
    assert len(parts) == devices
    differ = (np.asarray(keep_each(placed, n_keep)) != want).any(axis=(1, 2))
    record_property("R5", (int(differ.sum()), BATCH))
    assert not differ.any()


def test_there_are_more_than_five_hundred_of_them():
    assert BATCH * len(SHAPES) * len(LAYOUTS) >= 500


def naive_keep(scores, n_keep):
    return naive.by_sort(scores, 1 - n_keep / scores.size)


@both("ties fall together", ours=mj.keep_top, naive=naive_keep)
def test_counts_are_exact_in_a_thousand_cases(subject, record_property):
    keep = jax.jit(jax.vmap(subject))
    wrong = 0
    for seed in range(18):
        scores, n_keep = score_batch(100 + seed)
        n_keep = np.maximum(n_keep, np.isnan(scores).sum(axis=(1, 2)))  # all are kept
        kept = np.asarray(keep(scores, n_keep.astype(np.int32))).sum(axis=(1, 2))
        wrong += np.sum(kept != n_keep)
    if subject is mj.keep_top:
        record_property("R4", (int(wrong), 18 * BATCH))
    assert wrong == 0
