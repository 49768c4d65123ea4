"""What XLA makes of the library for a TPU, read from programs compiled without one.

Needs libtpu: `pip install -e ".[test,tpu-aot]"`. Nothing runs; sizes are those of a
real model, as shapes cost nothing.
"""

import collections
import importlib.metadata
import math
import os
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import movement_jax as mj

ONE_CHIP = ("v5e:1x1", (1, 1), {"chips_per_host_bounds": [1, 1, 1]})
FOUR_CHIPS = ("v5e:2x2", (2, 2), {})
LARGE = 1024  # bytes: no tensor is smaller, no count or flag of a few leaves larger
MOVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
SHOWN = ("sort", "while", "fusion", "copy", "all-reduce", *MOVES)
NBYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}

# Every leaf is larger than a v5e's fast memory, where XLA would cache it otherwise.
SHAPES = {
    "embed": {"embedding": (32768, 2048)},
    "blocks": {"mlp": {"kernel": (4, 4096, 8192), "bias": (4, 8192)}},
    "attention": {"kernel": (2048, 64, 512)},
    "head": {"kernel": (2048, 32768)},
    "norm": {"scale": (2048,)},
}
SPECS = {
    "embedding": ("model", None),
    "mlp/kernel": (None, "data", "model"),
    "attention/kernel": ("data", "model", None),
    "head/kernel": (None, "model"),
}


@pytest.fixture(scope="module")
def topology():
    """Makes meshes of TPUs that need not be there."""
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip('libtpu is not installed: pip install -e ".[tpu-aot]"')
    if tuple(int(n) for n in version.split(".")[:3]) < (0, 0, 23):
        pytest.skip(f"libtpu {version} crashes without a TPU: 0.0.23 does not")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

        def mesh(chips, axis_type=AxisType.Auto):
            name, shape, options = chips
            found = topologies.get_topology_desc(
                topology_name=name, platform="tpu", **options
            )
            devices = np.array(found.devices).reshape(shape)
            return Mesh(devices, ("data", "model"), axis_types=(axis_type,) * 2)

        yield mesh


@pytest.mark.parametrize("allocation", [mj.Uniform(), mj.Global()], ids=repr)
def test_train_step_on_a_tpu_takes_no_memory_of_its_own(topology, allocation):
    tx = pruned_adamw(allocation=allocation, check_finite=False)
    program = compiled(step_of(tx), tx, topology(ONE_CHIP))
    assert not program.sorts()
    assert program.temp < 0.01 * param_bytes()
    assert program.aliases_all_it_returns()
    assert program.copies_on_every_step() == []


def test_looking_for_bad_steps_on_a_tpu_takes_one_leaf_of_memory(topology):
    tx = pruned_adamw()
    program = compiled(step_of(tx), tx, topology(ONE_CHIP))
    assert not program.sorts()
    assert program.temp < 1.05 * 4 * max(map(math.prod, shapes()))
    assert program.aliases_all_it_returns()


@pytest.mark.parametrize("allocation", [mj.Uniform(), mj.Global()], ids=repr)
def test_prune_on_a_tpu_takes_no_memory_of_its_own(topology, allocation):
    tx = pruned_adamw(allocation=allocation)
    program = compiled(prune, tx, topology(ONE_CHIP))
    assert not program.sorts()
    assert program.temp < 0.01 * param_bytes()
    assert program.aliases_all_it_returns()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_train_step_on_four_tpus_exchanges_counts_only(topology, axis_type):
    tx = pruned_adamw(check_finite=False)
    program = compiled(step_of(tx), tx, topology(FOUR_CHIPS, axis_type))
    assert not program.sorts()
    assert program.moved() == []
    assert program.temp < 0.02 * param_bytes() / 4
    assert program.aliases_all_it_returns()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_prune_on_four_tpus_exchanges_counts_only(topology, axis_type):
    tx = pruned_adamw(allocation=mj.Global())
    program = compiled(prune, tx, topology(FOUR_CHIPS, axis_type))
    assert not program.sorts()
    assert program.moved() == []
    assert program.aliases_all_it_returns()


def test_flax_train_step_on_a_tpu_updates_its_state_in_place(topology):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x += nn.MultiHeadDotProductAttention(num_heads=8)(nn.LayerNorm()(x))
            return x + nn.Dense(512)(nn.gelu(nn.Dense(2048)(nn.LayerNorm()(x))))

    def train_step(state, x):
        def loss(params):
            return jnp.square(state.apply_fn({"params": params}, x) - x).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    def create(x):
        params = Block().init(jax.random.key(0), x)["params"]
        tx = pruned_adamw(stacked=None)
        return TrainState.create(apply_fn=Block().apply, params=params, tx=tx)

    x, mesh = jax.ShapeDtypeStruct((8, 256, 512), jnp.float32), topology(ONE_CHIP)
    state = place(jax.eval_shape(create, x), mesh)
    jitted = jax.jit(train_step, donate_argnums=0)
    program = Program(jitted.lower(state, place(x, mesh)))
    assert not program.sorts()
    assert program.aliases_all_it_returns()


class Program:
    """A compiled program: its operations with the types they return, its memory."""

    def __init__(self, lowered):
        built = lowered.compile()
        self.text, memory = built.as_text(), built.memory_analysis()
        self.temp = memory.temp_size_in_bytes
        self.alias = memory.alias_size_in_bytes
        self.returned = memory.output_size_in_bytes
        self.found = operations(self.text)
        self.ops = collections.Counter(name for _, name in self.found)
        telling = {n: self.ops[n] for n in SHOWN if self.ops[n]}
        print(
            f"\n  {telling}, {self.temp} bytes temporary, "
            f"{self.alias} of {self.returned} returned bytes in place",
            end=" ",
        )

    def sorts(self):
        return self.ops["sort"] > 0 or 'custom_call_target="TopK"' in self.text

    def aliases_all_it_returns(self):
        return self.returned - self.alias <= LARGE  # the rest: the table of outputs

    def moved(self):
        """What devices send each other, save for counts."""
        names = (*MOVES, "all-reduce")
        return [(r, n) for r, n in self.found if n in names and nbytes(r) >= LARGE]

    def copies_on_every_step(self):
        """Copies from main memory to main memory outside of loops and fusions."""
        entry = operations(self.text[self.text.index("\nENTRY ") :])
        copies = [r for r, name in entry if name == "copy" and "S(" not in r]
        return [r for r in copies if nbytes(r) >= LARGE]


def operations(text):
    """``(type returned, name)`` of every instruction; async pairs count once."""
    found = re.findall(r"^ *(?:ROOT )?%\S+ = (.*?) ([a-z][a-z\d-]*)\(", text, re.M)
    return [(result, name.removesuffix("-start")) for result, name in found]


def nbytes(result):
    """Bytes of all arrays in the type of an HLO instruction."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
    return sum(
        NBYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in arrays
    )


def pruned_adamw(stacked="blocks", **options):
    schedule = mj.cubic(0.9, begin=0, end=1000, every=100)
    pruning = mj.movement_pruning(schedule, stacked=stacked, **options)
    return optax.chain(optax.adamw(1e-3), pruning)


def step_of(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def prune(params, state, sparsity):
    return mj.prune((params, state), sparsity)


def compiled(function, tx, mesh):
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    state = jax.eval_shape(tx.init, params)
    params, state = place(params, mesh), place(state, mesh)
    last = params if function is not prune else place(jnp.float32(0.9), mesh)
    jitted = jax.jit(
        function,
        donate_argnums=(0, 1),
        out_shardings=jax.tree.map(lambda x: x.sharding, (params, state)),
    )
    with jax.sharding.set_mesh(mesh):
        return Program(jitted.lower(params, state, last))


def place(tree, mesh):
    """Abstract arrays like those of ``tree``, sharded as their paths say."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((SPECS[end] for end in SPECS if name.endswith(end)), ())
        spec = spec if len(spec) == leaf.ndim else ()
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def shapes():
    return jax.tree.leaves(SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def param_bytes():
    return 4 * sum(map(math.prod, shapes()))


CHEAP = [
    mj.EmaMagnitude(scores_dtype="bfloat16"),
    mj.EmaMagnitude(score_every=8),
    mj.EmaMagnitude(scores_dtype="bfloat16", score_every=8),
]


@pytest.mark.parametrize("criterion", CHEAP, ids=["bfloat16", "every 8", "both"])
def test_cheaper_scores_on_a_tpu_take_no_memory_either(topology, criterion):
    tx = pruned_adamw(criterion=criterion, check_finite=False)
    program = compiled(step_of(tx), tx, topology(ONE_CHIP))
    assert not program.sorts()
    assert program.temp < 0.01 * param_bytes()
    assert program.aliases_all_it_returns()
    assert program.copies_on_every_step() == []
