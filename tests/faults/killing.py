"""Processes killed while they save and while they train, and what is left of them.

`python -m tests.faults.killing --saves 100 --trainings 100` prints the counts. JAX is
imported once; every process that is killed is forked before JAX has made its threads.
"""

import argparse
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
import traceback

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint
from orbax.checkpoint import v1 as ocp  # noqa: F401  # takes long: before any fork

import movement_jax as mj

TX = mj.movement_pruning(
    mj.cubic(0.8, begin=0, end=30, every=3),
    mj.Movement(),
    inner=optax.adamw(1e-2),
    regrow=True,
)
STEPS, EVERY = 40, 4


def apart(function, *args):
    """Runs a function in a process of its own; returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function(*args)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return pid


def ended(pid):
    """Waits for a process; its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid, after):
    """Kills a process after some seconds, unless it has ended; its exit status."""
    deadline = time.monotonic() + after
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return ended(pid)


def state_at(step):
    """What a run has at a step: 8 MB that differ in every step."""
    return {"x": jax.random.normal(jax.random.key(step), (2048, 1024)), "step": step}


def save_on_and_on(save, directory, started):
    for step in range(1000):
        save(directory, step, state_at(step))
        written = started.with_suffix(".new")
        written.write_text(str(step))
        written.replace(started)


def check_saved(directory, done):
    """Every step that was reported is there, whole; one more may be."""
    steps = mj.checkpoint.steps(directory)
    assert steps[: done + 1] == list(range(done + 1)), (steps, done)
    assert len(steps) - (done + 1) in (0, 1), (steps, done)
    assert not steps or list(mj.checkpoint.verify(directory, steps[-1])) == steps[-1:]
    for step in steps[-2:]:
        restored = mj.checkpoint.restore(directory, like=state_at(0), step=step)
        assert jnp.array_equal(restored["x"], state_at(step)["x"])
    mj.checkpoint.save(directory, len(steps), state_at(len(steps)))
    assert not [name for name in os.listdir(directory) if "tmp" in name]


def kill_saves(n, seed=0):
    """How many of n kills lost a reported step or left a wrong one; and were inside."""
    rng, bad, during = random.Random(seed), 0, 0
    for _ in range(n):
        with tempfile.TemporaryDirectory() as root:
            directory, started = pathlib.Path(root, "run"), pathlib.Path(root, "at")
            pid = apart(save_on_and_on, mj.checkpoint.save, directory, started)
            way = rng.random()
            if way < 0.8:  # else in the first save of all, or before
                while not started.exists():
                    time.sleep(0.005)
            if way < 0.5:  # while it writes
                while not any("tmp" in name for name in os.listdir(directory)):
                    time.sleep(0.001)
                killed = kill(pid, rng.uniform(0, 0.03))
            else:
                killed = kill(pid, rng.uniform(0, 0.4 if way < 0.8 else 1.5))
            assert killed == -signal.SIGKILL, killed
            done = int(started.read_text()) if started.exists() else -1
            left = os.listdir(directory) if directory.exists() else []
            during += any("tmp" in name for name in left)
            bad += ended(apart(check_saved, directory, done)) != 0
    return bad, during


def overwrite(directory, step, state):
    ocp.save(directory, state, overwrite=True)


def latest_overwritten(directory):
    return int(ocp.load(directory, jax.tree.map(jnp.asarray, state_at(0)))["step"])


def save_without_waiting():
    """A way to save steps, by one manager that writes them in the background."""
    managers = {}

    def save(directory, step, state):
        if directory not in managers:
            managers[directory] = orbax.checkpoint.CheckpointManager(directory)
        managers[directory].save(step, args=orbax.checkpoint.args.StandardSave(state))

    return save


def latest_step(directory):
    return mj.checkpoint.steps(directory)[-1]


NAIVE = {
    "that overwrite": (lambda: overwrite, latest_overwritten),
    "that do not wait": (save_without_waiting, latest_step),
}


def check_latest(latest, directory, done):
    assert latest(directory) >= done


def kill_naive_saves(way, most, seed=0):
    """How many were killed until one lost a reported step, and whether one did."""
    (make, latest), rng = NAIVE[way], random.Random(seed)
    for n in range(1, most + 1):
        with tempfile.TemporaryDirectory() as root:
            directory, started = pathlib.Path(root, "run"), pathlib.Path(root, "at")
            pid = apart(save_on_and_on, make(), directory, started)
            while not started.exists():
                time.sleep(0.001)
            kill(pid, rng.uniform(0, 0.2) if way == "that overwrite" else 0)
            done = int(started.read_text())
            if ended(apart(check_latest, latest, directory, done)):
                return n, 1
    return most, 0


def fresh():
    kernel = jax.random.normal(jax.random.key(0), (32, 64))
    params = {"kernel": kernel, "out": {"kernel": kernel.T}}
    return {
        "params": params,
        "opt_state": TX.init(params),
        "key": jax.random.key(1),
        "epoch": jnp.int32(0),
    }


@jax.jit
def train_step(state):
    params, opt_state = state["params"], state["opt_state"]
    key, batch, noise = jax.random.split(state["key"], 3)
    x = jax.random.normal(batch, (128, 32))

    def loss(params):
        hidden = jnp.tanh(x @ params["kernel"])
        hidden *= jax.random.bernoulli(noise, 0.9, hidden.shape)
        return jnp.mean((hidden @ params["out"]["kernel"] - jnp.sin(x)) ** 2)

    grads = jax.grad(loss)(mj.effective_params(params, opt_state))
    updates, opt_state = TX.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    epoch = state["epoch"] + 1
    return {"params": params, "opt_state": opt_state, "key": key, "epoch": epoch}


def train(directory, digest):
    """Trains from the last checkpoint, if there is one, to the end."""
    state = fresh()
    if mj.checkpoint.steps(directory):
        state = mj.checkpoint.restore(directory, like=state)
    while state["epoch"] < STEPS:
        state = train_step(state)
        step = int(state["epoch"])
        if step % EVERY == 0:
            mj.checkpoint.save(directory, step, state)
    digest.write_text(mj.fingerprint([state]))


def kill_trainings(n, seed=0):
    """Trains until n were killed: how often to the end, kills, and ends that differ."""
    rng, run, kills, wrong = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as root:
        expected = pathlib.Path(root, "expected")
        for name in ("with programs to compile", "without"):
            start = time.monotonic()
            assert ended(apart(train, pathlib.Path(root, name), expected)) == 0
            whole = time.monotonic() - start
        while kills < n:
            run += 1
            directory, digest = pathlib.Path(root, f"run{run}"), pathlib.Path(root, "d")
            digest.unlink(missing_ok=True)
            while not digest.exists():
                # Mostly in the second half, where it trains and saves.
                after = whole * rng.uniform(0.2, 1.1)
                status = kill(apart(train, directory, digest), after)
                assert status in (0, -signal.SIGKILL), status
                kills += status != 0
            wrong += digest.read_text() != expected.read_text()
    return run, kills, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=100, help="kills around a save")
    parser.add_argument("--trainings", type=int, default=100, help="kills in trainings")
    parser.add_argument("--naive", type=int, help="kills at most, of other code only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as programs:
        # What each process would compile anew. The first of all is not killed.
        for name, value in {
            "jax_compilation_cache_dir": programs,
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }.items():
            jax.config.update(name, value)
        with tempfile.TemporaryDirectory() as root:
            assert ended(apart(check_saved, pathlib.Path(root, "run"), -1)) == 0
        return kill_all(args)


def kill_all(args):
    """Kills what is asked for and prints the counts; how many are lost or wrong."""
    if args.naive:
        for way in NAIVE:
            kills, bad = kill_naive_saves(way, args.naive)
            print(f"{kills} processes killed {way}: {bad} lost a step")
        return 0
    bad, during = kill_saves(args.saves)
    print(
        f"{args.saves} processes killed around a save, {during} of them inside: "
        f"{bad} lost a step or left a wrong one"
    )
    runs, kills, wrong = kill_trainings(args.trainings)
    print(f"{runs} trainings with {kills} kills: {wrong} ended otherwise than without")
    return bad or wrong


if __name__ == "__main__":
    sys.exit(main())
