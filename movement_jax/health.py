"""Whether a run is fit for pruning, and what to do where it is not."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from movement_jax import counting
from movement_jax import tree as _tree
from movement_jax.agreement import masks_at
from movement_jax.counting import Tensor
from movement_jax.criteria import EmaMagnitude, Magnitude
from movement_jax.findings import Finding, Health, TensorHealth
from movement_jax.report import (
    Opened,
    asked_of,
    checked_sparsity,
    count,
    open_state,
    scalar,
    whole,
)
from movement_jax.scoring import noise_decay
from movement_jax.state import TURNED, MovementState, scores_of

LEAST_MOVEMENT = 0.02
MOST_NOISE = 0.05
MOST_CHURN = 0.05
MOST_SKIPPED = 0.01
_SPARSITY = 0.8  # to judge the noise at, before anything is pruned
_NAMED = 3  # tensors in one message


def health(state: Any, *, sparsity: float | None = None, start: Any = None) -> Health:
    r"""Looks for what makes pruning go wrong, and says what to do about it.

    - ``position``: pruned weights that are not zero, because something follows
      ``movement_pruning`` in the chain, or that are not finite.
    - ``scores``: nothing scored yet, or scores that are not finite.
    - ``steps``, ``changes``: steps skipped for gradients that were not finite, mask
      changes refused for a sparsity out of range.
    - ``movement``: :math:`\|W - W_0\| / \|W_0\|` under 2 %, where scores of
      magnitude still rank the initial weights. Needs ``track_start=True``, or
      ``start``.
    - ``noise``: more than 5 % of the weights kept at ``sparsity`` score no more than
      weights of pure noise, since :math:`E|\mu + \sigma\xi| \ge \sigma\sqrt{2/\pi}`
      however small :math:`\mu` is. For scores that are not magnitudes: a
      signal-to-noise ratio under 1. Needs ``track_noise=True``.
    - ``churn``: more than 5 % of the weights changed places at the last mask change.
      Needs ``regrow=True``.
    - ``collapse``: tensors left with less than a tenth of the density asked for, less
      than 1 % of their weights where more than 2 % were asked for, or nothing.

    Args:
      state: a train state or a pair, as for :func:`movement_jax.prune`.
      sparsity: at which to judge the noise. Default: that of the state, or 0.8 while
        nothing is pruned.
      start: the weights to measure movement from, a tree like params, in place of
        those that ``track_start=True`` keeps.

    Returns:
      A record to print, or to read by attribute or ``to_dict()``; ``.ok`` says
      whether there is no warning.

    Raises:
      ValueError: if there is no pruning state, the state is traced, or an argument
        does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax, movement_jax as mj
      >>> tx = optax.chain(optax.sgd(0.1), mj.movement_pruning(track_start=True))
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> grads = {"kernel": jnp.full((2, 2), 0.01)}
      >>> updates, opt_state = tx.update(grads, tx.init(params), params)
      >>> report = mj.health((optax.apply_updates(params, updates), opt_state))
      >>> report.ok, report.findings[0].name, round(report.findings[0].figure, 4)
      (False, 'movement', 0.001)
    """
    opened = open_state(state, "health")
    found, tensors = opened.found, opened.tensors
    if sparsity is None:
        sparsity = scalar(found.sparsity) or _SPARSITY
    sparsity = checked_sparsity(sparsity)
    rows = [
        TensorHealth(tensor.name, _lowest_density(tensor, mask))
        for tensor, mask in zip(tensors, jax.tree.leaves(found.masks))
    ]
    findings = [
        *_position(opened),
        *_scored(opened),
        *_events(found),
        _collapse(rows, found, tensors),
    ]
    rows, finding = _movement(rows, opened, start)
    findings.append(finding)
    rows, finding = _noise(rows, opened, sparsity)
    findings.append(finding)
    order = {"warning": 0, "note": 1, "ok": 2}
    findings.sort(key=lambda finding: order[finding.level])
    return Health(tuple(findings), tuple(rows))


def _position(opened: Opened) -> list[Finding]:
    found, name = opened.found, "position"
    if found.config.regrow:
        message = "Pruned weights keep their dense value (regrow=True)."
        return [Finding("ok", name, None, message)]
    alive, broken, largest, where = 0, 0, 0.0, ""
    names = []
    for tensor, mask, weight in zip(
        opened.tensors, jax.tree.leaves(found.masks), jax.tree.leaves(opened.weights)
    ):
        finite, others, most = _not_zero(mask, weight, tensor.leading)
        alive, broken = alive + whole(finite), broken + whole(others)
        if whole(others):
            names.append(tensor.name)
        if float(most) > largest:
            largest, where = float(most), tensor.name
    undone = int(found.events.undone)
    if not alive and not broken and not undone:
        return [Finding("ok", name, 0, "All pruned weights are exactly zero.")]
    findings = []
    if broken:
        findings.append(
            Finding(
                "warning",
                name,
                broken,
                f"{broken:,} pruned weights are not finite ({_listed(names)}), and no "
                "update brings them to zero: look for the step that broke them, and "
                "call `apply_masks(params, find_state(opt_state).masks)` or `prune`.",
            )
        )
    if alive or undone:
        what = f"Pruned weights were alive after {undone:,} updates to zero them"
        if alive:
            what = f"{alive:,} pruned weights are not zero"
            what += f" (largest {largest:.3g}, in {where})"
        misplaced = bool(alive) or int(found.events.turned) == TURNED
        findings.append(
            Finding(
                "warning" if misplaced else "note",
                name,
                alive or undone,
                f"{what}: something follows `movement_pruning` in the chain and moves "
                "them, so put it last, as in "
                "`optax.chain(optimizer, movement_pruning(...))`.",
            )
        )
    return findings


def _scored(opened: Opened) -> list[Finding]:
    found, name = opened.found, "scores"
    if found.config.finalized:
        return [Finding("note", name, None, "The state was finalized: no scores left.")]
    findings = []
    if getattr(found.config.criterion, "accumulates", True) and not found.step > 0:
        findings.append(
            Finding(
                "warning",
                name,
                0,
                "Nothing has been scored yet, after 0 good steps: train before "
                "pruning.",
            )
        )
    scores = jax.tree.leaves(scores_of(found, opened.weights))
    counts = {
        tensor.name: whole(count(~jnp.isfinite(score), tensor.leading))
        for tensor, score in zip(opened.tensors, scores)
    }
    bad, names = sum(counts.values()), [name for name, n in counts.items() if n]
    if bad:
        findings.append(
            Finding(
                "warning",
                name,
                bad,
                f"{bad:,} scores are not finite ({_listed(names)}): a NaN is kept, as "
                "it cannot be ranked, so look for the step that broke these weights.",
            )
        )
    if not findings:
        steps = int(found.step)
        findings.append(
            Finding("ok", name, 0, f"All scores are finite, after {steps:,} steps.")
        )
    return findings


def _events(found: MovementState) -> list[Finding]:
    findings = []
    step, skipped, refused, changes = (
        int(x)
        for x in (
            found.step,
            found.events.skipped,
            found.events.refused,
            found.events.changes,
        )
    )
    if skipped:
        share = skipped / (step + skipped)
        findings.append(
            Finding(
                "warning" if share > MOST_SKIPPED else "note",
                "steps",
                share,
                f"{skipped:,} of {step + skipped:,} steps ({share:.1%}) were left out "
                "because gradients or updates were not finite: lower the learning "
                "rate, clip gradients, or lower the loss scale, and wrap the optimizer "
                "in `optax.apply_if_finite(optimizer, max_consecutive_errors=5)`, as "
                "one with moments, such as adam, keeps the NaN in them.",
            )
        )
    if refused:
        findings.append(
            Finding(
                "warning",
                "changes",
                refused,
                f"{refused:,} mask changes were refused because the sparsity was NaN "
                "or outside [0, 1], or nothing was scored: look at the schedule, or "
                "at the value given to `prune`.",
            )
        )
    if found.config.regrow and changes:
        churn = float(found.events.churn)
        high = churn > MOST_CHURN
        findings.append(
            Finding(
                "warning" if high else "ok",
                "churn",
                churn,
                f"{churn:.1%} of the weights changed places at the last mask change"
                + (
                    ": the ranking is not settled, so change masks less often, lower "
                    "the learning rate of weights or scores, or average longer."
                    if high
                    else "."
                ),
            )
        )
    return findings


def _collapse(
    rows: Sequence[TensorHealth], found: MovementState, tensors: list[Tensor]
) -> Finding:
    overall = scalar(found.sparsity)
    dead = []
    for row, level in zip(rows, asked_of(found, tensors)):
        asked = 1 - (overall if level is None else level)
        sparse = row.density < 0.01 and asked > 0.02
        if row.density == 0 or row.density < asked / 10 or sparse:
            dead.append(row)
    lowest = min((row.density for row in rows), default=1.0)
    if not dead:
        return Finding(
            "ok",
            "collapse",
            lowest,
            f"Every tensor keeps at least {lowest:.1%} of its weights.",
        )
    dead.sort(key=lambda row: row.density)
    return Finding(
        "warning",
        "collapse",
        lowest,
        f"{len(dead)} of {len(rows)} tensors collapsed, down to {lowest:.2%} of their "
        f"weights ({_listed([row.name for row in dead])}): raise `min_keep` of the "
        "allocation, use `Uniform()`, or give them their own sparsity with `PerPath`.",
    )


def _movement(
    rows: list[TensorHealth], opened: Opened, start: Any
) -> tuple[list[TensorHealth], Finding]:
    found, name = opened.found, "movement"
    if start is not None:
        start = _tree.punch(found.masks, start, "start")
    elif _tracked(found.tracked.start):
        start = found.tracked.start
    else:
        message = (
            "How far the weights moved was not measured: pass "
            "`movement_pruning(..., track_start=True)`, or `health(state, start=...)` "
            "with the initial params."
        )
        return rows, Finding("note", name, None, message)
    moved = total = 0.0
    measured, broken = [], []
    for row, mask, weight, first in zip(
        rows, *(jax.tree.leaves(t) for t in (found.masks, opened.weights, start))
    ):
        change, norm = _squares(mask, weight, first)
        moved, total = moved + change, total + norm
        ratio = math.sqrt(change / norm) if norm else None
        if not math.isfinite(change + norm):
            broken.append(row.name)
            ratio = None
        measured.append(dataclasses.replace(row, movement=ratio))
    if broken:
        message = (
            "How far the weights moved cannot be told, because weights are not finite "
            f"({_listed(broken)}): look for the step that broke them."
        )
        return measured, Finding("warning", name, None, message)
    ratio = math.sqrt(moved / total) if total else None
    if ratio is None:
        return measured, Finding("note", name, None, "The initial weights are zero.")
    low = [
        r.name
        for r in measured
        if r.movement is not None and r.movement < LEAST_MOVEMENT
    ]
    gist = f"Weights moved {ratio:.2%} of their norm since the start"
    if getattr(found.config.criterion, "needs_gradients", False):
        message = f"{gist}; scores from gradients do not need them to move far."
        return measured, Finding("ok", name, ratio, message)
    if not low:
        return measured, Finding("ok", name, ratio, f"{gist}.")
    where = f"those of {len(low)} of {len(rows)} tensors ({_listed(low)})"
    message = (
        f"{gist}, {where} less than {LEAST_MOVEMENT:.0%}: their scores still rank the "
        "initial weights, so train longer or raise the learning rate before pruning."
    )
    return measured, Finding("warning", name, ratio, message)


def _noise(
    rows: list[TensorHealth], opened: Opened, sparsity: float
) -> tuple[list[TensorHealth], Finding]:
    found, name = opened.found, "noise"
    if not _tracked(found.tracked.mean):
        message = (
            "The noise of the scores was not measured: pass "
            "`movement_pruning(..., track_noise=True)` (one float32 a weight)."
        )
        return rows, Finding("note", name, None, message)
    step = int(found.step)
    if not step:
        return rows, Finding("note", name, None, "No noise was measured yet: train.")
    criterion = found.config.criterion
    decay = noise_decay(criterion)
    # The deviation from a running mean is the noise of the weight plus that of the
    # mean: sigma**2 * 2 / (1 + decay). The average over steps began at zero.
    unbias = (1 + decay) / 2 / (1 - decay**step)
    # |noise| averaged as the scores are: its mean, and the spread that remains.
    memory = 0.0
    if isinstance(criterion, EmaMagnitude):
        memory = decay**criterion.score_every
    spread = math.sqrt((1 - 2 / math.pi) * (1 - memory) / (1 + memory))
    reach = math.sqrt(2 / math.pi) + 3 * spread
    ranks_magnitude = isinstance(criterion, EmaMagnitude | Magnitude)

    old = None if found.config.regrow else found.masks
    scores = scores_of(found, opened.weights)
    kept = masks_at(found, scores, sparsity, old)
    trees = (found.masks, found.tracked.mean, found.tracked.variance, scores, kept)
    measured, broken, n_kept, n_noise = [], [], 0, 0
    for row, tensor, mask, mean, variance, score, keep in zip(
        rows, opened.tensors, *(jax.tree.leaves(t) for t in trees)
    ):
        sigma = math.sqrt(float(variance) * unbias)
        signal = float(_rms(mask, mean))
        if not math.isfinite(sigma + signal):
            broken.append(row.name)
            measured.append(row)
            continue
        row = dataclasses.replace(
            row,
            sigma=sigma,
            snr=signal / sigma if sigma else None,
            noise_floor=sigma * math.sqrt(2 / math.pi),
        )
        if ranks_magnitude:
            level = np.float32(sigma * reach)
            inside, lowest = _below(keep, score, level, tensor.leading)
            inside, all_kept = whole(inside), whole(count(keep, tensor.leading))
            n_kept, n_noise = n_kept + all_kept, n_noise + inside
            row = dataclasses.replace(
                row,
                noise_reach=float(level),
                threshold=float(lowest) if math.isfinite(lowest) else None,
                in_noise=inside / all_kept if all_kept else 0.0,
            )
        measured.append(row)
    if broken:
        message = (
            "The noise cannot be told, because the running mean or variance of weights "
            f"is not finite ({_listed(broken)}): look for the step that broke them."
        )
        return measured, Finding("warning", name, None, message)
    if ranks_magnitude:
        return measured, _drowned(measured, n_noise / max(n_kept, 1), sparsity)
    return measured, _weak_signal(measured)


def _drowned(rows: list[TensorHealth], share: float, sparsity: float) -> Finding:
    bad = [row for row in rows if (row.in_noise or 0) > MOST_NOISE]
    gist = (
        f"At sparsity {sparsity:g}, {share:.1%} of the kept weights score no more than "
        "noise alone would"
    )
    if not bad:
        return Finding("ok", "noise", share, f"{gist}.")
    bad.sort(key=lambda row: -(row.in_noise or 0))
    worst = bad[0]
    under = (worst.threshold or 0) < (worst.noise_floor or 0)
    message = (
        f"{gist}, most in {_listed([row.name for row in bad])} (threshold "
        f"{worst.threshold or 0:.3g}, {'under' if under else 'near'} the noise floor "
        f"{worst.noise_floor:.3g}; signal-to-noise {worst.snr or 0:.2g}): lower or "
        "decay the learning rate before pruning, or average longer with "
        "`EmaMagnitude(half_life=...)`."
    )
    return Finding("warning", "noise", share, message)


def _weak_signal(rows: list[TensorHealth]) -> Finding:
    low = sorted((row.snr, row.name) for row in rows if row.snr is not None)
    if not low:
        return Finding("ok", "noise", None, "The weights do not move.")
    weak = [name for snr, name in low if snr < 1]
    gist = f"The lowest signal-to-noise ratio of the weights is {low[0][0]:.2g}"
    if not weak:
        return Finding("ok", "noise", low[0][0], f"{gist}.")
    message = (
        f"{gist} ({_listed(weak)}): lower or decay the learning rate before pruning."
    )
    return Finding("warning", "noise", low[0][0], message)


def _tracked(tree: Any) -> bool:
    return not (isinstance(tree, tuple) and tree == ())


def _lowest_density(tensor: Tensor, mask: jax.Array) -> float:
    stacks = math.prod(tensor.shape[: tensor.stacked])
    counts = counting.count_kept([mask], [tensor]).reshape(stacks, -1)
    fewest = jnp.min(counts.sum(1, dtype=jnp.float32))
    return float(fewest) / math.prod(tensor.shape[tensor.stacked :])


@functools.partial(jax.jit, static_argnames="lead")
def _not_zero(mask: jax.Array, weight: jax.Array, lead: int) -> Any:
    """Counts pruned weights that are finite and those that are not; the largest."""
    finite = jnp.isfinite(weight)
    alive = ~mask & (weight != 0) & finite
    size = jnp.where(alive, jnp.abs(weight), jnp.zeros_like(weight))
    most = jnp.max(size.astype(jnp.float32))
    return count(alive, lead), count(~mask & ~finite, lead), most


def _squares(mask: jax.Array, weight: Any, start: Any) -> tuple[float, float]:
    """Of the change and of the start, summed over the weights that are kept."""
    change, norm = (
        float(most) ** 2 * float(squares)
        for most, squares in _scaled_squares(mask, weight, start)
    )
    return change, norm


@jax.jit
def _scaled_squares(mask: jax.Array, weight: jax.Array, start: jax.Array) -> Any:
    """The largest magnitude, and the sum of squares in units of it.

    Squares of very small or large weights have no place in float32.
    """

    def scaled(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = jnp.where(mask, values, jnp.float32(0))
        most = jnp.max(jnp.abs(values))
        unit = jnp.where(most > 0, most, jnp.float32(1))
        return most, jnp.sum(jnp.square(values / unit))

    weight, start = weight.astype(jnp.float32), start.astype(jnp.float32)
    return scaled(weight - start), scaled(start)


@jax.jit
def _rms(mask: jax.Array, mean: jax.Array) -> jax.Array:
    square = jnp.where(mask, jnp.square(mean), jnp.float32(0)).mean()
    return jnp.sqrt(square / jnp.maximum(mask.mean(dtype=jnp.float32), 1e-30))


@functools.partial(jax.jit, static_argnames="lead")
def _below(keep: jax.Array, score: jax.Array, level: jax.Array, lead: int) -> Any:
    ranked = keep & jnp.isfinite(score)
    lowest = jnp.min(jnp.where(ranked, score, jnp.float32(jnp.inf)))
    return count(keep & (score <= level), lead), lowest


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    more = len(names) - _NAMED
    return f"{shown} and {more} more" if more > 0 else shown
