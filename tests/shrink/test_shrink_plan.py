"""Scores of units, choices, plans, what they do to states, and training after a cut."""

import functools
import json
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from jax import export

import movement_jax as mj
from movement_jax import shrink
from movement_jax.tree import named_leaves

X = jnp.asarray(np.random.default_rng(5).normal(size=(4, 6)), jnp.float32)


def model(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]


def make(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (8,), "down": (8, 3), "up": (6, 8)}
    return {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in shapes.items()}


PARAMS = make()
GROUPS = shrink.find_groups(model, PARAMS, X)
KEEP = {"up:1": np.array([True, False] * 4)}
PLAN = GROUPS.plan(KEEP)


def test_scores_of_units_sum_over_all_their_slices():
    scores = {name: jnp.abs(x) for name, x in PARAMS.items()}
    up, down, bias = (np.abs(np.asarray(PARAMS[n])) for n in ("up", "down", "bias"))
    total = up.sum(0) + down.sum(1) + bias
    want = {
        "sum": total,
        "mean": total / 10,
        "l2": np.sqrt((up**2).sum(0) + (down**2).sum(1) + bias**2),
        "max": np.maximum(np.maximum(up.max(0), down.max(1)), bias),
    }
    for reduce, expected in want.items():
        got = jax.jit(lambda s, r=reduce: GROUPS.unit_scores(s, r))(scores)
        np.testing.assert_allclose(got["up:1"], expected, rtol=1e-5)


def test_scores_may_lack_leaves():
    got = GROUPS.unit_scores({"up": jnp.ones((6, 8)), "bias": optax.MaskedNode()})
    np.testing.assert_allclose(got["up:1"], 6.0)


def test_scores_of_inner_factors_and_halves():
    fn, params, inputs = zoo.gqa_decoder()
    groups = shrink.find_groups(fn, params, *inputs)
    ones = jax.tree.map(jnp.ones_like, params)
    got = groups.unit_scores(ones)
    # 20 units: two columns of 16 in `gate_up`, one row of 16 in `down`.
    np.testing.assert_allclose(got["layer/gate_up:1"], 3 * 16)
    # A group of keys: 2 queries of 8, a key of 8, a value of 6 by 16, and wo.
    np.testing.assert_allclose(got["layer/wk:1[0]"], 16 * (2 * 8 + 8 + 6) + 16 * 2 * 6)
    # A pair of RoPE: i and i + 4, in 4 query heads and 2 key heads.
    np.testing.assert_allclose(got["layer/wk:1[1]"], 16 * 2 * (4 + 2))


def test_choose_keeps_the_highest_of_each_group_or_of_all():
    def two(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    params = {"a": jnp.ones((6, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 2))}
    groups = shrink.find_groups(two, params, X)
    scores = {"a:1": np.array([1.0, 2, 3, 4]), "b:1": np.array([10.0, 20, 30, 40])}

    def counts(*args, **options):
        keep = shrink.choose(groups, scores, *args, **options)
        return [int(mask.sum()) for mask in keep.values()]

    assert counts(0.5) == [2, 2]
    assert counts(0.5, scope="global") == [1, 4]  # `min_keep` of the first
    assert counts(0.25, scope="global") == [2, 4]
    assert counts(0.75, round_to=2) == [2, 2]
    assert counts({"a:1": 0.75}) == [1, 4]
    assert counts(0.5, scope="by_kind") == [2, 2]
    keep = shrink.choose(groups, scores, 0.5)
    assert keep["a:1"].tolist() == [False, False, True, True]


def test_kinds_are_the_same_groups_of_other_layers():
    fn, params, inputs = zoo.linen_transformer()
    groups = shrink.find_groups(fn, params, *inputs)
    kinds = {}
    for group in groups.prunable:
        kinds.setdefault(group.kind, []).append(group.name)
    sizes = sorted(len(names) for names in kinds.values())
    assert sizes == [1, 2, 2, 2, 2]  # the stream; heads, keys, values, FFN twice


def test_plan_survives_json_and_refuses_what_is_none():
    again = shrink.Plan.from_json(PLAN.to_json())
    assert again == PLAN
    np.testing.assert_array_equal(
        shrink.shrunk(model, again)(again.shrink(PARAMS), X),
        shrink.shrunk(model, PLAN)(PLAN.shrink(PARAMS), X),
    )
    for text, why in (
        ("{}", "KeyError"),
        ("no json", "JSONDecodeError"),
        (json.dumps({"format": 99}), r"ValueError\('another format'"),
    ):
        with pytest.raises(ValueError, match=rf"`text` is no plan \({why}"):
            shrink.Plan.from_json(text)
    broken = json.loads(PLAN.to_json())
    broken["cuts"]["up"]["1"] = [0, 99]
    with pytest.raises(ValueError, match="no plan: axis 1 of 'up'.*cannot keep"):
        shrink.Plan.from_json(json.dumps(broken))
    for positions in (["0", "1"], [0.5, 1.5], "01"):
        broken["cuts"]["up"]["1"] = positions
        with pytest.raises(ValueError, match="is no plan"):
            shrink.Plan.from_json(json.dumps(broken))
    broken = json.loads(PLAN.to_json())
    broken["shapes"]["up"] = [6.0, 8.0]
    with pytest.raises(ValueError, match="is no plan"):
        shrink.Plan.from_json(json.dumps(broken))


def test_plan_says_the_small_shapes():
    assert PLAN.small_shapes() == {"bias": (4,), "down": (4, 3), "up": (6, 4)}
    assert "8" in str(PLAN) and "80 parameters, 40 left (50.0%)" in str(PLAN)


class Small(nn.Module):
    """A block whose hyperparameters can be made smaller."""

    hidden: int = 24
    heads: int = 4
    head_dim: int = 4
    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="stream")(x)
        own = nn.MultiHeadDotProductAttention(
            self.heads, qkv_features=self.heads * self.head_dim, name="attention"
        )
        x = x + own(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(self.hidden, name="up")(nn.LayerNorm()(x)))
        return nn.Dense(3, name="head")(x + nn.Dense(self.width, name="down")(y))


REBUILT = {  # axes that are cut, sizes to pass, and whether the result is the same
    "hidden": (["up/kernel:1"], {"hidden": 12}, True),
    "heads": (["attention/query/kernel:1"], {"heads": 2}, True),
    "head_dim": (
        ["attention/query/kernel:2", "attention/value/kernel:2"],
        {"head_dim": 2},
        False,
    ),
    "width": (["stream/kernel:1"], {"width": 8}, False),
}


@pytest.mark.parametrize("name", REBUILT)
def test_smaller_modules_are_the_same_or_told_apart(name):
    axes, sizes, same = REBUILT[name]
    fn, params, inputs = zoo.linen(Small(), jnp.ones((2, 5, 6)))
    inputs = [jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6)), jnp.float32)]
    groups = shrink.find_groups(fn, params, *inputs)
    plan = groups.plan(
        {
            group.name: np.arange(group.size) % 2 == 1
            for group in groups.prunable
            if {f"{m.path}:{m.axis}" for m in group.members}
            & {f"params/{axis}" for axis in axes}
        }
    )
    small = Small(**sizes)
    made = jax.eval_shape(small.init, jax.random.key(0), *inputs)
    wanted = {n: x.shape for n, x in named_leaves(made)}
    assert plan.small_shapes() == wanted  # the sizes to pass
    check = functools.partial(shrink.verify, fn, params, plan, *inputs)
    if same:
        assert check(rebuilt=small.apply).worst < 1e-4
    else:
        assert check().worst < 1e-4
        with pytest.raises(
            ValueError,
            match="`rebuilt` is another model.*result '' differs by .* the largest is",
        ):
            check(rebuilt=small.apply)


def test_a_rebuilt_model_with_other_results_is_refused():
    with pytest.raises(
        ValueError, match=r"`rebuilt` returns arrays of shapes \(4, 1\), .* \(4, 3\)"
    ):
        shrink.verify(model, PARAMS, PLAN, X, rebuilt=lambda p, x: model(p, x)[:, :1])


def test_a_cut_is_verified_unless_told_otherwise():
    small, fast = shrink.cut(model, PARAMS, KEEP, X)
    assert jax.tree.map(jnp.shape, small) == PLAN.small_shapes()
    want = model(PLAN.mask(PARAMS), X)
    np.testing.assert_allclose(jax.jit(fast)(small, X), want, rtol=1e-5)

    found = shrink.find_groups(softmaxed, PARAMS, X)
    inexact = found.plan(KEEP, allow_inexact=True)
    with pytest.raises(ValueError, match="not the masked one"):
        shrink.cut(softmaxed, PARAMS, inexact, X)
    small, fast = shrink.cut(softmaxed, PARAMS, inexact, X, rtol=10.0)
    assert fast(small, X).shape == (4, 3)
    small, fast = shrink.cut(softmaxed, PARAMS, inexact, X, verified=False)
    assert fast(small, X).shape == (4, 3)


def test_layers_of_a_scan_lose_the_same_units():
    fn, params, inputs = zoo.gqa_decoder_scan()
    groups = shrink.find_groups(fn, params, *inputs)
    stacked = [g for g in groups.groups if any(m.axis == 0 for m in g.members)]
    layers = [g for g in stacked if "the length of a scan" in g.reason]
    assert layers and all(g.status == "pinned" for g in layers)
    group = next(g for g in groups.prunable if "gate_up" in g.name)
    masks = groups.masks({group.name: np.arange(group.size) % 2 == 0})
    (mask,) = [m for n, m in named_leaves(masks) if n.endswith("gate_up")]
    np.testing.assert_array_equal(mask, np.broadcast_to(mask[:1], mask.shape))
    assert not mask.all()


@pytest.mark.computes
def test_groups_of_a_large_model_are_found_in_two_seconds(capsys):
    module = zoo.Wide(layers=24, width=1130)
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), ids)
    times = []
    for _ in range(3):  # a busy machine only adds to it
        jax.clear_caches()
        start = time.process_time()
        groups = shrink.find_groups(module.apply, params, ids)
        times.append(time.process_time() - start)
    seconds = min(times)
    size = sum(x.size for x in jax.tree.leaves(params))
    with capsys.disabled():
        print(
            f"\n{len(groups.prunable)} prunable groups of {size:,} weights: "
            f"{seconds:.2f} s of CPU time"
        )
    assert size > 368e6 and len(groups.prunable) == 4 * 24 + 1
    assert seconds < 2


def test_shrink_like_cuts_moments_masks_and_scores():
    tx = optax.chain(
        optax.adamw(1e-3),
        mj.movement_pruning(criterion=mj.EmaMagnitude(), prunable="."),
    )
    state = PLAN.shrink_like(tx.init(PARAMS))
    small = tx.init(PLAN.shrink(PARAMS))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, small)
    updates, _ = tx.update(PLAN.shrink(PARAMS), state, PLAN.shrink(PARAMS))
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(
        jnp.shape, PLAN.shrink(PARAMS)
    )


def test_shrink_like_tells_moments_from_params_of_the_same_name():
    def fn(p, x):
        return jax.nn.relu(x @ p["mu"]["w"]) @ p["w"]

    params = {"mu": {"w": jnp.ones((6, 6))}, "w": jnp.ones((6, 6))}
    plan = shrink.find_groups(fn, params, X).plan({"mu/w:1": np.arange(6) < 2})
    state = plan.shrink_like(optax.chain(optax.adam(1e-3)).init(params))[0][0]
    small = jax.tree.map(jnp.shape, plan.shrink(params))
    assert small == {"mu": {"w": (6, 2)}, "w": (2, 6)}
    assert jax.tree.map(jnp.shape, (state.mu, state.nu)) == (small, small)


def test_shrink_like_refuses_factored_and_flattened_states():
    factored = optax.adafactor(1e-3, min_dim_size_to_factor=2).init(PARAMS)
    with pytest.raises(ValueError, match="the plan says"):
        PLAN.shrink_like(factored)
    with pytest.raises(
        ValueError, match="whose path ends in that of a param.*`optax.flatten`"
    ):
        PLAN.shrink_like({"mu": jnp.ones(80)})


@pytest.fixture
def float64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.usefixtures("float64")
def test_scores_of_units_are_float32_everywhere():
    for reduce in ("sum", "mean", "l2", "max"):
        got = GROUPS.unit_scores(make(dtype=jnp.float64), reduce)
        assert got["up:1"].dtype == jnp.float32


def test_five_steps_after_the_cut_are_five_masked_steps(float64):
    fn, params, inputs = zoo.gqa_decoder()
    groups = shrink.find_groups(fn, params, *inputs)
    rng = np.random.default_rng(0)
    keep = {
        g.name: rng.permutation(np.arange(g.size) < max(1, g.size // 2))
        for g in groups.prunable
    }
    plan, masks = groups.plan(keep), groups.masks(keep)
    target = jnp.asarray(rng.normal(size=fn(params, *inputs).shape))
    tx = optax.adamw(1e-2, eps=1e-4)

    def loss(params, *inputs):
        return ((fn(params, *inputs) - target) ** 2).mean()

    def masked_step(params, state):
        grads = jax.grad(loss)(params, *inputs)
        grads = jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, masks)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    small_loss = shrink.shrunk(jax.value_and_grad(loss), plan)

    def small_step(params, state):
        _, grads = small_loss(params, *inputs)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = plan.mask(params)
    params, state = masked_step(params, tx.init(params))  # moments to carry over
    small, small_state = plan.shrink(params), plan.shrink_like(state)
    masked_step, small_step = jax.jit(masked_step), jax.jit(small_step)
    for _ in range(5):
        params, state = masked_step(params, state)
        small, small_state = small_step(small, small_state)
    want = plan.shrink(params)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(small)):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-12)


def test_shrunk_functions_can_be_mapped_and_exported():
    small = PLAN.shrink(PARAMS)
    run = shrink.shrunk(model, PLAN)
    want = model(PLAN.mask(PARAMS), X)
    mapped = jax.vmap(run, in_axes=(None, 0))(small, X[:, None])[:, 0]
    np.testing.assert_allclose(mapped, want, atol=1e-6)
    exported = export.export(jax.jit(run))(small, X)
    np.testing.assert_allclose(exported.call(small, X), want, atol=1e-6)


def test_dead_units_are_found_and_cut_without_any_change():
    params = dict(PARAMS)
    params["up"] = params["up"].at[:, 1].set(0).at[:, 4].set(0)
    params["bias"] = params["bias"].at[1].set(0)  # 1 is dead, 4 has a bias
    params["down"] = params["down"].at[6].set(0)  # nothing reads 6
    keep = GROUPS.dead(params)
    assert np.flatnonzero(~keep["up:1"]).tolist() == [1, 6]
    plan = GROUPS.plan(keep)
    np.testing.assert_allclose(
        shrink.shrunk(model, plan)(plan.shrink(params), X), model(params, X), atol=1e-6
    )


def test_units_behind_a_sigmoid_are_not_dead():
    def fn(p, x):
        return jax.nn.sigmoid(x @ p["up"] + p["bias"]) @ p["down"]

    groups = shrink.find_groups(fn, PARAMS, X)
    params = {**PARAMS, "up": PARAMS["up"].at[:, 1].set(0)}
    params["bias"] = params["bias"].at[1].set(0)
    assert groups.dead(params)["up:1"].all()


def test_a_layer_that_is_all_dead_keeps_one_unit():
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    assert GROUPS.dead(params)["up:1"].tolist() == [True] + [False] * 7


def test_groups_print_members_layout_and_reasons():
    text = str(GROUPS)
    for part in ("up:1", "down:0 [8]", "prunable", "pinned: axis 1 of input 0"):
        assert part in text


def test_a_group_that_is_none_is_told_from_those_there_are():
    assert GROUPS["up:1"].name == "up:1"
    with pytest.raises(KeyError, match="no group 'up'; there are .*'up:1'"):
        GROUPS["up"]


def test_pinned_by_name():
    groups = shrink.find_groups(model, PARAMS, X, pin="down:0")
    assert groups["up:1"].reason == "pinned by 'down:0'"
    with pytest.raises(ValueError, match="in no `path:axis`"):
        shrink.find_groups(model, PARAMS, X, pin=["kernel"])


def other(p, x):
    return jnp.sort(x @ p["up"] + p["bias"], -1) @ p["down"]


def test_groups_mask_params_without_a_plan():
    by_plan, by_groups = PLAN.mask(PARAMS), GROUPS.mask(PARAMS, KEEP)
    for name, masked in by_groups.items():
        np.testing.assert_array_equal(masked, by_plan[name])
        assert np.any(masked == 0) == (name in ("up", "bias", "down"))


def softmaxed(p, x):
    return jax.nn.softmax(x @ p["up"] + p["bias"]) @ p["down"]


ERRORS = {
    "no arrays": (lambda: shrink.find_groups(model, {}, X), "`params` has no arrays"),
    "a function": (
        lambda: shrink.find_groups(model, {"f": jax.nn.relu}, X),
        "no array.*eqx.partition",
    ),
    "same path": (
        lambda: shrink.find_groups(model, {"a/b": X, "a": {"b": X}}, X),
        "two leaves with the path 'a/b'",
    ),
    "no group": (lambda: GROUPS.plan({"up": np.ones(8, bool)}), "which is no group"),
    "indices": (lambda: GROUPS.plan({"up:1": np.arange(8)}), "must be a bool array"),
    "wrong size": (lambda: GROUPS.plan({"up:1": np.ones(7, bool)}), r"shape \(8,\)"),
    "nothing": (lambda: GROUPS.plan({"up:1": np.zeros(8, bool)}), "keeps no unit"),
    "pinned": (
        lambda: GROUPS.plan({"up:0": np.arange(6) < 3}),
        "`keep` cuts 'up:0', which is pinned: axis 1 of input 0.*Leave it out.$",
    ),
    "no keep": (lambda: GROUPS.plan([1, 2]), "`keep` maps names"),
    "reduce": (
        lambda: GROUPS.unit_scores(PARAMS, "avg"),
        r"`reduce` must be one of \(.*\), got 'avg'",
    ),
    "scores": (
        lambda: GROUPS.unit_scores({"up": X}),
        "the groups were found with \\(6, 8\\)",
    ),
    "sparsity": (
        lambda: shrink.choose(GROUPS, {"up:1": np.ones(8)}, 1.0),
        r"of the units to drop, in \[0, 1\), got 1.0. A fraction for each",
    ),
    "pattern": (
        lambda: shrink.choose(GROUPS, {"up:1": np.ones(8)}, {"head": 0.5}),
        r"`sparsity` has patterns that decide nothing: \['head'\]",
    ),
    "no names": (lambda: shrink.choose(GROUPS, [X], 0.5), "`scores` maps names of gro"),
    "scores of others": (
        lambda: shrink.choose(GROUPS, {"up:1": np.ones(7)}, 0.5),
        r"\['up:1'\] must have shape \(8,\), got \(7,\)",
    ),
    "part of it": (
        lambda: GROUPS.dead({"up": PARAMS["up"]}),
        r"fit the groups: \['bias', 'down'\] missing.* that `find_groups` was",
    ),
    "part of what was cut": (
        lambda: shrink.shrunk(model, PLAN)({"up": X}, X),
        r"`params` does not fit the plan: \['bias', 'down'\] missing.*`plan.shrink",
    ),
    "scope": (lambda: shrink.choose(GROUPS, {}, 0.5, scope="all"), "`scope` must be"),
    "round": (
        lambda: shrink.choose(GROUPS, {}, 0.5, round_to=0),
        "`round_to` must be an integer of at least 1, got 0",
    ),
    "unknown": (lambda: shrink.choose(GROUPS, {"x": X}, 0.5), "no prunable groups"),
    "pattern of sparsity": (
        lambda: shrink.choose(GROUPS, {"up:1": np.ones(8)}, {"(": 0.5}),
        r"`sparsity` takes regular expressions, and '\('",
    ),
    "pattern of pin": (
        lambda: shrink.find_groups(model, PARAMS, X, pin="("),
        "`pin` takes regular expressions",
    ),
    "pattern of only": (lambda: GROUPS.only("("), "`pattern` takes regular expr"),
    "no plan to verify": (
        lambda: shrink.verify(model, PARAMS, None, X),
        "`plan` must be a `Plan`, got NoneType",
    ),
    "no plan to cut": (
        lambda: shrink.cut(model, PARAMS, None, X),
        r"`cut\(fn, groups.plan\(keep\), ...\)`",
    ),
    "nothing finite": (
        lambda: shrink.verify(model, PARAMS, PLAN, X * jnp.nan),
        "no finite number",
    ),
    "no plan": (lambda: shrink.shrunk(model, KEEP), "`plan` must be a `Plan`"),
    "dense params": (
        lambda: shrink.shrunk(model, PLAN)(PARAMS, X),
        r"'bias' has shape \(8,\), the plan says \(4,\)",
    ),
    "shrunk twice": (lambda: PLAN.shrink(PLAN.shrink(PARAMS)), r"the plan says \(8,\)"),
    "other tree": (lambda: PLAN.shrink({"w": X}), "knows no leaf 'w'"),
    "sorted": (
        lambda: shrink.shrunk(other, PLAN)(PLAN.shrink(PARAMS), X),
        "does not allow: sorted along",
    ),
    "softmax": (
        lambda: shrink.shrunk(softmaxed, PLAN)(PLAN.shrink(PARAMS), X),
        "still change what `fn` returns",
    ),
    "untied": (
        lambda: shrink.shrunk(lambda p, x: x @ p["a"] @ p["b"], UNTIED)(
            {"a": jnp.ones((6, 2)), "b": jnp.ones((2, 3))}, X
        ),
        "does not fit `fn`, which ties axis . of '[ab]'",
    ),
}
UNTIED = shrink.Plan(
    {"a": (6, 4), "b": (4, 3)}, {"a": {1: (0, 1)}, "b": {0: (2, 3)}}, {}
)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_came_and_what_to_do(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_symbolic_dimensions_are_refused():
    run = jax.jit(shrink.shrunk(model, PLAN))
    (batch,) = export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 6), jnp.float32)
    with pytest.raises(ValueError, match="symbolic dimensions cannot be shrunk"):
        export.export(run)(PLAN.shrink(PARAMS), x)


def test_abstract_params_are_enough():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert shrink.find_groups(model, shapes, X).plan(KEEP) == PLAN
