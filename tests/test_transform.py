import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import movement_jax as mj

RNG = np.random.default_rng(0)
PARAMS = {
    "embedding": jnp.asarray(RNG.standard_normal((5, 4)), jnp.float32),
    "dense": {
        "bias": jnp.asarray(RNG.standard_normal(6), jnp.float32),
        "kernel": jnp.asarray(RNG.standard_normal((4, 6)), jnp.float32),
    },
    "out": {"kernel": jnp.asarray(RNG.standard_normal((6, 5)), jnp.float32)},
}


def noise(seed):
    """Gradients like the params."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), PARAMS
    )


GRADS = [noise(seed) for seed in range(8)]


def masks_of(opt_state):
    return jax.tree.leaves(mj.find_state(opt_state).masks)


def kernels(params):
    return [params["dense"]["kernel"], params["out"]["kernel"]]


def training_step(tx):
    """A compiled step that counts in ``traces`` how often it is traced."""
    traces = []

    @jax.jit
    def step(params, opt_state, grads):
        traces.append(1)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step, traces


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_thousand_steps_compile_once_and_keep_pruned_weights_at_zero():
    end = 850
    schedule = mj.cubic(0.9, begin=100, end=end, every=7)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    tx = optax.chain(optimizer, mj.movement_pruning(schedule, mj.EmaMagnitude(0.99)))
    step, traces = training_step(tx)
    params, opt_state, asked = PARAMS, tx.init(PARAMS), 0.0
    for t in range(1, 1001):
        params, opt_state = step(params, opt_state, GRADS[t % 8])
        if t > 100 and ((t - 100) % 7 == 0 or t == end):
            asked = 0.9 * (1 - (1 - min((t - 100) / (end - 100), 1)) ** 3)
        for weight, mask in zip(kernels(params), masks_of(opt_state)):
            mask = np.asarray(mask)
            assert mask.size - mask.sum() == round(float(np.float32(asked)) * mask.size)
            # The bits: -0.0 would not do.
            assert not np.any(np.asarray(weight).view(np.int32)[~mask])
    assert len(traces) == 1


def test_the_end_is_reached_off_the_grid():
    tx = mj.movement_pruning(mj.cubic(0.9, 0, 199, every=100), mj.Magnitude())
    step, _ = training_step(tx)
    params, opt_state = PARAMS, tx.init(PARAMS)
    sparsity = {}
    for t in range(1, 201):
        params, opt_state = step(params, opt_state, noise(0))
        sparsity[t] = float(opt_state.sparsity)
    halfway = 0.9 * (1 - (1 - 100 / 199) ** 3)
    np.testing.assert_allclose(
        [sparsity[t] for t in (99, 100, 198, 199, 200)],
        [0, halfway, halfway, 0.9, 0.9],
        rtol=1e-6,
    )


def test_masks_rest_after_the_end_although_weights_could_come_back():
    tx = mj.movement_pruning(
        mj.cubic(0.5, 0, 5, every=50), mj.Magnitude(), inner=optax.sgd(0), regrow=True
    )
    params, state, changes = PARAMS, tx.init(PARAMS), []
    for _ in range(9):
        _, state = tx.update(params, state, params)
        params = jax.tree.map(lambda p: p[::-1], params)
        changes.append(int(state.events.changes))
    assert changes == [0, 0, 0, 0, 1, 1, 1, 1, 1]


def test_updates_without_the_weights_are_refused():
    tx = mj.movement_pruning(0.5)
    with pytest.raises(ValueError, match="updates"):
        tx.update({}, tx.init(PARAMS), PARAMS)


def test_pruned_weights_never_return_unless_regrowth_is_on():
    pruning = mj.movement_pruning(mj.linear(0.8, 0, 40), mj.Magnitude())
    tx = optax.chain(optax.sgd(0.5, 0.9), pruning)
    step, _ = training_step(tx)
    params, opt_state = PARAMS, tx.init(PARAMS)
    before = masks_of(opt_state)
    for t in range(50):
        params, opt_state = step(params, opt_state, noise(t))
        for old, new in zip(before, masks_of(opt_state)):
            assert not np.any(np.asarray(new) & ~np.asarray(old))
        before = masks_of(opt_state)


def test_regrowth_keeps_dense_params_and_masks_only_what_is_seen():
    tx = mj.movement_pruning(0.5, mj.Movement(), inner=optax.adam(0.1), regrow=True)
    step, _ = training_step(tx)
    params, opt_state = step(PARAMS, tx.init(PARAMS), noise(0))
    after, _ = step(params, opt_state, noise(1))
    seen = mj.effective_params(params, opt_state)
    for mask, old, new, shown in zip(
        masks_of(opt_state), kernels(params), kernels(after), kernels(seen)
    ):
        mask = np.asarray(mask)
        assert mask.sum() == mask.size / 2
        np.testing.assert_array_equal(new[~mask], old[~mask])
        assert np.all(old[~mask] != 0) and not np.any(shown[~mask])
        np.testing.assert_array_equal(shown[mask], old[mask])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("update_dtype", [jnp.bfloat16, jnp.float32])
def test_a_pruned_weight_cancels_to_zero_in_every_dtype(dtype, update_dtype):
    weights = jnp.asarray(RNG.standard_normal((16, 16)) * 100, dtype)
    params = {"kernel": weights.at[0, 0].set(-0.0)}
    tx = mj.movement_pruning(0.5, mj.Magnitude())
    step, _ = training_step(tx)
    grads = {"kernel": jnp.ones((16, 16), update_dtype)}
    params, opt_state = step(params, tx.init(params), grads)
    assert params["kernel"].dtype == dtype
    pruned = np.asarray(params["kernel"])[~np.asarray(opt_state.masks["kernel"])]
    assert pruned.size == 128 and not np.any(pruned.view(np.int8))


def test_scores_are_never_taken_from_the_first_zero_state():
    tx = mj.movement_pruning(0.5)
    step, _ = training_step(tx)
    params, opt_state = step(PARAMS, tx.init(PARAMS), noise(0))
    assert all(np.all(m) for m in masks_of(opt_state))
    _, opt_state = step(params, opt_state, noise(1))
    assert [int(m.sum()) for m in masks_of(opt_state)] == [12, 15]


def test_weights_that_all_score_zero_are_pruned_by_count():
    tx = mj.movement_pruning(0.5)
    step, _ = training_step(tx)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    opt_state = tx.init(zeros)
    for _ in range(2):
        _, opt_state = step(zeros, opt_state, zeros)
    assert [int(m.sum()) for m in masks_of(opt_state)] == [12, 15]


def test_masks_change_only_when_the_schedule_says_so():
    schedule = mj.Stepwise(optax.linear_schedule(0.0, 0.8, 8), every=4)
    tx = mj.movement_pruning(schedule, mj.Magnitude())
    step, _ = training_step(tx)
    params, opt_state = PARAMS, tx.init(PARAMS)
    changes = []
    for t in range(9):
        params, opt_state = step(params, opt_state, noise(t))
        changes.append(int(opt_state.events.changes))
    assert changes == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    np.testing.assert_allclose(mj.sparsity_of(opt_state), (19 + 24) / 54, rtol=1e-6)


@pytest.mark.parametrize("level", [np.nan, -0.1, 1.5, 80.0, np.inf])
def test_a_traced_sparsity_out_of_range_is_refused_and_counted(level):
    tx = mj.movement_pruning(
        lambda step: level + 0.0 * step, mj.Magnitude(), regrow=True
    )
    params, opt_state = training_step(tx)[0](PARAMS, tx.init(PARAMS), noise(0))
    assert all(np.all(m) for m in masks_of(opt_state))
    assert (opt_state.events.refused, opt_state.events.changes) == (1, 0)
    assert opt_state.sparsity == 0


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_the_ends_of_the_range_are_within_it(level):
    tx = mj.movement_pruning(
        lambda step: level + 0.0 * step,
        mj.Magnitude(),
        allocation=mj.Uniform(min_keep=0),
        regrow=True,
        inner=optax.sgd(0.1),
    )
    _, opt_state = training_step(tx)[0](PARAMS, tx.init(PARAMS), noise(0))
    assert (opt_state.events.refused, opt_state.events.changes) == (0, 1)
    assert mj.sparsity_of(opt_state) == level


def test_a_schedule_that_returns_a_percentage_is_refused():
    tx = mj.movement_pruning(lambda step: 80.0, mj.Magnitude())
    with pytest.raises(ValueError, match="got 80.0. Did you mean 0.8?"):
        tx.update(noise(0), tx.init(PARAMS), PARAMS)


def test_a_stack_of_layers_is_pruned_layer_by_layer():
    weights = np.concatenate([np.full((1, 2, 4), 1.0), np.full((1, 2, 4), 100.0)])
    params = {"layers": {"kernel": jnp.asarray(weights, jnp.float32)}}
    kept = {}
    for stacked in (None, "layers"):
        tx = mj.movement_pruning(0.5, mj.Magnitude(), stacked=stacked)
        _, state = tx.update(params, tx.init(params), params)
        kept[stacked] = np.asarray(state.masks["layers"]["kernel"]).sum(axis=(1, 2))
    np.testing.assert_array_equal(kept[None], [0, 8])
    np.testing.assert_array_equal(kept["layers"], [4, 4])


def test_the_step_counter_stops_at_its_largest_value():
    tx = mj.movement_pruning(None)
    last = tx.init(PARAMS)._replace(step=jnp.int32(2**31 - 1))
    _, state = tx.update(noise(0), last, PARAMS)
    assert state.step == 2**31 - 1


def test_tracking_copies_the_start_and_averages_the_weights():
    tx = mj.movement_pruning(None, track_start=True, track_noise=True)
    step, _ = training_step(tx)
    params, opt_state = step(PARAMS, tx.init(PARAMS), noise(0))
    start, weight = kernels(PARAMS)[0], kernels(params)[0]
    tracked = opt_state.tracked
    np.testing.assert_array_equal(tracked.start["dense"]["kernel"], start)
    np.testing.assert_allclose(
        tracked.mean["dense"]["kernel"], 0.9 * start + 0.1 * weight, rtol=1e-5
    )
    np.testing.assert_allclose(
        tracked.variance["dense"]["kernel"],
        0.1 * np.mean((np.asarray(weight) - np.asarray(start)) ** 2),
        rtol=1e-5,
    )


@dataclasses.dataclass(frozen=True)
class Longest:
    """The criterion of the guide: how many steps a weight spent above a level."""

    level: float = 0.5
    needs_gradients: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True

    def init(self, params):
        return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.int32), params)

    def update(self, state, *, params, grads, new_params):
        del params, grads
        return jax.tree.map(
            lambda s, w: s + (jnp.abs(w) > self.level), state, new_params
        )

    def scores(self, state, params):
        del params
        return jax.tree.map(lambda s: s.astype(jnp.float32), state)


def test_a_criterion_of_ones_own_works_with_schedule_allocation_and_prune():
    tx = mj.movement_pruning(
        mj.linear(0.5, 0, 10), Longest(), allocation=mj.Global(), prunable="kernel"
    )
    step, _ = training_step(tx)
    params, opt_state = PARAMS, tx.init(PARAMS)
    count = [np.zeros(w.shape, int) for w in kernels(params)]
    for t in range(12):
        updates = jax.tree.map(lambda u: 0.1 * u, noise(t))
        params, opt_state = step(params, opt_state, updates)
        count = [c + (np.abs(w) > 0.5) for c, w in zip(count, kernels(params))]
    for got, want in zip(jax.tree.leaves(opt_state.scores), count):
        np.testing.assert_array_equal(got, want)
    assert sum(int(m.sum()) for m in masks_of(opt_state)) == 27
    assert isinstance(Longest(), mj.Criterion)
    _, opt_state = jax.jit(mj.prune)((params, opt_state), 0.75)
    assert sum(int(m.sum()) for m in masks_of(opt_state)) == 54 - 40


@dataclasses.dataclass(frozen=True)
class Unsaid:
    """A criterion that does not say whether it accumulates, so it does."""

    level = 0.5
    init, update, scores = Longest.init, Longest.update, Longest.scores


def test_a_criterion_that_does_not_say_otherwise_is_not_asked_before_it_has_scored():
    tx = mj.movement_pruning(0.5, Unsaid(), prunable="kernel")
    step, _ = training_step(tx)
    params, opt_state, reached = PARAMS, tx.init(PARAMS), []
    for t in range(3):
        params, opt_state = step(params, opt_state, noise(t))
        reached.append(float(mj.find_state(opt_state).sparsity))
    assert reached == [0, 0.5, 0.5]


class Unhashable:
    scores = n_drop = init = update = check = None
    __hash__ = None


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: mj.movement_pruning(80), ValueError, "got 80. Did you mean 0.8?"),
        (lambda: mj.movement_pruning(80.0), ValueError, "got 80.0. Did you mean 0.8?"),
        (lambda: mj.movement_pruning(np.float32(80)), ValueError, "mean 0.8?"),
        (lambda: mj.movement_pruning(-0.1), ValueError, "in .0, 1., got -0.1"),
        (lambda: mj.movement_pruning(float("nan")), ValueError, "got nan"),
        (lambda: mj.movement_pruning(True), TypeError, "True of type bool. For exampl"),
        (lambda: mj.movement_pruning("0.5"), TypeError, "'0.5' of type str.*=0.8`"),
        (lambda: mj.movement_pruning(1), ValueError, r"Uniform\(min_keep=0\)`"),
        (
            lambda: mj.movement_pruning(mj.cubic(1.0, 0, 9), allocation=mj.Global()),
            ValueError,
            r"would empty every tensor.*`allocation=Global\(min_keep=0\)`",
        ),
        (
            lambda: mj.movement_pruning(0.5, mj.Movement()),
            ValueError,
            r"Wrap.*`movement_pruning\(sparsity, Movement\(\), inner=optax.adamw",
        ),
        (lambda: mj.movement_pruning(0.5, mj.Taylor()), ValueError, "`Taylor` needs"),
        (
            lambda: mj.movement_pruning(0.5, mj.Magnitude),
            TypeError,
            r"`criterion` must be an object with a method `scores`.*`EmaMagnitude\(\)",
        ),
        (
            lambda: mj.movement_pruning(0.5, allocation="global"),
            TypeError,
            r"with a method `n_drop`, such as `Uniform\(\)`, got 'global'",
        ),
        (
            lambda: mj.movement_pruning(0.5, Unhashable()),
            TypeError,
            r"`criterion` must be hashable.*make Unhashable a `dataclass\(frozen=True",
        ),
        (
            lambda: mj.movement_pruning(0.5, allocation=Unhashable()),
            TypeError,
            "`allocation` must be hashable",
        ),
        (
            lambda: mj.movement_pruning(0.5, mj.Movement(), inner=1e-3),
            TypeError,
            r"`inner` must be an optax optimizer, got 0.001.*inner=optax.adamw",
        ),
        (
            lambda: mj.movement_pruning(0.5, stacked="layers").init(PARAMS),
            ValueError,
            r"(?s)`stacked`='layers' must be found.*dense/kernel \(4, 6\)\n",
        ),
        (
            lambda: mj.movement_pruning(0.5).update(
                noise(0), mj.movement_pruning(0.5).init(PARAMS)
            ),
            ValueError,
            r"call `tx.update\(updates, state, params\)`, got params=None",
        ),
    ],
)
def test_a_wrong_argument_is_refused_with_the_right_call(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_sparsity_one_empties_a_tensor_if_asked_for_twice():
    tx = mj.movement_pruning(1.0, mj.Magnitude(), allocation=mj.Uniform(min_keep=0))
    params, _ = training_step(tx)[0](PARAMS, tx.init(PARAMS), noise(0))
    assert not any(np.any(w) for w in kernels(params))


def test_a_change_that_was_due_before_anything_was_scored_is_made_up_for():
    tx = mj.movement_pruning(mj.cubic(0.5, begin=0, end=1, every=1000))
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
    state, zeros = tx.init(params), {"kernel": jnp.zeros((2, 4))}
    for _ in range(2):
        updates, state = tx.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["kernel"], [[0, 0, 0, 0], [5, 6, 7, 8]])


def test_a_pruned_weight_that_came_back_is_zero_after_the_next_step():
    tx = optax.chain(optax.adamw(0.1), mj.movement_pruning(0.5, mj.Magnitude()))
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
    state, grads = tx.init(params), {"kernel": jnp.ones((2, 4))}
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert not params["kernel"][0].any() and params["kernel"][1].all()
        params = {"kernel": params["kernel"] + 1.0}  # something else moves them all


def test_a_state_in_the_place_of_params_is_told_apart():
    tx = mj.movement_pruning()
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(TypeError, match=r"call `tx.update\(updates, state, params\)`"):
        tx.update(params, params, tx.init(params))


def test_a_percentage_in_a_jax_array_is_refused():
    with pytest.raises(ValueError, match="Did you mean 0.8"):
        mj.movement_pruning(jnp.float32(80))


def test_a_stacked_pattern_must_be_a_regular_expression():
    with pytest.raises(ValueError, match="`stacked` takes regular expressions"):
        mj.movement_pruning(stacked="(").init({"kernel": jnp.ones((2, 2))})
