"""Several processes on one machine: masks are those of one process, bit for bit.

Each process owns some of the devices, as each host of a cluster does, and holds only
its part of params, scores and masks.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import pytest

# Run as a program, this file is one of the processes.
TIMEOUT = 150  # seconds, for all processes of a run
NO_GLOO = 77  # how a process ends that cannot talk to others
STEPS = 7
SPARSITY = 0.8


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes of two devices each report, and where they saved."""
    folder = tmp_path_factory.mktemp("two")
    return launch(2, devices=2, shape=(2, 2), save=folder / "saved"), folder / "saved"


@pytest.fixture(scope="module")
def three():
    """What three processes of one device each report."""
    return launch(3, devices=1, shape=(3, 1))


@pytest.fixture(scope="module")
def alone():
    """What one process of four devices reports."""
    return launch(1, devices=4, shape=(2, 2))[0]


def naive(*values, reason):
    fails = pytest.mark.xfail(strict=True, reason=reason, raises=AssertionError)
    return pytest.param(*values, id="naive", marks=fails)


@pytest.mark.parametrize(
    "subject",
    [
        pytest.param("steps", id="ours"),
        naive("held_masks", reason="the quantile of the part that a process holds"),
    ],
)
def test_E5_masks_of_every_step_are_those_of_one_process(
    two, three, alone, subject, record_property
):
    pairs = [
        pair
        for report in two[0] + (three if subject == "steps" else [])
        for pair in zip(report[subject], alone[subject], strict=True)
    ]
    differing = sum(mine != other for mine, other in pairs)
    if subject == "steps":
        assert len(pairs) == 5 * STEPS and len({*alone["steps"]}) > 2
        record_property("R6", (differing, len(pairs)))
    assert differing == 0


@pytest.mark.parametrize(
    "told_by",
    [
        pytest.param("differing", id="ours"),
        naive("refused", reason="JAX computes with copies that differ without a word"),
    ],
)
def test_E6_copies_that_differ_are_told_or_compute_the_same(two, told_by):
    told = all("copies/b" in report[told_by] for report in two[0])
    assert told or len({report["sum"] for report in two[0]}) == 1


def test_E5_two_processes_make_the_masks_of_one(two, alone):
    reports, _ = two
    assert [report["process"] for report in reports] == [0, 1]
    for report in reports:
        assert report["devices"] == 4
        assert report["digests"] == alone["digests"]
        assert report["sparsity"] == pytest.approx(SPARSITY, abs=1e-3)


def test_pruning_by_hand_does_too(two, alone):
    for report in two[0]:
        assert report["pruned"] == alone["pruned"]
        assert report["pruned"] != report["digests"]


def test_all_processes_have_one_fingerprint_and_tell_copies_that_differ(two, alone):
    for report in two[0]:
        assert report["fingerprint"] == alone["fingerprint"]
        assert "2 of 4 arrays differ" in report["differing"]
        assert "copies/b, copies/c" in report["differing"]


def test_E6_copies_that_differ_are_not_saved(two):
    for report in two[0]:
        assert "2 of 4 arrays differ" in report["not saved"]
        assert "Step 1 was not saved to" in report["not saved"]
        assert report["saved_steps"] == []


def test_two_processes_restore_what_they_saved(two):
    for report in two[0]:
        assert report["restored"] == report["digests"]


def test_each_process_holds_its_part_of_the_state(two):
    for report in two[0]:
        assert report["held"] == pytest.approx(report["whole"] / 2)


def test_three_processes_make_the_masks_of_one(three, alone):
    for report in three:
        assert report["devices"] == 3
        assert report["digests"]["masks"] == alone["digests"]["masks"]


@pytest.mark.parametrize(
    "shape, swap", [((2, 2), True), ((4, 1), False)], ids=["transposed", "4x1"]
)
@pytest.mark.parametrize("checked", [False, True], ids=["Orbax", "with a manifest"])
def test_what_two_processes_saved_is_restored_on_another_mesh(
    two, shape, swap, checked
):
    reports, path = two
    job = {"shape": shape, "swap": swap, "load": path, "checked": checked}
    restored = launch(1, devices=4, **job)[0]
    assert restored["digests"] == reports[0]["digests"]
    assert restored["pruned"] == reports[0]["pruned"]


def launch(count, **job):
    """Runs processes that know of each other; what each of them reports."""
    job = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in job.items()}
    job |= {"count": count, "port": _free_port()}
    devices = f"--xla_force_host_platform_device_count={job['devices']}"
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    with contextlib.ExitStack() as stack:
        children, logs = [], []
        for process in range(count):
            command = [sys.executable, __file__, json.dumps(job | {"process": process})]
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(_end, child)
            children.append(child)
            logs.append(log)
        _wait(children)
        for child in children:
            _end(child)
        texts = [_read(log) for log in logs]
    codes = [child.returncode for child in children]
    if NO_GLOO in codes:
        pytest.skip("the CPU processes of this jax cannot talk: it has no gloo")
    if any(codes):
        parts = [f"--- {code}\n{text[-4000:]}" for code, text in zip(codes, texts)]
        pytest.fail("\n".join(parts), pytrace=False)
    reports = [text.partition("REPORT ")[2].splitlines()[0] for text in texts]
    return [json.loads(report) for report in reports]


def _free_port():
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _end(child):
    if child.poll() is None:
        child.kill()
    child.wait()


def _read(log):
    log.seek(0)
    return log.read()


def _wait(children):
    """Until all have ended, or one has failed, or time is up."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        codes = [child.poll() for child in children]
        if None not in codes:
            return
        if any(codes):
            time.sleep(2)  # for the others to say what they think of it
            return
        time.sleep(0.1)


def child(job):
    """One process: trains, prunes by hand, saves or restores, and reports."""
    import jax

    if job["count"] > 1:
        try:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        except (AttributeError, ValueError):
            sys.exit(NO_GLOO)
        jax.distributed.initialize(
            f"127.0.0.1:{job['port']}", job["count"], job["process"]
        )
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    import movement_jax as mj

    devices = np.array(jax.devices()).reshape(job["shape"])
    names = ("model", "data") if job.get("swap") else ("data", "model")
    mesh = Mesh(devices, names, axis_types=(AxisType.Auto,) * 2)
    specs = {
        "dense": {"kernel": ("data", "model"), "bias": ("model",)},
        "blocks": {"kernel": (None, "model", "data")},
    }
    spec = functools.partial(
        jax.tree.map,
        lambda axes: NamedSharding(mesh, PartitionSpec(*axes)),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    shardings, replicated = spec(specs), NamedSharding(mesh, PartitionSpec())
    tx = optax.chain(
        optax.adamw(1e-2),
        mj.movement_pruning(
            mj.cubic(SPARSITY, begin=1, end=STEPS - 1, every=2), stacked="blocks"
        ),
    )

    def spread(tree):
        """Arrays that every process knows, of which each keeps its part."""
        return jax.tree.map(
            lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__),
            tree,
            shardings,
        )

    def state_shardings(params):
        return optax.tree_utils.tree_map_params(
            tx,
            lambda _, sharding: sharding,
            jax.eval_shape(tx.init, params),
            shardings,
            transform_non_params=lambda _: replicated,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )

    rng = np.random.default_rng(0)
    draw = {
        "dense": {"kernel": rng.normal(size=(48, 96)), "bias": rng.normal(size=96)},
        "blocks": {"kernel": rng.normal(size=(4, 24, 48))},
    }
    # Few distinct values: ties cross the processes.
    draw = jax.tree.map(lambda x: (np.round(x, 1) + 0.05).astype(np.float32), draw)
    params = spread(draw)
    out = shardings, state_shardings(params)

    @functools.partial(jax.jit, out_shardings=out, donate_argnums=(0, 1))
    def step(params, state):
        # Element by element, so that no order of sums depends on the mesh.
        grads = jax.tree.map(lambda p: 0.3 * p - 0.1 * jnp.sin(9 * p), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, masks_of_steps = jax.jit(tx.init, out_shardings=out[1])(params), []
    if job.get("checked"):
        params, state = mj.checkpoint.restore(f"{job['load']}_run", (params, state))
        mj.checkpoint.verify(f"{job['load']}_run")
    elif "load" in job:
        from orbax.checkpoint import v1 as ocp

        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            (params, state),
        )
        params, state = ocp.load(job["load"], target)
    else:
        for _ in range(STEPS):
            params, state = step(params, state)
            masks_of_steps.append(jax.tree.map(jnp.copy, mj.find_state(state).masks))
        assert step._cache_size() == 1
    if "save" in job:
        from orbax.checkpoint import v1 as ocp

        ocp.save(job["save"], (params, state))
        mj.checkpoint.save(f"{job['save']}_run", STEPS, (params, state))

    gather = jax.jit(lambda tree: tree, out_shardings=replicated)

    def digest(tree):
        leaves = [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(tree)]
        bits = b"".join(x.tobytes() for x in leaves)
        return hashlib.sha256(bits).hexdigest()[:16]

    def digests(params, state):
        found = mj.find_state(state)
        trees = {"params": params, "masks": found.masks, "scores": found.scores}
        trees["moments"] = optax.tree_utils.tree_get(state, "mu")
        return {name: digest(gather(tree)) for name, tree in trees.items()}

    arrays = [x for x in jax.tree.leaves((params, state)) if x.ndim > 1]
    report = {
        "process": jax.process_index(),
        "devices": jax.device_count(),
        "digests": digests(params, state),
        "sparsity": float(mj.sparsity_of((params, state))),
        "whole": sum(x.nbytes for x in arrays),
        "held": sum(s.data.nbytes for x in arrays for s in x.addressable_shards),
    }
    report["steps"] = [digest(gather(masks)) for masks in masks_of_steps]
    kernel = params["dense"]["kernel"]
    held = np.concatenate([np.asarray(s.data) for s in kernel.addressable_shards], None)
    threshold = np.quantile(np.abs(held), SPARSITY)
    report["held_masks"] = [digest(jnp.abs(gather(kernel)) > threshold)]
    report["fingerprint"] = mj.fingerprint((params, state))
    mj.assert_same_everywhere((params, state))
    mine = np.full(4, jax.process_index(), np.float32)
    copies = {
        name: jax.make_array_from_callback((4,), replicated, value.__getitem__)
        for name, value in {"a": np.zeros(4, np.float32), "b": mine}.items()
    }
    report |= {"sum": None, "refused": ""}
    try:
        report["sum"] = float(jax.jit(jnp.sum)(copies["b"]))
    except Exception as error:
        report["refused"] = str(error)
    copies |= {"c": mine, "d": 1.0}
    try:
        mj.assert_same_everywhere({"copies": copies})
    except ValueError as error:
        report["differing"] = str(error)
    if "save" in job:
        try:
            mj.checkpoint.save(f"{job['save']}_other", 1, {"copies": copies})
        except mj.CheckpointError as error:
            report["not saved"] = str(error)
        report["saved_steps"] = mj.checkpoint.steps(f"{job['save']}_other")
        like = mj.checkpoint.restore(f"{job['save']}_run", (params, state))
        report["restored"] = digests(*like)
    prune = jax.jit(mj.prune, out_shardings=out)
    report["pruned"] = digests(*prune((params, state), 0.93))
    print("REPORT", json.dumps(report), flush=True)
    if job["count"] > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
