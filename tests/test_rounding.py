"""Scores in bfloat16 rank as those in float32 do, and nothing is left to chance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import movement_jax as mj
from movement_jax.rounding import round_in_turn

TURNS = 1 << 16
LAST_BIT = 2.0**-7  # of a bfloat16 in [1, 2)
# At most this fraction of the tenth that is kept may be another than in float32: what
# rounding by chance gives at these decays.
MOST = {0.9: 0.0079, 0.99: 0.0138, 0.999: 0.0304, 0.9999: 0.0209}
WEIGHTS, STEPS = 100_000, 2000

pytestmark = pytest.mark.computes


def in_turns(x, turns):
    return jax.vmap(round_in_turn, (None, 0))(jnp.float32(x), jnp.asarray(turns))


@pytest.mark.parametrize("part", [0, 1, 255, 21845, 32768, 40503, 65535])
def test_a_whole_round_of_turns_is_right_on_average(part):
    x = 1 + part / TURNS * LAST_BIT  # exact in float32
    rounded = np.asarray(in_turns(x, np.arange(TURNS)), np.float64)
    assert set(rounded) <= {1, 1 + LAST_BIT}
    assert np.sum(rounded > 1) == part
    assert rounded.mean() == x


@pytest.mark.parametrize("part", [100, 6554, 21846, 25033, 32769, 62259])
def test_any_turns_in_a_row_round_up_as_often_as_they_should(part):
    x = 1 + part / TURNS * LAST_BIT
    up = np.asarray(in_turns(x, np.arange(2 * TURNS)), np.float64) > 1
    ahead = np.cumsum(up - part / TURNS)
    assert ahead.max() - ahead.min() < 6


@pytest.mark.parametrize(
    "x", [0.0, -0.0, 1.0, -1.5, 2.0**-126, 3.0e38, np.inf, -np.inf, np.nan]
)
def test_what_is_a_bfloat16_stays_as_it_is(x):
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    rounded = np.asarray(in_turns(x, np.arange(0, TURNS, 1009)), np.float32)
    np.testing.assert_array_equal(rounded, x)
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(x))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_a_nan_stays_one_whatever_its_payload(bits):
    x = jax.lax.bitcast_convert_type(jnp.uint32(bits), jnp.float32)
    assert np.all(np.isnan(np.asarray(in_turns(x, np.arange(0, TURNS, 1009)))))


def averaged(decay, weights, start=0.0):
    """The average of one weight over time, stored both ways."""
    average = mj.EmaMagnitude(decay, scores_dtype="bfloat16")
    state = average.init({"kernel": jnp.zeros(())})
    state = state._replace(values={"kernel": jnp.bfloat16(start)})

    @jax.jit
    def run(state, weights):
        def step(carry, weight):
            state, exact = carry
            params = {"kernel": weight}
            state = average.update(state, params=None, grads=None, new_params=params)
            exact = decay * exact + (1 - decay) * jnp.abs(weight)
            return (state, exact), (state.values["kernel"], exact)

        return jax.lax.scan(step, (state, jnp.float32(start)), weights)[1]

    got, want = run(state, jnp.asarray(weights, jnp.float32))
    return np.asarray(got, np.float64), np.asarray(want, np.float64)


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999, 0.9999])
def test_the_average_of_a_constant_does_not_stall(decay):
    # To nearest, it stops at .984, .805, .25 and .031 of it.
    got, want = averaged(decay, np.ones(round(5 / (1 - decay))))
    np.testing.assert_allclose(got[-1], want[-1], rtol=0.01)


@pytest.mark.parametrize("decay", [0.99, 0.999])
def test_the_score_of_a_weight_that_is_gone_decays(decay):
    got, want = averaged(decay, np.zeros(round(5 / (1 - decay))), start=1.0)
    np.testing.assert_allclose(got[-1], want[-1], rtol=0.05)


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("period", [2, 3, 5, 8, 13, 34, 55, 144, 256])
def test_weights_that_oscillate_do_not_fall_in_with_the_turns(period, decay):
    angle = 2 * np.pi * np.arange(8000) / period
    got, want = averaged(decay, 1 + 0.3 * np.sin(angle))
    assert np.mean(np.abs(got / want - 1)[500:]) < 2 * LAST_BIT


@dataclasses.dataclass(frozen=True)
class Nearest(mj.EmaMagnitude):
    """What plain rounding to bfloat16 makes of the same average."""

    def init(self, params):
        return jax.tree.map(lambda w: jnp.zeros_like(w, jnp.bfloat16), params)

    def update(self, state, *, params, grads, new_params):
        def average(score, weight):
            new = self.decay * score + (1 - self.decay) * jnp.abs(weight)
            return jax.lax.reduce_precision(new, 8, 7).astype(jnp.bfloat16)

        return jax.tree.map(average, state, new_params)


def walked(noise, criteria):
    """Scores of weights that walk at random from a normal distribution of scale 1."""
    txs = [mj.movement_pruning(None, c, check_finite=False) for c in criteria]
    key, first = jax.random.split(jax.random.key(0))
    params = {"kernel": jax.random.normal(first, (1, WEIGHTS))}

    @jax.jit
    def train(params, opt_states):
        def step(carry, i):
            params, opt_states = carry
            drawn = jax.random.normal(jax.random.fold_in(key, i), (1, WEIGHTS))
            updates = {"kernel": noise * drawn}
            opt_states = [
                tx.update(updates, opt_state, params)[1]
                for tx, opt_state in zip(txs, opt_states)
            ]
            return (optax.apply_updates(params, updates), opt_states), None

        return jax.lax.scan(step, (params, opt_states), jnp.arange(STEPS))[0]

    params, opt_states = train(params, [tx.init(params) for tx in txs])
    scores = [c.scores(s.scores, params) for c, s in zip(criteria, opt_states)]
    return [np.asarray(s["kernel"], np.float32).ravel() for s in scores]


def mismatch(a, b):
    """Fraction of the tenth that A keeps and B does not."""
    kept = [np.argsort(-x, kind="stable")[: WEIGHTS // 10] for x in (a, b)]
    return 1 - len(np.intersect1d(*kept)) / (WEIGHTS // 10)


@pytest.mark.parametrize("decay", MOST)
@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_at_90_percent_nearly_the_same_weights_are_kept(noise, decay):
    exact = mj.EmaMagnitude(decay)
    cheap = mj.EmaMagnitude(decay, scores_dtype="bfloat16")
    want, ours, theirs = walked(noise, (exact, cheap, Nearest(decay)))
    ours, theirs = mismatch(want, ours), mismatch(want, theirs)
    print(f"\n  otherwise kept: {ours:.2%}, rounded to nearest {theirs:.2%}", end=" ")
    assert ours < MOST[decay]
    assert theirs > 0.05 or decay == 0.9


CHEAP = {
    "ema": mj.EmaMagnitude(half_life=20, scores_dtype="bfloat16"),
    "ema, every 3": mj.EmaMagnitude(
        half_life=20, scores_dtype="bfloat16", score_every=3
    ),
    "taylor": mj.Taylor(scores_dtype="bfloat16"),
}
cheaply = pytest.mark.parametrize("criterion", CHEAP.values(), ids=list(CHEAP))


def pruning(criterion, inner=None, **options):
    schedule = mj.cubic(0.7, begin=1, end=9, every=2)
    inner = inner or optax.adam(1e-2)
    return mj.movement_pruning(schedule, criterion, inner=inner, **options)


def make_params(dtype="float32"):
    rng = np.random.default_rng(0)
    return {"kernel": jnp.asarray(rng.normal(size=(16, 24)), dtype)}


def step_of(tx):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
        grads = jax.tree.map(lambda w: w - jnp.sin(5 * w), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def trained(tx, state, steps):
    step = step_of(tx)
    for _ in range(steps):
        state = step(*state)
    return state


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@cheaply
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_take_two_bytes_a_weight_and_keep_their_dtype(criterion, dtype):
    tx, params = pruning(criterion), make_params(dtype)
    before = tx.init(params)
    after = trained(tx, (params, tx.init(params)), 3)[1]
    for state in (before, after):
        values = state.scores.values["kernel"]
        assert values.dtype == jnp.bfloat16 and values.nbytes == 2 * 16 * 24


@cheaply
def test_a_restart_changes_no_bit(criterion, tmp_path):
    tx = pruning(criterion)
    state = trained(tx, (make_params(), tx.init(make_params())), 5)
    ocp.save(tmp_path / "state", state)
    loaded = ocp.load(tmp_path / "state", (make_params(), tx.init(make_params())))
    assert_same(trained(tx, loaded, 6), trained(tx, state, 6))


@functools.cache
def on_one_device(criterion):
    tx = pruning(criterion)
    return trained(tx, (make_params(), tx.init(make_params())), 10)


@cheaply
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [("x", "y"), ("y",), (None, ("x", "y"))], ids=str)
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
def test_every_mesh_gives_the_bits_of_one_device(criterion, axis_type, spec):
    tx = pruning(criterion)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        params = {"kernel": jax.device_put(make_params()["kernel"], sharding)}
        spread = trained(tx, (params, tx.init(params)), 10)
    assert spread[1].scores.values["kernel"].sharding.is_equivalent_to(sharding, 2)
    assert_same(spread, on_one_device(criterion))


@cheaply
def test_bad_steps_take_no_turn(criterion):
    tx = pruning(criterion, optax.sgd(0.1))
    params, opt_state = make_params(), tx.init(make_params())
    for value in (jnp.nan, 1.0, jnp.inf):
        grads = {"kernel": jnp.full((16, 24), value)}
        opt_state = tx.update(grads, opt_state, params)[1]
    assert opt_state.step == opt_state.scores.updates == 1


@cheaply
def test_reports_read_them(criterion):
    tx = pruning(criterion, track_noise=True, track_start=True)
    state = trained(tx, (make_params(), tx.init(make_params())), 12)
    assert mj.summary(state).total.nonfinite == 0
    assert mj.agreement(state, mj.Magnitude(), sparsity=0.5).total.jaccard > 0.3
    assert mj.agreement(state, state, sparsity=0.5).total.jaccard == 1
    assert not [f for f in mj.health(state).findings if f.name == "scores" and f.figure]
    assert mj.sparsity_of(mj.prune(state, 0.9)) == pytest.approx(0.9, abs=2e-3)


def test_pictures_show_them():
    pytest.importorskip("matplotlib").use("agg")
    tx = pruning(CHEAP["ema"])
    state = trained(tx, (make_params(), tx.init(make_params())), 3)
    mj.plot.plot_scores(state, 0.5).figure.clear()
    mj.plot.plot_quadrants(state, mj.Magnitude(), 0.5).figure.clear()


@pytest.mark.parametrize("dtype", ["float16", jnp.int8, "bf16", None])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="`scores_dtype` must be 'float32' or"):
        mj.EmaMagnitude(scores_dtype=dtype)


def test_a_dtype_may_be_given_as_jax_knows_it():
    assert mj.EmaMagnitude(scores_dtype=jnp.bfloat16) == mj.EmaMagnitude(
        scores_dtype="bfloat16"
    )
