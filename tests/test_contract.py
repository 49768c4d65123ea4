"""What every criterion keeps to, in every form and inside every optax wrapper.

A new criterion is one line in ``CRITERIA``, a new wrapper one in ``WRAPPERS``. The
table that pytest prints at the end of the run counts the checks of each.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import movement_jax as mj

STEPS = 4
SPARSITY = 0.6
SCHEDULE = mj.cubic(SPARSITY, begin=1, end=2)


@dataclasses.dataclass(frozen=True)
class Lowest:
    """The smallest magnitude so far, slowly forgotten: a criterion of a user's own."""

    growth: float = 1.01
    needs_gradients: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True

    def init(self, params):
        return jax.tree.map(lambda p: jnp.abs(p).astype(jnp.float32), params)

    def update(self, state, *, params, grads, new_params):
        del params, grads

        def lowest(score, weight):
            return jnp.minimum(self.growth * score, jnp.abs(weight).astype(jnp.float32))

        return jax.tree.map(lowest, state, new_params)

    def scores(self, state, params):
        del params
        return state


CRITERIA = {
    "EmaMagnitude": mj.EmaMagnitude(),
    "EmaMagnitude(half_life)": mj.EmaMagnitude(half_life=10),
    "EmaMagnitude(bfloat16)": mj.EmaMagnitude(scores_dtype="bfloat16"),
    "EmaMagnitude(every 2)": mj.EmaMagnitude(score_every=2),
    "Magnitude": mj.Magnitude(),
    "Movement": mj.Movement(),
    "Movement(sgd)": mj.Movement(optax.sgd(1.0)),
    "Taylor": mj.Taylor(),
    "Taylor(bfloat16)": mj.Taylor(scores_dtype="bfloat16"),
    "Random": mj.Random(),
    "PeakMagnitude": mj.PeakMagnitude(),
    "UpperConfidence": mj.UpperConfidence(),
    "Dormancy": mj.Dormancy(),
    "Sensitivity": mj.Sensitivity(),
    "Fisher": mj.Fisher(),
    "SoftMovement": mj.SoftMovement(target_sparsity=SCHEDULE),
    "RigL": mj.RigL(end=10, every=3, drop_fraction=0.5),
    "SET": mj.SET(end=None, every=3, drop_fraction=0.5),
    "a user's own": Lowest(),
}
# Of another criterion, or of its kind of state: one form will do.
VARIANTS = [name for name in CRITERIA if name.endswith(")")]
VARIANTS += ["PeakMagnitude", "UpperConfidence", "Dormancy", "SET"]
FORMS = ["chain", "inner", "inner, regrow"]
PRUNED_PART = {"dense": True, "head": False}


def bare(criterion, form, sparsity=SCHEDULE, optimizer=None):
    """The transformation, and how it is joined with an optimizer."""
    return functools.partial(
        mj.movement_pruning,
        None if decides(criterion) else sparsity,
        criterion,
        regrow=form == "inner, regrow",
        inner=None if form == "chain" else optimizer or optax.adam(1e-2),
    )


def decides(criterion):
    """Whether it takes the place of a schedule, which needs `regrow`."""
    return hasattr(criterion, "target")


def grows(criterion):
    """Whether it lets weights in from zero, which needs the optimizer it wraps."""
    return hasattr(criterion, "exchange")


def forms_of(criterion):
    if grows(criterion):
        return ["inner"]
    return FORMS[-1:] if decides(criterion) else FORMS[criterion.needs_gradients :]


def joined(criterion, form, optimizer=None):
    tx = bare(criterion, form, optimizer=optimizer)()
    return optax.chain(optimizer or optax.adam(1e-2), tx) if form == "chain" else tx


def _partition(criterion, form):
    groups = {True: joined(criterion, form), False: optax.sgd(1e-2)}
    return optax.partition(groups, PRUNED_PART)


def _inject(criterion, form):
    inject = optax.inject_hyperparams(mj.movement_pruning)
    own = bare(criterion, form, SPARSITY)
    tx = inject(**own.keywords, sparsity=own.args[0], criterion=criterion)
    return optax.chain(optax.adam(1e-2), tx) if form == "chain" else tx


WRAPPERS = {
    "named_chain": lambda *how: optax.named_chain(("pruned", joined(*how))),
    "partition": _partition,
    "masked": lambda *how: optax.masked(joined(*how), PRUNED_PART),
    "inject_hyperparams": _inject,
    "apply_if_finite": lambda *how: optax.apply_if_finite(joined(*how), 3),
    "MultiSteps": lambda *how: optax.MultiSteps(
        joined(*how), every_k_schedule=2
    ).gradient_transformation(),
    "conditionally_transform": lambda *how: optax.conditionally_transform(
        joined(*how), lambda step: step >= 0
    ),
    "apply_every": lambda *how: optax.chain(optax.apply_every(2), joined(*how)),
    # Optimizers in place of adam; no line search, which would evaluate the loss.
    "muon": lambda *how: joined(*how, optax.contrib.muon(1e-2)),
    "lbfgs": lambda *how: joined(*how, optax.lbfgs(1e-2, linesearch=None)),
}


def _rows():
    """Every criterion in every form; then every wrapper around one of each kind."""
    for name, criterion in CRITERIA.items():
        forms = forms_of(criterion)
        for form in forms[-1:] if name in VARIANTS else forms:
            yield name, form, "plain"
    for wrapper in WRAPPERS:
        yield "EmaMagnitude", "chain", wrapper
        if wrapper not in ("muon", "lbfgs"):
            yield "Movement", "inner, regrow", wrapper


def _matrix():
    """Every criterion in every form inside every wrapper.

    Criteria that need gradients have no form "chain": there they see updates only.
    Variants wrap as what they vary.
    """
    for name, criterion in CRITERIA.items():
        if name in VARIANTS:
            continue
        for form in forms_of(criterion):
            for wrapper in ("plain", *WRAPPERS):
                # Of these optimizers neither has what is to be read.
                reads = getattr(criterion, "reads_optimizer", False)
                if not (reads and wrapper in ("muon", "lbfgs")):
                    yield name, form, wrapper


TRANSFORMS = [
    pytest.param(*row, id=" | ".join(row))
    for row in sorted(_rows(), key=lambda r: r[2])
]
MATRIX = [pytest.param(*row, id=" | ".join(row)) for row in _matrix()]
PLAIN = [row for row in TRANSFORMS if row.values[2] == "plain"]
REGROWING = [row for row in TRANSFORMS if row.values[1] == "inner, regrow"]
each = pytest.mark.parametrize("name, form, wrapper", TRANSFORMS)
each_plain = pytest.mark.parametrize("name, form, wrapper", PLAIN)


def make(name, form, wrapper):
    build = joined if wrapper == "plain" else WRAPPERS[wrapper]
    return build(CRITERIA[name], form)


def make_params(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"dense": {"kernel": (8, 6), "bias": (6,)}, "head": {"kernel": (6, 4)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def gradient(params, opt_state):
    """Of any loss, at the weights that the model computes with."""
    masks = mj.find_state(opt_state).masks
    weights = params | {"dense": mj.apply_masks(params["dense"], masks["dense"])}
    return jax.tree.map(lambda w: 0.3 * w - jnp.sin(7 * w), weights)


def step_of(tx):
    def step(params, opt_state, **extra_args):
        grads = gradient(params, opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
        return optax.apply_updates(params, updates), opt_state

    return step


@functools.cache
def run(name, form, wrapper):
    """The states of a short run, before it and after each step, and the traces."""
    tx = make(name, form, wrapper)
    traces = []

    @jax.jit
    def step(params, opt_state):
        traces.append(1)
        return step_of(tx)(params, opt_state)

    states = [(make_params(), tx.init(make_params()))]
    for _ in range(STEPS):
        states.append(step(*states[-1]))
    return states, len(traces)


@each
def test_the_state_is_found_and_reaches_the_sparsity(name, form, wrapper):
    _, opt_state = run(name, form, wrapper)[0][-1]
    masks = jax.tree.leaves(mj.find_state(opt_state).masks)
    dropped = [int(np.sum(~np.asarray(mask))) for mask in masks]
    each_of_them = [round(SPARSITY * mask.size) for mask in masks]
    if decides(CRITERIA[name]):  # by one threshold for all
        assert sum(dropped) == sum(each_of_them)
    else:
        assert dropped == each_of_them


@each
def test_pruned_weights_are_exactly_zero_after_every_step(name, form, wrapper):
    for params, opt_state in run(name, form, wrapper)[0]:
        check_zeros(params, opt_state, form)


def check_zeros(params, opt_state, form):
    """Of the weights that the model computes with, those that are pruned are zero."""
    mask = np.asarray(mj.find_state(opt_state).masks["dense"]["kernel"])
    if form == "inner, regrow":
        masks = {"kernel": mask, "bias": optax.MaskedNode()}
        params = params | {"dense": mj.apply_masks(params["dense"], masks)}
    kernel = np.asarray(params["dense"]["kernel"])
    if grows(mj.find_state(opt_state).config.criterion):
        assert not np.any(kernel[~mask])  # and others, that grew in this step
    else:
        np.testing.assert_array_equal(kernel == 0, ~mask)
    assert mj.find_state(opt_state).events.undone == 0


@pytest.mark.parametrize("name, form, wrapper", REGROWING)
def test_regrow_leaves_params_dense(name, form, wrapper):
    params, _ = run(name, form, wrapper)[0][-1]
    assert np.all(np.asarray(params["dense"]["kernel"]) != 0)


@each
def test_steps_are_traced_once(name, form, wrapper):
    assert run(name, form, wrapper)[1] == 1


@each
def test_prune_works_through_it(name, form, wrapper):
    params, opt_state = run(name, form, wrapper)[0][-1]
    _, pruned = jax.eval_shape(mj.prune, (params, opt_state), 0.8)
    assert jax.tree.structure(pruned) == jax.tree.structure(opt_state)
    if wrapper != "plain":
        _, pruned = jax.jit(mj.prune)((params, opt_state), 0.8)
        mask = mj.find_state(pruned).masks["dense"]["kernel"]
        assert np.sum(~np.asarray(mask)) == round(0.8 * mask.size)


@pytest.mark.nightly
@pytest.mark.parametrize("name, form, wrapper", MATRIX)
def test_the_full_matrix_keeps_the_core_of_the_contract(name, form, wrapper):
    states, traces = run(name, form, wrapper)
    assert traces == 1
    for params, opt_state in states[1:]:
        check_zeros(params, opt_state, form)
    params, opt_state = states[-1]
    mask = np.asarray(mj.find_state(opt_state).masks["dense"]["kernel"])
    if not decides(CRITERIA[name]):
        assert np.sum(~mask) == round(SPARSITY * mask.size)
    pruned = jax.eval_shape(mj.prune, (params, opt_state), 0.8)
    assert jax.tree.structure(pruned) == jax.tree.structure((params, opt_state))


@each
def test_structure_dtypes_and_weak_types_hold_in_a_scan(name, form, wrapper):
    scan(name, form, wrapper, "float32")


@each_plain
def test_they_hold_with_bfloat16_params(name, form, wrapper):
    scan(name, form, wrapper, "bfloat16")


@each_plain
def test_they_hold_with_float16_params(name, form, wrapper):
    scan(name, form, wrapper, "float16")


def scan(name, form, wrapper, dtype):
    """Traces two steps in a loop, which refuses a carry that changes its type."""
    tx, params = make(name, form, wrapper), make_params(dtype)
    step = step_of(tx)

    def train(params):
        carry = params, tx.init(params)
        return jax.lax.scan(lambda c, _: (step(*c), None), carry, length=2)[0]

    trained, _ = jax.eval_shape(train, params)
    assert trained["dense"]["kernel"].dtype == dtype


@each
def test_unknown_extra_arguments_are_ignored(name, form, wrapper):
    step = step_of(optax.with_extra_args_support(make(name, form, wrapper)))
    before = run(name, form, wrapper)[0][0]
    _, opt_state = jax.eval_shape(functools.partial(step, unheard_of=1), *before)
    assert jax.tree.structure(opt_state) == jax.tree.structure(before[1])


@each
def test_init_has_the_shapes_that_eval_shape_says(name, form, wrapper):
    tx = make(name, form, wrapper)
    opt_state = run(name, form, wrapper)[0][0][1]
    shapes = jax.eval_shape(tx.init, make_params())
    assert jax.tree.structure(shapes) == jax.tree.structure(opt_state)
    for said, got in zip(jax.tree.leaves(shapes), jax.tree.leaves(opt_state)):
        assert (said.shape, said.dtype) == (jnp.shape(got), jnp.result_type(got))


@each
def test_rank_promotion_is_never_used(name, form, wrapper):
    before = run(name, form, wrapper)[0][0]
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(step_of(make(name, form, wrapper)), *before)


@each_plain
def test_what_is_like_params_is_mapped_as_params(name, form, wrapper):
    opt_state = run(name, form, wrapper)[0][-1][1]
    zeroed = optax.tree_utils.tree_map_params(
        make(name, form, wrapper),
        lambda x: x if isinstance(x, optax.MaskedNode) else jnp.zeros_like(x),
        opt_state,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    state, before = mj.find_state(zeroed), mj.find_state(opt_state)
    assert not np.any(np.asarray(state.masks["dense"]["kernel"]))
    assert not np.any(np.asarray(state.masks["head"]["kernel"]))
    assert state.step == before.step == STEPS


@each_plain
def test_a_checkpoint_restores_every_bit(name, form, wrapper, tmp_path):
    opt_state = run(name, form, wrapper)[0][-1][1]
    ocp.save(tmp_path / "state", opt_state)
    restored = ocp.load(tmp_path / "state", opt_state)
    assert jax.tree.structure(restored) == jax.tree.structure(opt_state)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(opt_state)):
        np.testing.assert_array_equal(got, want)


@each_plain
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
def test_explicit_sharding_is_kept_in_every_leaf(name, form, wrapper):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    tx = make(name, form, wrapper)

    def layout(leaf):
        spec = PartitionSpec(*("x", "y")[: leaf.ndim])
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    params = {"dense": {"kernel": layout(jnp.ones((8, 8)))}}
    with jax.set_mesh(mesh):
        before = params, tx.init(params)

        def step(params, opt_state):
            updates, opt_state = tx.update(params, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        after = jax.make_jaxpr(step)(*before).out_avals
    assert after == [jax.typeof(leaf) for leaf in jax.tree.leaves(before)]


@pytest.mark.parametrize("name, form", [("Magnitude", "chain"), ("Taylor", "inner")])
def test_an_injected_sparsity_equals_a_plain_one(name, form):
    criterion = CRITERIA[name]
    plain = bare(criterion, form, SPARSITY)()
    if form == "chain":
        plain = optax.chain(optax.adam(1e-2), plain)
    trained = []
    for tx in (plain, _inject(criterion, form)):
        params = make_params()
        opt_state, step = tx.init(params), jax.jit(step_of(tx))
        for _ in range(3):
            params, opt_state = step(params, opt_state)
        trained.append(np.asarray(params["dense"]["kernel"]))
    np.testing.assert_array_equal(*trained)
    assert np.sum(trained[0] == 0) == round(SPARSITY * trained[0].size)
