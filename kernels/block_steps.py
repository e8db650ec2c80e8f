"""The steps that a block in training is made of (block.py): fused operators with a forward and a backward each.

Values live in a list; steps know them by their places in it. A tensor's value is the tensor, a batch norm's is
`Normalised`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import checks, dispatch
from .config import NO_AFFINE, Norm, Running
from .fused import affine_add_relu, affine_relu_max_pool, conv_norm, conv_stats
from .fused_checks import check_conv
from .fused_conv_ops import CONV_STATS, cast_weight, compute_conv_norm, conv_stats_gradients
from .fused_ops import AFFINE_ADD_RELU, POOL, POOL_BWD, affine_add_relu_gradients, compute_bn_affine_bwd, multiplied

Values = list[Any]
Saved = Sequence[Any]  # tensors or None


class Normalised(NamedTuple):
    """A batch norm as an affine, the biased variance that it was made from, and what became of its running statistics.

    ``updated``: whether they have been, of those that a step asks for.
    """

    center: Any
    scale: Tensor
    shift: Tensor
    var: Tensor
    updated: bool


class Scaled(NamedTuple):
    """A gradient that is yet to be multiplied by a vector over the channels."""

    gradient: Tensor
    scale: Tensor


class Gated(NamedTuple):
    """A gradient of a raw output that is yet to be made: from that of its activation, gate * dout.

    ``gradient``: dout, of what came out of the gate; ``out``: that, if it ended in ReLU and dout is not masked yet.
    """

    gradient: Tensor | None
    out: Tensor | None
    gate: Tensor | None


class ConvNorm(NamedTuple):
    """z, norm = `resnext.kernels.conv_norm` of x; ``prologue``, ``gamma`` and ``beta`` may be None.

    ``running``: statistics to update, if that costs no launch more.
    """

    x: int
    prologue: int | None
    weight: int
    gamma: int | None
    beta: int | None
    eps: float
    running: Running | None
    stride: tuple[int, int]
    groups: int
    z: int
    norm: int

    @property
    def result(self) -> int:
        """The place that backward starts from."""
        return self.z

    def forward(self, values: Values) -> tuple[bool, Saved]:
        """Run the step on ``values``; returns whether results are channels_last, and what `backward` needs of them."""
        x, parameter, gamma, beta = values[self.x], values[self.weight], at(values, self.gamma), at(values, self.beta)
        prologue = affine_at(values, self.prologue)
        dims = check_conv("conv_norm", x, parameter, self.stride, self.groups, casts=True)
        weight = cast_weight(parameter, x, *dims)
        norm = Norm(gamma, beta, self.eps, self.running)
        (z, mean, var, scale, shift), updated = compute_conv_norm(x, prologue, weight, norm, *dims)
        values[self.z], values[self.norm] = z, Normalised(mean, scale, shift, var, updated)
        return dims[-1], (x, *prologue, weight, gamma, z, mean, var)

    def backward(self, channels_last: bool, saved: Saved, gradients: Values, wanted: Sequence[bool]) -> None:
        """From the gradients of what the step made to those of what it was given."""
        x, *prologue, weight, gamma, z, mean, var = saved
        dz, (dscale, dshift) = gradients[self.z], gradients[self.norm]
        gradients[self.z] = None  # the last reference but ours
        dz, grad_scale = dz if isinstance(dz, Scaled) else (dz, None)
        if self.beta is not None and gamma is None:
            dscale, dshift = _summed(dscale, dshift)
        dmean, dvar, dgamma, dbeta = compute_bn_affine_bwd(dscale, dshift, var, gamma, self.eps)
        source = (z, mean, dmean, dvar)
        operands = x, *prologue, weight
        _conv_backward(self, dz, source, grad_scale, channels_last, operands, gradients, wanted)
        if self.gamma is not None:
            gradients[self.gamma] = dgamma
        if self.beta is not None:
            gradients[self.beta] = dshift if gamma is None else dbeta

    def again(self, values: Values) -> None:
        """Run the step by an operator that can be differentiated any number of times."""
        x = values[self.x]
        z, _, var, affine = conv_norm(
            x,
            values[self.weight].to(x.dtype),
            at(values, self.gamma),
            at(values, self.beta),
            self.eps,
            None if self.prologue is None else values[self.prologue][:3],
            self.stride,
            self.groups,
        )
        values[self.z], values[self.norm] = z, Normalised(*affine, var, False)


class Conv(NamedTuple):
    """z = `resnext.kernels.conv_stats` of x, without statistics; ``prologue`` may be None."""

    x: int
    prologue: int | None
    weight: int
    stride: tuple[int, int]
    groups: int
    z: int

    @property
    def result(self) -> int:
        """As of `ConvNorm`."""
        return self.z

    def forward(self, values: Values) -> tuple[bool, Saved]:
        """As of `ConvNorm`."""
        x, parameter, prologue = values[self.x], values[self.weight], affine_at(values, self.prologue)
        dims = check_conv("conv_stats", x, parameter, self.stride, self.groups, casts=True)
        weight = cast_weight(parameter, x, *dims)
        values[self.z], _, _ = CONV_STATS.kernel(x, *prologue, weight, *dims, False)
        return dims[-1], (x, *prologue, weight)

    def backward(self, channels_last: bool, saved: Saved, gradients: Values, wanted: Sequence[bool]) -> None:
        """As of `ConvNorm`."""
        dz, gradients[self.z] = gradients[self.z], None
        _conv_backward(self, dz, None, None, channels_last, saved, gradients, wanted)

    def again(self, values: Values) -> None:
        """As of `ConvNorm`."""
        x = values[self.x]
        prologue = None if self.prologue is None else values[self.prologue][:3]
        weight = values[self.weight].to(x.dtype)
        values[self.z], _, _ = conv_stats(x, weight, prologue, self.stride, self.groups, stats=False)


class AddRelu(NamedTuple):
    """out = `resnext.kernels.affine_add_relu` of z; ``residual``, like z, and ``residual_norm`` may be None."""

    z: int
    norm: int
    residual: int | None
    residual_norm: int | None
    keeps_result: bool
    out: int

    @property
    def result(self) -> int:
        """As of `ConvNorm`."""
        return self.out

    def forward(self, values: Values) -> tuple[bool, Saved]:
        """As of `ConvNorm`."""
        z, residual = values[self.z], at(values, self.residual)
        affine, residual_affine = affine_at(values, self.norm), affine_at(values, self.residual_norm)
        channels_last = checks.is_channels_last(z)
        out = AFFINE_ADD_RELU.kernel(z, *affine, residual, *residual_affine, channels_last, self.keeps_result)
        values[self.out] = out
        kept = residual if self.residual_norm is not None or not self.keeps_result else None
        return channels_last, (out if self.keeps_result else None, z, *affine, kept, *residual_affine)

    def backward(self, channels_last: bool, saved: Saved, gradients: Values, wanted: Sequence[bool]) -> None:
        """As of `ConvNorm`."""
        out, z, *vectors = saved
        affine, kept, residual_affine = vectors[:3], vectors[3], vectors[4:]
        wants = (True, self.residual is not None and wanted[self.residual], True)
        # The one gradient of the sum is that of both operands: what multiplies it, reads it.
        shared = wants[1] and getattr(dispatch.elementwise(z.dtype, z.device), "scales", False)
        dz, dresidual, dscale, dshift, dresidual_scale = affine_add_relu_gradients(
            *(gradients[self.out], out, z, kept, affine, residual_affine, channels_last),
            (True, wants[1] and not shared, True),
            deferred=True,
            unscaled=shared,
        )
        gradients[self.out] = None
        if shared:
            dresidual = dz if residual_affine[1] is None else Scaled(dz, residual_affine[1])
            dz = Scaled(dz, affine[1])
        add(gradients, self.z, dz)
        add_norm(gradients, self.norm, dscale, dshift)
        if self.residual is not None and wants[1]:
            add(gradients, self.residual, dresidual)
        if self.residual_norm is not None:
            add_norm(gradients, self.residual_norm, dresidual_scale, dshift)

    def again(self, values: Values) -> None:
        """As of `ConvNorm`."""
        residual_affine = None if self.residual_norm is None else values[self.residual_norm][:3]
        affine, residual = values[self.norm][:3], at(values, self.residual)
        values[self.out] = affine_add_relu(values[self.z], affine, residual, residual_affine)


class MaxPool(NamedTuple):
    """out = `resnext.kernels.affine_relu_max_pool` of z."""

    z: int
    norm: int
    out: int

    @property
    def result(self) -> int:
        """As of `ConvNorm`."""
        return self.out

    def forward(self, values: Values) -> tuple[bool, Saved]:
        """As of `ConvNorm`."""
        z, affine = values[self.z], affine_at(values, self.norm)
        channels_last = checks.is_channels_last(z)
        values[self.out], taps = POOL.kernel(z, *affine, channels_last, True)
        return channels_last, (taps, z, *affine)

    def backward(self, channels_last: bool, saved: Saved, gradients: Values, wanted: Sequence[bool]) -> None:
        """As of `ConvNorm`."""
        dz, dscale, dshift = POOL_BWD.kernel(gradients[self.out], *saved, channels_last, (True, True))
        gradients[self.out] = None
        add(gradients, self.z, dz)
        add_norm(gradients, self.norm, dscale, dshift)

    def again(self, values: Values) -> None:
        """As of `ConvNorm`."""
        values[self.out] = affine_relu_max_pool(values[self.z], values[self.norm][:3])


def at(values: Values, place: int | None) -> Any:
    """The value at a place that may be None."""
    return None if place is None else values[place]


def affine_at(values: Values, place: int | None) -> tuple[Tensor | None, ...]:
    """The three vectors of a norm at a place that may be None."""
    return NO_AFFINE if place is None else values[place][:3]


def _conv_backward(
    step: ConvNorm | Conv,
    dz: Tensor,
    source: tuple[Tensor, ...] | None,
    grad_scale: Tensor | None,
    channels_last: bool,
    operands: Saved,
    gradients: Values,
    wanted: Sequence[bool],
) -> None:
    """From the gradient of a convolution's output to those of its operands."""
    x, *prologue, weight = operands
    dims = step.stride, step.groups, channels_last
    wants = wanted[step.x] or step.prologue is not None, wanted[step.weight]
    also = {"grad_scale": grad_scale, "onto": own(gradients, step.x) if wants[0] else None}
    dx, *dvectors, dw = conv_stats_gradients(dz, source, x, prologue, weight, *dims, wants, deferred=True, **also)
    if wants[0]:
        gradients[step.x] = dx
    if step.prologue is not None:
        add_norm(gradients, step.prologue, *dvectors)
    gradients[step.weight] = dw


def own(gradients: Values, place: int) -> Tensor | None:
    """The gradient at a place, if there is one, in memory that nothing else refers to."""
    held = gradients[place]
    if isinstance(held, Scaled):
        return multiplied(*held)
    if held is not None and any(isinstance(each, Scaled | Gated) and each.gradient is held for each in gradients):
        return held.clone()
    return held


def add(gradients: Values, place: int, gradient: Tensor | Scaled) -> None:
    """Add a gradient to what there is at a place."""
    if gradients[place] is None:
        gradients[place] = gradient
        return
    if isinstance(gradient, Scaled):
        gradient = multiplied(*gradient)
    gradients[place] = own(gradients, place).add_(gradient)  # type: ignore[union-attr]


def add_norm(gradients: Values, place: int, dscale: Any, dshift: Tensor | None) -> None:
    """Add the gradients of an affine: of its scale and its shift, or partial sums of both and None."""
    held = gradients[place]
    if held is not None:
        pairs = zip(_summed(*held), _summed(dscale, dshift), strict=True)
        dscale, dshift = (first + second for first, second in pairs)
    gradients[place] = dscale, dshift


def _summed(dscale: Any, dshift: Tensor | None) -> tuple[Tensor, Tensor]:
    return dscale.summed() if dshift is None else (dscale, dshift)
