"""Trains, prunes and reads the result with the installed wheel and no extra."""

import pathlib

import jax
import jax.numpy as jnp
import optax

import movement_jax as mj

tx = optax.chain(optax.adamw(0.1), mj.movement_pruning())
params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
state = tx.init(params)
for _ in range(3):
    grads = jax.grad(lambda p: jnp.sum(p["kernel"] ** 2))(params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
params, state = mj.prune((params, state), 0.75)
assert int((params["kernel"] == 0).sum()) == 48
assert "site-packages" in pathlib.Path(mj.__file__).parts, mj.__file__
print(f"movement_jax {mj.__version__} from the wheel prunes 48 of 64 weights")
