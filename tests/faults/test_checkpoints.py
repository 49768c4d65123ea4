"""Rows F, and those of G that a checkpoint from a stranger can bring."""

import contextlib
import functools
import gc
import json
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import movement_jax as mj
from movement_jax import CheckpointError

from . import hostile
from .subjects import alike, both, failing


class Ours:
    """`movement_jax.checkpoint`."""

    save = staticmethod(mj.checkpoint.save)
    restore = staticmethod(mj.checkpoint.restore)


class Orbax:
    """Orbax as it is used without more thought."""

    @staticmethod
    def save(directory, step, state):
        with ocp.training.Checkpointer(directory) as checkpointer:
            checkpointer.save(step, state, overwrite=True)

    @staticmethod
    def restore(directory, like, step=None):
        with ocp.training.Checkpointer(directory) as checkpointer:
            return checkpointer.load(step, like)


class Files:
    """Files of NumPy, one for each array, under the same names at every step."""

    @staticmethod
    def save(directory, step, state):
        pathlib.Path(directory, "last").mkdir(parents=True, exist_ok=True)
        for n, leaf in enumerate(jax.tree.leaves(state)):
            np.save(pathlib.Path(directory, "last", f"{n}.npy"), leaf)

    @staticmethod
    def restore(directory, like, step=None):
        leaves, structure = jax.tree.flatten(like)
        for path in pathlib.Path(directory, "last").glob("*.npy"):
            leaves[int(path.stem)] = np.load(path)
        return structure.unflatten(leaves)


class Untargeted(Orbax):
    """Restores what is there, as it is."""

    @staticmethod
    def restore(directory, like, step=None):
        with ocp.training.Checkpointer(directory) as checkpointer:
            return checkpointer.load(step)


class InPlaces(Orbax):
    """One directory for each array, which older tools can read."""

    @staticmethod
    def save(directory, step, state):
        saving = ocp.options.ArrayOptions.Saving(use_ocdbt=False)
        array_options = ocp.options.ArrayOptions(saving=saving)
        with ocp.Context(array_options=array_options):
            Orbax.save(directory, step, state)


class Configured(Orbax):
    """Saves how weights are pruned as well, and makes the criterion of it."""

    @staticmethod
    def save(directory, step, state):
        criterion = re.sub(" at 0x[0-9a-f]+", "", str(mj.EmaMagnitude()))
        with ocp.training.Checkpointer(directory) as checkpointer:
            checkpointer.save(step, state, custom_metadata={"criterion": criterion})

    @staticmethod
    def restore(directory, like, step=None):
        with ocp.training.Checkpointer(directory) as checkpointer:
            said = checkpointer.metadata(step).custom_metadata["criterion"]
            decay = float(re.search(r"decay=([0-9.]+)", said)[1])
            return checkpointer.load(step, like), mj.EmaMagnitude(decay)


class Halved(Orbax):
    """Saves everything in bfloat16, for half of the room."""

    @staticmethod
    def save(directory, step, state):
        def halved(x):
            return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x

        Orbax.save(directory, step, jax.tree.map(halved, state))


ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

# Reads that fail leave futures behind, which tell of it when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def futures_are_collected():
    """In the test that left them, not at the end of all."""
    yield
    gc.collect()


def against(naive, reason, *raises):
    """Checks ours, and shows that other code does not pass the same check."""
    return both(reason, ours=Ours, naive=naive, raises=raises)


def against_orbax(reason, *raises):
    return against(Orbax, reason, *raises)


@contextlib.contextmanager
def full_disk(room=200_000):
    """No file can be written that is larger, as on a disk with so much room."""
    unlimited, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, hard))


def optimizer(criterion=None, sparsity=0.5):
    pruning = mj.movement_pruning(sparsity, criterion or mj.EmaMagnitude())
    return optax.chain(optax.adam(1e-2), pruning)


TX = optimizer()


def fresh(seed=0, tx=TX, width=16):
    params = nn.Dense(width).init(jax.random.key(seed), jnp.ones((1, 8)))["params"]
    return TrainState.create(apply_fn=None, params=params, tx=tx)


@jax.jit
def step(state):
    return state.apply_gradients(grads=jax.tree.map(jnp.sin, state.params))


@functools.cache
def trained(seed=0, steps=3, tx=TX):
    state = fresh(seed, tx)
    for _ in range(steps):
        state = step(state)
    return state


def assert_same(a, b):
    chex.assert_trees_all_equal(a.params, b.params)
    chex.assert_trees_all_equal(a.opt_state, b.opt_state)
    chex.assert_trees_all_equal_dtypes(a.opt_state, b.opt_state)


def files_of(directory, step):
    root = pathlib.Path(directory) / str(step)
    return sorted(path for path in root.rglob("*") if path.is_file())


def error_of(subject, directory, like, **options):
    """What restoring raises, if anything."""
    try:
        subject.restore(directory, like, **options)
    except Exception as error:
        return error
    return None


def refused(subject, directory, original):
    """Whether damage was told, or did none: True, None; else False."""
    like = jax.tree.map(jnp.zeros_like, original)
    try:
        restored = subject.restore(directory, like)
    except CheckpointError:
        return True
    except Exception:
        return subject is not Ours  # any error will do for others; ours has one kind
    return None if mj.fingerprint([restored]) == mj.fingerprint([original]) else False


def run_python(code, *args, **options):
    """Runs a program that imports the package; returns what it printed."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=300,
        **options,
    )


@against(Untargeted, "named tuples come back as dicts, tuples as lists")
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_F14_types_of_nodes_come_back(tmp_path, subject):
    state = trained().opt_state
    subject.save(tmp_path, 3, state)
    restored = subject.restore(tmp_path, jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_F14_what_is_saved_comes_back_bit_for_bit_in_its_own_types(tmp_path):
    state = trained()
    mj.checkpoint.save(tmp_path, 3, state)
    assert_same(mj.checkpoint.restore(tmp_path, like=fresh(seed=1)), state)
    abstract = jax.eval_shape(fresh)
    assert_same(mj.checkpoint.restore(tmp_path, like=abstract), state)
    assert jax.tree.structure(mj.checkpoint.restore(tmp_path, like=abstract)) == (
        jax.tree.structure(state)
    )
    assert mj.checkpoint.verify(tmp_path) == {3: mj.fingerprint(state)}
    with pytest.raises(TypeError, match="like"):
        mj.checkpoint.restore(tmp_path)


def test_F19_any_tree_of_arrays_is_saved_and_verified(tmp_path):
    state = {
        "key": jax.random.key(3),
        "box": nn.Partitioned(jnp.ones((2, 2)), names=("a", None)),
        "none": None,
        "epoch": 3,
        "list": [np.float32(1.5), jnp.bfloat16(2)],
        "small": jnp.ones((2, 2), jnp.float8_e4m3fn),
    }
    mj.checkpoint.save(tmp_path, 0, state)
    restored = mj.checkpoint.restore(tmp_path, like=state)
    assert jax.random.key_data(restored["key"]).tolist() == [0, 3]
    assert restored["epoch"] == 3
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(restored)):
        assert mj.fingerprint(old) == mj.fingerprint(new)
    assert list(mj.checkpoint.verify(tmp_path)) == [0]


@against(Files, "NumPy writes no keys, and most of these dtypes as bytes", TypeError)
def test_F19_unusual_dtypes_come_back(tmp_path, subject):
    dtypes = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "complex64", "bool"]
    state = {name: jnp.arange(4).astype(name) for name in dtypes}
    state |= {"key": jax.random.key(3), "none": None}
    subject.save(tmp_path, 0, state)
    restored = subject.restore(tmp_path, state)
    assert mj.fingerprint([restored]) == mj.fingerprint([state])
    assert restored["none"] is None


def test_plain_orbax_reads_it(tmp_path):
    state = trained()
    mj.checkpoint.save(tmp_path, 3, state)
    target = jax.tree.map(jnp.zeros_like, state)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        assert_same(checkpointer.load(3, target), state)
        assert_same(checkpointer.load(None, target), state)


def test_F3_nothing_is_overwritten(tmp_path):
    first, second = trained(seed=0), trained(seed=1)
    mj.checkpoint.save(tmp_path, 3, first)
    for step in (3, 2):
        with pytest.raises(
            CheckpointError, match=rf"must be larger than the last .* 3; got {step}"
        ):
            mj.checkpoint.save(tmp_path, step, second)
    assert mj.checkpoint.steps(tmp_path) == [3]
    assert_same(mj.checkpoint.restore(tmp_path, like=fresh()), first)


@pytest.mark.slow
@both(
    "overwriting deletes the last step first; a save not waited for is no save",
    ours=["--saves", "6", "--trainings", "3"],
    naive=["--naive", "20"],
)
def test_F1_F2_killed_processes_lose_nothing(subject):
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killing", *subject],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=1200,
    )
    lost = re.findall(r"processes killed .*: (\d+) lost", done.stdout)
    if len(lost) != 1 + ("--naive" in subject):
        raise RuntimeError(done.stdout + done.stderr[-3000:])
    assert "0" in lost  # of naive code, both ways lose a step: else this passes
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    if "--trainings" in subject:
        trained = re.search(r"trainings with (\d+) kills: 0 ended", done.stdout)
        assert trained and int(trained[1]) >= 3


@against_orbax("overwrite=True replaces a good step")
def test_F3_a_step_that_is_there_stays(tmp_path, subject):
    first, second = trained(seed=0), trained(seed=1)
    subject.save(tmp_path, 3, first)
    try:
        subject.save(tmp_path, 3, second)
    except CheckpointError:
        pass
    assert_same(subject.restore(tmp_path, fresh()), first)


SMALL = {"x": np.ones(16, np.float32)}
BIG = {"x": np.random.default_rng(0).normal(size=2**17).astype(np.float32)}


@against_orbax("what failed saves have left keeps the disk full")
def test_F4_a_full_disk_leaves_the_last_good_step_alone(
    tmp_path, subject, record_property
):
    subject.save(tmp_path, 1, SMALL)
    told, seen = 0, []
    with full_disk():
        for step in range(2, 12):
            try:
                subject.save(tmp_path, step, BIG)
            except ValueError as error:
                told += subject is Orbax or "last good step is 1." in str(error)
            seen.append(mj.checkpoint.steps(tmp_path))
    restored = subject.restore(tmp_path, jax.tree.map(jnp.zeros_like, SMALL))
    kept = seen == [[1]] * 10 and (restored["x"] == 1).all()
    if subject is Ours:
        record_property("R10", (10 - told if kept else 10, 10))
    assert told == 10 and kept
    subject.save(tmp_path, 12, SMALL)
    assert {name for name in os.listdir(tmp_path) if name[0] != "."} == {"1", "12"}


def latest_of_manager(directory, manager):
    return manager.latest_step()


def latest_on_disk(directory, manager):
    return mj.checkpoint.steps(directory)[-1]


@both("the manager has counted it", ours=latest_on_disk, naive=latest_of_manager)
def test_F5_a_step_that_an_asynchronous_save_will_lose_is_not_reported(
    tmp_path, subject
):
    mj.checkpoint.save(tmp_path, 1, SMALL)
    with orbax.checkpoint.CheckpointManager(tmp_path) as manager:
        with full_disk():
            manager.save(2, args=orbax.checkpoint.args.StandardSave(BIG))
            latest = subject(tmp_path, manager)
            with pytest.raises(ValueError, match="too large"):
                manager.wait_until_finished()
    assert (tmp_path / str(latest)).exists()
    like = jax.tree.map(jnp.zeros_like, SMALL)
    assert (mj.checkpoint.restore(tmp_path, like)["x"] == 1).all()


@against(Files, "a file is emptied before it is written", ValueError, EOFError)
def test_F6_the_last_good_step_outlives_a_full_disk(tmp_path, subject):
    first, second = BIG, {"x": -BIG["x"]}
    subject.save(tmp_path, 1, first)
    with full_disk():
        with pytest.raises((OSError, ValueError)):
            subject.save(tmp_path, 2, second)
    restored = subject.restore(tmp_path, jax.tree.map(jnp.zeros_like, first))
    np.testing.assert_array_equal(restored["x"], first["x"])


def test_F4_a_full_file_system_leaves_the_last_good_step(tmp_path, record_property):
    code = """
        import sys
        import jax, jax.numpy as jnp
        import movement_jax as mj
        directory, = sys.argv[1:]
        state = {"x": jax.random.normal(jax.random.key(0), (256, 1024))}
        mj.checkpoint.save(directory, 1, state)
        big = {"x": jax.random.normal(jax.random.key(0), (8192, 1024))}
        for step in range(2, 12):
            try:
                mj.checkpoint.save(directory, step, big)
            except mj.CheckpointError as error:
                assert f"Step {step} could not be saved to" in str(error), error
                assert "last good step is 1." in str(error), error
            else:
                sys.exit("a step that cannot fit was reported as saved")
            assert mj.checkpoint.steps(directory) == [1]
            print("refused", flush=True)
        restored = mj.checkpoint.restore(directory, like=state)
        assert (restored["x"] == state["x"]).all()
        mj.checkpoint.save(directory, 12, state)
        assert mj.checkpoint.steps(directory) == [1, 12]
        import os
        left = [n for n in os.listdir(directory) if "tmp" in n]
        assert not left, left
    """
    mount = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(tmp_path)]
    if subprocess.run([*mount, *probe], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    script = f"{' '.join(probe)} && exec {sys.executable} - {tmp_path}"
    done = subprocess.run(
        [*mount, "sh", "-c", script],
        input=textwrap.dedent(code),
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=300,
    )
    refused = 0 if done.returncode else done.stdout.count("refused")
    record_property("R10", (10 - refused, 10))
    assert refused == 10, done.stderr[-3000:]


@against_orbax("Orbax compares no array with what was saved")
def test_F7_flipped_bits_in_data_are_told(tmp_path, subject):
    original = {"kernel": jax.random.normal(jax.random.key(0), (128, 128))}
    subject.save(tmp_path / "good", 3, original)
    rng, verdicts = random.Random(0), []
    data = max(files_of(tmp_path / "good", 3), key=lambda path: path.stat().st_size)
    assert data.stat().st_size > 50_000
    for n in range(40):
        verdicts.append(damaged(subject, tmp_path, n, data, rng, original))
        assert verdicts[-1] is not False
    assert verdicts.count(True) > 30


def damaged(subject, root, n, path, rng, original, damage=None):
    """Restores a copy with one file damaged: see `refused`."""
    bad = root / f"bad{n}"
    shutil.copytree(root / "good", bad)
    target = bad / path.relative_to(root / "good")
    content = bytearray(target.read_bytes())
    (damage or flip_a_bit)(content, rng)
    target.write_bytes(content)
    verdict = refused(subject, bad, original)
    shutil.rmtree(bad)
    return verdict


def flip_a_bit(content, rng):
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def cut_the_end(content, rng):
    del content[rng.randrange(len(content)) :]


def zero_a_page(content, rng):
    start = rng.randrange(len(content))
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))


@pytest.mark.parametrize("damage", [flip_a_bit, cut_the_end, zero_a_page])
def test_F8_F9_F10_damage_to_any_file_is_told_or_does_none(
    tmp_path, damage, record_property
):
    original, rng = trained(), random.Random(1)
    mj.checkpoint.save(tmp_path / "good", 3, original)
    files = [p for p in files_of(tmp_path / "good", 3) if p.stat().st_size]
    for n, path in enumerate(files * 4):
        verdict = damaged(Ours, tmp_path, n, path, rng, original, damage)
        record_property("R11", (int(verdict is False), 1))
        assert verdict is not False, path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One state, saved once by each subject: a copy is what is damaged."""
    root = tmp_path_factory.mktemp("saved")
    kernel = np.random.default_rng(0).normal(size=(128, 128))
    state = {"kernel": kernel.astype(np.float32)}
    for subject in (Ours, Orbax, Files):
        subject.save(root / subject.__name__, 3, state)
    return root, state


def copies(saved, subject, root, n=1):
    """Copies of a checkpoint to damage, and its largest file in each."""
    source, _ = saved
    for number in range(n):
        copy = root / f"copy{number}"
        shutil.copytree(source / subject.__name__, copy)
        found = [path for path in copy.rglob("*") if path.is_file()]
        yield copy, max(found, key=lambda path: path.stat().st_size)


@against(Configured, "what is said of the run is believed")
def test_F8_a_flipped_bit_in_what_is_said_of_the_run_is_told(tmp_path, subject):
    subject.save(tmp_path, 3, trained())
    path = tmp_path / "3" / "_CHECKPOINT_METADATA"
    content = path.read_bytes()
    assert content.count(b"decay=0.9") == 1
    path.write_bytes(content.replace(b"decay=0.9", b"decay=0.8"))  # one bit
    with pytest.raises(CheckpointError, match="manifest was damaged"):
        subject.restore(tmp_path, jax.tree.map(jnp.zeros_like, trained()))


@alike(ours=Ours, naive=Orbax)
def test_F9_data_cut_short_is_told(tmp_path, subject, saved):
    rng, like = random.Random(4), jax.tree.map(jnp.zeros_like, saved[1])
    for copy, data in copies(saved, subject, tmp_path, 8):
        os.truncate(data, rng.randrange(data.stat().st_size))
        assert error_of(subject, copy, like)


@against(Files, "nothing is compared with what was saved")
def test_F10_a_zeroed_page_of_data_is_told(tmp_path, subject, saved):
    for copy, data in copies(saved, subject, tmp_path, 4):
        content = bytearray(data.read_bytes())
        content[8192:12288] = bytes(4096)
        data.write_bytes(content)
        assert refused(subject, copy, saved[1]) is True


@against(Files, "what is not there stays as it was made")
def test_F11_missing_data_is_told(tmp_path, subject, saved):
    ((copy, data),) = copies(saved, subject, tmp_path)
    data.unlink()
    assert refused(subject, copy, saved[1]) is True


@against(Untargeted, "whatever is there comes back, and nothing is compared")
def test_F12_what_does_not_fit_is_told(tmp_path, subject):
    x = {"a": np.ones((2, 2), "f"), "b": np.ones(3, "f")}
    subject.save(tmp_path, 3, x)
    for other in (
        {"a": x["a"]},
        {**x, "c": x["b"]},
        {"a": x["a"], "c": x["b"]},
        {"a": np.ones((2, 3), "f"), "b": x["b"]},
        {"a": np.ones((1, 2), "f"), "b": x["b"]},
    ):
        assert error_of(subject, tmp_path, jax.tree.map(jnp.zeros_like, other))
    assert error_of(subject, tmp_path, x, step=4)
    assert error_of(subject, tmp_path / "none", x)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_F7_F8_no_flipped_bit_anywhere_is_loaded(seed, tmp_path, record_property):
    large = jax.random.normal(jax.random.key(0), (99, 99))
    original, rng = {"state": trained(), "large": large}, random.Random(seed)
    mj.checkpoint.save(tmp_path / "good", 3, original)
    files = [p for p in files_of(tmp_path / "good", 3) if p.stat().st_size]
    verdicts = [
        damaged(Ours, tmp_path, n, rng.choice(files), rng, original) for n in range(105)
    ]
    silent, told = verdicts.count(False), verdicts.count(True)
    record_property("R9", (silent, len(verdicts)))
    assert silent == 0
    assert told > 50


def test_a_damaged_step_does_not_keep_the_run_from_saving(tmp_path):
    for damage in (b"", b"{", None):
        run = tmp_path / str(damage)
        mj.checkpoint.save(run, 1, trained(seed=0))
        path = run / "1" / "_CHECKPOINT_METADATA"
        path.unlink() if damage is None else path.write_bytes(damage)
        mj.checkpoint.save(run, 2, trained(seed=1))
        assert_same(mj.checkpoint.restore(run, like=fresh()), trained(seed=1))
        with pytest.raises(CheckpointError, match=r"Step 1 .*Good steps: \[2\]"):
            mj.checkpoint.verify(run)


def test_F11_a_missing_file_is_told_or_does_no_harm(tmp_path):
    original = trained()
    mj.checkpoint.save(tmp_path / "good", 3, original)
    told = 0
    for n, path in enumerate(files_of(tmp_path / "good", 3)):
        bad = tmp_path / f"bad{n}"
        shutil.copytree(tmp_path / "good", bad)
        (bad / path.relative_to(tmp_path / "good")).unlink()
        verdict = refused(Ours, bad, original)
        assert verdict is not False, path
        told += bool(verdict)
    assert told >= 3


def test_any_step_is_restored_and_verified_by_its_number(tmp_path):
    for step in (1, 4, 9):
        mj.checkpoint.save(tmp_path, step, trained(seed=step))
    assert_same(mj.checkpoint.restore(tmp_path, fresh(), step=4), trained(seed=4))
    assert list(mj.checkpoint.verify(tmp_path, step=4)) == [4]
    assert list(mj.checkpoint.verify(tmp_path)) == [1, 4, 9]
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        mj.checkpoint.verify(tmp_path / "none")


def test_F12_what_does_not_fit_is_told_by_name(tmp_path):
    mj.checkpoint.save(tmp_path, 3, trained())
    with pytest.raises(CheckpointError, match=r"'params/bias' is float32\[16\]"):
        mj.checkpoint.restore(tmp_path, like=fresh(width=4))
    like = fresh()
    renamed = {"other": like.params["kernel"], "bias": like.params["bias"]}
    with pytest.raises(
        CheckpointError,
        match="'params/other' is not in it.*with the same model and optimizer",
    ):
        mj.checkpoint.restore(tmp_path, like=like.replace(params=renamed))
    fewer = like.replace(params={"kernel": like.params["kernel"]})
    with pytest.raises(CheckpointError, match="'params/bias' is in it, but not"):
        mj.checkpoint.restore(tmp_path, like=fewer)
    with pytest.raises(CheckpointError, match="There is no step 4 in .*only .3."):
        mj.checkpoint.restore(tmp_path, like=like, step=4)
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        mj.checkpoint.restore(tmp_path / "none", like=like)
    with pytest.raises(TypeError, match=r"`int\(state.step\)`"):
        mj.checkpoint.restore(tmp_path, like=like, step="3")


@against_orbax("Orbax casts without a word")
def test_F13_nothing_is_cast(tmp_path, subject):
    subject.save(tmp_path, 3, trained())
    like = jax.tree.map(jnp.zeros_like, trained())
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), like.params)
    with pytest.raises(CheckpointError, match="Nothing is cast"):
        subject.restore(tmp_path, like.replace(params=cast))


@against_orbax("masks of another way to prune are masks")
def test_F15_the_way_of_pruning_must_be_the_same(tmp_path, subject):
    subject.save(tmp_path, 3, trained())
    other = fresh(tx=optimizer(mj.EmaMagnitude(decay=0.99)))
    with pytest.raises(CheckpointError, match=r"decay=0.9[,)].*decay=0.99"):
        subject.restore(tmp_path, other)


def test_F15_the_way_of_pruning_is_the_same_in_another_process(tmp_path):
    code = """
        import sys, jax.numpy as jnp, optax, movement_jax as mj
        tx = mj.movement_pruning(0.5, mj.Movement(), inner=optax.adam(1e-3))
        params = {"kernel": jnp.ones((4, 4))}
        state = params, tx.init(params)
        if mj.checkpoint.steps(sys.argv[1]):
            mj.checkpoint.restore(sys.argv[1], like=state)
            print("restored")
        else:
            mj.checkpoint.save(sys.argv[1], 1, state)
            print("saved")
    """
    for said in ("saved", "restored"):
        done = run_python(code, tmp_path)
        assert done.stdout.strip() == said, done.stderr[-2000:]


def test_F15_arrays_of_another_run_are_told(tmp_path):
    like = fresh()
    for name, seed in (("a", 0), ("b", 1)):
        mj.checkpoint.save(tmp_path / name, 3, trained(seed))
    manifest = "3/_CHECKPOINT_METADATA"
    shutil.copy(tmp_path / "a" / manifest, tmp_path / "b" / manifest)
    with pytest.raises(CheckpointError, match="leaf '.*' is not what was saved"):
        mj.checkpoint.restore(tmp_path / "b", like=like)
    with pytest.raises(CheckpointError, match="Good steps: none"):
        mj.checkpoint.verify(tmp_path / "b")


@against_orbax("names of list entries say nothing of what is in them")
def test_C11_arrays_that_trade_places_are_told(tmp_path, subject):
    x, y = jnp.ones(3), jnp.zeros(3)
    subject.save(tmp_path / "a", 1, {"layers": [x, y]})
    subject.save(tmp_path / "b", 1, {"layers": [y, x]})
    manifest = "1/_CHECKPOINT_METADATA"
    shutil.copy(tmp_path / "a" / manifest, tmp_path / "b" / manifest)
    with pytest.raises(CheckpointError, match="'layers/0' is not what was saved"):
        subject.restore(tmp_path / "b", {"layers": [x, y]})


@against_orbax("one of the two overwrites the other")
def test_F16_two_keys_for_one_place_are_refused(tmp_path, subject):
    state = {"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}
    with pytest.raises(ValueError, match="to the same place"):
        subject.save(tmp_path, 1, state)


@pytest.mark.parametrize(
    "subject, leaf, message",
    [
        (Ours, "text", "is a str, not an array or a number"),
        (Ours, object(), "is a object"),
        (Ours, np.ones((0, 3), np.float32), "size zero"),
        (Ours, np.ones(3), "which JAX would restore as float32"),
        failing(Orbax, object(), "object", reason="an error without the leaf's name"),
    ],
)
def test_F17_what_cannot_be_saved_is_told_by_name(tmp_path, subject, leaf, message):
    with pytest.raises(ValueError, match=message) as error:
        subject.save(tmp_path, 1, {"x": jnp.ones(2), "odd": leaf})
    assert "odd" in str(error.value)
    assert mj.checkpoint.steps(tmp_path) == []


MESHES = [
    *((Ours, shape, mode) for shape in [(2, 4), (8, 1), (1, 1)] for mode in (0, 1)),
    failing(Untargeted, (2, 4), 0, reason="on the mesh it was saved from"),
]


@pytest.mark.parametrize("subject, shape, explicit", MESHES)
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_F18_other_meshes_get_the_same_bits(tmp_path, subject, shape, explicit):
    def put(shape, spec):
        kind = AxisType.Explicit if explicit else AxisType.Auto
        mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(kind,) * 2)

        def one(leaf):
            names = spec if np.ndim(leaf) == 2 else ()
            return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*names)))

        return lambda tree: jax.tree.map(one, tree)

    state = trained()
    subject.save(tmp_path, 3, put((4, 2), ("x", "y"))(state))
    like = put(shape, ("y", "x"))(fresh(seed=1))
    restored = subject.restore(tmp_path, like)
    meshes = [{x.sharding.mesh for x in jax.tree.leaves(t)} for t in (restored, like)]
    assert meshes[0] == meshes[1]
    assert_same(restored, state)
    for old, new in zip(jax.tree.leaves(like), jax.tree.leaves(restored)):
        assert old.sharding == new.sharding
    assert mj.fingerprint(restored) == mj.fingerprint(state)


def resume_whole(directory, halfway, start):
    mj.checkpoint.save(directory, 10, halfway)
    return mj.checkpoint.restore(directory, like=start)


def resume_params(directory, halfway, start):
    Orbax.save(directory, 10, halfway.params)
    return start.replace(params=Orbax.restore(directory, start.params))


def resume_without_step(directory, halfway, start):
    """Saves what has the shape of weights, and starts to count anew."""
    arrays = {n: x for n, x in enumerate(jax.tree.leaves(halfway)) if jnp.ndim(x)}
    Orbax.save(directory, 10, arrays)
    leaves, structure = jax.tree.flatten(start)
    like = {n: leaves[n] for n in arrays}
    leaves = dict(enumerate(leaves)) | Orbax.restore(directory, like)
    return structure.unflatten(leaves.values())


@pytest.mark.parametrize(
    "subject",
    [
        pytest.param(resume_whole, id="ours"),
        failing(resume_params, id="naive_params", reason="masks are made anew"),
        failing(resume_without_step, id="naive_step", reason="steps count anew"),
    ],
)
def test_F20_F21_resumed_training_ends_where_it_was_going(tmp_path, subject):
    tx = optimizer(sparsity=mj.cubic(0.8, begin=0, end=20, every=2))
    resumed = subject(tmp_path, trained(steps=10, tx=tx), fresh(tx=tx))
    straight = trained(steps=25, tx=tx)
    for _ in range(15):
        resumed = step(resumed)
    assert mj.sparsity_of(resumed) == pytest.approx(0.8, abs=0.01)
    assert_same(resumed, straight)


@against(Halved, "scores are rounded, and near ties turn")
def test_F22_scores_are_saved_in_float32(tmp_path, subject):
    state = trained()
    subject.save(tmp_path, 3, state)
    scores = mj.find_state(subject.restore(tmp_path, fresh())).scores
    leaves = jax.tree.leaves(scores)
    assert leaves and all(leaf.dtype == jnp.float32 for leaf in leaves)
    chex.assert_trees_all_equal(scores, mj.find_state(state).scores)


@against_orbax("the later run writes over the steps of the other")
def test_F23_two_runs_in_one_directory_do_not_lose_each_others_steps(tmp_path, subject):
    for step, seed in ((3, 0), (3, 1), (6, 0)):
        try:
            subject.save(tmp_path, step, trained(seed=seed))
        except CheckpointError:
            assert seed == 1
    for step in (3, 6):
        assert_same(subject.restore(tmp_path, fresh(), step=step), trained(seed=0))


def test_F23_a_second_run_in_the_same_directory_is_refused(tmp_path):
    code = """
        import fcntl, os, sys
        lock = os.open(sys.argv[1] + "/.movement_jax.lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("held", flush=True)
        sys.stdin.read()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match="Another run is saving"):
        mj.checkpoint.save(tmp_path, 1, {"x": jnp.ones(2)})
    other.kill()
    other.communicate()
    mj.checkpoint.save(tmp_path, 1, {"x": jnp.ones(2)})


def plant_link(directory, path, secret):
    path.rename(secret)
    path.symlink_to(secret)


def plant_fifo(directory, path, secret):
    path.unlink()
    os.mkfifo(path)


@against_orbax("links are followed")
def test_G1_links_out_of_the_directory_are_refused(tmp_path, subject):
    subject.save(tmp_path / "run", 3, trained())
    like = jax.tree.map(jnp.zeros_like, trained())
    for n, path in enumerate(files_of(tmp_path / "run", 3)):
        bad = tmp_path / f"bad{n}"
        shutil.copytree(tmp_path / "run", bad)
        plant_link(bad, bad / path.relative_to(tmp_path / "run"), tmp_path / f"{n}")
        with pytest.raises(CheckpointError, match="is a link or no regular file"):
            subject.restore(bad, like)


def test_G1_the_step_itself_may_be_no_link(tmp_path):
    mj.checkpoint.save(tmp_path / "run", 3, trained())
    (tmp_path / "run" / "3").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "3").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link or no regular file"):
        mj.checkpoint.restore(tmp_path / "run", like=fresh())


def test_G1_a_file_that_cannot_be_looked_at_is_told(tmp_path, monkeypatch):
    mj.checkpoint.save(tmp_path, 3, trained())
    lost, look = files_of(tmp_path, 3)[0], os.lstat

    def lstat(path, **kwargs):
        if os.fspath(path) == os.fspath(lost):
            raise OSError("input/output error")
        return look(path, **kwargs)

    monkeypatch.setattr(os, "lstat", lstat)
    with pytest.raises(CheckpointError, match=f"nothing is known of .*{lost.name}"):
        mj.checkpoint.restore(tmp_path, like=fresh())


def test_G1_a_pipe_is_refused_and_not_waited_for(tmp_path):
    mj.checkpoint.save(tmp_path, 3, trained())
    plant_fifo(tmp_path, files_of(tmp_path, 3)[0], None)
    with pytest.raises(CheckpointError, match="is a link or no regular file"):
        mj.checkpoint.restore(tmp_path, like=fresh())


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "a\0b"])
def test_G2_names_that_lead_out_of_the_directory_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="could lead out of the directory"):
        mj.checkpoint.save(tmp_path / "run", 1, {name: jnp.ones(2)})
    assert os.listdir(tmp_path) in ([], ["run"])


@against(InPlaces, "a path that starts at the root leads there")
def test_G2_nothing_is_written_elsewhere(tmp_path, subject):
    with contextlib.suppress(ValueError):
        subject.save(tmp_path / "run", 1, {str(tmp_path / "elsewhere"): jnp.ones(2)})
    assert set(os.listdir(tmp_path)) <= {"run"}


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def restore_all_replaced(root, content):
    mj.checkpoint.save(root / "run", 1, SMALL)
    for path in files_of(root / "run", 1):
        path.write_bytes(content)
    with pytest.raises(CheckpointError):
        mj.checkpoint.restore(root / "run", like=SMALL)


@both(
    "unpickling calls what the file says",
    ours=restore_all_replaced,
    naive=lambda _, content: pickle.loads(content),
)
def test_G3_a_file_that_is_read_runs_nothing(tmp_path, subject):
    subject(tmp_path, pickle.dumps(Bomb(tmp_path / "ran")))
    assert not (tmp_path / "ran").exists()


def test_G6_masks_of_odd_bytes_count_right():
    from movement_jax.checkpoint import _canonical

    odd = np.array([0, 7, 255, 1], np.uint8).view(np.bool_)
    mask = jax.device_put(odd)
    assert int(jnp.sum(_canonical(mask))) == 3
    assert np.asarray(_canonical(mask)).view(np.uint8).tolist() == [0, 1, 1, 1]


def test_a_manifest_of_a_stranger_is_read_as_data(tmp_path):
    mj.checkpoint.save(tmp_path, 3, trained())
    path = tmp_path / "3" / "_CHECKPOINT_METADATA"
    whole = json.loads(path.read_text())
    for change in (
        {"seal": "0" * 64},
        {"format": 99},
        {"leaves": {}},
        {"config": "__import__('os').abort()"},
    ):
        content = json.loads(json.dumps(whole))
        content["custom_metadata"].update(change)
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="manifest was damaged"):
            mj.checkpoint.restore(tmp_path, like=fresh())
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="manifest cannot be read"):
        mj.checkpoint.restore(tmp_path, like=fresh())


ODD = [None, True, -1, 2**70, 0.5, "", "../..", "float9", [], {}, [[[]]], {"a": {}}]


def changed(value, rng):
    """A copy of what JSON holds with one thing in it replaced, renamed or gone."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    copy, how = value.copy(), rng.random()
    at = rng.choice([*value]) if isinstance(value, dict) else rng.randrange(len(value))
    if how < 0.1:
        del copy[at]
    elif how < 0.2 and isinstance(value, dict):
        copy[rng.choice(["", "x", at + "/", "../" + at])] = copy.pop(at)
    else:
        copy[at] = changed(value[at], rng)
    return copy


def test_whatever_a_stranger_seals_is_refused_or_harmless(tmp_path, record_property):
    original, rng, verdicts = trained(), random.Random(0), []
    mj.checkpoint.save(tmp_path, 3, original)
    path = tmp_path / "3" / "_CHECKPOINT_METADATA"
    whole = json.loads(path.read_text())
    manifest = {k: v for k, v in whole["custom_metadata"].items() if k != "seal"}
    for n in range(400):
        other = changed(manifest if n % 4 else whole, rng)
        if n % 4:
            sealed = mj.manifest._sealed(other) if isinstance(other, dict) else other
            other = {**whole, "custom_metadata": sealed}
        path.write_text(json.dumps(other))
        verdicts.append(refused(Ours, tmp_path, original))
    record_property("R11", (verdicts.count(False), len(verdicts)))
    assert False not in verdicts
    assert verdicts.count(True) > 300


def resealed(directory, **fields):
    """Changes the manifest of step 7 as anyone can, seal and all."""
    path = directory / "7" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    manifest = content["custom_metadata"] | fields
    manifest = {k: v for k, v in manifest.items() if k != "seal" and v is not None}
    content["custom_metadata"] = mj.manifest._sealed(manifest)
    path.write_text(json.dumps(content))


def test_F19_an_array_of_random_keys_is_verified(tmp_path):
    for impl in ("threefry2x32", "rbg"):
        state = {"keys": jax.random.split(jax.random.key(0, impl=impl), (3, 2))}
        mj.checkpoint.save(tmp_path / impl, 1, state)
        marks = mj.checkpoint.verify(tmp_path / impl)
        assert marks == {1: mj.fingerprint(state)}
        restored = mj.checkpoint.restore(tmp_path / impl, like=state)
        assert mj.fingerprint(restored) == mj.fingerprint(state)


def test_G2_an_array_outside_is_not_read_whoever_asks_for_it(tmp_path):
    hostile.good(tmp_path / "run", ocdbt=False)
    (tmp_path / "outside").mkdir()
    case = hostile.Case(tmp_path)
    (case.step / "state/params.dense.kernel").rename(tmp_path / "outside" / "x")
    name = str(tmp_path / "outside" / "x")
    case.renamed(name)
    like = hostile.state()
    like[name] = like["params"]["dense"].pop("kernel")
    with pytest.raises(CheckpointError, match=f"{name}' .*could lead out of the dire"):
        mj.checkpoint.restore(tmp_path / "run", like)
    with pytest.raises(CheckpointError, match="could lead out of the directory, so no"):
        mj.checkpoint.verify(tmp_path / "run")


@pytest.mark.parametrize("name", ["a/.//b", "//x", "a/../b", "a/./", "\ud800"])
def test_G2_keys_that_lead_out_when_dots_join_them_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is no safe name: as that of a file"):
        mj.checkpoint.save(tmp_path, 1, {name: jnp.ones(2)})


def test_F15_the_fingerprint_in_the_manifest_is_compared(tmp_path):
    hostile.good(tmp_path)
    resealed(tmp_path, fingerprint="f" * 64)
    with pytest.raises(CheckpointError, match="have not the fingerprint"):
        mj.checkpoint.restore(tmp_path, like=hostile.state())
    with pytest.raises(CheckpointError, match="have not the fingerprint"):
        mj.checkpoint.verify(tmp_path)


def test_F15_what_a_manifest_does_not_say_is_not_claimed(tmp_path):
    hostile.good(tmp_path)
    resealed(tmp_path, covered=None)
    assert mj.checkpoint.verify(tmp_path) == {7: ""}
    mj.checkpoint.restore(tmp_path, like=hostile.state())


@pytest.mark.parametrize("packed", [False, True])
def test_F15_the_fingerprint_is_computed_from_what_was_read(tmp_path, packed):
    tx = mj.movement_pruning(None, mj.Magnitude(), pack_masks=packed)
    params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
    state = mj.prune((params, tx.init(params)), 0.5)
    mj.checkpoint.save(tmp_path, 7, state)
    assert mj.checkpoint.verify(tmp_path) == {7: mj.fingerprint(state)}
    resealed(tmp_path, fingerprint="f" * 64)
    with pytest.raises(CheckpointError, match="have not the fingerprint"):
        mj.checkpoint.verify(tmp_path)


def test_F15_the_schedule_may_change(tmp_path):
    mj.checkpoint.save(tmp_path, 3, trained())
    other = fresh(tx=optimizer(sparsity=mj.cubic(0.9, begin=0, end=50)))
    assert_same(mj.checkpoint.restore(tmp_path, like=other), trained())


@pytest.mark.parametrize("name", ["01", "0007", "step_9", "9_x", "\u0663", "\u00b2"])
def test_only_what_is_named_as_save_names_it_is_a_step(tmp_path, name):
    state = {"x": jnp.ones(2)}
    mj.checkpoint.save(tmp_path, 1, state)
    shutil.copytree(tmp_path / "1", tmp_path / name)
    assert mj.checkpoint.steps(tmp_path) == [1]
    assert list(mj.checkpoint.verify(tmp_path)) == [1]
    mj.checkpoint.restore(tmp_path, like=state)
    mj.checkpoint.save(tmp_path, 2, state)
    assert mj.checkpoint.steps(tmp_path) == [1, 2]


def test_steps_may_be_numbers_of_numpy(tmp_path):
    state = {"x": jnp.ones(2)}
    mj.checkpoint.save(tmp_path, np.int64(3), state)
    mj.checkpoint.restore(tmp_path, like=state, step=np.int32(3))
    assert list(mj.checkpoint.verify(tmp_path, step=np.uint8(3))) == [3]


def test_F17_a_tree_without_leaves_is_refused_and_leaves_nothing_running(tmp_path):
    code = """
        import sys, movement_jax as mj
        for state in ({}, {"a": None}, ()):
            try:
                mj.checkpoint.save(sys.argv[1], 1, state)
            except ValueError as error:
                assert "There is no array in the state" in str(error), error
        print("refused")
    """
    assert run_python(code, tmp_path).stdout == "refused\n"


@pytest.mark.parametrize("plant", [plant_fifo, plant_link])
def test_G1_a_save_opens_no_link_or_pipe_of_an_earlier_step(tmp_path, plant):
    state = {"x": jnp.ones(2)}
    mj.checkpoint.save(tmp_path / "run", 1, state)
    plant(None, tmp_path / "run/1/_CHECKPOINT_METADATA", tmp_path / "secret")
    with pytest.raises(CheckpointError, match="Step 2 was not saved.* link or no reg"):
        mj.checkpoint.save(tmp_path / "run", 2, state)


@pytest.mark.parametrize("dtype", ["uint4", "float8_e4m3"])
def test_F17_a_dtype_that_orbax_does_not_write_is_told_before(tmp_path, dtype):
    state = {f"x{n}": jnp.ones(100) for n in range(20)}
    for step in range(1, 6):
        with pytest.raises(ValueError, match=f"'odd' is {dtype}, which Orbax does not"):
            odd = state | {"odd": jnp.ones(3, dtype)}
            mj.checkpoint.save(tmp_path, step, odd)
        mj.checkpoint.save(tmp_path, step, state)


def test_a_save_that_fails_in_orbax_leaves_the_next_one_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(mj.manifest, "_is_written", lambda dtype: True)
    state = {f"x{n}": jnp.ones(100) for n in range(20)}
    for step in range(1, 9):
        with pytest.raises(CheckpointError, match="could not be saved to"):
            odd = state | {"odd": jnp.ones(3, "uint4")}
            mj.checkpoint.save(tmp_path, 2 * step, odd)
        assert not [name for name in os.listdir(tmp_path) if "tmp" in name]
        mj.checkpoint.save(tmp_path, 2 * step + 1, state)


def test_a_state_of_very_many_small_leaves_is_refused(tmp_path):
    state = {f"x{n}": np.float32(n) for n in range(14_000)}
    with pytest.raises(ValueError, match="with hardly anything in them"):
        mj.checkpoint.save(tmp_path, 1, state)


def test_a_file_in_the_place_of_the_directory_is_told(tmp_path):
    path, state = tmp_path / "file", {"x": jnp.ones(2)}
    path.touch()
    with pytest.raises(CheckpointError, match="Nothing can be saved to .*/file"):
        mj.checkpoint.save(path, 1, state)
    for read in (mj.checkpoint.steps, mj.checkpoint.verify):
        with pytest.raises(CheckpointError, match="read as a directory of checkpoints"):
            read(path)
    with pytest.raises(CheckpointError, match="read as a directory of checkpoints"):
        mj.checkpoint.restore(path, state)


@pytest.mark.parametrize("make", [os.mkdir, lambda path: path.symlink_to("victim")])
def test_G1_a_lock_that_is_none_is_told(tmp_path, make):
    (tmp_path / "victim").write_text("whole")
    make(tmp_path / ".movement_jax.lock")
    with pytest.raises(CheckpointError, match="take away what is in the place of"):
        mj.checkpoint.save(tmp_path, 1, {"x": jnp.ones(2)})
    assert (tmp_path / "victim").read_text() == "whole"


def test_F17_leaves_that_are_no_arrays_are_told_by_name(tmp_path):
    with pytest.raises(ValueError, match="'n' is 1099511627776, too large for the"):
        mj.checkpoint.save(tmp_path, 1, {"n": 2**40})
    mj.checkpoint.save(tmp_path, 1, {"x": jnp.ones(2)})
    for odd in ("foo", 2**70, object()):
        with pytest.raises(CheckpointError, match="at 'x', which is no array"):
            mj.checkpoint.restore(tmp_path, like={"x": odd})


def test_G1_a_link_named_like_an_unfinished_save_goes_and_its_target_stays(tmp_path):
    run, precious, state = tmp_path / "run", tmp_path / "precious", {"x": jnp.ones(2)}
    mj.checkpoint.save(run, 1, state)
    precious.mkdir()
    (precious / "x").touch()
    (run / "2.orbax-checkpoint-tmp").symlink_to(precious)
    (run / "3.orbax-checkpoint-tmp").write_text("a file")
    (run / "4.orbax-checkpoint-tmp").mkdir()
    mj.checkpoint.save(run, 2, state)
    assert sorted(os.listdir(run)) == [".movement_jax.lock", "1", "2"]
    assert os.listdir(precious) == ["x"]


def test_a_bad_last_step_is_told_with_the_others(tmp_path):
    state = {"x": jnp.ones(2)}
    mj.checkpoint.save(tmp_path, 1, state)
    (tmp_path / "5").mkdir()
    with pytest.raises(
        CheckpointError, match=r"Step 5 .*Other steps there: \[1\]; give"
    ):
        mj.checkpoint.restore(tmp_path, like=state)
    mj.checkpoint.restore(tmp_path, like=state, step=1)


@pytest.mark.parametrize("byte", [7, 255])
def test_G6_odd_bytes_on_disk_are_refused_or_come_back_as_ones(tmp_path, byte):
    hostile.good(tmp_path / "run")
    hostile.CASES[f"mask_of_bytes_{byte}"](hostile.Case(tmp_path))
    try:
        restored = mj.checkpoint.restore(tmp_path / "run", like=hostile.state())
    except CheckpointError:
        return  # as TensorStore does, of which later versions may not
    masks = jax.tree.leaves(mj.find_state(restored["opt_state"]).masks)
    assert all(np.asarray(mask).view(np.uint8).max() == 1 for mask in masks)
