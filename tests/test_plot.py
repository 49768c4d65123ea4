"""What the plots show, read back from their axes."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import movement_jax as mj

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib.figure")  # what an import of it alone leaves out


@pytest.fixture(scope="module")
def state():
    """One trained state with two tensors, the larger of them ``b/kernel``."""
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": jnp.asarray(rng.normal(size=(10, 10)), jnp.float32)},
        "b": {"kernel": jnp.asarray(rng.normal(size=(30, 50)), jnp.float32)},
    }
    tx = optax.chain(optax.sgd(0.1), mj.movement_pruning(track_noise=True))
    opt_state = tx.init(params)
    for i in range(5):
        grads = jax.tree.map(lambda p, i=i: jnp.sin(30 * p + i), params)
        updates, opt_state = jax.jit(tx.update)(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_the_heat_map_of_one_report_shows_its_shares(state):
    report = mj.agreement(state, mj.Random(), 0.5)
    ax = mj.plot.plot_agreement(report)
    shown = np.asarray(ax.images[0].get_array())
    row = report.tensors[0]
    union = row.both + row.only_a + row.only_b
    wanted = [row.both, row.only_a, row.only_b]
    np.testing.assert_allclose(shown[0, :3], np.divide(wanted, union))
    np.testing.assert_allclose(shown[0, 3], row.both / union - 1 / 3)
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names == [row.name for row in report.tensors]


def test_the_heat_map_of_several_reports_shows_jaccard_by_sparsity(state):
    reports = [mj.agreement(state, mj.Random(), s) for s in (0.8, 0.5)]
    ax = mj.plot.plot_agreement(reports)
    shown = np.asarray(ax.images[0].get_array())
    assert shown.shape == (2, 2)
    jaccard = {row.name: row.jaccard for row in reports[1].tensors}
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    np.testing.assert_allclose(shown[:, 0], [jaccard[name] for name in names])
    ticks = [tick.get_text() for tick in ax.get_xticklabels()]
    assert ticks == ["0.5\n(0.33)", "0.8\n(0.67)"]


def test_a_large_heat_map_has_a_scale_and_few_labels():
    rows = tuple(
        mj.TensorAgreement(f"layer_{i}/kernel", 100, 40, 10, 10, 0.67, 0.33, None, None)
        for i in range(100)
    )
    ax = mj.plot.plot_agreement(mj.Agreement("A", "B", 0.5, rows, rows[0]))
    assert len(ax.get_yticklabels()) <= 40
    assert not ax.texts
    assert len(ax.figure.axes) == 2  # the scale


def test_reports_on_other_rankings_do_not_share_a_heat_map(state):
    reports = [mj.agreement(state, o, 0.5) for o in (mj.Random(), mj.Magnitude())]
    with pytest.raises(ValueError, match="the same two rankings"):
        mj.plot.plot_agreement(reports)


def test_no_report_is_refused():
    with pytest.raises(ValueError, match="`reports` must hold at least one"):
        mj.plot.plot_agreement([])


def test_the_histogram_counts_every_weight_of_the_largest_tensor(state):
    ax = mj.plot.plot_scores(state, 0.8)
    assert labels(ax)[:2] == ["pruned (80.0%)", "kept (20.0%)"]
    bars = [bar for group in ax.containers for bar in group]
    assert sum(bar.get_height() for bar in bars) == 1500
    assert ax.get_title() == "b/kernel at sparsity 0.8"


def test_the_histogram_marks_the_lowest_score_that_is_kept(state):
    ax = mj.plot.plot_scores(state, 0.8, tensor="a/kernel")
    scores = np.sort(np.asarray(mj.find_state(state[1]).scores["a"]["kernel"]), None)
    np.testing.assert_allclose(ax.lines[0].get_xdata(), scores[80])
    assert labels(ax)[-1].startswith("noise alone")


def test_an_unknown_tensor_is_refused_with_the_paths(state):
    with pytest.raises(
        ValueError, match="(?s)of these paths, got 'c'.*a/kernel.*b/kernel"
    ):
        mj.plot.plot_scores(state, 0.8, tensor="c")


def test_the_quadrants_count_all_weights_and_draw_some(state):
    report = mj.agreement(state, mj.Magnitude(), 0.5)
    (row,) = (row for row in report.tensors if row.name == "b/kernel")
    ax = mj.plot.plot_quadrants(state, mj.Magnitude(), 0.5, max_points=100)
    kept = 1500 - row.both - row.only_a - row.only_b
    counts = (kept, row.both, row.only_a, row.only_b)
    shown = [label.rpartition(" ")[2] for label in labels(ax)]
    assert shown == [f"{count / 1500:.1%}" for count in counts]
    assert sum(len(group.get_offsets()) for group in ax.collections) == 100
    assert len(ax.lines) == 2  # both thresholds


def test_no_points_are_refused(state):
    with pytest.raises(ValueError, match="`max_points` must be at least 1, got 0"):
        mj.plot.plot_quadrants(state, mj.Magnitude(), 0.5, max_points=0)


def test_the_quadrants_take_masks(state):
    masks = mj.find_state(mj.prune(state, 0.5)[1]).masks
    ax = mj.plot.plot_quadrants(state, masks)
    assert labels(ax)[:2] == ["kept by both: 50.0%", "pruned by both: 50.0%"]


def test_the_course_of_sparsity_shows_what_was_asked_and_reached():
    ax = mj.plot.plot_sparsity([0, 10, 20], [0.0, 0.3, 0.5], asked=[0.0, 0.4, 0.5])
    asked, reached = ax.lines
    np.testing.assert_array_equal(asked.get_ydata(), [0.0, 0.4, 0.5])
    np.testing.assert_array_equal(reached.get_xdata(), [0, 10, 20])
    assert labels(ax) == ["asked", "reached"]


def test_values_without_a_step_are_refused():
    with pytest.raises(ValueError, match="`sparsities` must have one value a step"):
        mj.plot.plot_sparsity([0, 1], [0.5])


@pytest.mark.parametrize("stacked", [None, "kernel"])
def test_a_stacked_tensor_has_no_single_threshold(stacked):
    params = {"kernel": jnp.arange(24.0).reshape(2, 3, 4)}
    tx = mj.movement_pruning(criterion=mj.Magnitude(), stacked=stacked)
    ax = mj.plot.plot_scores((params, tx.init(params)), 0.5)
    assert len(ax.lines) == (stacked is None)
    ax = mj.plot.plot_quadrants((params, tx.init(params)), mj.Magnitude(), 0.5)
    assert len(ax.lines) == 2 * (stacked is None)


def test_a_weight_that_is_nan_leaves_the_lines_where_they_are():
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, np.nan]])}
    tx = mj.movement_pruning(criterion=mj.Magnitude())
    ax = mj.plot.plot_quadrants((params, tx.init(params)), mj.Magnitude(), 0.5)
    across, down = ax.lines
    assert across.get_ydata()[0] == down.get_xdata()[0] == 4


def test_a_state_without_a_tensor_is_refused():
    state = {}, mj.movement_pruning(criterion=mj.Magnitude()).init({})
    with pytest.raises(ValueError, match="nothing to plot"):
        mj.plot.plot_scores(state, 0.5)
    with pytest.raises(ValueError, match="nothing to plot"):
        mj.plot.plot_quadrants(state, mj.Random(), 0.5)


def test_errors_name_the_plot_that_was_called():
    params = {"kernel": jnp.ones((2, 2))}
    state = params, mj.movement_pruning().init(params)
    with pytest.raises(ValueError, match="`plot_scores` ranks"):
        mj.plot.plot_scores(state, 0.5)
    state = params, mj.movement_pruning(criterion=mj.Magnitude()).init(params)
    with pytest.raises(ValueError, match="`plot_quadrants.state, other, sparsity"):
        mj.plot.plot_quadrants(state, mj.Random())


def test_every_plot_draws_on_given_axes_and_saves(state, tmp_path):
    figure = matplotlib.figure.Figure(figsize=(12, 9))
    a, b, c, d = figure.subplots(2, 2).flat
    assert mj.plot.plot_agreement(mj.agreement(state, mj.Random(), 0.5), ax=a) is a
    assert mj.plot.plot_scores(state, 0.5, ax=b) is b
    assert mj.plot.plot_quadrants(state, mj.Random(), 0.5, ax=c) is c
    assert mj.plot.plot_sparsity([0, 1], [0.0, 0.5], ax=d) is d
    figure.savefig(tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_importing_the_package_does_not_import_matplotlib():
    code = (
        "import sys, movement_jax; movement_jax.plot.plot_scores; "
        "sys.exit('matplotlib' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install \"movement-jax\[plot\]\""):
        mj.plot.plot_sparsity([0], [0.0])
