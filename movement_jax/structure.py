"""What is kept or dropped together: single weights, blocks, slices, N of every M."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from movement_jax import grouping
from movement_jax.arguments import compiled, make_plain, plain
from movement_jax.counting import Tensor
from movement_jax.grouping import Reduce
from movement_jax.units import Units

_MOST_MEMBERS = 2**30
# Attention projects to (heads, head_dim), fused ones to (3, heads, head_dim).
_PROJECTION = re.compile(
    r"(^|/)(to_|w)?(query|key|value|q|k|v|(?P<fused>q?kv))(_proj(ection)?)?/[^/]*$"
)
_CONVOLUTION = re.compile("conv", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Every weight is kept or dropped on its own.

    Examples:
      >>> import movement_jax as mj
      >>> tx = mj.movement_pruning(0.9, structure=mj.Unstructured())
    """

    @property
    def reduce(self) -> Reduce:
        """A group of one is worth what its weight is."""
        return "mean"

    def block(self, tensor: Tensor) -> tuple[int, ...]:
        """Size of a group along each axis: 1."""
        return (1,) * len(tensor.shape)


@dataclasses.dataclass(frozen=True)
class Block:
    """Rectangular blocks of weights are kept or dropped as one.

    A block covers the last axes of a tensor: ``Block((4, 16))`` of a convolution
    ``(3, 3, 64, 128)`` are 4 inputs by 16 outputs at one place of the filter. Blocks at
    the end of an axis hold what is left of it and count as whole ones: where many do,
    as where 128 does not divide 130, the sparsity of the weights is not that of the
    blocks, which is what was asked for. :func:`movement_jax.summary` tells both. While
    blocks are ranked a TPU reserves once or twice the size of a tensor.

    Attributes:
      shape: of a block, for the last ``len(shape)`` axes. Sizes beyond an axis stand
        for all of it.
      reduce: ``"mean"`` or ``"sum"`` of the scores of its weights is what a block is
        worth. They differ for partial blocks.

    Raises:
      ValueError: if ``shape`` is no tuple of positive integers; at ``init``, if it is
        longer than a prunable tensor has axes.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> tx = mj.movement_pruning(None, mj.Magnitude(), structure=mj.Block((2, 2)))
      >>> params = {"kernel": jnp.array([[1.0, 5.0, 2.0, 2.0], [1.0, 1.0, 3.0, 2.0]])}
      >>> params, _ = mj.prune((params, tx.init(params)), 0.5)
      >>> print(params["kernel"])
      [[0. 0. 2. 2.]
       [0. 0. 3. 2.]]

    References:
      Lagunas, Charlaix, Sanh, Rush, *Block Pruning For Faster Transformers*, 2021,
      `arXiv:2109.04838 <https://arxiv.org/abs/2109.04838>`_
    """

    shape: tuple[int, ...]
    reduce: Reduce = "mean"

    def __post_init__(self) -> None:
        right = "Block((4, 16))"
        object.__setattr__(self, "shape", _integers("shape", self.shape, 1, right))
        _check_reduce(self.reduce, right)

    def block(self, tensor: Tensor) -> tuple[int, ...]:
        """Size of a group along each axis of a tensor."""
        rest = len(tensor.shape) - len(self.shape)
        if rest < tensor.stacked:
            raise ValueError(
                f"`structure`={self} has more axes than {_told(tensor)}: give it a "
                "shorter block, as in `structure={'dense': Block((4, 16)), '.': "
                "Unstructured()}`."
            )
        sizes = (1,) * rest + self.shape
        return tuple(min(b, d) for b, d in zip(sizes, tensor.shape))


@dataclasses.dataclass(frozen=True)
class Axis:
    """Slices are kept or dropped as one: rows, columns, heads.

    A group is all weights that share their index along ``axis``. Of a dense kernel
    ``(in, out)``, ``Axis(-1)`` drops columns, which are outputs, and ``Axis(-2)`` rows.
    Of an attention kernel ``(embed, heads, head_dim)``, ``Axis(1)`` drops heads.

    Attributes:
      axis: one axis or several. The layer axis of a ``stacked`` tensor does not count:
        0 is the one after it, and every layer has slices of its own.
      reduce: ``"mean"`` or ``"sum"`` of the scores of its weights is what a slice is
        worth. All slices of a tensor are of one size, so this changes only how tensors
        compare under ``Global()``.

    Raises:
      ValueError: if ``axis`` is neither an integer nor a tuple of different ones; at
        ``init``, if a prunable tensor has no such axis.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> tx = mj.movement_pruning(None, mj.Magnitude(), structure=mj.Axis(-1))
      >>> params = {"kernel": jnp.array([[1.0, 5.0, 2.0, 2.0], [1.0, 1.0, 3.0, 2.0]])}
      >>> params, _ = mj.prune((params, tx.init(params)), 0.5)
      >>> print(params["kernel"])
      [[0. 5. 2. 0.]
       [0. 1. 3. 0.]]
    """

    axis: int | tuple[int, ...]
    reduce: Reduce = "mean"

    def __post_init__(self) -> None:
        make_plain(self, "axis")
        right = "Axis(-1)` or `Axis((0, 1))"
        if isinstance(self.axis, tuple | list):
            object.__setattr__(self, "axis", _integers("axis", self.axis, None, right))
        else:
            _integers("axis", (self.axis,), None, right)
        _check_reduce(self.reduce, "Axis((0, 1))")

    def block(self, tensor: Tensor) -> tuple[int, ...]:
        """Size of a group along each axis of a tensor."""
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        own = [_own_axis(self, axis, tensor) for axis in axes]
        if len(set(own)) < len(own):
            raise ValueError(
                f"`structure`={self} names an axis of {_told(tensor)} twice: "
                f"`Axis({axes[0]})` once is enough."
            )
        own += range(tensor.stacked)
        return tuple(1 if i in own else d for i, d in enumerate(tensor.shape))


@dataclasses.dataclass(frozen=True)
class NM:
    """Of every ``m`` consecutive weights at least ``n`` stay: N:M sparsity.

    ``NM(2, 4)`` is the pattern that GPUs from Ampere on can make use of. At sparsity
    ``s`` each window of ``m`` drops its lowest ``round(s * m)``, at most ``m - n``; as
    a schedule rises the pattern tightens. Where an axis ends within a window, the
    weights missing there count as dropped, so no window holds more than ``n`` in the
    end.

    Every window takes the sparsity asked for overall, or by a rule of ``PerPath``.
    ``Global`` and ``ErdosRenyi`` spread theirs over the other tensors only, and
    ``min_keep`` does not apply. More than ``(m - n) / m`` cannot be asked for; a traced
    sparsity beyond it, as that of an optax schedule, is met as far as it can be: what
    was reached is told by :func:`movement_jax.sparsity_of`, what was asked for by the
    state. Within a window NaN ranks highest.

    Attributes:
      n: how many of a window stay.
      m: weights of a window; they are compared pair by pair, so keep it small.
      axis: along which windows lie, not counting the layer axis of a ``stacked``
        tensor. None is the axis that a Flax layer sums over, as hardware wants it:
        ``embed`` of kernels ``(embed, heads, head_dim)``, told by a name such as
        ``query``, ``v_proj`` or ``qkv`` or by ``embed = heads * head_dim``; the last
        but one of all others: inputs of ``Dense`` and ``Conv``, ``head_dim`` of
        attention's ``out``. A projection has no more heads than inputs: by that,
        kernels of a scan are told where ``stacked`` does not name them. For other
        layouts say which.

    Raises:
      ValueError: if not ``0 < n < m``, or ``axis`` is no integer; at ``init``, if a
        prunable tensor has no such axis, or it cannot be told which.

    Examples:
      >>> import jax.numpy as jnp, movement_jax as mj
      >>> tx = mj.movement_pruning(None, mj.Magnitude(), structure=mj.NM(2, 4))
      >>> params = {"kernel": jnp.array([[1.0, 4, 2, 1], [3, 2, 9, 3]]).T}
      >>> params, _ = mj.prune((params, tx.init(params)), 0.5)
      >>> print(params["kernel"].T)
      [[0. 4. 2. 0.]
       [3. 0. 9. 0.]]

    References:
      Mishra et al., *Accelerating Sparse Deep Neural Networks*, 2021,
      `arXiv:2104.08378 <https://arxiv.org/abs/2104.08378>`_
    """

    n: int
    m: int
    axis: int | None = None

    def __post_init__(self) -> None:
        make_plain(self, "n", "m", "axis")
        _integers("n", (self.n,), 1, "NM(2, 4)")
        _integers("m", (self.m,), 2, "NM(2, 4)")
        if self.n >= self.m:
            raise ValueError(
                f"`n` must be less than `m`, got NM({self.n}, {self.m}). Keeping 2 of "
                "every 4 is `NM(2, 4)`."
            )
        if self.axis is not None:
            _integers("axis", (self.axis,), None, "NM(2, 4, axis=-2)")

    @property
    def most(self) -> float:
        """The highest sparsity that there is."""
        return (self.m - self.n) / self.m

    def axis_of(self, tensor: Tensor) -> int:
        """The axis of a tensor along which windows lie, counted from its first."""
        axis = self._summed(tensor) if self.axis is None else self.axis
        return _own_axis(self, axis, tensor)

    def keep(
        self,
        scores: jax.Array,
        tensor: Tensor,
        n_drop: jax.Array,
        kept: jax.Array | None = None,
    ) -> jax.Array:
        """Mask that drops ``n_drop`` of every window, or ``m - n`` if that is less."""
        n_drop = n_drop.clip(0, self.m - self.n)
        axis = self.axis_of(tensor)
        return grouping.keep_in_windows(scores, axis, self.m, n_drop, kept)

    def dropped(self, tensor: Tensor, n_drop: int) -> float:
        """Fraction of the weights that :meth:`keep` drops."""
        n_drop, size = min(n_drop, self.m - self.n), tensor.shape[self.axis_of(tensor)]
        whole, rest = divmod(size, self.m)
        return (whole * n_drop + max(0, rest and n_drop + rest - self.m)) / size

    def _summed(self, tensor: Tensor) -> int:
        """The axis that a Flax layer sums over, not counting that of ``stacked``."""
        shape, name = tensor.shape[tensor.stacked :], tensor.name
        if len(shape) < 3:
            return -2
        projection = _PROJECTION.search(name)
        fused = projection and projection["fused"] and shape[-3] in (2, 3)
        if fused and len(shape) > 3:
            return len(shape) - 4
        axis, (inputs, *outputs) = len(shape) - 3, shape[-3:]
        if projection is None:
            named = axis > 0 or _CONVOLUTION.search(name)
            whole = inputs == math.prod(outputs) and min(outputs) > 1
            return 0 if whole and not named else -2
        if (tensor.stacked and axis == 0) or inputs > outputs[0]:
            return axis
        if inputs == outputs[0]:
            raise ValueError(
                f"`structure`={self} cannot tell what {_told(tensor)} sums over: "
                "projections (inputs, heads, head_dim), or layers of kernels (inputs, "
                "outputs)? Name scan-stacked kernels with `stacked=`, or say which "
                f"axis, as in `structure={{{name!r}: NM({self.n}, {self.m}, axis=0)}}`."
            )
        return -2


Structure = Unstructured | Block | Axis | NM
Rules = tuple[tuple[str, Structure], ...]


def checked(structure: Any) -> Structure | Rules | Units:
    """A structure as given by the user, or the rules of a mapping, ready to hash."""
    if isinstance(structure, Structure | Units):
        return structure
    if hasattr(structure, "units"):  # the groups of a model
        units: Units = structure.units()
        return units
    if isinstance(structure, Mapping):
        for pattern, value in structure.items():
            if not isinstance(value, Structure):
                raise _no_structure(f"`structure`[{pattern!r}]", value)
            compiled("structure", pattern)
        return tuple(structure.items())
    raise _no_structure("`structure`", structure)


def check(structure: Structure | Rules | Units, tensors: list[Tensor]) -> None:
    """Refuses rules that decide nothing, and structures that do not fit a tensor."""
    if isinstance(structure, Units):
        structure.check(tensors)
        return
    if isinstance(structure, tuple):
        used = {_rule(structure, tensor.name) for tensor in tensors}
        unused = [p for i, (p, _) in enumerate(structure) if i not in used]
        if unused:
            listing = "\n  ".join(tensor.name for tensor in tensors[:20])
            raise ValueError(
                f"`structure` has patterns that decide nothing: {unused}. They are "
                "found in no prunable path, or an earlier pattern wins in all of "
                f"theirs. Prunable paths:\n  {listing}"
            )
    for tensor in tensors:
        own = structure_of(structure, tensor.name)
        if isinstance(own, NM):
            own.axis_of(tensor)
        elif math.prod(own.block(tensor)) > _MOST_MEMBERS:
            raise ValueError(
                f"`structure`={own} makes one group of more than {_MOST_MEMBERS} "
                f"weights of {_told(tensor)}."
            )


def structure_of(structure: Structure | Rules, name: str) -> Structure:
    """The structure of the tensor with a path: the first pattern found in it wins."""
    if not isinstance(structure, tuple):
        return structure
    rule = _rule(structure, name)
    return Unstructured() if rule is None else structure[rule][1]


def groups_of(own: Unstructured | Block | Axis, tensor: Tensor) -> Tensor:
    """The groups of a tensor, as a tensor to be ranked."""
    block = own.block(tensor)
    if math.prod(block) == 1:
        return tensor
    shape = grouping.group_shape(tensor.shape, block)
    return dataclasses.replace(tensor, shape=shape, block=block)


def ranked_groups(
    structure: Structure | Rules | Units, tensors: list[Tensor], windows: bool = False
) -> list[Tensor]:
    """The groups of all tensors whose groups are ranked: not of those in windows.

    With ``windows`` also one window of each of those, which is counted too.
    """
    if isinstance(structure, Units):
        return structure.tensors
    found = []
    for tensor in tensors:
        own = structure_of(structure, tensor.name)
        if not isinstance(own, NM):
            found.append(groups_of(own, tensor))
        elif windows:
            found.append(Tensor(tensor.name, (own.m,)))
    return found


def _rule(rules: Rules, name: str) -> int | None:
    for i, (pattern, _) in enumerate(rules):
        if re.search(pattern, name):
            return i
    return None


def _own_axis(structure: Structure, axis: int, tensor: Tensor) -> int:
    ndim = len(tensor.shape) - tensor.stacked
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"`structure`={structure} needs axis {axis}, which {_told(tensor)} does "
            "not have. Give this path a structure of its own, as in "
            "`structure={'pattern': Axis(-1), '.': Unstructured()}`."
        )
    return tensor.stacked + axis % ndim


def _told(tensor: Tensor) -> str:
    more = ", the first of them layers" if tensor.stacked else ""
    return f"{tensor.name!r} of shape {tensor.shape}{more}"


def _integers(name: str, values: Any, least: int | None, right: str) -> tuple[int, ...]:
    whole = tuple(map(plain, values)) if isinstance(values, tuple | list) else ()
    right_kind = all(isinstance(x, int) and not isinstance(x, bool) for x in whole)
    if not whole or not right_kind or (least is not None and min(whole) < least):
        range_ = "" if least is None else f" of at least {least}"
        raise ValueError(
            f"`{name}` takes integers{range_}, got {values!r}. Write `{right}`."
        )
    return whole


def _check_reduce(reduce: Any, right: str) -> None:
    if reduce not in ("mean", "sum"):
        raise ValueError(
            f"`reduce` must be 'mean' or 'sum', got {reduce!r}. Several sizes or axes "
            f"go in a tuple, as in `{right}`."
        )


def _no_structure(name: str, value: Any) -> TypeError:
    return TypeError(
        f"{name} must be `Unstructured()`, `Block((4, 16))`, `Axis(-1)`, `NM(2, 4)`, "
        "a mapping of patterns to them, or the groups of `shrink.find_groups` by "
        f"themselves, got {value!r}."
    )
