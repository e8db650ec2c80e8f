"""Channel attention (squeeze-and-excitation) around fused operators: the mean of an activation, and its gate.

An attention multiplies each channel of each image by a gate, which a small network makes of the channels' means (Hu et
al., "Squeeze-and-Excitation Networks", 2018). What it attends to is act(affine(z)): a raw convolution output z, its
batch norm as an affine (fused.py), and ReLU or nothing. Neither that nor its gradient is ever written:

    mean = mean over H, W of act(affine(z))         gated = gate * act(affine(z))
    d act = gate * d gated + d mean / (H * W)       d gate = sum over H, W of d gated * act(affine(z))

The gate's gradient has to be there before that of the mean is known, so backward reads z twice. `affine_gate` also
takes the residual sum and ReLU that end a block. `excite` is one layer of the small network.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch, reference
from .config import Affine
from .fused_checks import check_activation, check_affine, like_result, transformed
from .fused_ops import affine_of, vector_like
from .operators import Operator, if_wanted, or_empty, through_formula
from .ops import dense, empty

_AFFINE = "Tensor? center, Tensor? scale, Tensor? shift"
_RESIDUAL = "Tensor? residual, Tensor? residual_center, Tensor? residual_scale, Tensor? residual_shift"
MEAN = Operator("_affine_mean", f"(Tensor z, {_AFFINE}, bool relu, bool channels_last) -> Tensor")
MEAN_BWD = Operator(
    "_affine_mean_bwd",
    f"(Tensor dmean, Tensor z, {_AFFINE}, bool relu, bool channels_last) -> (Tensor, Tensor, Tensor)",
)
GATE = Operator(
    "_affine_gate", f"(Tensor z, {_AFFINE}, bool relu, Tensor gate, {_RESIDUAL}, bool channels_last) -> Tensor"
)
GATE_BWD = Operator(
    "_affine_gate_bwd",
    f"(Tensor dout, Tensor? out, Tensor z, {_AFFINE}, bool relu, Tensor gate, {_RESIDUAL}, bool channels_last, "
    "bool wants_residual) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def affine_mean(z: Tensor, affine: Affine | None = None, relu: bool = True) -> Tensor:
    """Take the mean over each image's channels of relu(affine(z)), or of affine(z), or of z.

    Differentiable in ``z`` and the affine's scale and shift, any number of times.

    Args:
        z: (N, C, H, W), in any memory layout; float32, float16, bfloat16 or float64.
        affine: (center or None, scale, shift), each (C,), float32 (float64 for float64 z); None for the identity.
        relu: Whether the mean is that of the activation behind ReLU.

    Returns:
        (N, C, 1, 1), float32 (float64 for float64 z).

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """
    name = "affine_mean"
    check_activation(name, z)
    vectors = check_affine(name, z, affine)
    if transformed():
        return reference.affine_mean(z, _given(*vectors), relu, False)
    return MEAN(z, *vectors, relu, checks.is_channels_last(z))


def affine_gate(
    z: Tensor,
    gate: Tensor,
    affine: Affine | None = None,
    relu: bool = True,
    residual: Tensor | None = None,
    residual_affine: Affine | None = None,
) -> Tensor:
    """Compute gate * relu(affine(z)), or gate * affine(z); with a residual relu(that + residual), in one pass.

    Differentiable in ``z``, ``gate``, ``residual`` and the affines' scales and shifts, any number of times.

    Args:
        z: (N, C, H, W), in any memory layout; float32, float16, bfloat16 or float64.
        gate: (N, C, 1, 1), any floating-point dtype.
        affine: (center or None, scale, shift), each (C,), float32 (float64 for float64 z); None for the identity.
        relu: Whether ReLU comes before the gate.
        residual: Of z's shape, or one that expands to it; any floating-point dtype, any layout.
        residual_affine: An affine for the residual, where it is a raw convolution output too.

    Returns:
        (N, C, H, W), of z's dtype and layout. Computed in float32, rounded once.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """
    name = "affine_gate"
    check_activation(name, z)
    vectors = check_affine(name, z, affine)
    if gate.shape != (*z.shape[:2], 1, 1) or not gate.is_floating_point() or gate.device != z.device:
        raise ValueError(
            f"{name}: expected a floating-point gate ({z.shape[0]}, {z.shape[1]}, 1, 1) on {z.device}, got "
            f"{tuple(gate.shape)} {gate.dtype} on {gate.device}"
        )
    if residual_affine is not None and residual is None:
        raise ValueError(f"{name}: expected a residual with residual_affine, got None; leave out both, or give both")
    if residual is not None:
        residual = like_result(name, residual, z, z.shape)
    residual_vectors = check_affine(name, z, residual_affine, "residual_")
    gate = gate.to(checks.vector_dtype(z.dtype))
    if transformed():
        return reference.affine_gate(z, _given(*vectors), relu, gate, residual, _given(*residual_vectors), False)
    return GATE(z, *vectors, relu, gate, residual, *residual_vectors, checks.is_channels_last(z))


def excite(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """One layer between an attention's mean and its gate: linear, or a 1x1 convolution, and an activation.

    A matrix product in float32 (float64), whatever autocast says: it is small, and rounding its operands takes longer
    than it does. Differentiable as PyTorch's operators, which it is made of, are.

    Args:
        x: (N, C_in, 1, 1).
        weight: (C_out, C_in), or with two ones behind.
        bias: (C_out,) or None.
        activation: ``"relu"``, ``"sigmoid"`` or ``""``.

    Returns:
        (N, C_out, 1, 1), of x's dtype.
    """
    return excited(x, weight, bias, activation).to(x.dtype)[:, :, None, None]


def excited(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """What `excite` rounds: (N, C_out), float32 (float64)."""
    bias = None if bias is None else bias.to(checks.vector_dtype(x.dtype))
    with _without_autocast(x):
        y = F.linear(_as_matrix(x), _as_matrix(weight, x), bias)
    return {"relu": torch.relu, "sigmoid": torch.sigmoid, "": lambda same: same}[activation](y)


def excite_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, y: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, from that of `excite`'s result; ``y``: of `excited`."""
    dy = _as_matrix(dy, x)
    if activation == "relu":
        dy = torch.ops.aten.threshold_backward(dy, y, 0)
    elif activation == "sigmoid":
        dy = torch.ops.aten.sigmoid_backward(dy, y)
    with _without_autocast(x):
        dx, dw = dy @ _as_matrix(weight, x), dy.t() @ _as_matrix(x)
    return dx.to(x.dtype)[:, :, None, None], dw.view(weight.shape), dy.sum(0)


def _as_matrix(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """A tensor (N, C) or (N, C, 1, 1) as (N, C), in the dtype of vectors beside ``like``, or beside itself."""
    return tensor.flatten(1).to(checks.vector_dtype((tensor if like is None else like).dtype))


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    on = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else contextlib.nullcontext()


# --- the operators: what runs, what a compiler sees ---


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dense(tensor: Tensor | None, channels_last: bool) -> Tensor | None:
    return None if tensor is None else dense(tensor, channels_last)


def _affine_mean(z, center, scale, shift, relu, channels_last):
    launchers = dispatch.attention(z.dtype, z.device)
    return launchers.affine_mean(dense(z, channels_last), affine_of(center, scale, shift), relu, channels_last)


def _affine_mean_bwd(dmean, z, center, scale, shift, relu, channels_last):
    added = dmean / (z.shape[2] * z.shape[3])
    affine = (center, scale, shift)
    return or_empty(z, *activation_gradients(z, affine, relu, None, None, None, added, channels_last))


def _affine_gate(
    z, center, scale, shift, relu, gate, residual, residual_center, residual_scale, residual_shift, channels_last
):
    return dispatch.attention(z.dtype, z.device).affine_gate(
        dense(z, channels_last),
        affine_of(center, scale, shift),
        relu,
        gate.contiguous(),
        _dense(residual, channels_last),
        affine_of(residual_center, residual_scale, residual_shift),
        channels_last,
    )


def _affine_gate_bwd(
    dout,
    out,
    z,
    center,
    scale,
    shift,
    relu,
    gate,
    residual,
    residual_center,
    residual_scale,
    residual_shift,
    channels_last,
    wants_residual,
):
    affine, residual_affine = (center, scale, shift), (residual_center, residual_scale, residual_shift)
    of_gate = gate_gradients(dout, out, z, affine, relu, residual, residual_affine, channels_last, wants_residual)
    of_activation = activation_gradients(z, affine, relu, dout, out, gate, None, channels_last)
    return or_empty(z, *of_activation, *of_gate)


def gate_gradients(
    dout: Tensor,
    out: Tensor | None,
    z: Tensor,
    affine: Any,
    relu: bool,
    residual: Tensor | None,
    residual_affine: Any,
    channels_last: bool,
    wants_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.affine_gate_bwd`, of tensors in any layout."""
    residual_affine = affine_of(*residual_affine)
    return dispatch.attention(z.dtype, z.device).affine_gate_bwd(
        dense(dout, channels_last),
        _dense(out, channels_last),
        dense(z, channels_last),
        affine_of(*affine),
        relu,
        None if residual_affine is None else _dense(residual, channels_last),
        residual_affine,
        channels_last,
        wants_residual,
    )


def activation_gradients(
    z: Tensor,
    affine: Any,
    relu: bool,
    dout: Tensor | None,
    out: Tensor | None,
    gate: Tensor | None,
    added: Tensor | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `reference.gated_affine_bwd`, of tensors in any layout."""
    return dispatch.attention(z.dtype, z.device).gated_affine_bwd(
        dense(z, channels_last),
        affine_of(*affine),
        relu,
        _dense(dout, channels_last),
        _dense(out, channels_last),
        _contiguous(gate),
        _contiguous(added),
        channels_last,
    )


def _fake_affine_mean(z, center, scale, shift, relu, channels_last):
    return z.new_empty((*z.shape[:2], 1, 1), dtype=checks.vector_dtype(z.dtype))


def _fake_affine_mean_bwd(dmean, z, center, scale, shift, relu, channels_last):
    return empty(z, z.shape, channels_last), *_fake_vectors(z, scale)


def _fake_affine_gate(
    z, center, scale, shift, relu, gate, residual, residual_center, residual_scale, residual_shift, channels_last
):
    return empty(z, z.shape, channels_last)


def _fake_affine_gate_bwd(
    dout,
    out,
    z,
    center,
    scale,
    shift,
    relu,
    gate,
    residual,
    residual_center,
    residual_scale,
    residual_shift,
    channels_last,
    wants_residual,
):
    dresidual = empty(z, z.shape, channels_last) if wants_residual else z.new_empty(0)
    vectors = _fake_vectors(z, scale), _fake_vectors(z, residual_scale)
    return empty(z, z.shape, channels_last), *vectors[0], torch.empty_like(gate), dresidual, *vectors[1]


def _fake_vectors(z: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    absent = scale is None
    return tuple(z.new_empty(0) if absent else vector_like(z, z.shape[1]) for _ in range(2))  # type: ignore[return-value]


# --- their derivatives ---


def _given(*vectors: Tensor | None) -> Any:
    return None if vectors[1] is None else vectors


class _AffineMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, center, scale, shift, relu, channels_last):
        ctx.flags = relu, channels_last
        ctx.save_for_backward(z, center, scale, shift)
        return MEAN.below_autograd(ctx, z, center, scale, shift, relu, channels_last)

    @staticmethod
    def backward(ctx, dmean):
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():

            def formula(z, *vectors):
                return reference.affine_mean(z, _given(*vectors), *ctx.flags)

            return *through_formula(formula, tensors, (dmean,), needed), None, None
        dz, dscale, dshift = MEAN_BWD(dmean, *tensors, *ctx.flags)
        gradients = (dz, None, dscale, dshift)
        return *(if_wanted(n, g) for n, g in zip(needed, gradients, strict=True)), None, None


class _AffineGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, center, scale, shift, relu, gate, *rest):
        out = GATE.below_autograd(ctx, z, center, scale, shift, relu, gate, *rest)
        residual, *residual_affine, ctx.channels_last = rest
        ctx.relu = relu
        kept = None if residual is None else out
        ctx.save_for_backward(kept, z, center, scale, shift, gate, residual, *residual_affine)
        return out

    @staticmethod
    def backward(ctx, dout):
        out, *tensors = ctx.saved_tensors
        needed = (*ctx.needs_input_grad[:4], *ctx.needs_input_grad[5:10])
        if torch.is_grad_enabled():

            def formula(z, center, scale, shift, gate, residual, *vectors):
                affines = _given(center, scale, shift), _given(*vectors)
                return reference.affine_gate(z, affines[0], ctx.relu, gate, residual, affines[1], ctx.channels_last)

            gradients = through_formula(formula, tensors, (dout,), needed)
        else:
            z, center, scale, shift, gate, *of_residual = tensors
            dz, dscale, dshift, dgate, dresidual, dresidual_scale, dresidual_shift = GATE_BWD(
                dout, out, z, center, scale, shift, ctx.relu, gate, *of_residual, ctx.channels_last, needed[5]
            )
            found = (dz, None, dscale, dshift, dgate, dresidual, None, dresidual_scale, dresidual_shift)
            gradients = [if_wanted(n, g) for n, g in zip(needed, found, strict=True)]
        return *gradients[:4], None, *gradients[4:], None


MEAN.register(_affine_mean, _fake_affine_mean, _AffineMean)
MEAN_BWD.register(_affine_mean_bwd, _fake_affine_mean_bwd)
GATE.register(_affine_gate, _fake_affine_gate, _AffineGate)
GATE_BWD.register(_affine_gate_bwd, _fake_affine_gate_bwd)
