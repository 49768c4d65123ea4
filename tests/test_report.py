"""What `summary` reports, against counts made by hand."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import movement_jax as mj
from movement_jax.report import _bytes

# Pruned at 0.5 by magnitude, the four lowest go: all of row 1 and of column 2.
KERNEL = np.array([[8.0, -7.0, 0.3], [0.1, 0.2, -0.4]], np.float32)


def state_of(params, sparsity=None, **options):
    options = {"criterion": mj.Magnitude(), **options}
    tx = mj.movement_pruning(**options)
    state = (jax.tree.map(jnp.asarray, params), tx.init(params))
    return state if sparsity is None else mj.prune(state, sparsity)


def test_counts_sizes_sparsities_and_dead_rows_and_columns():
    params = {"a": {"kernel": KERNEL, "bias": np.zeros(3, np.float32)}}
    report = mj.summary(state_of(params, 4 / 6))
    (row,) = report.tensors
    assert (row.name, row.shape, row.size, row.kept) == ("a/kernel", (2, 3), 6, 2)
    assert row.asked == pytest.approx(4 / 6, abs=1e-7)
    assert row.sparsity == pytest.approx(4 / 6)
    assert (row.rows, row.dead_rows, row.columns, row.dead_columns) == (2, 1, 3, 1)
    assert (report.dense_size, report.dense_bytes) == (3, 12)


def test_python_numbers_among_params_are_counted():
    report = mj.summary(state_of({"kernel": KERNEL, "temp": 1.0}, 0.5))
    assert (report.dense_size, report.dense_bytes) == (1, 4)


def test_python_numbers_that_no_function_touched_are_counted():
    params = {"kernel": KERNEL, "temp": 1.0}
    tx = mj.movement_pruning(criterion=mj.Magnitude())
    report = mj.summary((params, tx.init(params)))
    assert (report.dense_size, report.dense_bytes) == (1, 4)


@pytest.mark.parametrize("report", [mj.summary, mj.health])
def test_an_optimizer_that_trains_other_weights_is_refused(report):
    tx = optax.chain(optax.sgd(0.1), mj.movement_pruning(criterion=mj.Magnitude()))
    tx = optax.contrib.schedule_free(tx, 0.1)
    params = {"kernel": jnp.asarray(KERNEL)}
    with pytest.raises(ValueError, match="`optax.contrib.schedule_free` keeps"):
        report((params, tx.init(params)))


def test_nothing_is_dead_before_pruning():
    total = mj.summary(state_of({"kernel": KERNEL})).total
    assert (total.asked, total.sparsity) == (0, 0)
    assert (total.dead_rows, total.dead_columns) == (0, 0)


@pytest.mark.parametrize(("dtype", "dense"), [(jnp.float32, 24), (jnp.bfloat16, 12)])
def test_bytes_follow_the_dtype_of_the_params(dtype, dense):
    total = mj.summary(state_of({"kernel": jnp.asarray(KERNEL, dtype)}, 4 / 6)).total
    assert total.dense_bytes == dense
    assert total.packed_bytes == 2 * dense // 6 + 1  # two weights, six bits


def test_a_convolution_is_a_matrix_of_its_last_axis():
    kernel = np.ones((3, 3, 2, 4), np.float32)
    kernel[1, 2, 0] = 0.1  # a row of 4
    kernel[..., 3] = 0.1  # a column of 18, one of them in that row
    total = mj.summary(state_of({"kernel": kernel}, 21 / 72)).total
    assert (total.rows, total.dead_rows) == (18, 1)
    assert (total.columns, total.dead_columns) == (4, 1)


def test_layers_of_a_stacked_kernel_are_counted_one_by_one():
    kernel = np.stack([KERNEL, KERNEL.T.reshape(2, 3), KERNEL])
    total = mj.summary(state_of({"kernel": kernel}, 4 / 6, stacked="kernel")).total
    # The second layer is [[8, .1, -7], [.2, .3, -.4]]: its second row is dead, and
    # its middle column.
    assert (total.rows, total.dead_rows) == (6, 3)
    assert (total.columns, total.dead_columns) == (9, 3)


def test_a_vector_has_neither_rows_nor_columns():
    report = mj.summary(state_of({"scale": KERNEL[0]}, 1 / 3, prunable="scale"))
    assert (report.total.rows, report.total.columns) == (0, 0)
    assert "-" in str(report)


def test_scores_that_are_not_finite_are_counted():
    params = {"kernel": np.array([[np.nan, 1.0], [np.inf, 2.0]], np.float32)}
    assert mj.summary(state_of(params)).total.nonfinite == 2


def test_a_finalized_state_has_no_scores_to_count():
    report = mj.summary(mj.finalize(state_of({"kernel": KERNEL}, 4 / 6)))
    assert report.total.nonfinite is None
    assert report.total.kept == 2
    str(report)


def test_a_sparsity_per_path_is_asked_of_its_tensors():
    params = {name: {"kernel": np.arange(1.0, 11.0).reshape(2, 5)} for name in "abc"}
    report = mj.summary(state_of(params, 0.5, allocation=mj.PerPath({"b": 0.8})))
    assert [row.asked for row in report.tensors] == [0.5, 0.8, 0.5]
    assert report.total.asked == pytest.approx(18 / 30)
    assert report.total.sparsity == pytest.approx(18 / 30)


def test_rules_ask_for_nothing_before_pruning():
    allocation = mj.PerPath({"kernel": 0.8})
    report = mj.summary(state_of({"kernel": KERNEL}, allocation=allocation))
    assert report.total.asked == 0


def test_a_global_threshold_asks_the_total_alone():
    params = {"a": {"kernel": KERNEL}, "b": {"kernel": 100 * KERNEL}}
    report = mj.summary(state_of(params, 0.5, allocation=mj.Global()))
    assert [row.asked for row in report.tensors] == [None, None]
    assert report.total.asked == 0.5


def test_erdos_renyi_asks_each_tensor_for_what_it_reached():
    params = {"a": {"kernel": np.ones((4, 4))}, "b": {"kernel": np.ones((16, 16))}}
    report = mj.summary(state_of(params, 0.7, allocation=mj.ErdosRenyi()))
    small, large = report.tensors
    assert small.asked == pytest.approx(small.sparsity)
    assert large.asked == pytest.approx(large.sparsity)
    assert small.asked < 0.7 < large.asked


def test_every_kind_of_train_state_is_read():
    params, opt_state = state_of({"kernel": KERNEL}, 4 / 6)
    flax_state = TrainState.create(
        apply_fn=None, params=params, tx=mj.movement_pruning(criterion=mj.Magnitude())
    )
    flax_state = flax_state.replace(opt_state=opt_state)
    chained = (params, (optax.EmptyState(), opt_state))
    for state in (flax_state, {"params": params, "opt_state": opt_state}, chained):
        assert mj.summary(state).total.kept == 2


def test_boxed_params_are_read():
    boxed = nn.Partitioned(jnp.asarray(KERNEL), names=("in", "out"))
    report = mj.summary(state_of({"kernel": boxed}, 4 / 6))
    assert report.tensors[0].name == "kernel"
    assert (report.total.kept, report.total.dead_rows) == (2, 1)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_reports_on_sharded_params_are_those_of_one_device(axis_type):
    kind = getattr(jax.sharding.AxisType, axis_type)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    kernel = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    tx = mj.movement_pruning(track_start=True, track_noise=True)

    def reports(params):
        opt_state = tx.init(params)
        for i in range(3):
            grads = jax.tree.map(lambda p, i=i: jnp.cos(9 * p + i), params)
            grads = jax.tree.map(lambda g: 0.1 * g, grads)
            updates, opt_state = jax.jit(tx.update)(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        before = mj.agreement((params, opt_state), mj.Random(), 0.8).to_dict()
        state = mj.prune((params, opt_state), 0.8)
        return before, mj.summary(state).to_dict(), mj.health(state).to_dict()

    whole = reports({"kernel": jnp.asarray(kernel)})
    with jax.set_mesh(mesh):
        parts = reports({"kernel": jax.device_put(kernel, spread)})
    assert parts[:2] == whole[:2]
    (ours,), (theirs,) = parts[2]["tensors"], whole[2]["tensors"]
    assert ours.pop("name") == theirs.pop("name") == "kernel"
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_prints_as_a_table():
    text = str(mj.summary(state_of({"kernel": KERNEL, "bias": np.zeros(3)}, 4 / 6)))
    lines = text.split("\n")
    assert lines[0] == "Sparsity"
    assert lines[2].split()[:4] == ["Tensor", "Weights", "Asked", "Reached"]
    assert lines[4].split()[:4] == ["kernel", "6", "0.667", "0.667"]
    assert "1 / 2" in lines[4] and "1 / 3" in lines[4] and "24 B" in lines[4]
    assert "3 weights" in lines[-1]
    assert text == "\n".join(line.rstrip() for line in lines)
    assert text.isascii()


def test_paths_with_brackets_print_as_they_are():
    text = str(mj.summary(state_of({"[bold]": {"kernel": KERNEL}})))
    assert "[bold]/kernel" in text


def test_converts_to_json():
    report = mj.summary(state_of({"kernel": KERNEL}, 4 / 6)).to_dict()
    assert json.loads(json.dumps(report))["total"]["kept"] == 2


def test_counts_stay_exact_beyond_float32():
    n = 2**24 + 3
    mask = np.ones((1, n), bool)
    mask[0, 5] = False
    params, opt_state = state_of({"kernel": np.ones((1, n), jnp.bfloat16)})
    opt_state = opt_state._replace(masks={"kernel": jnp.asarray(mask)})
    total = mj.summary((params, opt_state)).total
    assert total.kept == n - 1
    assert total.packed_bytes == 2 * (n - 1) + math.ceil(n / 8)


def test_traced_states_are_refused_with_the_way_out():
    params, opt_state = state_of({"kernel": KERNEL})
    with pytest.raises(ValueError, match=r"outside of `jit`.*`metrics\(state\)`"):
        jax.jit(lambda p, s: mj.summary((p, s)))(params, opt_state)


def test_a_state_without_pruning_is_refused():
    params = {"kernel": jnp.asarray(KERNEL)}
    with pytest.raises(ValueError, match="Found no `movement_pruning` state"):
        mj.summary((params, optax.sgd(0.1).init(params)))


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (2_550_000, "2.5 MB"),
        (7.1e9, "7.1 GB"),
        (1.2e12, "1.2 TB"),
        (3.4e15, "3400.0 TB"),
    ],
)
def test_bytes_are_shown_in_thousands(count, shown):
    assert _bytes(count) == shown


def test_reports_count_a_large_tensor_as_a_whole(monkeypatch, traced_anew):
    monkeypatch.setattr("movement_jax.counting.MAX_COUNT", 50)
    weights = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    tx = mj.movement_pruning(None, mj.Magnitude(), allocation=mj.Global())
    state = {"kernel": jnp.asarray(weights)}
    state = mj.prune((state, tx.init(state)), 0.55)
    row = mj.summary(state).tensors[0]
    assert (row.kept, row.rows, row.columns) == (54, 20, 6)
    assert mj.metrics(state)["pruning/lowest_density"] == np.float32(54 / 120)
    health = {entry.name: entry for entry in mj.health(state).tensors}
    assert health["kernel"].density == 54 / 120


def test_metrics_are_logged_of_any_number_of_weights():
    params = {"kernel": jax.ShapeDtypeStruct((4, 2**15, 2**15), jnp.float32)}
    tx = mj.movement_pruning(allocation=mj.Global())
    logged = jax.eval_shape(mj.metrics, jax.eval_shape(tx.init, params))
    assert logged["pruning/sparsity"].shape == ()
