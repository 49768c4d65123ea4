"""Checkpoints as a stranger could make them, and what the library does with each.

``python -m tests.faults.hostile FOLDER NAME...`` builds those that are named, reads
each with ``restore`` and with ``verify``, and prints what came of it.
"""

import contextlib
import ctypes
import faulthandler
import functools
import gzip
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

import movement_jax as mj

SECONDS, SPARE_BYTES = 5, 512 * 2**20
SECRET = b"what must never be read" * 100
MANIFEST, TREE = "_CHECKPOINT_METADATA", "state/_METADATA"
CASES = {}


def state(seed=0):
    tx = mj.movement_pruning(None, mj.Magnitude())
    kernel = jax.random.normal(jax.random.key(seed), (8, 8))
    params = {"dense": {"kernel": kernel, "bias": jnp.zeros(8)}}
    params["out"] = {"kernel": kernel[::-1]}
    params, opt_state = mj.prune((params, tx.init(params)), 0.5)
    return {"params": params, "opt_state": opt_state, "key": jax.random.key(seed)}


def good(directory, seed=0, ocdbt=True):
    """A small good checkpoint of step 7; every case changes a copy of it."""
    saving = ocp.options.ArrayOptions.Saving(use_ocdbt=ocdbt)
    with ocp.Context(array_options=ocp.options.ArrayOptions(saving=saving)):
        mj.checkpoint.save(directory, 7, state(seed))


class Case:
    """What a case may change.

    Attributes:
      run: the directory given to ``restore`` and ``verify``.
      step: of it, the directory of step 7.
      outside: a folder beside it, of which nothing may be touched.
      other: a good checkpoint of another state.
    """

    def __init__(self, folder):
        self.run, self.outside, self.other = (
            folder / name for name in ("run", "outside", "other")
        )
        self.step = self.run / "7"
        self.secret = self.outside / "secret"

    def link_to_a_secret(self, path):
        (self.other / "secret").write_bytes(SECRET)
        os.link(self.other / "secret", path)

    def json(self, name, change):
        path = self.step / name
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content) or content))

    def manifest(self, change):
        """Changes the manifest, and seals it as anyone can."""

        def sealed(content):
            manifest = content["custom_metadata"]
            manifest.pop("seal")
            manifest = change(manifest) or manifest
            content["custom_metadata"] = mj.manifest._sealed(manifest)

        self.json(MANIFEST, sealed)

    def tree(self, change):
        self.json(TREE, change)

    def entry(self, change, name="('params', 'dense', 'kernel')"):
        self.tree(lambda content: change(content["tree_metadata"][name]))

    def renamed(self, *keys):
        """Gives a leaf another name: in the manifest, and in what Orbax wrote."""
        described = [{"key": key, "key_type": 2} for key in keys]
        self.entry(lambda entry: entry.update(key_metadata=described))

        def rename(manifest):
            leaves = manifest["leaves"]
            leaves["/".join(keys)] = leaves.pop("params/dense/kernel")

        self.manifest(rename)

    @property
    def store(self):
        base = {"driver": "file", "path": f"{self.step}/state/"}
        return ts.KvStore.open({"driver": "ocdbt", "base": base}).result()

    def array(self, change, name="params.dense.kernel"):
        """Changes how zarr describes an array, in the database of Orbax."""
        store, key = self.store, f"{name}/zarr.json"
        content = json.loads(store[key])
        store[key] = json.dumps(change(content) or content).encode()

    def chunk(self, content, name="params.dense.kernel"):
        store = self.store
        (key,) = [
            k for k in store.list().result() if k.startswith(f"{name}/c".encode())
        ]
        if content is None:
            store.delete_range(ts.KvStore.KeyRange(key, key + b"\0")).result()
        else:
            store[key] = content

    def largest(self):
        """The file of data that is read: others are what it was merged from."""
        return max((self.step / "state/d").iterdir(), key=lambda p: p.stat().st_size)


def case(function):
    CASES[function.__name__] = function
    return function


def cases(**table):
    for name, function in table.items():
        CASES[name] = function


# Links, pipes, and directories where a file belongs.


def moved_out(name):
    """Replaces a file or directory by a link to where it has been moved."""

    def change(c):
        path, target = c.step / name, c.outside / "moved"
        path.rename(target)
        path.symlink_to(target)

    return change


cases(
    link_at_the_manifest=moved_out(MANIFEST),
    link_at_the_description=moved_out(TREE),
    link_at_the_shardings=moved_out("state/_sharding"),
    link_at_the_database=moved_out("state/manifest.ocdbt"),
    link_at_the_database_of_a_process=moved_out("state/ocdbt.process_0/manifest.ocdbt"),
    link_at_the_array_metadata=moved_out("state/array_metadatas/process_0"),
    link_at_a_directory_of_data=moved_out("state/d"),
    link_at_the_directory_of_a_process=moved_out("state/ocdbt.process_0"),
    link_at_the_state=moved_out("state"),
    link_at_the_step=moved_out(""),
    link_at_data=lambda c: moved_out(c.largest().relative_to(c.step))(c),
    link_that_dangles=lambda c: (c.step / "state/d/x").symlink_to("/nowhere"),
    link_to_a_secret=lambda c: (c.step / "state/d/x").symlink_to(c.secret),
    link_to_itself=lambda c: (c.step / "state/x").symlink_to("x"),
    link_to_its_parent=lambda c: (c.step / "state/x").symlink_to(".."),
    link_to_an_endless_device=lambda c: replaced(
        c.step / TREE, lambda p: p.symlink_to("/dev/zero")
    ),
    link_within_the_step=lambda c: replaced(
        c.step / "state/_sharding", lambda p: p.symlink_to("_METADATA")
    ),
    link_of_a_step_beside=lambda c: (c.run / "9").symlink_to(c.other / "7"),
    hard_link_to_a_secret=lambda c: replaced(c.largest(), c.link_to_a_secret),
    hard_link_to_the_same=lambda c: os.link(c.largest(), c.step / "state/d/x"),
    pipe_for_the_manifest=lambda c: replaced(c.step / MANIFEST, os.mkfifo),
    pipe_for_data=lambda c: replaced(c.largest(), os.mkfifo),
    pipe_that_is_too_much=lambda c: os.mkfifo(c.step / "state/pipe"),
    pipe_for_a_step=lambda c: os.mkfifo(c.run / "9"),
    socket_for_data=lambda c: replaced(c.largest(), listen),
    socket_that_is_too_much=lambda c: listen(c.step / "state/x"),
    directory_for_the_manifest=lambda c: replaced(c.step / MANIFEST, os.mkdir),
    directory_for_the_description=lambda c: replaced(c.step / TREE, os.mkdir),
    directory_for_data=lambda c: replaced(c.largest(), os.mkdir),
    directory_for_the_database=lambda c: replaced(
        c.step / "state/manifest.ocdbt", os.mkdir
    ),
    file_for_the_state=lambda c: replaced(c.step / "state", os.mknod),
    file_for_the_data=lambda c: replaced(c.step / "state/d", os.mknod),
    file_for_the_step=lambda c: replaced(c.step, os.mknod),
    file_for_the_run=lambda c: replaced(c.run, os.mknod),
)


def replaced(path, make):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)


def listen(path):
    os.chdir(path.parent)  # names of sockets must be short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)


# Names of leaves.


def elsewhere(*keys, ocdbt=True):
    def change(c):
        c.renamed(*(key.format(out=c.outside) for key in keys))
        c.tree(lambda content: content.update(use_ocdbt=ocdbt))

    return change


cases(
    name_that_is_absolute=elsewhere("{out}/x"),
    name_that_is_absolute_in_files=elsewhere("{out}/x", ocdbt=False),
    name_that_goes_up=elsewhere("..", "..", "outside", "x"),
    name_that_goes_up_in_files=elsewhere("../../../outside/x", ocdbt=False),
    name_that_goes_up_when_joined=elsewhere("a/", "", "/../x", ocdbt=False),
    name_that_goes_up_by_dots=elsewhere("", "", "x", ocdbt=False),
    name_with_a_zero=elsewhere("a\0b", ocdbt=False),
    name_that_is_no_text=elsewhere("a\ud800"),
    name_that_is_empty=elsewhere(""),
    name_that_is_long=elsewhere("a" * 10**6),
    name_with_many_keys=elsewhere(*["a"] * 10**4),
    name_in_the_manifest_alone=lambda c: c.manifest(
        lambda m: m["leaves"].update({f"{c.outside}/x": [[2], "float32", "0" * 64]})
    ),
    name_in_the_description_alone=lambda c: c.entry(
        lambda e: e.update(key_metadata=[{"key": f"{c.outside}/x", "key_type": 2}])
    ),
    name_of_what_is_empty=lambda c: c.entry(
        lambda e: e.update(
            key_metadata=[{"key": "../../x", "key_type": 2}],
            value_metadata={"value_type": "None", "skip_deserialize": True},
        )
    ),
    names_that_are_the_same=lambda c: c.tree(
        lambda content: content["tree_metadata"].update(
            more=content["tree_metadata"]["('params', 'dense', 'kernel')"]
        )
    ),
    database_that_is_none=lambda c: c.tree(lambda t: t.update(use_ocdbt=False)),
    database_that_is_undecided=lambda c: c.tree(lambda t: t.update(use_ocdbt=None)),
)


@case
def name_that_is_absolute_where_there_is_an_array(c):
    """Without a database names are those of directories: this is a real array."""
    shutil.rmtree(c.run)
    shutil.copytree(c.run.with_name("files"), c.run)
    (c.step / "state/params.dense.kernel").rename(c.outside / "x")
    c.renamed(f"{c.outside}/x")


@case
def name_that_leads_out_where_there_is_an_array(c):
    shutil.rmtree(c.run)
    shutil.copytree(c.run.with_name("files"), c.run)
    (c.step / "state/params.dense.kernel").rename(c.outside / "x")
    (c.step / "state/a").mkdir()
    c.renamed("a/../../../../outside/x")


# What else is said of leaves, by Orbax.

cases(
    description_of_too_much=lambda c: c.tree(
        lambda t: t["tree_metadata"].update(
            more={
                "key_metadata": [{"key": "more", "key_type": 2}],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                },
            }
        )
    ),
    description_of_too_little=lambda c: c.tree(
        lambda t: t["tree_metadata"].popitem() and None
    ),
    description_of_nothing=lambda c: c.tree(lambda t: t.update(tree_metadata={})),
    description_that_is_a_list=lambda c: c.tree(lambda t: t.update(tree_metadata=[])),
    description_that_is_none=lambda c: c.tree(lambda t: {"more": 1}),
    description_that_skips_an_array=lambda c: c.entry(
        lambda e: e["value_metadata"].update(skip_deserialize=True)
    ),
    description_as_text=lambda c: c.entry(
        lambda e: e["value_metadata"].update(value_type="string")
    ),
    description_as_what_is_not_known=lambda c: c.entry(
        lambda e: e["value_metadata"].update(value_type="os.system")
    ),
    description_of_another_shape=lambda c: c.entry(
        lambda e: e["value_metadata"].update(write_shape=[10**6, 10**6])
    ),
    description_with_keys_in_a_list=lambda c: c.entry(
        lambda e: e["key_metadata"][0].update(key_type=1)
    ),
    description_with_keys_of_no_type=lambda c: c.entry(
        lambda e: e["key_metadata"][0].update(key_type=99)
    ),
    description_with_keys_that_are_lists=lambda c: c.entry(
        lambda e: e["key_metadata"][0].update(key=[[]])
    ),
    description_without_keys=lambda c: c.entry(
        lambda e: e.pop("key_metadata") and None
    ),
    description_in_another_zarr=lambda c: c.tree(lambda t: t.update(use_zarr3=False)),
    description_by_classes=lambda c: c.tree(
        lambda t: t.update(
            value_metadata_tree='{"category": "namedtuple", "module": "os", '
            '"clazz": "system", "entries": [{"key": "x", "value": "true"}]}'
        )
    ),
)

# What the manifest says, sealed as anyone can.


def says(**fields):
    return lambda c: c.manifest(lambda m: m.update(fields))


def leaf(n, value):
    def change(c):
        c.manifest(lambda m: m["leaves"]["params/dense/kernel"].__setitem__(n, value))

    return change


cases(
    manifest_of_format_99=says(format=99),
    manifest_of_a_huge_format=says(format=10**4000),
    manifest_of_another_step=says(step=8),
    manifest_of_a_step_in_text=says(step="7"),
    manifest_of_a_step_and_a_bit=says(step=7.0),
    manifest_of_a_true_step=says(step=True),
    manifest_of_no_leaves=says(leaves={}),
    manifest_of_leaves_in_a_list=says(leaves=[]),
    manifest_of_leaves_in_text=says(leaves="abc"),
    manifest_of_a_negative_shape=leaf(0, [-8, -8]),
    manifest_of_a_huge_shape=leaf(0, [10**6, 10**6]),
    manifest_of_a_shape_of_many_axes=leaf(0, [1] * 10**5),
    manifest_of_a_shape_beyond_64_bits=leaf(0, [2**70]),
    manifest_of_a_shape_in_text=leaf(0, "88"),
    manifest_of_a_shape_of_nan=leaf(0, [float("nan")]),
    manifest_of_a_shape_that_is_a_dict=leaf(0, {}),
    manifest_of_another_dtype=leaf(1, "int32"),
    manifest_of_objects=leaf(1, "object"),
    manifest_of_keys=leaf(1, "key<fry>"),
    manifest_of_another_digest=leaf(2, "0" * 64),
    manifest_of_no_digest=leaf(2, None),
    manifest_of_another_pruning=says(config="__import__('os').abort()"),
    manifest_of_no_pruning=says(config=None),
    manifest_of_another_fingerprint=says(fingerprint="f" * 64),
    manifest_of_no_fingerprint=says(fingerprint=None),
    manifest_that_covers_a_list=says(covered=[["x", None]]),
    manifest_that_covers_what_is_not_there=says(covered={"params/x": ["x", None]}),
    manifest_that_covers_along_a_far_axis=lambda c: c.manifest(
        lambda m: next(iter(m["covered"].values())).__setitem__(1, 10**9)
    ),
    manifest_that_covers_by_halves=lambda c: c.manifest(
        lambda m: m["covered"].popitem() and None
    ),
    manifest_of_other_versions=says(versions={"jax": None}),
    manifest_of_more=says(more=[[{}]]),
    manifest_with_nan=says(more=[float("nan"), float("inf"), -float("inf")]),
    manifest_without_a_field=lambda c: c.manifest(lambda m: m.pop("config") and None),
    manifest_without_a_seal=lambda c: c.json(
        MANIFEST, lambda j: j["custom_metadata"].pop("seal") and None
    ),
    manifest_that_is_a_list=lambda c: c.json(
        MANIFEST, lambda j: j.update(custom_metadata=[])
    ),
    manifest_that_is_missing=lambda c: (c.step / MANIFEST).unlink(),
    manifest_of_another_run=lambda c: shutil.copy(c.other / "7" / MANIFEST, c.step),
    handlers_that_are_code=lambda c: c.json(
        MANIFEST, lambda j: j.update(item_handlers={"state": "os.system"})
    ),
    handlers_that_are_missing=lambda c: c.json(
        MANIFEST, lambda j: j.pop("item_handlers") and None
    ),
    times_that_are_huge=lambda c: c.json(
        MANIFEST, lambda j: j.update(init_timestamp_nsecs=10**300)
    ),
)

# JSON itself.


def text(name, make):
    def change(c):
        path = c.step / name
        path.write_bytes(make(path.read_bytes()))

    return change


for _where, _name in (("manifest", MANIFEST), ("description", TREE)):
    cases(
        **{
            f"{_where}_as_{what}": text(_name, make)
            for what, make in {
                "nothing": lambda b: b"",
                "zeros": lambda b: bytes(len(b)),
                "half": lambda b: b[: len(b) // 2],
                "text_and_more": lambda b: b + b"{}",
                "deep_lists": lambda b: b"[" * 10**5 + b"]" * 10**5,
                "deep_dicts": lambda b: b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
                "3_MB_of_spaces": lambda b: b + b" " * (3 * 2**20),
                "60_MB_of_spaces": lambda b: b + b" " * (60 * 2**20),
                "4_MB_of_one_key": lambda b: b"{" + b'"a":1,' * 5 * 2**17 + b[1:],
                "4_MB_of_keys": lambda b: b"{%s%s" % (many_keys(), b[1:]),
                "4_MB_of_lists": lambda b: b"[" + b"[]," * 10 * 2**17 + b"1]",
                "60_MB_of_lists": lambda b: b"[" + b"[]," * 20 * 2**20 + b"1]",
                "two_of_a_key": lambda b: b[:-1] + b"," + b[1:],
                "a_key_twice": lambda b: b'{"custom_metadata":1,"use_ocdbt":1,' + b[1:],
                "nan": lambda b: b'{"more":[NaN,Infinity,-Infinity],' + b[1:],
                "just_nan": lambda b: b"NaN",
                "a_long_number": lambda b: b'{"more":%s,' % (b"9" * 10**5) + b[1:],
                "bytes_of_no_text": lambda b: b'{"more":"\xff\xfe",' + b[1:],
                "another_encoding": lambda b: b.decode().encode("utf-16"),
                "half_a_character": lambda b: b'{"more":"\\ud800",' + b[1:],
            }.items()
        }
    )


@functools.cache
def many_keys():
    return b"".join(b'"k%d":{},' % n for n in range(3 * 10**5))


# Data.


def damaged(pattern, change):
    def damage(c):
        for path in (c.step / "state").glob(pattern):
            content = change(path.read_bytes())
            path.unlink() if content is None else path.write_bytes(content)

    return damage


for _what, _change in {
    "cut": lambda b: b[: len(b) // 2],
    "zeroed": lambda b: bytes(len(b)),
    "missing": lambda b: None,
    "emptied": lambda b: b"",
    "doubled": lambda b: b + b,
    "inverted": lambda b: bytes(255 - x for x in b),
}.items():
    cases(
        **{
            f"data_{_what}": damaged("d/*", _change),
            f"data_of_a_process_{_what}": damaged("ocdbt.process_0/d/*", _change),
            f"database_{_what}": damaged("manifest.ocdbt", _change),
            f"shardings_{_what}": damaged("_sharding", _change),
            f"array_metadata_{_what}": damaged("array_metadatas/*", _change),
        }
    )


def described(**fields):
    return lambda c: c.array(lambda content: content.update(fields))


def grid(*shape):
    return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


cases(
    array_of_another_shape=described(shape=[4, 16]),
    array_that_is_larger=described(shape=[8, 9]),
    array_that_is_enormous=described(shape=[10**6, 10**6]),
    array_beyond_64_bits=described(shape=[2**62, 2**62]),
    array_of_many_axes=described(shape=[8] * 40),
    array_of_a_negative_shape=described(shape=[-8, 8]),
    array_of_another_dtype=described(data_type="int32"),
    array_of_wider_numbers=described(data_type="float64"),
    array_of_no_dtype=described(data_type="os.system"),
    array_in_enormous_chunks=described(chunk_grid=grid(10**6, 10**6)),
    array_in_large_chunks=described(chunk_grid=grid(2**14, 2**14)),
    array_in_chunks_of_nothing=described(chunk_grid=grid(0, 0)),
    array_in_small_chunks=described(chunk_grid=grid(1, 1)),
    array_of_unknown_codecs=described(codecs=[{"name": "os.system"}]),
    array_of_another_node=described(node_type="group"),
    array_of_another_zarr=described(zarr_format=2),
    array_of_another_fill_value=described(fill_value="NaN"),
    array_with_more=described(attributes={"more": [[{}]] * 1000}),
    array_described_by_nothing=lambda c: c.array(lambda content: {"a": 1}),
    array_of_random_bytes=lambda c: c.chunk(bytes(range(256))),
    array_of_no_bytes=lambda c: c.chunk(b""),
    array_without_its_chunk=lambda c: c.chunk(None),
)


@case
def array_filled_by_its_description(c):
    """Nothing is stored, and the value of everything is a field of its description."""
    c.tree(lambda t: t.update(store_array_data_equal_to_fill_value=False))
    c.array(lambda content: content.update(fill_value=1.0))
    c.chunk(None)


@case
def arrays_filled_to_a_terabyte(c):
    """As one that is all there, and the manifest agrees."""
    c.tree(lambda t: t.update(store_array_data_equal_to_fill_value=False))
    c.array(lambda content: content.update(shape=[2**20, 2**18], fill_value=0.0))
    c.chunk(None)
    leaf(0, [2**20, 2**18])(c)


@case
def array_that_is_unpacked_to_a_gigabyte(c):
    """One chunk of zeros, compressed a thousandfold."""
    n = 2**14
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    codecs += [{"name": "gzip", "configuration": {"level": 9}}]
    c.array(lambda m: m.update(shape=[n, n], chunk_grid=grid(n, n), codecs=codecs))
    c.chunk(_zeros(n * n * 4))
    leaf(0, [n, n])(c)


@case
def array_of_the_right_shape_in_a_chunk_of_a_gigabyte(c):
    n = 2**14
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    codecs += [{"name": "gzip", "configuration": {"level": 9}}]
    c.array(lambda m: m.update(chunk_grid=grid(n, n), codecs=codecs))
    c.chunk(_zeros(n * n * 4))


@functools.cache
def _zeros(size):
    return gzip.compress(bytes(size), 9)


def rewritten(name, value):
    """Writes other bytes into an array, all of whose descriptions stay good."""

    def change(c):
        base = {"driver": "file", "path": f"{c.step}/state/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        array = ts.open({"driver": "zarr3", "kvstore": kvstore}).result()
        array.write(value(array.read().result())).result()

    return change


MASK = "opt_state.masks.dense.kernel"
cases(
    array_of_other_values=rewritten("params.dense.kernel", lambda x: x + 1),
    array_of_nan=rewritten("params.dense.kernel", lambda x: x * np.nan),
    mask_of_other_values=rewritten(MASK, lambda x: ~x),
    mask_of_bytes_7=rewritten(MASK, lambda x: odd(x, 7)),
    mask_of_bytes_255=rewritten(MASK, lambda x: odd(x, 255)),
)


def odd(mask, byte):
    return (np.asarray(mask).view(np.uint8) * np.uint8(byte)).view(np.bool_)


@case
def arrays_that_trade_places(c):
    store, one, two = c.store, b"params.dense.kernel/c/0/0", b"params.out.kernel/c/0/0"
    store[one], store[two] = store[two], store[one]


@case
def state_of_another_run(c):
    shutil.rmtree(c.step / "state")
    shutil.copytree(c.other / "7/state", c.step / "state")


@case
def data_of_another_run(c):
    shutil.rmtree(c.step / "state/d")
    shutil.copytree(c.other / "7/state/d", c.step / "state/d")


def _checksum(data):
    """CRC-32C, which ends the files of TensorStore's database."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return struct.pack("<I", crc ^ 0xFFFFFFFF)


@case
def database_whose_data_are_elsewhere(c):
    """Its own record of where its files are is a path too, and checked by a sum."""
    path = c.step / "state/manifest.ocdbt"
    content, (name,) = path.read_bytes(), (c.step / "state/d").iterdir()
    old, new = f"d/{name.name}".encode(), b"../../../outside/secret"
    assert _checksum(content[:-4]) == content[-4:] and old in content
    content = content[:-4].replace(old, new.ljust(len(old), b"/"))
    path.write_bytes(content + _checksum(content))


# Directories.

cases(
    step_that_is_empty=lambda c: (c.run / "9").mkdir(),
    step_with_a_zero=lambda c: shutil.copytree(c.step, c.run / "07"),
    step_in_other_digits=lambda c: shutil.copytree(c.step, c.run / "\u0669"),
    step_with_a_prefix=lambda c: shutil.copytree(c.step, c.run / "step_9"),
    step_with_a_suffix=lambda c: shutil.copytree(c.step, c.run / "9_x"),
    step_below_zero=lambda c: shutil.copytree(c.step, c.run / "-9"),
    step_in_superscript=lambda c: shutil.copytree(c.step, c.run / "\u00b2"),
    step_of_200_digits=lambda c: (c.run / ("9" * 200)).mkdir(),
    step_under_another_number=lambda c: c.step.rename(c.run / "8"),
    step_that_was_not_finished=lambda c: shutil.copytree(
        c.step, c.run / "9.orbax-checkpoint-tmp"
    ),
    step_linked_as_not_finished=lambda c: (c.run / "9.orbax-checkpoint-tmp").symlink_to(
        c.outside
    ),
    file_that_is_too_much=lambda c: (c.step / "state/d/x").write_bytes(b"x" * 1000),
    file_named_in_no_encoding=lambda c: (c.step / os.fsdecode(b"\xff")).touch(),
    step_named_in_no_encoding=lambda c: (c.run / os.fsdecode(b"9\xff")).mkdir(),
    files_in_great_number=lambda c: [
        (c.step / f"state/d/{n}").touch() for n in range(10_000)
    ],
    file_of_a_terabyte=lambda c: sparse(c.step / "state/x"),
    tree_beside_the_state=lambda c: shutil.copytree(
        c.other / "7/state", c.step / "pytree"
    ),
    tree_before_the_state=lambda c: shutil.copytree(c.other / "7/state", c.step / "a"),
    tree_instead_of_the_state=lambda c: (c.step / "state").rename(c.step / "default"),
    run_without_a_step=lambda c: shutil.rmtree(c.step),
    run_that_is_missing=lambda c: shutil.rmtree(c.run),
    marker_that_is_missing=lambda c: (c.step / "commit_success.txt").unlink(),
)


def sparse(path):
    path.touch()
    os.truncate(path, 2**40)


@case
def directories_in_each_other(c):
    path = c.step / "state"
    for _ in range(300):
        path = path / "d"
        path.mkdir(exist_ok=True)


# Reading them.


def touched(path):
    """Begins to watch a folder; returns what tells how often it was touched since."""
    libc = ctypes.CDLL(None, use_errno=True)
    kinds = 0x1 | 0x2 | 0x4 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200  # all but closing
    watch = libc.inotify_init1(os.O_NONBLOCK)
    every_path = [path, *(p for p in path.rglob("*") if not p.is_symlink())]
    for one in every_path:
        libc.inotify_add_watch(watch, os.fsencode(one), kinds)

    def count():
        try:
            return len(os.read(watch, 2**16)) // 16
        except BlockingIOError:
            return 0
        finally:
            os.close(watch)

    return count


def snapshot(path):
    """Of all files there is, and when they were changed."""
    found = {str(p): p.lstat() for p in [path, *path.rglob("*")] if os.path.lexists(p)}
    return {name: (s.st_mode, s.st_size, s.st_mtime_ns) for name, s in found.items()}


def _memory(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field)]
    return int(line.split()[1]) * 1024


class _TooLong(BaseException):
    pass


def _ring(*_):
    raise _TooLong


def attempt(read, right, folder):
    """What came of reading a case: in words, with how long it took and how much."""
    before = snapshot(folder)
    size = min(sum(size for _, size, _ in before.values()), 2**30)
    watched = touched(folder / "outside")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # of the peak, what was
    start, memory = time.monotonic(), _memory("VmRSS")
    faulthandler.dump_traceback_later(60, exit=True)
    signal.alarm(SECONDS)
    try:
        outcome = "exact" if right(read()) else "WRONG"
    except mj.CheckpointError as error:
        outcome = "refused" if SECRET[:20] not in str(error).encode() else "TOLD"
        message = str(error)
    except _TooLong:
        outcome = "SLOW"
    except BaseException as error:
        outcome = f"RAISED {type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    seconds, peak = time.monotonic() - start, _memory("VmHWM") - memory
    if watched():
        outcome += " READ OUTSIDE"
    if snapshot(folder) != before:
        outcome += " WROTE"
    if peak > 2 * size + SPARE_BYTES:
        outcome += " LARGE"
    if seconds > SECONDS:
        outcome += " LATE"
    told = message[:999] if outcome == "refused" else ""
    return outcome, round(seconds, 2), peak >> 20, told


def read_all(folder, names):
    """``{name: outcomes}`` of all cases, each read in a child process."""
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    found, names = {}, list(names)
    while names:
        child = subprocess.run(
            [sys.executable, "-m", "tests.faults.hostile", str(folder), *names],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
        )
        for kind, name, *outcomes in map(json.loads, child.stdout.splitlines()):
            found[name] = outcomes[0] if kind == "done" else [["ENDED THE PROCESS"]]
        left = [name for name in names if name not in found]
        if len(left) == len(names):
            raise RuntimeError(child.stderr[-3000:])
        names = left
    return found


def main(folder, *names):
    """Prints a line for each case: its name, and what came of it in each way."""
    folder = pathlib.Path(folder)
    signal.signal(signal.SIGALRM, _ring)
    limit = _memory("VmSize") + 16 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name, options in (
        ("good", {}),
        ("files", {"ocdbt": False}),
        ("other", {"seed": 1}),
    ):
        if not (folder / name).exists():
            good(folder / name, **options)
    saved = state()
    like, mark = jax.tree.map(jnp.zeros_like, saved), mj.fingerprint([saved])
    short = mj.fingerprint(saved)
    mj.checkpoint.verify(folder / "good")  # what is imported and compiled but once
    mj.checkpoint.restore(folder / "good", like)
    for name in names:
        here = folder / name
        for old, new in (("good", "run"), ("other", "other"), ("files", "files")):
            shutil.copytree(folder / old, here / new)
        (here / "outside").mkdir()
        (here / "outside/secret").write_bytes(SECRET)
        before = snapshot(here)
        CASES[name](Case(here))
        assert snapshot(here) != before, name
        os.chdir(folder)
        print(json.dumps(["begun", name]), flush=True)
        restore = functools.partial(mj.checkpoint.restore, here / "run", like)
        verify = functools.partial(mj.checkpoint.verify, here / "run")
        found = [
            attempt(restore, lambda found: mj.fingerprint([found]) == mark, here),
            attempt(verify, lambda found: found == {7: short}, here),
        ]
        print(json.dumps(["done", name, found]), flush=True)
        with contextlib.suppress(OSError):
            shutil.rmtree(here)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # reads that failed may have left threads that wait
