"""Units of a model scored, scheduled and masked in training: `structure=groups`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import movement_jax as mj
from movement_jax import shrink
from movement_jax.tree import named_leaves
from movement_jax.units import Slices, UnitGroup, Units

X = jnp.asarray(np.random.default_rng(5).normal(size=(4, 6)), jnp.float32)
SIZES = {"a": 12, "b": 10}


def model(p, x):
    x = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"])
    x = jax.nn.relu(x @ p["b"]["kernel"] + p["b"]["bias"])
    return x @ p["c"]["kernel"] + p["c"]["bias"]


def make(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def dense(rows, columns):
        kernel, bias = rng.normal(size=(rows, columns)), rng.normal(size=columns)
        return {"bias": jnp.asarray(bias, dtype), "kernel": jnp.asarray(kernel, dtype)}

    return {"a": dense(6, 12), "b": dense(12, 10), "c": dense(10, 3)}


PARAMS = make()
GROUPS = shrink.find_groups(model, PARAMS, X)
PRUNE = jax.jit(mj.prune)  # the sparsity is traced


def loss(params, x=X):
    return ((model(params, x) - 1) ** 2).mean()


def means(p):
    """What every unit is worth by hand: the mean magnitude of all its weights."""
    p = jax.tree.map(lambda x: np.abs(np.asarray(x, np.float64)), p)
    a = p["a"]["kernel"].sum(0) + p["a"]["bias"] + p["b"]["kernel"].sum(1)
    b = p["b"]["kernel"].sum(0) + p["b"]["bias"] + p["c"]["kernel"].sum(1)
    return {"a": a / (6 + 1 + 10), "b": b / (12 + 1 + 3)}


def units(masks):
    """Which units are left, after a look that whole units are."""
    rows = {
        "a": [masks["a"]["kernel"].all(0), masks["a"]["kernel"].any(0)],
        "b": [masks["c"]["kernel"].all(1), masks["c"]["kernel"].any(1)],
    }
    for all_of, any_of in rows.values():
        np.testing.assert_array_equal(all_of, any_of)
    a, b = (np.asarray(rows[name][0]) for name in "ab")
    np.testing.assert_array_equal(masks["a"]["bias"], a)
    np.testing.assert_array_equal(masks["b"]["bias"], b)
    np.testing.assert_array_equal(masks["b"]["kernel"], a[:, None] & b)
    return {"a": a, "b": b}


def lowest(worth, n_drop):
    stays = np.ones(len(worth), bool)
    stays[np.argsort(worth, kind="stable")[:n_drop]] = False
    return stays


def step_of(tx, regrow=False, **jit):
    def step(params, state, x=X):
        at = mj.effective_params(params, state) if regrow else params
        updates, state = tx.update(jax.grad(loss)(at, x), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **jit)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.8, 0.99])
def test_the_units_with_the_lowest_mean_go(sparsity):
    tx = mj.movement_pruning(None, mj.Magnitude(), structure=GROUPS)
    params, state = PRUNE((PARAMS, tx.init(PARAMS)), sparsity)
    left, worth = units(state.masks), means(PARAMS)
    for name, size in SIZES.items():
        n_drop = min(round(sparsity * size), size - 1)
        np.testing.assert_array_equal(left[name], lowest(worth[name], n_drop))
    assert state.masks["c"]["bias"] == optax.MaskedNode()  # of no unit
    np.testing.assert_array_equal(params["c"]["bias"], PARAMS["c"]["bias"])
    np.testing.assert_array_equal(params["a"]["bias"][~left["a"]], 0)


def test_of_equal_units_the_first_stay_and_zero_scores_are_no_exception():
    params = jax.tree.map(jnp.ones_like, PARAMS)
    for scale in (1.0, 0.0):
        scaled = jax.tree.map(lambda x, s=scale: s * x, params)
        tx = mj.movement_pruning(None, mj.Magnitude(), structure=GROUPS)
        _, state = PRUNE((scaled, tx.init(scaled)), 0.5)
        left = units(state.masks)
        assert left["a"].tolist() == [True] * 6 + [False] * 6
        assert left["b"].tolist() == [True] * 5 + [False] * 5


def test_a_unit_with_a_score_that_is_nan_stays():
    tx = mj.movement_pruning(None, mj.Magnitude(), structure=GROUPS)
    params = jax.tree.map(lambda x: x, PARAMS)
    worst = int(np.argmin(means(PARAMS)["a"]))
    params["a"]["bias"] = params["a"]["bias"].at[worst].set(jnp.nan)
    _, state = PRUNE((params, tx.init(params)), 0.9)
    assert units(state.masks)["a"][worst]


def test_global_ranks_all_units_and_counts_their_weights():
    tx = mj.movement_pruning(
        None, mj.Magnitude(), structure=GROUPS, allocation=mj.Global(min_keep=2)
    )
    worth = means(PARAMS)
    each = np.repeat([17, 16], [12, 10])
    everyone = np.concatenate([worth["a"], worth["b"]])
    for sparsity in (0.3, 0.7):
        _, state = PRUNE((PARAMS, tx.init(PARAMS)), sparsity)
        left = units(state.masks)
        stays = np.concatenate([left["a"], left["b"]])
        assert everyone[~stays].max() < everyone[stays].min()
        dropped, total = each[~stays].sum(), round(sparsity * each.sum())
        assert total - 17 < dropped <= total
    _, state = PRUNE((PARAMS, tx.init(PARAMS)), 0.99)
    assert [x.sum() for x in units(state.masks).values()] == [2, 2]


def test_sums_weigh_larger_units_more():
    def ranked(reduce):
        tx = mj.movement_pruning(
            None,
            mj.Magnitude(),
            structure=GROUPS.units(reduce),
            allocation=mj.Global(min_keep=0),
        )
        params = jax.tree.map(jnp.ones_like, PARAMS)
        params["a"]["bias"] *= 0.9  # less worth on average, more in sum
        return units(PRUNE((params, tx.init(params)), 0.4)[1].masks)

    assert ranked("mean")["b"].all() and not ranked("sum")["b"].all()


def test_paths_of_an_allocation_are_names_of_groups():
    rules = {"a/kernel": 0.25, "b/kernel": 0.5}
    tx = mj.movement_pruning(
        0.1, mj.Magnitude(), structure=GROUPS, allocation=mj.PerPath(rules)
    )
    _, state = PRUNE((PARAMS, tx.init(PARAMS)), 0.1)
    assert [int(x.sum()) for x in units(state.masks).values()] == [9, 5]


def test_a_schedule_is_followed_exactly_in_one_compiled_step():
    schedule = mj.cubic(0.75, begin=1, end=7)
    tx = optax.chain(
        optax.adamw(1e-2, weight_decay=0.1),
        mj.movement_pruning(schedule, structure=GROUPS),
    )
    traced = []

    def step(params, state):
        traced.append(1)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    state, before = tx.init(params), {"a": np.ones(12, bool), "b": np.ones(10, bool)}
    for k in range(1, 10):
        params, state = step(params, state)
        left = units(mj.find_state(state).masks)
        sparsity = float(schedule(k)) if k > 1 else 0.0  # nothing is scored at first
        for name, size in SIZES.items():
            assert size - left[name].sum() == round(sparsity * size)
            assert not (left[name] & ~before[name]).any()  # what is gone stays gone
        before = left
        zeros = jax.tree.map(lambda x: np.asarray(x) != 0, params)
        np.testing.assert_array_equal(
            zeros["b"]["kernel"], left["a"][:, None] & left["b"]
        )
        np.testing.assert_array_equal(zeros["a"]["bias"], left["a"])
    assert len(traced) == 1
    logged = mj.metrics(state)
    assert (
        logged["pruning/sparsity_asked"] == 0.75 and logged["pruning/mask_changes"] > 1
    )
    masks = jax.tree.leaves(mj.find_state(state).masks)
    want = sum(int((~m).sum()) for m in masks) / sum(m.size for m in masks)
    np.testing.assert_allclose(mj.sparsity_of(state), want, rtol=1e-6)


CRITERIA = {
    "EmaMagnitude": mj.EmaMagnitude(),
    "Magnitude": mj.Magnitude(),
    "Movement": mj.Movement(),
    "Taylor": mj.Taylor(),
    "Random": mj.Random(),
    "PeakMagnitude": mj.PeakMagnitude(),
    "UpperConfidence": mj.UpperConfidence(),
    "Dormancy": mj.Dormancy(),
    "Sensitivity": mj.Sensitivity(),
    "Fisher": mj.Fisher(),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_prunes_whole_units(name):
    regrow = name in ("Movement", "Magnitude", "Random", "Taylor")  # half of them
    tx = mj.movement_pruning(
        0.5,
        CRITERIA[name],
        structure=GROUPS,
        inner=optax.adam(1e-2) if name in ("Sensitivity", "Fisher") else optax.sgd(0.1),
        regrow=regrow,
    )
    step = step_of(tx, regrow)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = step(params, state)
    left = units(state.masks)
    assert [int(x.sum()) for x in left.values()] == [6, 5]
    keep = GROUPS.kept(state.masks)
    assert [keep["a/kernel:1"].tolist(), keep["b/kernel:1"].tolist()] == [
        left["a"].tolist(),
        left["b"].tolist(),
    ]


def test_units_that_went_stay_away_whatever_their_scores_say():
    tx = mj.movement_pruning(None, structure=GROUPS)
    params, state = step_of(tx)(PARAMS, tx.init(PARAMS))
    params, state = PRUNE((params, state), 0.5)
    before = units(state.masks)
    turned = jax.tree.map(lambda x: 1 / (x + 1e-3), state.scores)
    _, state = PRUNE((params, state._replace(scores=turned)), 0.75)
    left = units(state.masks)
    assert [int(x.sum()) for x in left.values()] == [3, 2]
    assert not any((left[name] & ~before[name]).any() for name in left)


def test_units_come_back_with_regrow():
    tx = mj.movement_pruning(
        0.5, mj.Magnitude(), structure=GROUPS, inner=optax.sgd(0.0), regrow=True
    )
    step = step_of(tx, regrow=True)
    _, state = step(PARAMS, tx.init(PARAMS))
    gone = int(np.flatnonzero(~units(state.masks)["a"])[0])
    params = jax.tree.map(lambda x: x, PARAMS)
    params["a"]["kernel"] = params["a"]["kernel"].at[:, gone].set(100)
    _, state = step(params, state)
    left = units(state.masks)["a"]
    assert left[gone] and left.sum() == 6
    assert state.events.churn > 0


def test_several_groups_share_weights_in_a_transformer():
    fn, params, inputs = zoo.gqa_decoder()
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    groups = shrink.find_groups(fn, params, *inputs)
    tx = mj.movement_pruning(None, mj.Magnitude(), structure=groups)
    state = PRUNE((params, tx.init(params)), 0.5)
    keep = groups.kept(state[1].masks)
    worth = groups.unit_scores(jax.tree.map(jnp.abs, params), "mean")
    for group in groups.prunable:
        n_drop = min(round(0.5 * group.size), group.size - 1)
        want = lowest(np.asarray(worth[group.name]), n_drop)
        np.testing.assert_array_equal(keep[group.name], want)
    masks = dict(named_leaves(groups.masks(keep)))
    for path, mask in named_leaves(state[1].masks):
        np.testing.assert_array_equal(mask, masks[path])
    # A second time, the units that are left among all those that share them.
    again = groups.kept(PRUNE(state, 0.75)[1].masks)
    for group in groups.prunable:
        n_drop = min(round(0.75 * group.size), group.size - 1)
        assert (group.size - again[group.name].sum()) == n_drop
        assert not (again[group.name] & ~keep[group.name]).any()


def test_summary_tells_of_units():
    tx = mj.movement_pruning(None, mj.Magnitude(), structure=GROUPS)
    state = PRUNE((PARAMS, tx.init(PARAMS)), 0.5)
    found = mj.summary(state)
    assert [(u.name, u.size, u.kept, u.weights) for u in found.units] == [
        ("a/kernel:1", 12, 6, 17),
        ("b/kernel:1", 10, 5, 16),
    ]
    reached = {row.name: (row.asked, row.sparsity) for row in found.tensors}
    assert reached["a/kernel"] == (0.5, 0.5)
    assert reached["b/kernel"] == (0.75, 0.75)
    assert found.total.asked == pytest.approx(found.total.sparsity)
    assert "Units" in str(found) and found.to_dict()["units"][0]["kept"] == 6
    assert {f.level for f in mj.health(state).findings if f.name == "collapse"} == {
        "ok"
    }


def test_groups_that_are_not_cut_keep_their_units():
    state = mj.movement_pruning(0.5, mj.Magnitude(), structure=GROUPS).init(PARAMS)
    plan = GROUPS.plan({"a/kernel:1": np.arange(12) < 5})
    units = plan.shrink_like(state).config.structure
    sizes = {group.name: group.size for group in units.groups}
    assert sizes == {"a/kernel:1": 5, "b/kernel:1": 10}


def test_what_a_common_threshold_asks_of_a_tensor_is_not_known():
    allocation = mj.Global()
    tx = mj.movement_pruning(
        None, mj.Magnitude(), structure=GROUPS, allocation=allocation
    )
    found = mj.summary(PRUNE((PARAMS, tx.init(PARAMS)), 0.5))
    assert {row.asked for row in found.tensors} == {None}


def test_training_goes_on_after_the_cut_with_the_units_that_are_left():
    tx = optax.chain(
        optax.adamw(1e-2, eps=1e-4), mj.movement_pruning(0.5, structure=GROUPS)
    )
    step = step_of(tx)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = step(params, state)
    plan = GROUPS.plan(GROUPS.kept(mj.find_state(state).masks))
    small, small_state = plan.shrink(params), plan.shrink_like(state)
    cut = mj.find_state(small_state).config.structure
    assert [(g.size, g.weights) for g in cut.groups] == [(6, 12), (5, 10)]
    run = shrink.shrunk(jax.value_and_grad(loss), plan)

    @jax.jit
    def small_step(params, state):
        updates, state = tx.update(run(params)[1], state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        params, state = step(params, state)
        small, small_state = small_step(small, small_state)
    for a, b in zip(jax.tree.leaves(plan.shrink(params)), jax.tree.leaves(small)):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)
    small, small_state = PRUNE((small, small_state), 0.8)  # of what is left
    masks = mj.find_state(small_state).masks
    assert masks["a"]["bias"].sum() == 1 and masks["b"]["bias"].sum() == 1


def test_cut_numbers_what_is_left_anew():
    halves = np.array([0, 1, 2, -1, 0, 1, 2])
    group = UnitGroup("w:0", 3, 6, (Slices.of("w", 0, halves),))
    units = Units((group,), (("w", (7, 3)),))
    left = units.cut({"w": {0: (0, 2, 3, 4, 6), 1: (0, 2)}})
    assert left.shapes == (("w", (5, 2)),)
    (group,) = left.groups
    assert (group.size, group.weights) == (2, 4)
    assert group.slices[0].unit_at.tolist() == [0, 1, -1, 0, 1]
    assert group.slices[0].positions.tolist() == [[0, 3], [1, 4]]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_masks_are_the_same_on_eight_devices(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = {"kernel": PartitionSpec("y", None), "bias": PartitionSpec("y")}

    def place(path, leaf):
        spec = specs[path[-1].key] if leaf.shape[0] % 2 == 0 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    tx = mj.movement_pruning(None, mj.Magnitude(), structure=GROUPS)
    want = PRUNE((PARAMS, tx.init(PARAMS)), 0.5)
    placed = jax.tree_util.tree_map_with_path(place, PARAMS)
    with jax.set_mesh(mesh):
        got = PRUNE((placed, jax.jit(tx.init)(placed)), 0.5)
        again = PRUNE(got, 0.75)
    assert units(jax.device_get(again[1].masks))["a"].sum() == 3
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
        np.testing.assert_array_equal(a, b)
    if kind == AxisType.Explicit:
        for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(got[0])):
            assert jax.typeof(a) == jax.typeof(b)


def test_nothing_is_sorted():
    tx = mj.movement_pruning(None, mj.Magnitude(), structure=GROUPS)
    state = PARAMS, tx.init(PARAMS)
    text = jax.jit(mj.prune).lower(state, 0.5).compile().as_text()
    assert " sort(" not in text and " while(" in text


def test_the_structure_is_data_that_compares_prints_and_is_checked_on_restore(tmp_path):
    again = shrink.find_groups(model, PARAMS, X)
    assert GROUPS.units() == again.units() and hash(GROUPS.units()) == hash(
        again.units()
    )
    assert GROUPS.units() != GROUPS.units("sum") != GROUPS.only("a/").units("sum")
    assert repr(GROUPS.units()).startswith("Units(22 units in 2 groups, reduce='mean'")
    assert len(repr(GROUPS.units())) < 120
    tx = mj.movement_pruning(0.5, structure=GROUPS)
    step = step_of(tx)
    state = step(*step(PARAMS, tx.init(PARAMS)))
    mj.checkpoint.save(tmp_path, 1, state)
    restored = mj.checkpoint.restore(tmp_path, like=(PARAMS, tx.init(PARAMS)))
    for a, b in zip(jax.tree.leaves(step(*state)), jax.tree.leaves(step(*restored))):
        np.testing.assert_array_equal(a, b)
    other = mj.movement_pruning(0.5, structure=GROUPS.units("sum"))
    with pytest.raises(ValueError, match="was pruned with"):
        mj.checkpoint.restore(tmp_path, like=(PARAMS, other.init(PARAMS)))


def init(params=PARAMS, **options):
    return mj.movement_pruning(None, mj.Magnitude(), **options).init(params)


def wider():
    params = make()
    params["a"]["kernel"] = jnp.ones((7, 12))
    return params


def enormous():
    many = 2**16
    shapes = {"a": (many, many, 2), "b": (2, 3)}
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    x = jax.ShapeDtypeStruct((1, many, many), jnp.float32)

    def fn(p, x):
        return jax.nn.relu(jnp.einsum("bij,ijk->bk", x, p["a"])) @ p["b"]

    groups = shrink.find_groups(fn, params, x).only("a:2")
    tx = mj.movement_pruning(None, mj.Magnitude(), structure=groups)
    jax.eval_shape(tx.init, params)


def pinned(p, x):
    return jnp.sort(x @ p["a"]["kernel"], -1)


ERRORS = {
    "a criterion that decides": (
        lambda: mj.movement_pruning(
            criterion=mj.SoftMovement(target_sparsity=0.5),
            structure=GROUPS,
            inner=optax.sgd(0.1),
            regrow=True,
        ),
        "finds the threshold for single weights",
    ),
    "shapes of tensors": (
        lambda: init(structure=GROUPS, allocation=mj.ErdosRenyi()),
        r"`ErdosRenyi\(\)` reads the shapes",
    ),
    "layers": (lambda: init(structure=GROUPS, stacked="a"), "leave it out, got stack"),
    "devices": (lambda: init(structure=GROUPS, axis_name="x"), "`axis_name` splits"),
    "kernels only": (
        lambda: init(structure=GROUPS, prunable="kernel"),
        r"weights in \['a/bias', 'b/bias'\], which are no prunable leaves",
    ),
    "another tree": (
        lambda: init({"params": PARAMS}, structure=GROUPS),
        "There is nothing to prune",
    ),
    "another tree, all of it": (
        lambda: init({"params": PARAMS}, structure=GROUPS, prunable="."),
        "find the groups with the params that `tx.init` is given",
    ),
    "another shape": (
        lambda: init(wider(), structure=GROUPS),
        r"was found with 'a/kernel' of shape \(6, 12\), .* have \(7, 12\)",
    ),
    "units too large to count": (enormous, "one unit of more than 1073741824 weights"),
    "nothing to prune": (
        lambda: init(structure=shrink.find_groups(pinned, PARAMS, X)),
        "no group is prunable",
    ),
    "unknown group": (
        lambda: init(structure=GROUPS, allocation=mj.PerPath({"head": 0.5})),
        "decide nothing",
    ),
    "reduce": (
        lambda: GROUPS.units("max"),
        r"`reduce` .*got 'max'. Write `groups.units",
    ),
    "only": (lambda: GROUPS.only("head"), "found in no name of a group"),
    "masks with holes": (
        lambda: GROUPS.kept({"a": {"kernel": jnp.zeros((6, 12), bool)}}),
        r"`masks` drop units of 'a/kernel:1' with weights in \['a/bias', 'b/kernel'\]",
    ),
    "all of it": (
        lambda: mj.prune((PARAMS, init(structure=GROUPS)), 1.0),
        "would empty every tensor",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_right_is_refused(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_units_are_no_part_of_a_mapping():
    with pytest.raises(TypeError, match="by themselves"):
        init(structure={"a": GROUPS})


def test_only_some_groups_and_everything_else_is_left_alone():
    tx = mj.movement_pruning(
        None, mj.Magnitude(), structure=GROUPS.only("b/kernel"), prunable="."
    )
    _, state = PRUNE((PARAMS, tx.init(PARAMS)), 0.5)
    assert state.masks["a"]["kernel"].all() and state.masks["c"]["bias"].all()
    assert state.masks["b"]["bias"].sum() == 5
    np.testing.assert_array_equal(GROUPS.kept(state.masks)["a/kernel:1"], True)


def test_units_go_through_hyperparams_that_are_traced():
    pruning = functools.partial(mj.movement_pruning, structure=GROUPS)
    inject = optax.inject_hyperparams(pruning)(sparsity=0.5, criterion=mj.Magnitude())
    tx = optax.apply_if_finite(optax.chain(optax.adam(1e-2), inject), 3)
    params, state = step_of(tx)(PARAMS, tx.init(PARAMS))
    left = units(mj.find_state(state).masks)
    assert [int(x.sum()) for x in left.values()] == [6, 5]
    assert (params["a"]["bias"] == 0).sum() == 6
