import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import movement_jax as mj


def test_the_cubic_schedule_follows_its_formula():
    schedule = mj.cubic(0.9, begin=100, end=500, initial=0.1)
    steps = np.array([0, 100, 101, 200, 300, 499, 500, 10**6])
    got = [float(schedule(int(t))) for t in steps]
    done = np.clip((steps - 100) / 400, 0, 1)
    np.testing.assert_allclose(got, 0.9 - 0.8 * (1 - done) ** 3, rtol=1e-6)


def test_the_linear_schedule_rises_by_the_same_amount():
    schedule = mj.linear(0.8, begin=10, end=50)
    got = [float(schedule(t)) for t in (0, 10, 20, 30, 40, 50, 60)]
    np.testing.assert_allclose(got, [0, 0, 0.2, 0.4, 0.6, 0.8, 0.8], rtol=1e-6)


def test_one_shot_prunes_at_its_step_and_not_before():
    schedule = mj.one_shot(0.5, step=7)
    assert [float(schedule(t)) for t in (0, 6, 7, 8)] == [0.0, 0.0, 0.5, 0.5]
    assert [bool(schedule.due(t)) for t in (0, 6, 7)] == [False, False, True]


@pytest.mark.parametrize("final", [0.1, 1 / 3, 0.7, 0.9, 0.999])
def test_the_end_is_the_final_sparsity_to_the_last_bit(final):
    schedule = mj.cubic(final, begin=0, end=777)
    assert np.asarray(schedule(777)) == np.float32(final)
    assert schedule.target(777).progress == 1.0
    assert schedule.target(700).progress < 1.0


def test_masks_change_on_the_grid_and_at_an_end_off_the_grid():
    schedule = mj.cubic(0.9, begin=50, end=199, every=60)
    due = [t for t in range(400) if bool(schedule.due(t))]
    assert due == [50, 110, 170, 199, 230, 290, 350]


def test_progress_is_the_share_of_the_final_sparsity():
    schedule = mj.linear(0.8, begin=0, end=4)
    got = [float(schedule.target(t).progress) for t in range(6)]
    np.testing.assert_allclose(got, [0, 0.25, 0.5, 0.75, 1, 1], rtol=1e-6)


def test_fractions_are_taken_of_the_whole_run():
    schedule = mj.cubic(0.9, begin=0.1, end=1.0, every=0.02, total_steps=500)
    assert (schedule.begin, schedule.end, schedule.every) == (50, 500, 10)


def test_a_fraction_of_less_than_one_step_means_every_step():
    assert mj.cubic(0.9, 0.0, 1.0, every=0.001, total_steps=100).every == 1


def test_whole_floats_are_steps():
    assert mj.cubic(0.9, begin=0.0, end=200.0).end == 200


def test_stepwise_changes_masks_at_multiples_only():
    schedule = mj.Stepwise(optax.linear_schedule(0.0, 0.9, 90), every=30)
    assert [t for t in range(100) if bool(schedule.due(t))] == [0, 30, 60, 90]
    np.testing.assert_allclose(schedule(30), 0.3, rtol=1e-6)
    assert mj.Stepwise(0.5, every=3)(11) == 0.5


def test_a_schedule_of_a_traced_step_keeps_its_dtype():
    level = jax.eval_shape(mj.cubic(0.9, 0, 9), jax.ShapeDtypeStruct((), jnp.int32))
    assert (level.dtype, level.shape, level.weak_type) == (jnp.float32, (), False)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: mj.cubic(80, 0, 9), ValueError, "got 80. Did you mean 0.8?"),
        (
            lambda: mj.cubic(-0.1, 0, 9),
            ValueError,
            "`final` is the fraction of weights .* got -0",
        ),
        (lambda: mj.cubic(float("nan"), 0, 9), ValueError, "got nan"),
        (lambda: mj.cubic(True, 0, 9), TypeError, "True of type bool.*`final=0.8`"),
        (lambda: mj.cubic("0.5", 0, 9), TypeError, "'0.5' of type str"),
        (lambda: mj.cubic(0.5, 0, 9, initial=5), ValueError, "`initial`.*mean 0.05"),
        (lambda: mj.cubic(0.5, 0, 9, initial=0.9), ValueError, "must not exceed"),
        (lambda: mj.cubic(0.5, 9, 3), ValueError, "must not come after `end`, got 9"),
        (
            lambda: mj.cubic(0.5, -1, 3),
            ValueError,
            "`begin` must be .* got -1. Fractions of a run",
        ),
        (lambda: mj.cubic(0.5, True, 3), ValueError, "`begin` must be .* got True"),
        (lambda: mj.cubic(0.5, 0, 9, every=0), ValueError, "`every` must be an int"),
        (lambda: mj.cubic(0.5, 0, 9, every=-5), ValueError, "`every` must be an int"),
        (lambda: mj.cubic(0.5, 0.1, 0.9), ValueError, "got 0.1 and no `total_steps`"),
        (lambda: mj.cubic(0.5, 0, 1.0), ValueError, "`end` must be a step, or a frac"),
        (
            lambda: mj.cubic(0.5, 0, 1.5, total_steps=9),
            ValueError,
            "a fraction of `total_steps`, got 1.5",
        ),
        (lambda: mj.cubic(0.5, 0, 99, total_steps=50), ValueError, "beyond the run"),
        (lambda: mj.linear(2, 0, 9), ValueError, "got 2. Did you mean 0.02?"),
        (lambda: mj.one_shot(101, 9), ValueError, "must be in .0, 1., got 101.$"),
        (
            lambda: mj.Stepwise(0.5, every=0),
            ValueError,
            "`every` must be at least 1 step, got 0",
        ),
        (
            lambda: mj.Stepwise(0.5, every=0.1),
            TypeError,
            "`every` must be a whole number of steps, got 0.1",
        ),
        (lambda: mj.Stepwise(50, every=1), ValueError, "`schedule`.*mean 0.5"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_reason(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_numpy_scalars_are_taken_as_the_numbers_they_are():
    schedule = mj.cubic(np.float64(0.9), np.int64(1), np.int32(9), every=np.int64(2))
    assert schedule == mj.cubic(0.9, 1, 9, every=2)
    assert mj.EmaMagnitude(half_life=np.int64(5)) == mj.EmaMagnitude(half_life=5)
    assert mj.Global(min_keep=np.int64(3)) == mj.Global(min_keep=3)
    assert mj.PerPath({"a": np.float64(0.5)}) == mj.PerPath({"a": 0.5})


def test_a_schedule_with_a_grid_of_its_own_takes_no_second_one():
    with pytest.raises(ValueError, match=r"write `cubic\(\.\.\., every=20\)`"):
        mj.Stepwise(mj.cubic(0.9, 0, 55), every=20)
