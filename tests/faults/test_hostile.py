"""What strangers may hand in: code in files, odd bytes, patterns that never end."""

import ast
import contextlib
import pathlib
import re
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

import movement_jax as mj

from . import hostile
from .subjects import KERNEL, PARAMS, both, train

PACKAGE = pathlib.Path(mj.__file__).parent
SOURCES = {path.name: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
# They run code that is in a file, or read formats that nothing here has to read.
MODULES = {
    *("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"),
    *("safetensors", "msgpack", "zipfile", "tarfile", "imp", "runpy"),
}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"import_module", "msgpack_restore", "from_bytes", "savez", "fromfile"}
ARRAY_MODULES = {"np", "numpy", "jnp"}


def dangers(source):
    """Names by which a file could run or read what a stranger made."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [part for a in node.names for part in a.name.split(".")]
            names += (getattr(node, "module", None) or "").split(".")
            found += [name for name in names if name in MODULES | METHODS]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += {node.func.id} & (CALLS | METHODS)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = getattr(node.func.value, "id", None)
            load = node.func.attr == "load" and owner in ARRAY_MODULES
            found += {node.func.attr} & (METHODS | ({"load"} if load else set()))
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_G3_no_file_can_run_what_a_stranger_made(name):
    assert dangers(SOURCES[name]) == []


@pytest.mark.parametrize(
    "source, found",
    [
        ("import pickle", "pickle"),
        ("def f(x):\n  import cloudpickle as c\n  c.loads(x)", "cloudpickle"),
        ("from yaml import load", "yaml"),
        ("from safetensors.numpy import load_file", "safetensors"),
        ("import flax\nflax.serialization.msgpack_restore(x)", "msgpack_restore"),
        ("from flax.serialization import from_bytes", "from_bytes"),
        ("np.load('x.npz', allow_pickle=True)", "load"),
        ("eval('1')", "eval"),
        ("def f(x):\n  exec(x)", "exec"),
        ("import importlib\nimportlib.import_module(x)", "import_module"),
        ("__import__(x)", "__import__"),
    ],
)
def test_G3_would_find_it_if_one_could(source, found):
    assert found in dangers(source)


STORED = {"kernel": np.array([[0, 7], [1, 255]], np.uint8).view(bool)}


def our_count(masks):
    params = jax.tree.map(lambda m: jnp.ones(m.shape), masks)
    state = mj.movement_pruning(None, mj.Magnitude()).init(params)
    return 4 - 4 * mj.sparsity_of(state._replace(masks=masks))


@both("adds the bytes up", ours=our_count, naive=lambda m: jnp.sum(m["kernel"]))
def test_G6_a_kept_weight_counts_once_whatever_byte_says_so(subject):
    assert subject(jax.tree.map(jnp.asarray, STORED)) == 3


def test_G6_a_mask_with_other_bytes_than_one_drops_the_same_weights():
    params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    for apply in (mj.apply_masks, jax.jit(mj.apply_masks)):
        got = apply(params, jax.tree.map(jnp.asarray, STORED))["kernel"]
        np.testing.assert_array_equal(got, [[0, 2], [3, 4]])


def test_G6_new_masks_are_written_in_zeros_and_ones():
    stored = np.full((8, 8), 7, np.uint8).view(bool)
    tx = mj.movement_pruning(None, mj.Magnitude())
    state = tx.init(PARAMS)._replace(masks={"kernel": jnp.asarray(stored)})
    for prune in (mj.prune, jax.jit(mj.prune)):
        _, after = prune((PARAMS, state), 0.5)
        written = np.asarray(after.masks["kernel"]).view(np.uint8)
        assert np.bincount(written.ravel()).tolist() == [32, 32]


def test_G9_patterns_come_from_code_and_never_from_a_checkpoint(tmp_path):
    theirs = mj.movement_pruning(None, mj.Magnitude(), prunable=r"(a+)+$|kernel")
    _, saved = train(theirs, steps=1)
    assert all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(saved))
    ocp.save(tmp_path / "state", saved)
    for file in (tmp_path / "state").rglob("*"):
        assert file.is_dir() or b"(a+)+" not in file.read_bytes()
    ours = mj.movement_pruning(None, mj.Magnitude(), prunable="kernel")
    restored = ocp.load(tmp_path / "state", ours.init(PARAMS))
    assert mj.find_state(restored).config.prunable == "kernel"


def our_masks(name):
    tx = mj.movement_pruning(0.5, mj.Magnitude())
    params = {name: {"weight": KERNEL, "kernel": KERNEL}}
    return tx.init(params).masks[name]["kernel"]


def kernels_by_pattern(name):
    """Masks of what a path of words leads to, by a pattern of the obvious kind."""
    if re.search(r"^(\w+/?)*/kernel$", f"{name}/weight"):
        return None
    return jnp.ones((8, 8), bool)


@contextlib.contextmanager
def time_limit(seconds):
    def stop(*_):
        pytest.fail(f"took more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@both("a pattern that goes back", ours=our_masks, naive=kernels_by_pattern)
def test_G9_a_long_name_is_matched_in_no_time(subject):
    our_masks("warm")
    with time_limit(0.5):
        assert subject("bidirectional_encoder_representation").all()


@pytest.mark.parametrize("name", ["a" * 10**6, "a/" * 10**5, "norm" * 10**5 + "!"])
def test_G9_the_names_of_leaves_cost_time_in_proportion(name):
    params = {name: {"weight": KERNEL, "kernel": KERNEL}}
    tx = optax.chain(optax.sgd(0.1), mj.movement_pruning(0.5, mj.Magnitude()))
    tx.init(PARAMS)
    start = time.process_time()
    opt_state = tx.init(params)
    assert time.process_time() - start < 2  # of a pattern that goes back: for ever
    assert mj.find_state(opt_state).masks[name]["kernel"].all()


BATCHES = 4
on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="what is read is seen by inotify"
)


@on_linux
@pytest.mark.parametrize("batch", range(BATCHES))
def test_G1_G2_no_checkpoint_of_a_stranger_does_harm(batch, tmp_path, record_property):
    names = list(hostile.CASES)[batch::BATCHES]
    found = hostile.read_all(tmp_path, names)
    good = ("exact", "refused")
    bad = {n: o for n, o in found.items() if any(way[0] not in good for way in o)}
    record_property("R11", (len(bad), len(names)))
    assert sorted(found) == sorted(names)
    assert bad == {}


@on_linux
def test_and_most_of_them_are_refused(tmp_path):
    assert len(hostile.CASES) > 200
    told = hostile.read_all(
        tmp_path,
        [
            "link_to_a_secret",
            "name_that_is_absolute_where_there_is_an_array",
            "names_that_are_the_same",
            "description_without_keys",
            "manifest_as_60_MB_of_spaces",
            "arrays_filled_to_a_terabyte",
            "array_of_the_right_shape_in_a_chunk_of_a_gigabyte",
            "mask_of_bytes_7",
            "data_zeroed",
        ],
    )
    words = [
        "so nothing of it was read",
        "could lead out of the directory",
        "name other leaves",
        "what Orbax wrote of it was damaged",
        "is larger than",
        "are said to hold",
        "in chunks of",
        "If its files were damaged",
        "is not what was saved",
    ]
    for (name, (_, verified)), part in zip(told.items(), words):
        assert verified[0] == "refused" and part in verified[3], (name, verified)
