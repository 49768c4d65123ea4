"""The states that are kept as checkpoints, and what of them is compared."""

import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import movement_jax as mj

HERE = pathlib.Path(__file__).parent
DIGESTS = HERE / "digests.json"


def _params(dtype=jnp.float32):
    kernels = np.random.default_rng(0).standard_normal((3, 8, 8)).astype(np.float32)
    return {
        "scan": {"kernel": jnp.asarray(kernels, dtype)},
        "out": {"kernel": jnp.asarray(kernels[0] - 1), "bias": jnp.zeros(8)},
    }


def _chained():
    pruning = mj.movement_pruning(mj.cubic(0.75, begin=1, end=8, every=2))
    return optax.chain(optax.adamw(1e-2, mu_dtype=jnp.float32), pruning), jnp.bfloat16


def _movement():
    pruning = mj.movement_pruning(
        mj.cubic(0.75, begin=1, end=8),
        mj.Movement(),
        allocation=mj.PerPath({"out": 0.5}),
        structure={"out": mj.Block((4, 2)), "scan": mj.NM(1, 4)},
        inner=optax.adamw(1e-2),
        regrow=True,
        track_start=True,
        track_noise=True,
    )
    return pruning, jnp.float32


def _soft():
    criterion = mj.SoftMovement(target_sparsity=mj.cubic(0.75, begin=1, end=8))
    pruning = mj.movement_pruning(
        criterion=criterion, stacked="scan", inner=optax.sgd(1e-2), regrow=True
    )
    return pruning, jnp.float32


def _cheap():
    criterion = mj.EmaMagnitude(scores_dtype="bfloat16", score_every=2)
    allocation = mj.Global(min_keep=3)
    pruning = mj.movement_pruning(
        mj.cubic(0.75, begin=1, end=8), criterion, allocation=allocation
    )
    return optax.chain(optax.lion(1e-3), pruning), jnp.float32


MADE = {"chained": _chained, "movement": _movement, "soft": _soft, "cheap": _cheap}


def fresh(name):
    """A state as it is before training: what a user gives as ``like``."""
    tx, dtype = MADE[name]()
    state = TrainState.create(apply_fn=None, params=_params(dtype), tx=tx)
    return {"train": state, "key": jax.random.key(7)}


def trained(name, steps=12):
    """The same after some steps with made-up gradients."""
    state, noise = fresh(name), np.random.default_rng(1)

    @jax.jit
    def step(train, grads):
        return train.apply_gradients(grads=grads)

    for _ in range(steps):
        grads = jax.tree.map(
            lambda x: jnp.asarray(noise.standard_normal(x.shape), x.dtype),
            state["train"].params,
        )
        state["train"] = step(state["train"], grads)
    return state


def digest(state):
    """Of all bytes, types, shapes and paths, by nothing of the library itself."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        x = np.asarray(x)
        digest.update(f"{jax.tree_util.keystr(path)} {x.dtype}{x.shape} ".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()
