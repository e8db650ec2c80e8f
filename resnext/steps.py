"""The steps of a plan (`resnext.plan`), and the plan itself: pure data.

Values have slots. An *affine* is a batch norm as three vectors (`resnext.kernels.bn_affine`), in the slot of the norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from resnext.graph import Node, Shell, Watched

NONE = -1
"""The slot of a value that is not there."""


@dataclass(frozen=True)
class ConvStats:
    """Convolve ``x``, or relu(prologue(x)); with the affine of the norm behind it if there is one."""

    conv: str
    norm: str
    x: int
    prologue: int
    out: int
    affine: int


@dataclass(frozen=True)
class BlockEnd:
    """`ConvStats`, and relu(its affine of its result + residual), or + residual_affine(residual).

    ``in_place``: whether the sum has the branch's dtype whatever the residual's is.
    """

    conv: str
    norm: str
    x: int
    prologue: int
    residual: int
    residual_affine: int
    in_place: bool
    out: int


@dataclass(frozen=True)
class Activation:
    """relu(affine(z)), for those who cannot apply it as they read."""

    z: int
    affine: int
    out: int


@dataclass(frozen=True)
class Pool:
    """3x3 max pooling, stride 2, of relu(affine(z)): the end of a stem."""

    z: int
    affine: int
    out: int


@dataclass(frozen=True)
class Mean:
    """The mean over each image's channels of act(affine(z)): what an attention looks at.

    In inference ``affine`` is `NONE`, and z the activation itself. ``relu``: whether act is ReLU, else it is nothing.
    ``keeps_dims``: whether the result is (N, C, 1, 1), else (N, C).
    """

    z: int
    affine: int
    relu: bool
    keeps_dims: bool
    out: int


@dataclass(frozen=True)
class Excite:
    """activation(layer(x)), between an attention's mean and its gate; ``activation`` as of `kernels.excite`."""

    layer: str
    x: int
    activation: str
    out: int


@dataclass(frozen=True)
class Gate:
    """gate * act(affine(z)) as of `Mean`; with a residual relu(that + residual), which ends a block.

    ``residual_affine`` and ``in_place`` as in `BlockEnd`.
    """

    z: int
    affine: int
    relu: bool
    gate: int
    residual: int
    residual_affine: int
    in_place: bool
    out: int


@dataclass(frozen=True)
class ConvAffine:
    """A convolution with its batch norm folded, residual and ReLU; ``in_place`` as in `BlockEnd`."""

    pair: tuple[str, str]
    x: int
    residual: int
    in_place: bool
    relu: bool
    out: int


@dataclass(frozen=True)
class Call:
    """A node as it was recorded.

    ``kind``: of a module, its class before it was converted; what takes its place may do something else.
    ``sees_layout``: what it does may depend on the layout of the tensors it is given.
    """

    node: Node
    out: int
    kind: type[nn.Module] | None
    sees_layout: bool


Step = ConvStats | BlockEnd | Activation | Pool | Mean | Excite | Gate | ConvAffine | Call


@dataclass(frozen=True)
class Program:
    """Steps in order, each with the slots that are not needed after it, and what to return, with `Ref` for values."""

    steps: tuple[tuple[Step, tuple[int, ...]], ...]
    output: Any


@dataclass(frozen=True)
class Segment:
    """Fused steps in a row whose last result is the only value of theirs that others need.

    Such are all steps of a residual block, a network's stem, what is before and after an attention in a block.

    Attributes:
        steps: The steps, without those that are called as they were recorded.
        reads: The slots of what they are given: tensors.
    """

    steps: tuple[Step, ...]
    reads: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How to run a module fused.

    Attributes:
        kind: "block" if there is a residual sum in it, else "chain".
        slots: Number of slots for values; the first ones are the arguments.
        train: Steps that are right in every mode.
        infer: Steps for evaluation without gradients.
        pairs: Names of the convolutions and the norms behind them that the steps stand for.
        folds: Those of them that ``infer`` runs with the norm folded into the convolution; and the layers of `Excite`,
            with "" for a norm.
        excites: Names of the layers of `Excite`.
        convs: Names of further convolutions, without a norm.
        entries: Names of those convolutions that are given the first argument.
        roles: Names of further modules that the steps stand for, with their classes.
        dropouts: The modules that ``infer`` leaves out, which pass their input on in evaluation.
        shells: The modules whose forwards the steps replace.
        watched: Further modules of whose attributes the steps depend.
        aliases: Pairs of names of one module.
        in_channels_last: How many convolutions gain by channels_last, those of ``units`` included; 0 if more is lost.
        units: Names of the modules that are called and have plans themselves.
        writes: Whether a node that is called as it was recorded writes into memory that it is given.
        flags: Names of the modules that are called, with their ``inplace``.
        segments: The segments of ``train``, by the number of their first step.
    """

    kind: str
    slots: int
    train: Program
    infer: Program
    pairs: tuple[tuple[str, str], ...]
    folds: tuple[tuple[str, str], ...]
    excites: tuple[str, ...]
    convs: tuple[str, ...]
    entries: tuple[str, ...]
    roles: tuple[tuple[str, type[nn.Module]], ...]
    dropouts: tuple[Shell, ...]
    shells: tuple[Shell, ...]
    watched: tuple[Watched, ...]
    aliases: tuple[tuple[str, str], ...]
    in_channels_last: int
    units: tuple[str, ...]
    writes: bool
    flags: tuple[tuple[str, Any], ...]
    segments: dict[int, Segment]

    @property
    def every_conv(self) -> tuple[str, ...]:
        """Names of all convolutions that the steps stand for."""
        return every_conv(self.pairs, self.convs)

    @property
    def recomputes(self) -> bool:
        """Whether there is a convolution that backward can compute again: the last of a block."""
        return any(isinstance(step, BlockEnd) for step, _ in self.train.steps)

    @property
    def attends(self) -> bool:
        """Whether there is an attention among the steps."""
        return any(isinstance(step, Gate) for step, _ in self.train.steps)


def plan_of(module: nn.Module) -> Plan | None:
    """The plan for calls of a converted module with as few tensors as it takes; None without any."""
    return next(iter(module.__dict__.get("_fused_plans", {}).values()), None)


def every_conv(pairs: Iterable[tuple[str, str]], convs: Iterable[str]) -> tuple[str, ...]:
    """Names of the convolutions of pairs and of others."""
    return (*(conv for conv, _ in pairs), *convs)


def writes(step: Step) -> tuple[int, ...]:
    """The slots that a step fills."""
    return (step.out, step.affine) if isinstance(step, ConvStats) and step.norm else (step.out,)


def reads_affines(step: Step) -> list[int]:
    """The slots of the affines that a step is given."""
    names = ["prologue", "residual_affine"]
    if isinstance(step, Activation | Pool | Mean | Gate):
        names.append("affine")
    return [getattr(step, name, NONE) for name in names]


def reads(step: Step) -> list[int]:
    """The slots that a step is given."""
    if isinstance(step, Call):
        return step.node.refs
    names = ["x", "z", "prologue", "residual", "residual_affine", "gate"]
    if isinstance(step, Activation | Pool | Mean | Gate):
        names.append("affine")
    return [slot for name in names if (slot := getattr(step, name, NONE)) != NONE]
