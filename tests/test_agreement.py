"""What `agreement` reports, against sets and ranks made by hand."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import movement_jax as mj

WEIGHTS = np.array([[1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0]])


def state_of(params, criterion=None, steps=0, lr=0.0, **options):
    tx = optax.chain(
        optax.sgd(lr),
        mj.movement_pruning(criterion=criterion or mj.Magnitude(), **options),
    )
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    opt_state = tx.init(params)
    for _ in range(steps):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def masks_without(*flat):
    mask = np.ones(10, bool)
    mask[list(flat)] = False
    return {"kernel": jnp.asarray(mask.reshape(2, 5))}


def test_counts_the_sets_and_their_jaccard_index_by_hand():
    # At 0.4 magnitude drops the entries 0 to 3.
    report = mj.agreement(state_of({"kernel": WEIGHTS}), masks_without(2, 3, 4, 9), 0.4)
    (row,) = report.tensors
    assert (row.size, row.both, row.only_a, row.only_b) == (10, 2, 2, 2)
    assert row.jaccard == pytest.approx(2 / 6)
    assert (report.a, report.b, report.sparsity) == ("Magnitude", "masks", 0.4)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_the_chance_level_is_s_over_two_minus_s(sparsity):
    report = mj.agreement(state_of({"kernel": WEIGHTS}), mj.Random(), sparsity)
    assert report.total.chance == pytest.approx(sparsity / (2 - sparsity))


def test_the_chance_level_of_unequal_sets_is_the_ratio_of_expected_counts():
    report = mj.agreement(state_of({"kernel": WEIGHTS}), masks_without(0, 1), 0.5)
    # Two at random among ten meet 2 * 5 / 10 = 1 of the five, in a union of 6.
    assert report.total.chance == pytest.approx(1 / 6)


def test_random_masks_agree_as_chance_says():
    kernel = np.random.default_rng(0).normal(size=(200, 500))
    total = mj.agreement(state_of({"kernel": kernel}), mj.Random(), 0.8).total
    assert total.jaccard == pytest.approx(0.8 / 1.2, abs=0.01)


def test_says_where_the_disputed_weights_lie():
    report = mj.agreement(state_of({"kernel": WEIGHTS}), masks_without(2, 3, 4, 9), 0.4)
    # Only A drops entries 0 and 1: below them lie 0 and 1 of ten, and half of
    # themselves. Only B drops 4 and 9.
    (row,) = report.tensors
    assert row.where_a.magnitude == pytest.approx((0.05, 0.05, 0.15))
    assert row.where_b.magnitude == pytest.approx((0.45, 0.45, 0.95))
    assert row.where_a.score == row.where_a.magnitude  # A ranks by magnitude


def test_ranks_by_score_are_those_of_the_criterion_of_the_state():
    scores = {"kernel": jnp.asarray(WEIGHTS[::-1, ::-1].copy(), jnp.float32)}
    params, (first, found) = state_of({"kernel": WEIGHTS}, mj.EmaMagnitude(), steps=1)
    state = (params, (first, found._replace(scores=scores)))
    report = mj.agreement(state, mj.Magnitude(), 0.1)
    (row,) = report.tensors
    assert (row.only_a, row.only_b) == (1, 1)
    assert row.where_a.score[1] == pytest.approx(0.05)  # what A values least
    assert row.where_a.magnitude[1] == pytest.approx(0.95)  # is the largest weight


def test_the_most_contested_tensors_come_first_and_the_total_pools_them():
    params = {name: {"kernel": WEIGHTS} for name in ("a", "b", "c")}
    masks = {
        "a": masks_without(0, 1, 2, 3),
        "b": masks_without(9, 8, 7, 6),
        "c": masks_without(0, 1, 8, 9),
    }
    report = mj.agreement(state_of(params), masks, 0.4)
    names = [row.name for row in report.tensors]
    assert names == ["b/kernel", "c/kernel", "a/kernel"]
    assert [row.jaccard for row in report.tensors] == pytest.approx([0, 2 / 6, 1])
    assert (report.total.both, report.total.only_a, report.total.only_b) == (6, 6, 6)
    assert report.total.jaccard == pytest.approx(6 / 18)
    # Only A: ranks .05 .15 .25 .35 in b, .25 .35 in c.
    assert report.total.where_a.magnitude == pytest.approx((0.15, 0.25, 0.35))


def test_a_state_agrees_with_itself():
    state = state_of({"kernel": WEIGHTS}, mj.EmaMagnitude(), steps=2)
    report = mj.agreement(state, state, 0.5)
    assert (report.total.jaccard, report.total.where_a) == (1, None)
    assert report.b == "EmaMagnitude of the other state"


def test_another_state_brings_its_own_scores():
    state = state_of({"kernel": WEIGHTS}, mj.EmaMagnitude(), steps=1)
    other = state_of({"kernel": WEIGHTS[::-1, ::-1]}, mj.EmaMagnitude(), steps=1)
    for given in (other, other[1], {"params": other[0], "opt_state": other[1]}):
        report = mj.agreement(state, given, 0.5)
        assert (report.total.both, report.total.only_a) == (0, 5)


def test_another_state_that_ranks_by_its_weights_uses_them():
    other = state_of({"kernel": WEIGHTS[::-1, ::-1]})
    report = mj.agreement(state_of({"kernel": WEIGHTS}), other, 0.5)
    assert (report.total.both, report.total.only_a) == (0, 5)


def test_the_state_of_a_longer_chain_brings_its_own_scores():
    kernel = {"kernel": jnp.asarray(WEIGHTS[::-1, ::-1], jnp.float32)}
    pruning = mj.movement_pruning(criterion=mj.EmaMagnitude())
    tx = optax.chain(optax.clip(1.0), optax.sgd(0.0), pruning)
    _, other = tx.update(kernel, tx.init(kernel), kernel)
    state = state_of({"kernel": WEIGHTS}, mj.EmaMagnitude(), steps=1)
    report = mj.agreement(state, other, 0.5)
    assert (report.total.both, report.total.only_a) == (0, 5)


def test_ranks_of_a_large_tensor_are_estimated_from_some_of_it():
    kernel = np.random.default_rng(0).normal(size=(400, 400))
    total = mj.agreement(state_of({"kernel": kernel}), mj.Random(), 0.5).total
    # Magnitude prunes the lower half and random ranks do not know of it.
    quartiles = np.array([0.125, 0.25, 0.375])
    np.testing.assert_allclose(total.where_a.magnitude, quartiles, atol=0.01)
    np.testing.assert_allclose(total.where_b.magnitude, quartiles + 0.5, atol=0.01)


def test_an_optimizer_state_that_ranks_by_weights_needs_them():
    other = state_of({"kernel": WEIGHTS})[1]
    with pytest.raises(ValueError, match=r"\(other_params, other_opt_state\)"):
        mj.agreement(state_of({"kernel": WEIGHTS}), other, 0.5)


def test_masks_of_a_state_are_masks():
    params = {"kernel": WEIGHTS, "bias": np.zeros(5)}
    state = state_of(params)
    masks = mj.find_state(mj.prune(state, 0.4)[1]).masks
    assert mj.agreement(state, masks).total.jaccard == 1


def test_bools_for_all_params_are_masks():
    state = state_of({"kernel": WEIGHTS, "bias": np.zeros(5)})
    masks = {**masks_without(0, 1), "bias": jnp.ones(5, bool)}
    assert mj.agreement(state, masks).total.jaccard == 1


def test_without_a_sparsity_the_criterion_drops_what_the_masks_drop():
    report = mj.agreement(state_of({"kernel": WEIGHTS}), masks_without(0, 1, 9))
    assert report.sparsity == pytest.approx(0.3)
    assert (report.total.both, report.total.only_a, report.total.only_b) == (2, 1, 1)


def test_pruned_weights_are_ranked_as_they_score_now():
    state = mj.prune(state_of({"kernel": WEIGHTS}), 0.4)
    report = mj.agreement(state, masks_without(0, 1), 0.2)
    # The entries 0 to 3 are zero and tie; of ties the lower index is kept.
    assert (report.total.both, report.total.only_a) == (0, 2)


def test_both_sides_follow_the_allocation_of_the_state():
    params = {"a": {"kernel": WEIGHTS}, "b": {"kernel": 100 * WEIGHTS}}
    state = state_of(params, allocation=mj.Global())
    report = mj.agreement(state, mj.Magnitude(), 0.4)
    both = {row.name: row.both for row in report.tensors}
    assert both == {"a/kernel": 8, "b/kernel": 0}


def test_a_nan_score_does_not_disturb_the_others():
    weights = WEIGHTS.copy()
    weights[1, 4] = np.nan
    report = mj.agreement(state_of({"kernel": weights}), masks_without(0, 1), 0.2)
    assert report.total.jaccard == 1


def test_a_scalar_of_numpy_or_jax_is_a_sparsity():
    state = state_of({"kernel": WEIGHTS})
    for sparsity in (np.float32(0.3), np.float64(0.3), jnp.float32(0.3)):
        assert mj.agreement(state, mj.Random(), sparsity).sparsity == 0.3


def test_prints_as_a_table():
    report = mj.agreement(state_of({"kernel": WEIGHTS}), masks_without(2, 3, 4, 9), 0.4)
    lines = str(report).split("\n")
    assert lines[0] == "Pruned at sparsity 0.4 by A = Magnitude and B = masks"
    wanted = "kernel 10 2 2 2 0.333 0.250 0.050 0.050 0.450 0.450"
    assert lines[4].split() == wanted.split()


def test_converts_to_json():
    report = mj.agreement(state_of({"kernel": WEIGHTS}), mj.Random(), 0.5).to_dict()
    assert json.loads(json.dumps(report))["total"]["size"] == 10


def test_a_criterion_that_accumulates_has_no_scores_here():
    with pytest.raises(ValueError, match=r"agreement\(state, other_state, sparsity="):
        mj.agreement(state_of({"kernel": WEIGHTS}), mj.EmaMagnitude(), 0.5)


@pytest.mark.parametrize(
    ("criterion", "call"),
    [
        (mj.Movement(), "criterion=Movement(...), inner=optax.adamw(...))"),
        (mj.EmaMagnitude(), "criterion=EmaMagnitude(...), ...)"),
    ],
)
def test_the_advised_call_has_what_the_criterion_needs(criterion, call):
    with pytest.raises(ValueError, match=re.escape(call)):
        mj.agreement(state_of({"kernel": WEIGHTS}), criterion, 0.5)


def test_params_of_another_shape_are_named_in_a_state_that_is_given():
    params, opt_state = state_of({"kernel": WEIGHTS}, mj.EmaMagnitude(), steps=1)
    other = {"kernel": params["kernel"].T}, opt_state
    with pytest.raises(ValueError, match=r"`params` does not fit.*\(5, 2\)"):
        mj.agreement((params, opt_state), other, 0.5)


def test_params_may_be_a_tuple():
    state = state_of((WEIGHTS, WEIGHTS), prunable=".*")
    other = state_of((WEIGHTS[::-1, ::-1], WEIGHTS), prunable=".*")
    assert mj.agreement(state, other, 0.5).total.both == 5


def test_nothing_scored_yet_is_said():
    state = state_of({"kernel": WEIGHTS}, mj.EmaMagnitude())
    with pytest.raises(
        ValueError, match=r"`agreement` ranks .* accumulate. Train first\.$"
    ):
        mj.agreement(state, mj.Magnitude(), 0.5)


def test_a_finalized_state_is_refused():
    state = mj.finalize(mj.prune(state_of({"kernel": WEIGHTS}), 0.5))
    with pytest.raises(
        ValueError, match="was finalized and its scores are gone.*`agreement`"
    ):
        mj.agreement(state, mj.Magnitude(), 0.5)


def test_two_rankings_need_a_sparsity():
    with pytest.raises(ValueError, match=r"`sparsity` is needed.*sparsity=0.8"):
        mj.agreement(state_of({"kernel": WEIGHTS}), mj.Random())


def test_a_percentage_is_refused():
    with pytest.raises(ValueError, match="Did you mean 0.8"):
        mj.agreement(state_of({"kernel": WEIGHTS}), mj.Random(), 80)


def test_masks_that_are_not_bools_are_refused():
    with pytest.raises(ValueError, match="masks, which are bools.*float32"):
        mj.agreement(state_of({"kernel": WEIGHTS}), {"kernel": jnp.ones((2, 5))}, 0.5)


def test_masks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="'kernel' has shape"):
        masks = {"kernel": jnp.ones((5, 2), bool)}
        mj.agreement(state_of({"kernel": WEIGHTS}), masks, 0.5)


def test_a_state_of_another_model_is_refused():
    other = state_of({"kernel": WEIGHTS, "w": WEIGHTS}, mj.EmaMagnitude(), steps=1)
    with pytest.raises(ValueError, match=r"another model.*'w'"):
        mj.agreement(state_of({"kernel": WEIGHTS}), other, 0.5)


def test_the_class_of_a_criterion_is_refused():
    message = r"`other` must be an object such as `Magnitude\(\)`, got the class"
    with pytest.raises(TypeError, match=message):
        mj.agreement(state_of({"kernel": WEIGHTS}), mj.Magnitude, 0.5)


@pytest.mark.parametrize("other", ["magnitude", None])
def test_what_is_neither_criterion_state_nor_masks_is_refused(other):
    with pytest.raises(TypeError, match=r"or a tree of masks .*; got \w+.$"):
        mj.agreement(state_of({"kernel": WEIGHTS}), other, 0.5)
