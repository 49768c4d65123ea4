"""A small regression, its gradients and optimizers by hand, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import movement_jax as mj

STEPS = 50
INPUTS = np.random.default_rng(0).standard_normal((32, 6)).astype(np.float32)
LABELS = np.tanh(INPUTS @ np.random.default_rng(1).standard_normal((6, 3)))
PARAMS = {
    "first": {"kernel": np.random.default_rng(2).standard_normal((6, 5)) * 0.4},
    "second": {"kernel": np.random.default_rng(3).standard_normal((5, 3)) * 0.4},
}
PARAMS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
# Not before step 5: Adam's first step makes all scores equal but for rounding.
LEVELS = [0.6 * (1 - (1 - np.clip((t - 5) / 35, 0, 1)) ** 3) for t in range(STEPS + 1)]


def loss(params):
    hidden = jnp.tanh(INPUTS @ params["first"]["kernel"])
    return jnp.mean((hidden @ params["second"]["kernel"] - LABELS) ** 2)


def kernels(tree):
    """The two kernels as float64, whatever tree they come in."""
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def gradients(weights):
    """Of the regression above, by hand."""
    first, second = weights
    hidden = np.tanh(INPUTS.astype(np.float64) @ first)
    error = 2 * (hidden @ second - LABELS) / LABELS.size
    return [INPUTS.T @ ((error @ second.T) * (1 - hidden**2)), hidden.T @ error]


def keep_highest(scores, sparsity):
    mask = np.ones(scores.size, bool)
    order = np.lexsort((-np.arange(scores.size), scores.ravel()))
    mask[order[: round(sparsity * scores.size)]] = False
    return mask.reshape(scores.shape)


def train(tx, steps=STEPS, params=PARAMS, at=mj.effective_params):
    """Params, optimizer state and pruning state after every step."""

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(loss)(at(params, opt_state))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    history = []
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
        history.append((params, mj.find_state(opt_state)))
    return history


class AdamByHand:
    def __init__(self, like, rate=1e-2):
        self.rate, self.t = rate, 0
        self.mean = [np.zeros_like(x) for x in like]
        self.square = [np.zeros_like(x) for x in like]

    def __call__(self, grads):
        self.t += 1
        steps = []
        for i, g in enumerate(grads):
            self.mean[i] = 0.9 * self.mean[i] + 0.1 * g
            self.square[i] = 0.999 * self.square[i] + 0.001 * g**2
            mean = self.mean[i] / (1 - 0.9**self.t)
            root = np.sqrt(self.square[i] / (1 - 0.999**self.t))
            steps.append(-self.rate * mean / (root + 1e-8))
        return steps
