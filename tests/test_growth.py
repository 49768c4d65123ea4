"""Sparse training from the start, against the same written in NumPy."""

import gzip
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import AdamByHand, gradients, keep_highest, kernels, train

import movement_jax as mj

DIGITS = pathlib.Path(__file__).parents[2] / "shared" / "data" / "mnist10k"
STEPS, SPARSITY, SEED = 60, 0.7, 3
ALPHA, EVERY, END = 0.4, 4, 45
NAMES = ["first/kernel", "second/kernel"]


def make_params(hidden=24):
    rng = np.random.default_rng(4)
    shapes = {"first": (6, hidden), "second": (hidden, 3)}
    return {
        name: {"kernel": jnp.asarray(rng.standard_normal(shape) * 0.4, jnp.float32)}
        for name, shape in shapes.items()
    }


def noise(key, shapes):
    keys = [jax.random.fold_in(key, zlib.crc32(name.encode())) for name in NAMES]
    return [np.asarray(jax.random.uniform(k, s)) for k, s in zip(keys, shapes)]


def by_gradient(t, grads):
    return [np.abs(g) for g in grads]


def by_chance(t, grads):
    key = jax.random.fold_in(jax.random.key(SEED), t)
    return noise(key, [g.shape for g in grads])


def share(t, end):
    """Of the kept weights that is exchanged at step ``t``."""
    if t % EVERY or (end is not None and t >= end):
        return 0.0
    return ALPHA if end is None else ALPHA / 2 * (1 + np.cos(np.pi * t / end))


def swap(mask, weight, worth, fraction):
    """Drops the smallest weights, then grows those of the most worth."""
    kept = mask.sum()
    stays = keep_lowest_last(np.where(mask, np.abs(weight), -1), kept, fraction)
    order = np.lexsort((-np.arange(worth.size), np.where(stays, np.inf, worth).ravel()))
    new = np.zeros(worth.size, bool)
    new[order[worth.size - kept :]] = True
    return new.reshape(mask.shape)


def keep_lowest_last(scores, kept, fraction):
    order = np.lexsort((-np.arange(scores.size), scores.ravel()))
    stays = np.zeros(scores.size, bool)
    stays[order[scores.size - kept + round(fraction * kept) :]] = True
    return stays.reshape(scores.shape)


class MomentumByHand:
    def __init__(self, like):
        self.trace = [np.zeros_like(x) for x in like]

    def __call__(self, grads):
        self.trace = [0.9 * m + g for m, g in zip(self.trace, grads)]
        return [-0.1 * m for m in self.trace]

    @property
    def memory(self):
        return [self.trace]


class Adam(AdamByHand):
    def __init__(self, like):
        super().__init__(like, rate=2e-3)  # float32 is off by some 1e-4 of it a step

    @property
    def memory(self):
        return [self.mean, self.square]


CASES = {
    "RigL": (mj.RigL, END, by_gradient),
    "RigL without an end": (mj.RigL, None, by_gradient),
    "SET": (mj.SET, END, by_chance),
    "SET without an end": (mj.SET, None, by_chance),
}
OPTIMIZERS = {
    "momentum": (optax.sgd(0.1, momentum=0.9), MomentumByHand),
    "adam": (optax.adam(2e-3), Adam),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_sixty_steps_equal_numpy(name, optimizer):
    make, end, worth = CASES[name]
    inner, by_hand = OPTIMIZERS[optimizer]
    criterion = make(end, every=EVERY, drop_fraction=ALPHA, seed=SEED)
    tx = mj.movement_pruning(SPARSITY, criterion, inner=inner)
    weights = kernels(make_params())
    masks, move = [np.ones(w.shape, bool) for w in weights], by_hand(weights)
    grown = exchanges = 0
    for t, (params, state) in enumerate(train(tx, STEPS, make_params()), 1):
        grads = gradients(weights)
        moves = move([m * g for m, g in zip(masks, grads)])
        if t == 1:
            drawn = noise(jax.random.key(SEED), [w.shape for w in weights])
            masks = [keep_highest(x, SPARSITY) for x in drawn]
        fraction = share(t, end)
        if fraction:
            exchanges += 1
            for i, value in enumerate(worth(t, grads)):
                new = swap(masks[i], weights[i], value, fraction)
                for memory in move.memory:
                    memory[i] = np.where(new & ~masks[i], 0, memory[i])
                grown += (new & ~masks[i]).sum()
                masks[i] = new
                moves[i] = 0
        weights = [m * (w + d) for m, w, d in zip(masks, weights, moves)]
        for i in range(2):
            np.testing.assert_array_equal(kernels(state.masks)[i], masks[i])
            np.testing.assert_allclose(kernels(params)[i], weights[i], atol=1e-6)
    assert (t, state.events.changes) == (STEPS, 1 + exchanges)
    assert exchanges == (15 if end is None else 11) and grown > 25
    for memory, want in zip(memories(state, weights), move.memory):
        for i in range(2):
            np.testing.assert_allclose(memory[i], want[i], atol=1e-6)


def memories(state, weights):
    """What the optimizer remembers: its trees like the params, in order."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(state.inner_state)]
    leaves = [x for x in leaves if x.ndim]
    return [leaves[i : i + len(weights)] for i in range(0, len(leaves), len(weights))]


def test_the_fraction_falls_along_a_cosine_and_ends():
    falling = mj.RigL(100, every=25, drop_fraction=0.4)
    got = [float(falling.exchange(t)) for t in (0, 1, 24, 25, 50, 75, 100, 125)]
    want = [0, 0, 0, 0.2 * (1 + 0.5**0.5), 0.2, 0.2 * (1 - 0.5**0.5), 0, 0]
    np.testing.assert_allclose(got, want, atol=1e-6)
    forever = mj.SET(None, every=25, drop_fraction=0.4)
    got = [float(forever.exchange(t)) for t in (0, 24, 25, 1000)]
    np.testing.assert_allclose(got, [0, 0, 0.4, 0.4])


def test_masks_begin_at_random_and_prune_then_ranks_by_magnitude():
    tx = mj.movement_pruning(None, mj.RigL(100), inner=optax.sgd(0.0))
    params = {"kernel": jnp.arange(1.0, 401.0).reshape(20, 20)}
    state = tx.init(params)
    began = np.asarray(mj.prune((params, state), 0.5)[0]["kernel"])
    assert 60 < (began[:10] != 0).sum() < 140
    other = mj.movement_pruning(None, mj.SET(100, seed=1), inner=optax.sgd(0.0))
    began_so = mj.prune((params, other.init(params)), 0.5)[0]["kernel"]
    assert np.any((began == 0) != (np.asarray(began_so) == 0))
    _, state = tx.update(params, state, params)
    later, _ = mj.prune((params, state), 0.5)
    np.testing.assert_array_equal(np.asarray(later["kernel"][:10]), 0)


@pytest.mark.parametrize("make", [mj.RigL, mj.SET])
def test_the_erdos_renyi_counts_of_every_tensor_stay(make):
    criterion = make(None, every=3, drop_fraction=0.5)
    tx = mj.movement_pruning(
        0.8, criterion, allocation=mj.ErdosRenyi(), inner=optax.adam(1e-2)
    )
    history = train(tx, 20, make_params())
    counts = [[int(m.sum()) for m in kernels(state.masks)] for _, state in history]
    assert all(count == counts[0] for count in counts)
    assert counts[0] != [round(0.2 * 144), round(0.2 * 72)]
    assert sum(counts[0]) == round(0.2 * 216)


def test_a_sparsity_that_rises_drops_by_magnitude_and_is_met():
    criterion = mj.RigL(None, every=4, drop_fraction=0.5)
    schedule = mj.cubic(0.8, 3, 40, every=4, initial=0.4)
    tx = mj.movement_pruning(schedule, criterion, inner=optax.sgd(0.1))
    history = train(tx, 50, make_params())
    for params, state in history:
        for weight, mask in zip(kernels(params), kernels(state.masks)):
            assert not np.any(weight[mask == 0])
    for mask in kernels(state.masks):
        assert mask.sum() == mask.size - round(0.8 * mask.size)
    assert float(mj.sparsity_of(state)) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: mj.RigL(0), ValueError, "`end` must be at least 1 step, got 0"),
        (lambda: mj.RigL(0.75), TypeError, "`end` must be a whole number of steps"),
        (lambda: mj.RigL(10, every=1), ValueError, "`every` must be at least 2"),
        (lambda: mj.SET(10, every=0), ValueError, "`every` must be at least 1 step"),
        (lambda: mj.SET(10, drop_fraction=1), ValueError, "`drop_fraction` must be in"),
        (lambda: mj.SET(10, seed=0.5), TypeError, "`seed` must be an integer, got 0.5"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_reason(make, error, message):
    with pytest.raises(error, match=message):
        make()


def digits():
    def read(name, skip):
        return np.frombuffer(gzip.open(DIGITS / name).read()[skip:], np.uint8)

    x = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 784)
    x = jnp.asarray(x / 255, jnp.float32)
    return x, jnp.asarray(read("t10k-labels-idx1-ubyte.gz", 8), jnp.int32)


def network(seed):
    draw, sizes = jax.nn.initializers.he_normal(), (784, 300, 100, 10)
    keys = jax.random.split(jax.random.key(seed), 3)
    return [
        {"kernel": draw(key, shape), "bias": jnp.zeros(shape[1])}
        for key, shape in zip(keys, zip(sizes, sizes[1:]))
    ]


def logits(params, x):
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def accuracy(tx, seed, steps=2000):
    """On the last 2,000 digits, after training on the first 8,000."""
    x, y = digits()
    rows = jax.random.randint(jax.random.key(seed), (steps, 100), 0, 8000)

    @jax.jit
    def run(params):
        def step(carry, rows):
            def loss(params):
                out = logits(params, x[rows])
                return optax.losses.softmax_cross_entropy_with_integer_labels(
                    out, y[rows]
                ).mean()

            params, opt_state = carry
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        params, opt_state = jax.lax.scan(step, (params, tx.init(params)), rows)[0]
        right = jnp.argmax(logits(params, x[8000:]), 1) == y[8000:]
        return right.mean(), mj.sparsity_of(opt_state)

    right, sparsity = run(network(seed))
    assert sparsity == pytest.approx(LEVEL, abs=1e-4)
    return float(right)


LEVEL = 0.95
METHODS = {
    "static mask": lambda seed: mj.RigL(1500, drop_fraction=0.0, seed=seed),
    "SET": lambda seed: mj.SET(1500, every=50, seed=seed),
    "RigL": lambda seed: mj.RigL(1500, every=50, seed=seed),
    "gradual magnitude": lambda seed: mj.Magnitude(),
}


@pytest.mark.nightly
@pytest.mark.skipif(not DIGITS.exists(), reason=f"needs handwritten digits in {DIGITS}")
def test_on_handwritten_digits_rigl_beats_a_static_mask():
    medians = {}
    for name, make in METHODS.items():
        gradual = name == "gradual magnitude"
        level = mj.cubic(LEVEL, 100, 1500, every=50) if gradual else LEVEL
        allocation = mj.ErdosRenyi()
        reached = []
        for seed in range(3):
            tx = mj.movement_pruning(
                level, make(seed), allocation=allocation, inner=optax.adam(1e-3)
            )
            reached.append(accuracy(tx, seed))
        medians[name] = np.median(reached)
        print(f"{name}: median {medians[name]:.4f} of {np.round(reached, 4)}")
    assert medians["RigL"] > medians["static mask"]
