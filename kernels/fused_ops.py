"""The operators under fused.py: schemas, what runs, what a compiler sees, and derivatives.

The backward of one that is differentiated is an operator again. Backward of backward is autograd's, through the formula
in plain PyTorch. None stands for an absent argument; an operator returns an empty tensor for an absent result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, composed, dispatch, reference
from .config import Affine
from .operators import Operator
from .ops import dense, dense_weight, empty, is_dense

_AFFINE = "Tensor? center, Tensor scale, Tensor shift"
_PROLOGUE = "Tensor? center, Tensor? scale, Tensor? shift"
_DIMS = "SymInt[2] stride, SymInt groups, bool channels_last"
CONV_STATS = Operator(
    "_conv_stats", f"(Tensor x, {_PROLOGUE}, Tensor weight, {_DIMS}, bool stats) -> (Tensor, Tensor, Tensor)"
)
CONV_STATS_BWD = Operator(
    "_conv_stats_bwd",
    f"(Tensor dz, Tensor? z, Tensor? mean, Tensor? dmean, Tensor? dvar, Tensor x, {_PROLOGUE}, Tensor weight, {_DIMS}, "
    "bool[2] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)
CONV_AFFINE = Operator(
    "_conv_affine",
    f"(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, bool relu, {_DIMS}) -> Tensor",
)
BN_AFFINE = Operator(
    "_bn_affine", "(Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps) -> (Tensor, Tensor)"
)
BN_AFFINE_BWD = Operator(
    "_bn_affine_bwd",
    "(Tensor dscale, Tensor dshift, Tensor var, Tensor? gamma, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
AFFINE_ADD_RELU = Operator(
    "_affine_add_relu",
    f"(Tensor z, {_AFFINE}, Tensor? residual, Tensor? residual_center, Tensor? residual_scale, Tensor? residual_shift, "
    "bool channels_last, bool keeps_result) -> Tensor",
)
AFFINE_ADD_RELU_BWD = Operator(
    "_affine_add_relu_bwd",
    f"(Tensor dout, Tensor? out, Tensor z, {_AFFINE}, Tensor? residual, Tensor? residual_center, "
    "Tensor? residual_scale, Tensor? residual_shift, bool channels_last, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
POOL = Operator("_affine_relu_max_pool", f"(Tensor z, {_AFFINE}, bool channels_last, bool taps) -> (Tensor, Tensor)")
POOL_BWD = Operator(
    "_affine_relu_max_pool_bwd",
    f"(Tensor dout, Tensor taps, Tensor z, {_AFFINE}, bool channels_last, bool[2] wanted) -> (Tensor, Tensor, Tensor)",
)
LAID_OUT = Operator("_laid_out", "(Tensor x, bool channels_last) -> Tensor")

FORMULA = composed.Composed(reference)


# --- the operators: what runs, what a compiler sees ---


def _or_empty(like: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """Operators return tensors only: an empty one stands for None."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _affine_of(center: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Affine | None:
    if scale is None or shift is None:
        return None
    return None if center is None else center.contiguous(), scale.contiguous(), shift.contiguous()


def _conv_stats(x, center, scale, shift, weight, stride, groups, channels_last, stats):
    stride = tuple(stride)
    launchers = dispatch.fused_launchers("fwd", x.shape, weight.shape, stride, groups, x.dtype, x.device, channels_last)
    z, mean, var = launchers.conv_stats_fwd(
        dense(x, channels_last),
        _affine_of(center, scale, shift),
        dense_weight(weight),
        stride,
        groups,
        channels_last,
        stats,
    )
    if stats:
        return z, mean, var
    empty = x.new_empty(0, dtype=checks.vector_dtype(x.dtype))
    return z, empty, torch.empty_like(empty)


def _conv_stats_bwd(dz, z, mean, dmean, dvar, x, center, scale, shift, weight, stride, groups, channels_last, wanted):
    stride = tuple(stride)
    launchers = dispatch.fused_launchers(
        "dgrad", x.shape, weight.shape, stride, groups, x.dtype, x.device, channels_last
    )
    grad_prologue = None
    if z is not None:
        grad_prologue = (dense(z, channels_last), mean.contiguous(), dmean.contiguous(), dvar.contiguous())
    results = launchers.conv_stats_bwd(
        dense(dz, channels_last),
        grad_prologue,
        dense(x, channels_last),
        _affine_of(center, scale, shift),
        dense_weight(weight),
        stride,
        groups,
        channels_last,
        tuple(wanted),
    )
    return _or_empty(x, *results)


def _conv_affine(x, weight, scale, shift, residual, relu, stride, groups, channels_last):
    stride = tuple(stride)
    launchers = dispatch.affine_launchers(
        "fwd", x.shape, weight.shape, stride, groups, x.dtype, x.device, channels_last
    )
    return launchers.conv_affine(
        dense(x, channels_last),
        dense_weight(weight),
        None if scale is None else scale.contiguous(),
        None if shift is None else shift.contiguous(),
        None if residual is None else dense(residual, channels_last),
        relu,
        stride,
        groups,
        channels_last,
    )


def _bn_affine(mean, var, gamma, beta, eps):
    gamma, beta = (None if t is None else t.contiguous() for t in (gamma, beta))
    return dispatch.vectors(mean.dtype, mean.device).bn_affine(mean.contiguous(), var.contiguous(), gamma, beta, eps)


def _bn_affine_bwd(dscale, dshift, var, gamma, eps):
    gamma = None if gamma is None else gamma.contiguous()
    results = dispatch.vectors(var.dtype, var.device).bn_affine_bwd(
        dscale.contiguous(), dshift.contiguous(), var.contiguous(), gamma, eps
    )
    return _or_empty(var, *results)


def _affine_add_relu(
    z,
    center,
    scale,
    shift,
    residual,
    residual_center,
    residual_scale,
    residual_shift,
    channels_last,
    keeps_result,
):
    return dispatch.elementwise(z.dtype, z.device).affine_add_relu(
        dense(z, channels_last),
        _affine_of(center, scale, shift),
        None if residual is None else dense(residual, channels_last),
        _affine_of(residual_center, residual_scale, residual_shift),
        channels_last,
    )


def _affine_add_relu_bwd(
    dout, out, z, center, scale, shift, residual, residual_center, residual_scale, residual_shift, channels_last, wanted
):
    launchers = dispatch.elementwise(z.dtype, z.device)
    z, affine = dense(z, channels_last), _affine_of(center, scale, shift)
    residual = None if residual is None else dense(residual, channels_last)
    residual_affine = _affine_of(residual_center, residual_scale, residual_shift)
    if out is not None:
        out = dense(out, channels_last)
    elif residual is not None:
        out = launchers.affine_add_relu(z, affine, residual, residual_affine, channels_last)
    results = launchers.affine_add_relu_bwd(
        dense(dout, channels_last),
        out,
        z,
        affine,
        None if residual_affine is None else residual,
        residual_affine,
        channels_last,
        tuple(wanted),
    )
    return _or_empty(z, *results)


def _affine_relu_max_pool(z, center, scale, shift, channels_last, taps):
    out, picked = dispatch.pooling(z.dtype, z.device).affine_relu_max_pool(
        dense(z, channels_last), _affine_of(center, scale, shift), channels_last, taps
    )
    return out, z.new_empty(0, dtype=torch.uint8) if picked is None else picked


def _affine_relu_max_pool_bwd(dout, taps, z, center, scale, shift, channels_last, wanted):
    results = dispatch.pooling(z.dtype, z.device).affine_relu_max_pool_bwd(
        dense(dout, channels_last),
        taps,
        dense(z, channels_last),
        _affine_of(center, scale, shift),
        channels_last,
        tuple(wanted),
    )
    return _or_empty(z, *results)


def _laid_out(x, channels_last):
    launchers = dispatch.elementwise(x.dtype, x.device)
    if x.device.type == "cpu" and hasattr(launchers, "laid_out") and is_dense(x, not channels_last):
        return launchers.laid_out(x, channels_last)
    return x.clone(memory_format=checks.memory_format(channels_last))


def _vector(like: Tensor, size: int) -> Tensor:
    return like.new_empty(size, dtype=checks.vector_dtype(like.dtype))


def _fake_conv_stats(x, center, scale, shift, weight, stride, groups, channels_last, stats):
    size = checks.output_size(x.shape[2:], stride)
    z = empty(x, (x.shape[0], weight.shape[0], *size), channels_last)
    channels = weight.shape[0] if stats else 0
    return z, _vector(x, channels), _vector(x, channels)


def _fake_conv_stats_bwd(
    dz, z, mean, dmean, dvar, x, center, scale, shift, weight, stride, groups, channels_last, wanted
):
    dx = empty(x, x.shape, channels_last) if wanted[0] else x.new_empty(0)
    dw = empty(weight, weight.shape, channels_last) if wanted[1] else x.new_empty(0)
    if wanted[0] and scale is not None:
        return dx, _vector(x, x.shape[1]), _vector(x, x.shape[1]), dw
    return dx, x.new_empty(0), x.new_empty(0), dw


def _fake_conv_affine(x, weight, scale, shift, residual, relu, stride, groups, channels_last):
    return empty(x, (x.shape[0], weight.shape[0], *checks.output_size(x.shape[2:], stride)), channels_last)


def _fake_bn_affine(mean, var, gamma, beta, eps):
    return torch.empty_like(mean), torch.empty_like(mean)


def _fake_bn_affine_bwd(dscale, dshift, var, gamma, eps):
    parameters = (var.new_empty(0),) * 2 if gamma is None else (torch.empty_like(gamma), torch.empty_like(gamma))
    return torch.empty_like(var), torch.empty_like(var), *parameters


def _fake_affine_add_relu(
    z,
    center,
    scale,
    shift,
    residual,
    residual_center,
    residual_scale,
    residual_shift,
    channels_last,
    keeps_result,
):
    return empty(z, z.shape, channels_last)


def _fake_affine_add_relu_bwd(
    dout, out, z, center, scale, shift, residual, residual_center, residual_scale, residual_shift, channels_last, wanted
):
    dz, dresidual = (empty(z, z.shape, channels_last) if w else z.new_empty(0) for w in wanted[:2])
    dscale, dshift = (_vector(z, z.shape[1]) if wanted[2] else z.new_empty(0) for _ in range(2))
    has_scale = wanted[2] and residual is not None and residual_scale is not None
    return dz, dresidual, dscale, dshift, _vector(z, z.shape[1]) if has_scale else z.new_empty(0)


def _fake_pool(z, center, scale, shift, channels_last, taps):
    shape = (*z.shape[:2], (z.shape[2] + 1) // 2, (z.shape[3] + 1) // 2)
    out = empty(z, shape, channels_last)
    return out, torch.empty_like(out, dtype=torch.uint8) if taps else z.new_empty(0, dtype=torch.uint8)


def _fake_pool_bwd(dout, taps, z, center, scale, shift, channels_last, wanted):
    dz = empty(z, z.shape, channels_last) if wanted[0] else z.new_empty(0)
    return dz, *(_vector(z, z.shape[1]) if wanted[1] else z.new_empty(0) for _ in range(2))


def _fake_laid_out(x, channels_last):
    return empty(x, x.shape, channels_last)


# --- their derivatives ---


def _through_formula(
    function: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients that can themselves be differentiated: autograd's, through the formula in plain PyTorch."""
    outputs = function(*tensors)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None and o.requires_grad]
    inputs = [t for t, n in zip(tensors, needed, strict=True) if n and t is not None]
    if not pairs:
        return [None] * len(tensors)
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True, allow_unused=True))
    return [next(found) if n else None for n in needed]


def _if_wanted(wanted: bool, gradient: Tensor) -> Tensor | None:
    return gradient if wanted else None


class _ConvStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, center, scale, shift, weight, *rest):
        z, mean, var = CONV_STATS.below_autograd(ctx, x, center, scale, shift, weight, *rest)
        *ctx.dims, ctx.stats = rest
        ctx.set_materialize_grads(False)
        if ctx.stats:
            ctx.save_for_backward(x, center, scale, shift, weight, z, mean)
        else:
            ctx.mark_non_differentiable(mean, var)
            ctx.save_for_backward(x, center, scale, shift, weight, None, None)
        return z, mean, var

    @staticmethod
    def backward(ctx, dz, dmean, dvar):
        x, center, scale, shift, weight, z, mean = ctx.saved_tensors
        needed = ctx.needs_input_grad[:5]
        unneeded = (None,) * (len(ctx.dims) + 1)
        if torch.is_grad_enabled():
            stride, groups, channels_last = ctx.dims

            def formula(x, center, scale, shift, weight):
                prologue = None if scale is None else (center, scale, shift)
                return FORMULA.conv_stats_fwd(x, prologue, weight, stride, groups, channels_last, ctx.stats)

            tensors = (x, center, scale, shift, weight)
            return *_through_formula(formula, tensors, (dz, dmean, dvar), needed), *unneeded
        if dmean is None and dvar is None:
            z = mean = None
            if dz is None:
                return (None,) * 5 + unneeded
        else:
            dz = torch.zeros_like(z) if dz is None else dz
            dmean, dvar = (torch.zeros_like(mean) if d is None else d for d in (dmean, dvar))
        wants_dx, wants_dw = needed[0] or needed[2] or needed[3], needed[4]
        dx, dscale, dshift, dw = CONV_STATS_BWD(
            dz, z, mean, dmean, dvar, x, center, scale, shift, weight, *ctx.dims, (wants_dx, wants_dw)
        )
        return (
            _if_wanted(needed[0], dx),
            None,
            _if_wanted(needed[2], dscale),
            _if_wanted(needed[3], dshift),
            _if_wanted(wants_dw, dw),
            *unneeded,
        )


def bn_affine_formula(mean, var, gamma, beta, eps):
    """What `BN_AFFINE` computes, with the mean's gradient by way of the shift."""
    scale, shift = reference.bn_affine(mean.detach(), var, gamma, beta, eps)
    return scale, shift - (mean - mean.detach()) * scale


class _BnAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean, var, gamma, beta, eps):
        ctx.eps = eps
        ctx.save_for_backward(mean, var, gamma, beta)
        return BN_AFFINE.below_autograd(ctx, mean, var, gamma, beta, eps)

    @staticmethod
    def backward(ctx, dscale, dshift):
        tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():

            def formula(mean, var, gamma, beta):
                return bn_affine_formula(mean, var, gamma, beta, ctx.eps)

            return *_through_formula(formula, tensors, (dscale, dshift), needed), None
        _, var, gamma, beta = tensors
        dmean, dvar, dgamma, dbeta = BN_AFFINE_BWD(dscale, dshift, var, gamma, ctx.eps)
        if needed[3] and gamma is None:
            dbeta = dshift.to(beta.dtype)
        gradients = (dmean, dvar, dgamma, dbeta)
        return *(_if_wanted(n, g) for n, g in zip(needed, gradients, strict=True)), None


class _AffineAddRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        out = AFFINE_ADD_RELU.below_autograd(ctx, *args)
        z, center, scale, shift, residual, residual_center, residual_scale, residual_shift, *rest = args
        ctx.channels_last, keeps_result = rest
        ctx.has_residual = residual is not None
        # Whose gradient, if it is a plain one, is that of the sum.
        kept = residual if residual_scale is not None or not keeps_result else None
        out_kept = out if keeps_result else None
        ctx.save_for_backward(out_kept, z, center, scale, shift, kept, residual_center, residual_scale, residual_shift)
        return out

    @staticmethod
    def backward(ctx, dout):
        out, z, center, scale, shift, residual, residual_center, residual_scale, residual_shift = ctx.saved_tensors
        needed = ctx.needs_input_grad[:8]
        if torch.is_grad_enabled():
            return *_add_relu_through_formula(ctx, dout, needed), None, None
        wants_vectors = any(needed[i] for i in (2, 3, 6, 7))
        dz, dresidual, dscale, dshift, dresidual_scale = AFFINE_ADD_RELU_BWD(
            dout,
            out,
            z,
            center,
            scale,
            shift,
            residual,
            residual_center,
            residual_scale,
            residual_shift,
            ctx.channels_last,
            (needed[0], needed[4], wants_vectors),
        )
        # Two gradients may not be one tensor.
        dresidual_shift = dshift.clone() if needed[7] else None
        gradients = (dz, None, dscale, dshift, dresidual, None, dresidual_scale, dresidual_shift)
        return *(_if_wanted(n, g) for n, g in zip(needed, gradients, strict=True)), None, None


def _add_relu_through_formula(ctx, dout, needed):
    """Differentiable gradients; where a plain residual was not kept, only the ReLU's mask depends on it."""
    out, *tensors = ctx.saved_tensors
    z, center, scale, shift, residual, residual_center, residual_scale, residual_shift = tensors
    if out is None:
        with torch.no_grad():
            out = AFFINE_ADD_RELU(*tensors, ctx.channels_last, True)
    mask = (out > 0) | out.isnan()

    def formula(z, center, scale, shift, residual, residual_center, residual_scale, residual_shift):
        other = None if residual_scale is None else (residual_center, residual_scale, residual_shift)
        total = reference.affine_add(z, (center, scale, shift), residual, other, ctx.channels_last)
        return total.masked_fill(~mask, 0)

    if ctx.has_residual and residual is None:
        residual = torch.zeros_like(z, requires_grad=needed[4])
    tensors = (z, center, scale, shift, residual, residual_center, residual_scale, residual_shift)
    return _through_formula(formula, tensors, (dout,), needed)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, center, scale, shift, channels_last, taps):
        out, picked = POOL.below_autograd(ctx, z, center, scale, shift, channels_last, taps)
        ctx.channels_last = channels_last
        ctx.mark_non_differentiable(picked)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, center, scale, shift, picked)
        return out, picked

    @staticmethod
    def backward(ctx, dout, _):
        z, center, scale, shift, picked = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        if dout is None:
            return (None,) * 6
        if torch.is_grad_enabled():

            def formula(z, center, scale, shift):
                return reference.affine_relu_max_pool(z, (center, scale, shift), ctx.channels_last, False)[0]

            return *_through_formula(formula, (z, center, scale, shift), (dout,), needed), None, None
        wanted = (needed[0], needed[2] or needed[3])
        dz, dscale, dshift = POOL_BWD(dout, picked, z, center, scale, shift, ctx.channels_last, wanted)
        gradients = (dz, None, dscale, dshift)
        return *(_if_wanted(n, g) for n, g in zip(needed, gradients, strict=True)), None, None


class _LaidOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, channels_last):
        return LAID_OUT.below_autograd(ctx, x, channels_last)

    @staticmethod
    def backward(ctx, gradient):  # in whatever layout it comes, as that of a copy in PyTorch
        return gradient, None


CONV_STATS.register(_conv_stats, _fake_conv_stats, _ConvStats)
CONV_STATS_BWD.register(_conv_stats_bwd, _fake_conv_stats_bwd)
CONV_AFFINE.register(_conv_affine, _fake_conv_affine)
BN_AFFINE.register(_bn_affine, _fake_bn_affine, _BnAffine)
BN_AFFINE_BWD.register(_bn_affine_bwd, _fake_bn_affine_bwd)
AFFINE_ADD_RELU.register(_affine_add_relu, _fake_affine_add_relu, _AffineAddRelu)
AFFINE_ADD_RELU_BWD.register(_affine_add_relu_bwd, _fake_affine_add_relu_bwd)
POOL.register(_affine_relu_max_pool, _fake_pool, _Pool)
POOL_BWD.register(_affine_relu_max_pool_bwd, _fake_pool_bwd)
LAID_OUT.register(_laid_out, _fake_laid_out, _LaidOut)
