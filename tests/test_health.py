"""What `health` finds: faults are flagged by their names, and sound runs are not."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import movement_jax as mj


def run(tx, params, grads, steps):
    """Trains with ``grads(params, key)``; returns params and optimizer state."""

    @jax.jit
    def train(params, keys):
        def step(carry, key):
            params, opt_state = carry
            updates, opt_state = tx.update(grads(params, key), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, tx.init(params)), keys)[0]

    return train(params, jax.random.split(jax.random.key(0), steps))


@functools.cache
def noisy_run(learning_rate, noise, steps=200, **options):
    """Weights drawn to targets of their own size, by gradients with noise."""
    rng = np.random.default_rng(0)
    start, target = (
        {"kernel": jnp.asarray(rng.normal(0, 0.1, (40, 25)), jnp.float32)}
        for _ in range(2)
    )

    def grads(params, key):
        draw = noise * jax.random.normal(key, (40, 25))
        return {"kernel": params["kernel"] - target["kernel"] + draw}

    options = {"track_start": True, "track_noise": True, **options}
    tx = optax.chain(optax.sgd(learning_rate), mj.movement_pruning(**options))
    return run(tx, start, grads, steps)


def finding(report, name):
    (found,) = (found for found in report.findings if found.name == name)
    return found


def warnings(report):
    return [found.name for found in report.findings if found.level == "warning"]


def test_a_sound_run_is_healthy_before_and_after_pruning():
    state = noisy_run(0.02, noise=0.01)
    assert mj.health(state).ok
    assert mj.health(mj.prune(state, 0.8)).ok


def test_a_sound_run_on_a_schedule_is_healthy():
    schedule = mj.cubic(0.8, begin=100, end=250, every=10)
    state = noisy_run(0.02, noise=0.01, steps=300, sparsity=schedule)
    assert mj.health(state).ok


def test_a_tensor_without_noise_has_no_ratio_beside_one_that_has():
    start = {"a": {"kernel": jnp.ones((4, 4))}, "b": {"kernel": jnp.ones((4, 4))}}

    def grads(params, key):
        noise = jax.random.normal(key, (4, 4))
        return {"a": {"kernel": noise}, "b": {"kernel": jnp.zeros((4, 4))}}

    pruning = mj.movement_pruning(track_start=True, track_noise=True)
    report = mj.health(run(optax.chain(optax.sgd(0.1), pruning), start, grads, 20))
    assert [row.snr is None for row in report.tensors] == [False, True]
    *_, line = (row for row in str(report).splitlines() if "b/kernel" in row)
    assert " - " in line


@pytest.mark.parametrize("pruned", [False, True])
def test_a_high_learning_rate_drowns_the_scores_in_noise(pruned):
    state = noisy_run(1.0, noise=0.2)
    report = mj.health(mj.prune(state, 0.8) if pruned else state)
    assert warnings(report) == ["noise"]
    assert "lower or decay the learning rate" in finding(report, "noise").message


def test_a_low_learning_rate_leaves_the_weights_where_they_were():
    report = mj.health(noisy_run(1e-5, noise=0.01))
    assert warnings(report) == ["movement"]
    found = finding(report, "movement")
    assert found.figure < 0.02
    assert "raise the learning rate" in found.message


def test_noise_is_measured_as_it_is():
    # Weights without memory: every step draws them anew around their means.
    sigma, mean = 0.05, np.linspace(-1, 1, 4000, dtype=np.float32).reshape(40, 100)

    def grads(params, key):
        draw = mean + sigma * jax.random.normal(key, mean.shape)
        return {"kernel": params["kernel"] - draw}

    tx = optax.chain(optax.sgd(1.0), mj.movement_pruning(track_noise=True))
    (row,) = mj.health(run(tx, {"kernel": jnp.asarray(mean)}, grads, 100)).tensors
    assert row.sigma == pytest.approx(sigma, rel=0.02)
    assert row.snr == pytest.approx(math.sqrt(1 / 3) / sigma, rel=0.02)
    assert row.noise_floor == pytest.approx(sigma * math.sqrt(2 / math.pi), rel=0.02)


def test_weights_of_pure_noise_score_within_its_reach():
    def grads(params, key):
        return {"kernel": params["kernel"] - jax.random.normal(key, (100, 100))}

    for criterion in (mj.Magnitude(), mj.EmaMagnitude(0.9), mj.EmaMagnitude(0.99)):
        decay = getattr(criterion, "decay", 0.9)
        tx = optax.chain(
            optax.sgd(1.0), mj.movement_pruning(None, criterion, track_noise=True)
        )
        steps = math.ceil(5 / (1 - decay))
        state = run(tx, {"kernel": jnp.zeros((100, 100))}, grads, steps)
        (row,) = mj.health(state, sparsity=0.8).tensors
        assert row.in_noise > 0.9, criterion


def test_noise_of_pruned_weights_does_not_dilute_that_of_the_kept():
    before = mj.health(noisy_run(0.5, noise=0.1)).tensors[0].sigma
    state = noisy_run(0.5, noise=0.1, sparsity=mj.one_shot(0.8, 100))
    (row,) = mj.health(state).tensors
    assert row.density == pytest.approx(0.2)
    assert row.sigma == pytest.approx(before, rel=0.1)


def test_other_scores_are_judged_by_the_signal_to_noise_ratio():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(0, 0.1, (40, 25)), jnp.float32)}

    def grads(params, key):
        return {"kernel": params["kernel"] - jax.random.normal(key, (40, 25))}

    for rate, flagged in ((1.0, ["noise"]), (1e-3, [])):
        tx = mj.movement_pruning(
            None, mj.Movement(), inner=optax.sgd(rate), track_noise=True
        )
        assert warnings(mj.health(run(tx, params, grads, 50))) == flagged


def test_movement_is_the_relative_norm_of_the_change():
    params = {"a": {"kernel": jnp.full((2, 2), 1.0)}, "b": {"w": jnp.full((2, 2), 2.0)}}
    tx = optax.chain(optax.sgd(0.1), mj.movement_pruning())
    state = run(tx, params, lambda p, key: jax.tree.map(jnp.ones_like, p), 1)
    report = mj.health(state, start=params)
    assert [row.movement for row in report.tensors] == pytest.approx([0.1, 0.05])
    figure = finding(report, "movement").figure
    assert figure == pytest.approx(math.sqrt(8 * 0.01 / (4 + 16)))
    assert report.ok


def test_weights_that_pruning_zeroed_did_not_move():
    kernel = jnp.array([[1.0, 2.0], [0.1, 0.2]])
    tx = mj.movement_pruning(criterion=mj.Magnitude(), track_start=True)
    params, opt_state = mj.prune(({"kernel": kernel}, tx.init({"kernel": kernel})), 0.5)
    params = {"kernel": params["kernel"] * 1.5}
    assert mj.health((params, opt_state)).tensors[0].movement == pytest.approx(0.5)


def test_a_frozen_tensor_among_moving_ones_is_named():
    params = {name: {"kernel": jnp.ones((4, 4))} for name in ("frozen", "moving")}
    tx = optax.chain(optax.sgd(0.1), mj.movement_pruning(track_start=True))

    def grads(params, key):
        return {"frozen": {"kernel": jnp.zeros((4, 4))}, "moving": params["moving"]}

    found = finding(mj.health(run(tx, params, grads, 5)), "movement")
    assert found.level == "warning"
    assert "1 of 2 tensors (frozen/kernel)" in found.message


def test_scores_from_gradients_do_not_need_weights_to_move_far():
    tx = mj.movement_pruning(
        None, mj.Movement(), inner=optax.sgd(1e-5), track_start=True
    )
    params = {"kernel": jnp.ones((4, 4))}
    report = mj.health(run(tx, params, lambda p, key: p, 3))
    assert finding(report, "movement").figure < 0.02
    assert report.ok


WRONG_ORDERS = {
    "adamw": optax.adamw(0.1),
    "sign": optax.scale(-1.0),
    "average": optax.ema(0.9),
    "clip": optax.clip_by_global_norm(1e-2),
    "decay": optax.add_decayed_weights(0.1),
}
PARAMS = {"kernel": np.array([[3.0, -0.1], [0.2, -4.0]], np.float32)}


def steady(params, key):
    return jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), params)


@pytest.mark.parametrize("after", WRONG_ORDERS.values(), ids=WRONG_ORDERS)
def test_what_follows_pruning_in_the_chain_is_flagged_by_the_second_step(after):
    tx = optax.chain(mj.movement_pruning(0.5, mj.Magnitude()), after)
    report = mj.health(run(tx, PARAMS, steady, 2))
    found = finding(report, "position")
    assert (found.level, found.figure) == ("warning", 2)
    assert "`optax.chain(optimizer, movement_pruning(...))`" in found.message


@pytest.mark.parametrize("before", WRONG_ORDERS.values(), ids=WRONG_ORDERS)
def test_what_comes_before_pruning_in_the_chain_is_not_flagged(before):
    tx = optax.chain(before, mj.movement_pruning(0.5, mj.Magnitude()))
    assert "position" not in warnings(mj.health(run(tx, PARAMS, steady, 2)))


WRAPPED = {
    "inner": mj.movement_pruning(0.5, mj.Taylor(), inner=optax.adamw(0.1)),
    "accumulated": optax.MultiSteps(
        optax.chain(optax.adam(0.1), mj.movement_pruning(0.5, mj.Magnitude())), 2
    ).gradient_transformation(),
    "if finite": optax.apply_if_finite(
        optax.chain(optax.adam(0.1), mj.movement_pruning(0.5, mj.Magnitude())), 3
    ),
}


@pytest.mark.parametrize("tx", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_wrapped_optimizers_are_not_flagged(tx, dtype):
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)
    state = run(tx, params, steady, 5)
    assert np.sum(np.asarray(state[0]["kernel"] == 0)) == 2
    assert "position" not in warnings(mj.health(state))


def test_dense_weights_kept_for_regrowth_are_not_flagged():
    tx = mj.movement_pruning(0.5, mj.Movement(), inner=optax.sgd(0.1), regrow=True)
    assert finding(mj.health(run(tx, PARAMS, steady, 3)), "position").level == "ok"


def test_the_largest_weight_that_came_alive_is_named():
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = mj.prune(
        (params, mj.movement_pruning(None, mj.Magnitude()).init(params)), 0.5
    )
    alive = {"kernel": state[0]["kernel"].at[0, 1].set(-0.25)}
    found = finding(mj.health((alive, state[1])), "position")
    assert found.figure == 1
    assert "largest 0.25, in kernel" in found.message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pruned_weights_that_are_not_finite_are_not_blamed_on_the_chain(value):
    params, opt_state = pruned()
    broken = {"kernel": params["kernel"].at[0, 1].set(value)}
    found = finding(mj.health((broken, opt_state)), "position")
    assert (found.level, found.figure) == ("warning", 1)
    assert "not finite (kernel)" in found.message and "chain" not in found.message
    for mended in (
        mj.apply_masks(broken, mj.find_state(opt_state).masks),
        mj.prune((broken, opt_state), 0.5)[0],
    ):
        assert finding(mj.health((mended, opt_state)), "position").level == "ok"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_movement_of_weights_that_are_not_finite_cannot_be_told(value):
    params, opt_state = pruned(track_start=True)
    params = {"kernel": params["kernel"].at[0, 0].set(value)}
    report = mj.health((params, opt_state))
    found = finding(report, "movement")
    assert (found.level, found.figure) == ("warning", None)
    assert "not finite (kernel)" in found.message
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("scale", [1e-20, 1e-30, 1e25])
def test_movement_does_not_hang_on_the_scale_of_the_weights(scale):
    params = {"kernel": jnp.full((2, 2), scale, jnp.float32)}
    _, opt_state = pruned(params, sparsity=0.0)
    moved = {"kernel": 1.1 * params["kernel"]}
    found = finding(mj.health((moved, opt_state), start=params), "movement")
    assert found.figure == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("criterion", [mj.Magnitude(), mj.Taylor()])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_noise_that_is_not_finite_is_a_warning(criterion, value):
    inner = optax.sgd(0.1)
    tx = mj.movement_pruning(None, criterion, inner=inner, track_noise=True)
    params, found = run(tx, PARAMS, steady, 2)
    variance = {"kernel": jnp.float32(value)}
    found = found._replace(tracked=found.tracked._replace(variance=variance))
    report = mj.health((params, found))
    noise = finding(report, "noise")
    assert (noise.level, noise.figure) == ("warning", None)
    json.dumps(report.to_dict(), allow_nan=False)


def with_events(state, **events):
    params, found = state
    events = {name: jnp.asarray(value) for name, value in events.items()}
    return params, found._replace(events=found.events._replace(**events))


def pruned(params=None, sparsity=0.5, **options):
    params = jax.tree.map(jnp.asarray, params or PARAMS)
    tx = mj.movement_pruning(None, mj.Magnitude(), **options)
    return mj.prune((params, tx.init(params)), sparsity)


@pytest.mark.parametrize(("good", "level"), [(1, "warning"), (999, "note")])
def test_skipped_steps_are_reported_as_a_fraction(good, level):
    params, found = with_events(pruned(), skipped=1)
    report = mj.health((params, found._replace(step=jnp.int32(good))))
    assert finding(report, "steps").level == level
    assert finding(report, "steps").figure == pytest.approx(1 / (good + 1))
    assert "`optax.apply_if_finite(optimizer" in finding(report, "steps").message


def test_refused_changes_are_reported():
    report = mj.health(with_events(pruned(), refused=2))
    assert finding(report, "changes").figure == 2


def test_churn_is_the_fraction_that_changed_places():
    tx = mj.movement_pruning(0.5, mj.Magnitude(), inner=optax.sgd(1.0), regrow=True)
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
    opt_state = tx.init(params)
    grads = {"kernel": jnp.zeros((2, 4))}
    _, opt_state = tx.update(grads, opt_state, params)
    assert opt_state.events.churn == 0  # four went, as was asked for
    grads = {"kernel": jnp.zeros((2, 4)).at[1, 3].set(7.5)}  # the most, now the least
    _, opt_state = tx.update(grads, opt_state, params)
    assert opt_state.events.churn == 2 / 8


@pytest.mark.parametrize(("before", "after"), [(6, 2), (2, 6)])
def test_what_only_goes_or_only_comes_back_is_no_churn(before, after):
    tx = mj.movement_pruning(
        lambda step: jnp.where(step < 2, 1 - before / 8, 1 - after / 8),
        mj.Magnitude(),
        inner=optax.sgd(1.0),
        regrow=True,
    )
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
    opt_state = tx.init(params)
    for kept in (before, after):
        _, opt_state = tx.update({"kernel": jnp.zeros((2, 4))}, opt_state, params)
        assert opt_state.masks["kernel"].sum() == kept
        assert opt_state.events.churn == 0


def test_what_cannot_be_measured_yet_is_a_note():
    tx = mj.movement_pruning(track_start=True, track_noise=True)
    params = {"kernel": jnp.zeros((2, 4))}
    report = mj.health((params, tx.init(params)))
    assert "No noise was measured yet" in finding(report, "noise").message
    assert "initial weights are zero" in finding(report, "movement").message


def test_weights_that_stand_still_are_no_weak_signal():
    tx = mj.movement_pruning(None, mj.Random(0), track_noise=True)
    params = {"kernel": jnp.ones((2, 4))}
    _, opt_state = tx.update({"kernel": jnp.zeros((2, 4))}, tx.init(params), params)
    found = finding(mj.health((params, opt_state)), "noise")
    assert (found.level, found.message) == ("ok", "The weights do not move.")


@pytest.mark.parametrize(("churn", "level"), [(0.2, "warning"), (0.01, "ok")])
def test_churn_above_a_twentieth_is_flagged(churn, level):
    state = with_events(pruned(regrow=True), churn=np.float32(churn))
    found = finding(mj.health(state), "churn")
    assert (found.level, found.figure) == (level, pytest.approx(churn))


def test_scores_that_are_not_finite_are_flagged():
    params = {"kernel": np.array([[np.nan, 1.0], [2.0, 3.0]], np.float32)}
    found = finding(mj.health(pruned(params)), "scores")
    assert (found.level, found.figure) == ("warning", 1)


def test_nothing_scored_yet_is_flagged():
    tx = mj.movement_pruning()
    report = mj.health((PARAMS, tx.init(PARAMS)))
    assert warnings(report) == ["scores"]
    assert "Nothing has been scored yet" in finding(report, "scores").message


def test_a_tensor_that_a_global_threshold_emptied_is_named():
    params = {
        "large": {"kernel": np.ones((20, 20))},
        "small": {"kernel": np.ones((20, 20))},
    }
    params["small"]["kernel"] = params["small"]["kernel"] * 1e-3
    found = finding(mj.health(pruned(params, 0.5, allocation=mj.Global())), "collapse")
    assert found.level == "warning"
    assert found.figure == pytest.approx(1 / 400)  # `min_keep`
    assert "1 of 2 tensors" in found.message and "small/kernel" in found.message


def test_a_high_sparsity_that_was_asked_for_is_no_collapse():
    report = mj.health(pruned({"kernel": np.arange(1e4).reshape(100, 100)}, 0.995))
    assert finding(report, "collapse").level == "ok"


def test_an_empty_layer_of_a_stacked_kernel_is_a_collapse():
    params, found = pruned({"kernel": np.ones((3, 4, 5))}, stacked="kernel")
    masks = {"kernel": found.masks["kernel"].at[1].set(False)}
    params = mj.apply_masks(params, masks)
    report = mj.health((params, found._replace(masks=masks)))
    assert finding(report, "collapse").figure == 0
    assert finding(report, "collapse").level == "warning"


@pytest.mark.parametrize(
    ("name", "way"), [("movement", "track_start=True"), ("noise", "track_noise=True")]
)
def test_what_was_not_measured_is_a_note_that_says_how_to(name, way):
    found = finding(mj.health(pruned()), name)
    assert (found.level, found.figure) == ("note", None)
    assert way in found.message


def test_a_finalized_state_can_be_looked_at():
    assert mj.health(mj.finalize(pruned())).ok


def test_prints_findings_and_tensors_as_tables():
    text = str(mj.health(noisy_run(1e-5, noise=0.01)))
    lines = text.split("\n")
    assert lines[2].split() == ["Level", "What", "Finding"]
    assert lines[4].split()[:2] == ["warning", "movement"]
    assert any(line.split()[:2] == ["kernel", "1.000"] for line in lines)
    assert max(map(len, lines)) <= 120


def test_converts_to_json():
    report = mj.health(noisy_run(0.02, noise=0.01)).to_dict()
    assert json.loads(json.dumps(report, allow_nan=False))["ok"] is True


def test_start_must_fit_the_params():
    with pytest.raises(ValueError, match="`start` does not fit"):
        mj.health(pruned(), start={"kernel": jnp.ones((3, 3))})


def test_a_percentage_is_refused():
    with pytest.raises(ValueError, match="Did you mean 0.8"):
        mj.health(pruned(), sparsity=80)


def test_traced_states_are_refused():
    with pytest.raises(ValueError, match="outside of `jit`"):
        jax.jit(lambda state: mj.health(state).ok)(pruned())
