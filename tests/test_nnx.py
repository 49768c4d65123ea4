"""The verbs for NNX modules and optimizers."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import movement_jax as mj
import movement_jax.nnx

X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)


class Net(nnx.Module):
    """Two layers, with state that is no param between them."""

    def __init__(self, rngs):
        self.l1 = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.l2 = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.l2(self.dropout(nnx.relu(self.norm(self.l1(x)))))


def loss(model):
    return jnp.mean((model(X) - 1) ** 2)


def make(tx):
    model = Net(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def chained(sparsity=None):
    return optax.chain(optax.adamw(1e-2), mj.movement_pruning(sparsity))


def regrowing(sparsity=None):
    return mj.movement_pruning(
        sparsity, mj.Movement(), inner=optax.adamw(1e-2), regrow=True
    )


@nnx.jit
def step(model, optimizer):
    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def regrow_step(model, optimizer):
    grads = nnx.grad(loss)(mj.nnx.effective_model(model, optimizer))
    optimizer.update(model, grads)


def masks_of(optimizer):
    masks = mj.find_state(optimizer.opt_state).masks
    return {name: np.asarray(masks[name]["kernel"][...]) for name in ("l1", "l2")}


def kernels_of(model):
    return {"l1": np.asarray(model.l1.kernel), "l2": np.asarray(model.l2.kernel)}


def assert_kernels_follow_masks(model, optimizer):
    for name, mask in masks_of(optimizer).items():
        np.testing.assert_array_equal(kernels_of(model)[name] == 0, ~mask)


def test_importing_the_package_loads_no_nnx():
    script = (
        "import movement_jax, sys\n"
        "assert not {'flax.nnx', 'orbax.checkpoint'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_prune_drops_the_weights_of_lowest_score():
    model, optimizer = make(chained())
    step(model, optimizer)
    _, opt_state = mj.nnx.train_state(model, optimizer)
    scores = np.asarray(mj.find_state(opt_state).scores["l1"]["kernel"])
    mj.nnx.prune(model, optimizer, 0.75)
    np.testing.assert_array_equal(
        masks_of(optimizer)["l1"], scores > np.sort(scores, axis=None)[23]
    )
    assert_kernels_follow_masks(model, optimizer)


def test_prune_inside_jit_takes_a_traced_sparsity():
    @nnx.jit
    def prune(model, optimizer, sparsity):
        mj.nnx.prune(model, optimizer, sparsity)

    model, optimizer = make(chained())
    step(model, optimizer)
    prune(model, optimizer, 0.5)
    assert [mask.sum() for mask in masks_of(optimizer).values()] == [16, 8]
    assert_kernels_follow_masks(model, optimizer)
    prune(model, optimizer, 0.75)
    assert [mask.sum() for mask in masks_of(optimizer).values()] == [8, 4]


def test_training_after_prune_keeps_the_zeros():
    model, optimizer = make(chained())
    step(model, optimizer)
    mj.nnx.prune(model, optimizer, 0.75)
    masks, before = masks_of(optimizer), kernels_of(model)
    for _ in range(3):
        step(model, optimizer)
        assert_kernels_follow_masks(model, optimizer)
    np.testing.assert_array_equal(masks_of(optimizer)["l1"], masks["l1"])
    assert np.any(kernels_of(model)["l1"] != before["l1"])


def test_a_schedule_prunes_by_itself():
    model, optimizer = make(chained(mj.cubic(0.75, begin=1, end=3)))
    for _ in range(3):
        step(model, optimizer)
    assert mj.nnx.sparsity_of(optimizer) == 0.75
    assert_kernels_follow_masks(model, optimizer)


def test_training_equals_that_of_a_linen_layer():
    tx = chained(mj.cubic(0.75, begin=1, end=3))
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = {"kernel": model.kernel[...], "bias": model.bias[...]}
    opt_state = tx.init(params)
    layer = linen.Dense(2)
    for _ in range(3):
        step(model, optimizer)
        grads = jax.grad(lambda p: loss(lambda x: layer.apply({"params": p}, x)))(
            params
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(model.kernel[...], params["kernel"], rtol=1e-5)
    assert np.sum(params["kernel"] != 0) == 2


def test_the_gradient_at_the_effective_model_moves_scores_of_pruned_weights():
    model, optimizer = make(regrowing(mj.cubic(0.75, begin=1, end=2)))
    for _ in range(2):
        regrow_step(model, optimizer)
    dropped = ~masks_of(optimizer)["l1"]
    before, kernel = scores_of(optimizer), kernels_of(model)["l1"]
    regrow_step(model, optimizer)
    assert dropped.sum() == 24
    assert np.all(kernels_of(model)["l1"][dropped] == kernel[dropped])
    assert np.mean(scores_of(optimizer)[dropped] != before[dropped]) > 0.5


def scores_of(optimizer):
    scores = mj.find_state(optimizer.opt_state).scores.values
    return np.asarray(scores["l1"]["kernel"][...])


def test_the_effective_model_is_masked_and_the_model_stays_dense():
    model, optimizer = make(regrowing())
    regrow_step(model, optimizer)
    mj.nnx.prune(model, optimizer, 0.75)
    masked = mj.nnx.effective_model(model, optimizer)
    np.testing.assert_array_equal(
        masked.l1.kernel[...], np.where(masks_of(optimizer)["l1"], model.l1.kernel, 0)
    )
    assert np.all(kernels_of(model)["l1"] != 0)


def test_batch_statistics_and_random_counts_advance_in_the_model():
    model, optimizer = make(regrowing())
    mean, count = model.norm.mean[...], model.dropout.rngs.count[...]
    regrow_step(model, optimizer)
    assert np.all(model.norm.mean[...] != mean)
    assert model.dropout.rngs.count[...] == count + 1


def test_finalize_drops_the_scores_and_training_goes_on():
    model, optimizer = make(chained())
    step(model, optimizer)
    mj.nnx.prune(model, optimizer, 0.75)
    before = masks_of(optimizer)
    mj.nnx.finalize(model, optimizer)
    for _ in range(2):
        step(model, optimizer)
    assert mj.find_state(optimizer.opt_state).scores == ()
    np.testing.assert_array_equal(masks_of(optimizer)["l1"], before["l1"])
    assert_kernels_follow_masks(model, optimizer)


def test_finalize_works_inside_jit():
    model, optimizer = make(regrowing())
    regrow_step(model, optimizer)
    mj.nnx.prune(model, optimizer, 0.75)
    nnx.jit(mj.nnx.finalize)(model, optimizer)
    assert mj.find_state(optimizer.opt_state).scores == ()
    assert_kernels_follow_masks(model, optimizer)
    step(model, optimizer)
    assert_kernels_follow_masks(model, optimizer)


def test_metrics_are_scalars_by_name():
    model, optimizer = make(chained())
    step(model, optimizer)
    mj.nnx.prune(model, optimizer, 0.5)
    logged = mj.nnx.metrics(optimizer)
    assert logged["pruning/sparsity"] == 0.5
    assert logged["pruning/scored_steps"] == 1


def test_the_train_state_is_what_the_functions_for_arrays_take():
    model, optimizer = make(chained())
    step(model, optimizer)
    params, opt_state = mj.prune(mj.nnx.train_state(model, optimizer), 0.5)
    assert mj.sparsity_of(opt_state) == 0.5
    assert np.all(kernels_of(model)["l1"] != 0)
    assert type(params["l1"]["kernel"]) is type(jnp.ones(1))


def test_reports_take_the_train_state():
    model, optimizer = make(chained())
    step(model, optimizer)
    mj.nnx.prune(model, optimizer, 0.5)
    state = mj.nnx.train_state(model, optimizer)
    printed = [str(mj.summary(state)), str(mj.health(state))]
    printed.append(str(mj.agreement(state, mj.Magnitude(), sparsity=0.5)))
    assert all("l1/kernel" in text for text in printed)


def test_paths_read_as_in_linen():
    class LinenNet(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(2, name="l2")(linen.Dense(8, name="l1")(x))

    tx = mj.movement_pruning(prunable="^l[12]/kernel$")
    _, optimizer = make(tx)
    params = LinenNet().init(jax.random.key(0), X)["params"]
    names = [
        [tensor.name for tensor in mj.state.tensors_of(mj.find_state(state))]
        for state in (optimizer.opt_state, tx.init(params))
    ]
    assert names == [["l1/kernel", "l2/kernel"]] * 2


def test_layers_stacked_by_vmap_are_ranked_one_by_one():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def layers(rngs):
                return nnx.Linear(4, 4, rngs=rngs)

            self.layers = layers(rngs)

        def __call__(self, x):
            scan = nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            return scan(x, self.layers)

    model = Stack(nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.1), mj.movement_pruning(stacked="layers"))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step(model, optimizer)
    mj.nnx.prune(model, optimizer, 0.75)
    step(model, optimizer)
    assert [np.sum(layer != 0) for layer in np.asarray(model.layers.kernel)] == [4] * 3


def test_tied_weights_are_pruned_once_and_stay_tied():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
            self.b = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(self.a(x))

    model = Tied(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, regrowing(), wrt=nnx.Param)
    regrow_step(model, optimizer)
    mj.nnx.prune(model, optimizer, 0.75)
    masked = mj.nnx.effective_model(model, optimizer)
    assert masked.a.kernel is masked.b.kernel
    assert np.sum(masked.b.kernel[...] != 0) == 4
    mj.nnx.finalize(model, optimizer)
    assert model.a.kernel is model.b.kernel
    assert np.sum(model.a.kernel[...] != 0) == 4


def test_an_optimizer_that_holds_its_model_works_too():
    model = Net(nnx.Rngs(0))
    optimizer = nnx.ModelAndOptimizer(model, chained(), wrt=nnx.Param)
    optimizer.update(nnx.grad(loss)(model))
    mj.nnx.prune(optimizer.model, optimizer, 0.75)
    optimizer.update(nnx.grad(loss)(model))
    assert_kernels_follow_masks(model, optimizer)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.inject_hyperparams(
            lambda scale: optax.chain(optax.scale(scale), tx)
        )(1.0),
    ],
    ids=["multi_steps", "apply_if_finite", "inject_hyperparams"],
)
def test_prune_and_finalize_see_through_wrappers(wrap):
    model, optimizer = make(wrap(chained()))
    for _ in range(2):
        step(model, optimizer)
    mj.nnx.prune(model, optimizer, 0.75)
    mj.nnx.finalize(model, optimizer)
    for _ in range(2):
        step(model, optimizer)
    assert mj.nnx.sparsity_of(optimizer) == 0.75
    assert_kernels_follow_masks(model, optimizer)
