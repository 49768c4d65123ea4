import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization, struct
from flax.training.train_state import TrainState
from orbax.checkpoint import v1 as ocp1

import movement_jax as mj
from movement_jax import checkpoint, stepdirs

INPUTS = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)


def optimizer():
    return mj.movement_pruning(
        mj.cubic(0.75, begin=2, end=16, every=3),
        mj.Movement(),
        inner=optax.adamw(1e-2, weight_decay=0.1),
        regrow=True,
        track_start=True,
        track_noise=True,
    )


TX = optax.chain(optimizer())


def fresh_state():
    kernel = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
    params = {
        "dense": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(8)},
        "none": None,
    }
    return TrainState.create(apply_fn=None, params=params, tx=TX)


def loss(dense):
    return jnp.mean((jnp.tanh(INPUTS @ dense["kernel"] + dense["bias"]) - 0.3) ** 2)


@jax.jit
def step(state):
    seen = mj.effective_params(state.params, state.opt_state)
    grads = jax.tree.map(jnp.zeros_like, state.params)
    grads["dense"] = jax.grad(loss)(seen["dense"])
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


def train(state, steps):
    for _ in range(steps):
        state = step(state)
    return state


def save_v0(path, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)


def load_v0(path, target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def save_managed(path, state):
    with ocp.CheckpointManager(path) as manager:
        manager.save(10, args=ocp.args.StandardSave(state))


def load_managed(path, target):
    with ocp.CheckpointManager(path) as manager:
        return manager.restore(10, args=ocp.args.StandardRestore(target))


WAYS = {
    "StandardCheckpointer": (save_v0, load_v0),
    "CheckpointManager": (save_managed, load_managed),
    "v1": (ocp1.save, ocp1.load),
}


def abstract(make, *args):
    """Shapes, dtypes and devices to restore to, without making the arrays."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(make, *args),
    )


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("way", WAYS)
def test_training_resumes_bit_for_bit(tmp_path, way):
    save, load = WAYS[way]
    halfway = train(fresh_state(), 10)
    save(tmp_path / "run", halfway)
    target = abstract(fresh_state)
    restored = load(tmp_path / "run", target)
    assert jax.tree.structure(restored) == jax.tree.structure(halfway)
    assert_same_bits(restored, halfway)
    straight = train(fresh_state(), 20)
    assert_same_bits(train(restored, 10), straight)
    assert mj.sparsity_of(straight) == 0.75


def test_a_restored_state_can_be_pruned_and_finalized(tmp_path):
    save, load = WAYS["v1"]
    save(tmp_path / "run", train(fresh_state(), 3))
    state = load(tmp_path / "run", abstract(fresh_state))
    state = mj.finalize(mj.prune(state, 0.5))
    assert jnp.sum(state.params["dense"]["kernel"] == 0) == 16


@pytest.mark.parametrize("way", WAYS)
def test_empty_leaves_do_not_keep_the_pruning_state_from_being_saved(tmp_path, way):
    save, load = WAYS[way]
    params = {"kernel": jnp.ones((2, 3)), "empty": {"kernel": jnp.ones((0, 3))}}
    tx = mj.movement_pruning(0.5, track_start=True, track_noise=True)
    state = tx.init(params)
    save(tmp_path / "run", state)
    restored = load(tmp_path / "run", abstract(tx.init, params))
    assert_same_bits(restored, state)


@pytest.mark.parametrize("way", WAYS)
def test_a_finalized_state_is_saved_without_scores(tmp_path, way):
    save, load = WAYS[way]
    tx = mj.movement_pruning(None, mj.Magnitude())

    def final():
        params = {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3)}
        return mj.finalize(jax.jit(mj.prune)((params, tx.init(params)), 0.5))

    save(tmp_path / "run", final())
    restored = load(tmp_path / "run", abstract(final))
    assert mj.find_state(restored).config.finalized
    assert_same_bits(restored, final())


def test_flax_serialization_takes_the_state_after_one_registration():
    serialization.register_serialization_state(
        mj.PruningConfig, lambda config: {}, lambda config, _: config, override=True
    )
    tx = optax.chain(optax.adam(0.1), mj.movement_pruning())
    params = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    _, state = tx.update(params, tx.init(params), params)
    data = serialization.to_bytes(state)
    restored = serialization.from_bytes(tx.init(params), data)
    assert jax.tree.all(jax.tree.map(np.array_equal, state, restored))


@pytest.mark.parametrize(
    "step, error, message",
    [
        (-1, ValueError, "`step` must not be negative, got -1"),
        (True, TypeError, "`step` must be a number of steps, got True"),
        (1.0, TypeError, r"number of steps, got 1.0. Of a train state it is `int\("),
    ],
)
def test_a_step_that_is_none_is_refused(tmp_path, step, error, message):
    with pytest.raises(error, match=message):
        mj.checkpoint.save(tmp_path, step, {"x": jnp.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_silently_wrote_nothing_is_told(tmp_path, monkeypatch):
    state = {"x": jnp.ones(2)}
    mj.checkpoint.save(tmp_path, 1, state)
    monkeypatch.setattr(ocp1.training.Checkpointer, "save", lambda *_, **__: True)
    with pytest.raises(mj.CheckpointError, match="Step 2 was not written to .* is 1"):
        mj.checkpoint.save(tmp_path, 2, state)


def test_a_path_of_a_bucket_is_left_as_it_is_and_not_locked(tmp_path, monkeypatch):
    from movement_jax import stepdirs

    monkeypatch.chdir(tmp_path)  # stands in for the bucket
    monkeypatch.setattr(stepdirs, "_in_bucket", lambda directory: True)
    assert stepdirs._path("gs://bucket/run") == "gs://bucket/run"
    path = str(tmp_path / "run")
    mj.checkpoint.save(path, 1, {"x": jnp.arange(3.0)})
    restored = mj.checkpoint.restore(path, like={"x": jnp.zeros(3)})
    np.testing.assert_array_equal(restored["x"], [0, 1, 2])
    assert [name for name in os.listdir(path) if "lock" in name] == []


def test_several_processes_must_say_where_arrays_are_to_be(tmp_path, monkeypatch):
    from movement_jax import checkpoint

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="must say where it is to be.*a sharding"):
        checkpoint._target(jax.ShapeDtypeStruct((3,), jnp.float32))


def test_leaves_of_one_path_have_no_fingerprint():
    twice = {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}, "c": jnp.ones(1)}
    with pytest.raises(ValueError, match="Two leaves have the same path.*a/b"):
        mj.fingerprint(twice)


@struct.dataclass
class Adapted:
    """A state of which the params are not leaves, but made of them when asked for."""

    frozen: dict
    delta: dict
    opt_state: object

    @property
    def params(self):
        return jax.tree.map(jnp.add, self.frozen, self.delta)


def test_params_that_are_made_of_leaves_are_covered_too(tmp_path):
    params = fresh_state().params["dense"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    opt_state = optimizer().init(params)
    state = Adapted(frozen=params, delta=zeros, opt_state=opt_state)
    checkpoint.save(tmp_path, 1, state)
    checkpoint.verify(tmp_path)
    like = jax.tree.map(jnp.zeros_like, state)
    back = checkpoint.restore(tmp_path, like=like)
    assert mj.fingerprint(back) == mj.fingerprint(state)
    assert mj.fingerprint(back.replace(delta=params)) != mj.fingerprint(state)


def test_after_a_failed_save_the_first_process_cleans_up(monkeypatch, tmp_path):
    left = tmp_path / "7.orbax-checkpoint-tmp"
    left.mkdir()
    running = set(threading.enumerate())
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert checkpoint._cleaned_up(tmp_path, running) == "There is no good step."
    assert left.exists()
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    checkpoint._cleaned_up(tmp_path, running)
    assert not left.exists()


def test_in_a_bucket_orbax_cleans_up(monkeypatch):
    monkeypatch.setattr(os, "listdir", lambda path: pytest.fail("it was looked into"))
    stepdirs.clean("gs://nobody/nothing")
