"""What a health report holds, and how it prints."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from movement_jax.report import add_row, fraction, new_table, rendered

if TYPE_CHECKING:
    from rich.console import Group

Level = Literal["warning", "note", "ok"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
      level: ``"warning"``, ``"note"`` (nothing is wrong, or nothing was measured), or
        ``"ok"``.
      name: what was looked at, such as ``"movement"`` or ``"noise"``.
      figure: what was measured, in the unit that ``message`` says; None if nothing.
      message: one sentence with the figure and what to do.
    """

    level: Level
    name: str
    figure: float | None
    message: str


@dataclasses.dataclass(frozen=True)
class TensorHealth:
    r"""What was measured on one tensor; None where it was not.

    Attributes:
      name: its ``/``-joined path.
      density: fraction of its weights that are kept; of its sparsest slice, if it is
        ``stacked``.
      movement: :math:`\|W - W_0\| / \|W_0\|` over the weights that are kept.
      sigma: standard deviation of a weight around its running mean :math:`\mu`, over
        the weights that are kept. Drift counts as noise.
      snr: signal-to-noise ratio, root mean square of :math:`\mu` over ``sigma``.
      noise_floor: :math:`\sigma\sqrt{2/\pi}`, below which the expected magnitude of
        no noisy weight falls, however small its mean.
      noise_reach: what the scores of weights without any signal reach: the floor and
        three of their standard deviations. Scores of magnitude only.
      threshold: lowest score among the weights kept at the sparsity in question.
      in_noise: fraction of the weights kept at that sparsity whose score lies within
        ``noise_reach``.
    """

    name: str
    density: float
    movement: float | None = None
    sigma: float | None = None
    snr: float | None = None
    noise_floor: float | None = None
    noise_reach: float | None = None
    threshold: float | None = None
    in_noise: float | None = None


@dataclasses.dataclass(frozen=True)
class Health:
    """Findings; made by :func:`health`, prints as tables.

    Attributes:
      findings: warnings first, then notes, then what is well.
      tensors: what was measured on every prunable tensor.
    """

    findings: tuple[Finding, ...]
    tensors: tuple[TensorHealth, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no warning."""
        return all(finding.level != "warning" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain Python values, ready for JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return rendered(self)

    def __rich__(self) -> "Group":
        from rich.console import Group

        findings = new_table("Level", "What", "Finding", title="Health")
        findings.columns[1].justify = findings.columns[2].justify = "left"
        findings.columns[2].no_wrap, findings.columns[2].max_width = False, 80
        style = {"warning": "bold", "note": None, "ok": "dim"}
        for found in self.findings:
            add_row(
                findings,
                found.level,
                found.name,
                found.message,
                style=style[found.level],
            )
        fields = [
            ("Density", "density"),
            ("Movement", "movement"),
            ("Signal/noise", "snr"),
            ("Noise reaches", "noise_reach"),
            ("Threshold", "threshold"),
            ("Kept in noise", "in_noise"),
        ]
        fields = [
            (title, field)
            for title, field in fields
            if any(getattr(row, field) is not None for row in self.tensors)
        ]
        measured = new_table("Tensor", *(title for title, _ in fields), title=None)
        for row in self.tensors:
            add_row(
                measured,
                row.name,
                *(_number(getattr(row, field)) for _, field in fields),
            )
        return Group(findings, measured)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return fraction(value) if 0.001 <= abs(value) < 100 or not value else f"{value:.3g}"
