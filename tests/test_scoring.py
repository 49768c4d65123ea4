"""Scores of every so many steps: of which, how they forget, what they leave alone."""

import dataclasses
import functools
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

import movement_jax as mj

SHAPE = (12, 10)
RATE = 0.01

pytestmark = pytest.mark.computes


def make_params():
    return {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=SHAPE))}


def pruning(criterion, sparsity=None, **options):
    return optax.chain(
        optax.sgd(RATE), mj.movement_pruning(sparsity, criterion, **options)
    )


def gradient(params):
    return jax.tree.map(lambda w: w - jnp.sin(9 * w), params)


def trained(tx, state, steps, bad=()):
    """Every state from the given one on; gradients of steps in ``bad`` are NaN."""

    @jax.jit
    def step(params, opt_state, good):
        grads = jax.tree.map(lambda g: jnp.where(good, g, jnp.nan), gradient(params))
        updates, opt_state = tx.update(grads, opt_state, params)
        updates = jax.tree.map(lambda u: jnp.where(good, u, 0), updates)
        return optax.apply_updates(params, updates), opt_state

    states = [state]
    for i in range(steps):
        states.append(step(*states[-1], i not in bad))
    return states


def start(tx):
    return make_params(), tx.init(make_params())


def scores_of(state):
    return np.asarray(mj.find_state(state[1]).scores["kernel"])


@pytest.mark.parametrize("every", [2, 3, 7])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_the_first_and_every_so_manieth_step_are_averaged(decay, every):
    tx = pruning(mj.EmaMagnitude(decay, score_every=every))
    states = trained(tx, start(tx), 15)
    want = np.zeros(SHAPE)
    for number, (before, after) in enumerate(zip(states, states[1:]), start=1):
        if number == 1 or number % every == 0:
            size = np.abs(np.asarray(before[0]["kernel"], np.float64))
            want = decay**every * want + (1 - decay**every) * size
            np.testing.assert_allclose(scores_of(after), want, rtol=1e-5)
        else:
            np.testing.assert_array_equal(scores_of(after), scores_of(before))


def test_a_half_life_is_in_steps_of_the_optimizer():
    criterion = mj.EmaMagnitude(half_life=64, score_every=8)
    tx = mj.movement_pruning(None, criterion)
    params = {"kernel": jnp.ones(SHAPE)}
    state, gone = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    state = state._replace(scores=params, step=jnp.int32(8))
    update = jax.jit(tx.update)
    for _ in range(64):
        _, state = update(gone, state, gone)
    np.testing.assert_allclose(state.scores["kernel"], 0.5, rtol=1e-5)


def test_nearly_the_same_weights_are_kept_as_with_every_step():
    pairs = [(50, 1), (50, 5), (50, 10), (500, 1), (500, 10), (500, 50)]
    criteria = [mj.EmaMagnitude(half_life=h, score_every=k) for h, k in pairs]
    txs = [mj.movement_pruning(None, c, check_finite=False) for c in criteria]
    kernel = np.random.default_rng(0).normal(size=(100, 1000))

    @jax.jit
    def train(params):
        def step(carry, i):
            params, states = carry
            key = jax.random.fold_in(jax.random.key(1), i)
            updates = {"kernel": RATE * jax.random.normal(key, (100, 1000))}
            states = [tx.update(updates, s, params)[1] for tx, s in zip(txs, states)]
            return (optax.apply_updates(params, updates), states), None

        carry = params, [tx.init(params) for tx in txs]
        return jax.lax.scan(step, carry, jnp.arange(1000))[0]

    params, states = train({"kernel": jnp.asarray(kernel)})
    kept = {}
    for pair, state in zip(pairs, states):
        _, state = mj.prune((params, state), 0.9)
        kept[pair] = np.asarray(state.masks["kernel"])
    for half_life, every in pairs:
        both = np.sum(kept[half_life, every] & kept[half_life, 1])
        other = 1 - both / np.sum(kept[half_life, 1])
        print(f"\n  half-life {half_life}, every {every}: {other:.2%} others", end=" ")
        assert other < 0.01


def test_prune_works_after_one_step():
    tx = pruning(mj.EmaMagnitude(score_every=100))
    states = trained(tx, start(tx), 1)
    params, _ = mj.prune(states[1], 0.5)
    lowest = np.argsort(np.abs(np.asarray(states[0][0]["kernel"])), axis=None)[:60]
    assert np.all(np.asarray(params["kernel"]).ravel()[lowest] == 0)


def test_masks_change_by_the_weights_that_enter_the_step():
    schedule = mj.cubic(0.5, begin=0, end=8, every=4)
    tx = pruning(mj.EmaMagnitude(0.0, score_every=4), schedule)
    states = trained(tx, start(tx), 8)
    for number in (4, 8):
        entered = np.abs(np.asarray(states[number - 1][0]["kernel"]))
        mask = np.asarray(mj.find_state(states[number][1]).masks["kernel"])
        assert entered[~mask].max() <= entered[mask].min()
    assert np.sum(~mask) == 60


def test_a_bad_step_is_scored_by_the_next_good_one():
    tx = pruning(mj.EmaMagnitude(score_every=3))
    states = trained(tx, start(tx), 6, bad={0, 3})
    good = [states[i] for i in (1, 2, 4, 5, 6)]  # those after which steps were made
    np.testing.assert_array_equal(scores_of(states[1]), 0)
    np.testing.assert_array_equal(scores_of(states[4]), scores_of(states[3]))
    plain = trained(tx, start(tx), 4)
    for got, want in zip(good, plain):
        np.testing.assert_array_equal(scores_of(got), scores_of(want))
    assert np.any(scores_of(states[5]) != scores_of(states[4]))


def test_a_restart_between_scorings_changes_no_bit(tmp_path):
    schedule = mj.cubic(0.7, begin=0, end=9, every=3)
    tx = pruning(mj.EmaMagnitude(score_every=4), schedule)
    states = trained(tx, start(tx), 12)
    ocp.save(tmp_path / "state", states[6])
    resumed = trained(tx, ocp.load(tmp_path / "state", states[0]), 6)[-1]
    for got, want in zip(jax.tree.leaves(resumed), jax.tree.leaves(states[-1])):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_regrow_scores_the_dense_weights_that_enter():
    criterion = mj.EmaMagnitude(0.5, score_every=2)
    tx = mj.movement_pruning(0.5, criterion, inner=optax.sgd(RATE), regrow=True)
    states = trained(tx, start(tx), 2)
    first, second = (np.abs(np.asarray(s[0]["kernel"])) for s in states[:2])
    want = 0.25 * 0.75 * first + 0.75 * second
    np.testing.assert_allclose(scores_of(states[2]), want, rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Largest:
    """A user's own: the largest magnitude seen."""

    score_every: int = 5
    needs_gradients: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True

    def init(self, params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, state, *, params, grads, new_params):
        assert grads is None
        return jax.tree.map(lambda s, w: jnp.maximum(s, abs(w)), state, new_params)

    def scores(self, state, params):
        return state


def test_a_criterion_of_ones_own_may_ask_for_it():
    tx = pruning(Largest())
    states = trained(tx, start(tx), 6)
    sizes = [np.abs(np.asarray(s[0]["kernel"])) for s in states]
    np.testing.assert_array_equal(scores_of(states[4]), sizes[0])
    np.testing.assert_array_equal(scores_of(states[6]), np.maximum(sizes[0], sizes[4]))


def test_a_criterion_of_gradients_may_not():
    @dataclasses.dataclass(frozen=True)
    class Sampled(mj.Taylor):
        score_every: int = 10

    with pytest.raises(ValueError, match="`Sampled` needs the gradient of every step"):
        mj.movement_pruning(0.5, Sampled(), inner=optax.sgd(0.1))


@pytest.mark.parametrize("every, error", [(0, ValueError), (2.5, TypeError)])
def test_what_is_no_number_of_steps_is_refused(every, error):
    with pytest.raises(error, match="`score_every` must be"):
        mj.EmaMagnitude(score_every=every)


def test_numpy_integers_are_numbers_of_steps():
    assert mj.EmaMagnitude(score_every=np.int64(3)) == mj.EmaMagnitude(score_every=3)


def compiled(**options):
    """A donated train step of 4 MB kernels on a schedule."""
    schedule = mj.cubic(0.9, begin=0, end=1000, every=100)
    pruned = mj.movement_pruning(
        schedule, mj.EmaMagnitude(half_life=100, **options), check_finite=False
    )
    tx = optax.chain(optax.adamw(1e-3), pruned)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    params = {"a": {"kernel": shape}, "b": {"kernel": shape}}
    return step.lower(params, jax.eval_shape(tx.init, params), params).compile()


@pytest.mark.parametrize(
    "options",
    [
        {"scores_dtype": "bfloat16"},
        {"score_every": 8},
        {"scores_dtype": "bfloat16", "score_every": 8},
    ],
    ids=["bfloat16", "every 8", "both"],
)
def test_cheaper_scores_are_updated_in_place(options):
    memory = compiled(**options).memory_analysis()
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024
    usual = compiled().memory_analysis()
    assert memory.temp_size_in_bytes < usual.temp_size_in_bytes + 1024


def test_steps_between_read_no_score():
    # In the compiled step, scores pass through loops of no or one trip and through
    # nothing else; their type is one that nothing else has.
    def readers(**options):
        text = compiled(scores_dtype="bfloat16", **options).as_text()
        entry = text[text.index("\nENTRY ") :]
        made = re.findall(r"(%\S+) = (.*?) ([a-z][a-z\d-]*)\((.*?)\)", entry)
        scores = [name for name, kind, *_ in made if kind.startswith("bf16[1024,1024]")]
        assert len(scores) >= 2
        used = {
            operation
            for _, _, operation, operands in made
            if set(scores) & set(re.findall(r"%[\w.-]+", operands))
        }
        return used - {"while", "tuple", "get-tuple-element", "parameter"}

    assert readers(score_every=8) == set()
    assert "fusion" in readers() or "call" in readers()


def test_scoring_copies_no_weights():
    # As it must if it reads the old weights once the new ones are in their place.
    text = compiled().as_text()
    entry = text[text.index("\nENTRY ") :]
    assert not re.findall(r"\[1024,1024\]\S* copy\(", entry)
