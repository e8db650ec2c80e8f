"""The operators under fused.py but for convolutions: schemas, what runs, what a compiler sees, and derivatives.

The backward of one that is differentiated is an operator again. Backward of backward is autograd's, through the formula
in plain PyTorch. None stands for an absent argument; an operator returns an empty tensor for an absent result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .config import Affine
from .operators import Operator, if_wanted, or_empty, through_formula
from .ops import dense, empty, is_dense

_AFFINE = "Tensor? center, Tensor scale, Tensor shift"
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


# --- the operators: what runs, what a compiler sees ---


def affine_of(center: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Affine | None:
    """The affine of an operator's three arguments, contiguous; None if there is none."""
    if scale is None or shift is None:
        return None
    return None if center is None else center.contiguous(), scale.contiguous(), shift.contiguous()


def compute_bn_affine(mean, var, gamma, beta, eps):
    """Scale and shift, by what serves such vectors."""
    gamma, beta = (None if t is None else t.contiguous() for t in (gamma, beta))
    return dispatch.vectors(mean.dtype, mean.device).bn_affine(mean.contiguous(), var.contiguous(), gamma, beta, eps)


def _bn_affine_bwd(dscale, dshift, var, gamma, eps):
    return or_empty(var, *compute_bn_affine_bwd(dscale.contiguous(), dshift.contiguous(), var.contiguous(), gamma, eps))


def compute_bn_affine_bwd(dscale, dshift, var, gamma, eps):
    """Gradients of mean, var, gamma and beta, the last two None without gamma.

    ``dscale``: also the partial sums that came with a gradient of an affine; ``dshift`` is None then.
    """
    gamma = None if gamma is None else gamma.contiguous()
    return dispatch.vectors(var.dtype, var.device).bn_affine_bwd(dscale, dshift, var, gamma, eps)


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
        affine_of(center, scale, shift),
        None if residual is None else dense(residual, channels_last),
        affine_of(residual_center, residual_scale, residual_shift),
        channels_last,
    )


def _affine_add_relu_bwd(
    dout, out, z, center, scale, shift, residual, residual_center, residual_scale, residual_shift, channels_last, wanted
):
    affines = (center, scale, shift), (residual_center, residual_scale, residual_shift)
    return or_empty(z, *affine_add_relu_gradients(dout, out, z, residual, *affines, channels_last, wanted))


def affine_add_relu_gradients(
    dout, out, z, residual, affine, residual_affine, channels_last, wanted, deferred=False, unscaled=False
):
    """What `AFFINE_ADD_RELU_BWD` returns, None for what is not wanted.

    ``deferred``: whether both scales' gradients may come as partial sums, as of `fused_conv_ops.conv_stats_gradients`.
    ``unscaled``: as of `batch_norm.affine_add_relu_bwd`, for launchers that have it.
    """
    launchers = dispatch.elementwise(z.dtype, z.device)
    z, affine, residual_affine = dense(z, channels_last), affine_of(*affine), affine_of(*residual_affine)
    residual = None if residual is None else dense(residual, channels_last)
    if out is not None:
        out = dense(out, channels_last)
    elif residual is not None:
        out = launchers.affine_add_relu(z, affine, residual, residual_affine, channels_last)
    also = {"deferred": True} if deferred and getattr(launchers, "merges", False) else {}
    if unscaled:
        also["unscaled"] = True
    return launchers.affine_add_relu_bwd(
        dense(dout, channels_last),
        out,
        z,
        affine,
        None if residual_affine is None else residual,
        residual_affine,
        channels_last,
        tuple(wanted),
        **also,
    )


def _affine_relu_max_pool(z, center, scale, shift, channels_last, taps):
    out, picked = dispatch.pooling(z.dtype, z.device).affine_relu_max_pool(
        dense(z, channels_last), affine_of(center, scale, shift), channels_last, taps
    )
    return out, z.new_empty(0, dtype=torch.uint8) if picked is None else picked


def _affine_relu_max_pool_bwd(dout, taps, z, center, scale, shift, channels_last, wanted):
    results = dispatch.pooling(z.dtype, z.device).affine_relu_max_pool_bwd(
        dense(dout, channels_last),
        taps,
        dense(z, channels_last),
        affine_of(center, scale, shift),
        channels_last,
        tuple(wanted),
    )
    return or_empty(z, *results)


def _laid_out(x, channels_last):
    launchers = dispatch.elementwise(x.dtype, x.device)
    if x.device.type == "cpu" and hasattr(launchers, "laid_out") and is_dense(x, not channels_last):
        return launchers.laid_out(x, channels_last)
    return x.clone(memory_format=checks.memory_format(channels_last))


def multiplied(gradient: Tensor, scale: Tensor) -> Tensor:
    """A gradient times a vector over its channels, of the gradient's dtype."""
    return (gradient * scale[:, None, None]).to(gradient.dtype)


def vector_like(like: Tensor, size: int) -> Tensor:
    """A vector over the channels of ``like``, or of as many others."""
    return like.new_empty(size, dtype=checks.vector_dtype(like.dtype))


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
    dscale, dshift = (vector_like(z, z.shape[1]) if wanted[2] else z.new_empty(0) for _ in range(2))
    has_scale = wanted[2] and residual is not None and residual_scale is not None
    return dz, dresidual, dscale, dshift, vector_like(z, z.shape[1]) if has_scale else z.new_empty(0)


def _fake_pool(z, center, scale, shift, channels_last, taps):
    shape = (*z.shape[:2], (z.shape[2] + 1) // 2, (z.shape[3] + 1) // 2)
    out = empty(z, shape, channels_last)
    return out, torch.empty_like(out, dtype=torch.uint8) if taps else z.new_empty(0, dtype=torch.uint8)


def _fake_pool_bwd(dout, taps, z, center, scale, shift, channels_last, wanted):
    dz = empty(z, z.shape, channels_last) if wanted[0] else z.new_empty(0)
    return dz, *(vector_like(z, z.shape[1]) if wanted[1] else z.new_empty(0) for _ in range(2))


def _fake_laid_out(x, channels_last):
    return empty(x, x.shape, channels_last)


# --- their derivatives ---


def bn_affine_formula(mean, var, gamma, beta, eps):
    """What `BN_AFFINE` computes, with the mean's gradient by way of the shift."""
    scale, shift = reference.bn_affine(mean.detach(), var, gamma, beta, eps)
    return scale, shift - (mean - mean.detach()) * scale


def bn_affine_gradients(dscale, dshift, var, gamma, beta, eps, needed):
    """Of mean, var, gamma and beta; ``needed``: whether those of gamma and beta are."""
    dmean, dvar, dgamma, dbeta = BN_AFFINE_BWD(dscale, dshift, var, gamma, eps)
    if needed[1] and gamma is None:
        dbeta = dshift.to(beta.dtype)
    return dmean, dvar, if_wanted(needed[0], dgamma), if_wanted(needed[1], dbeta)


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

            return *through_formula(formula, tensors, (dscale, dshift), needed), None
        _, var, gamma, beta = tensors
        dmean, dvar, *parameters = bn_affine_gradients(dscale, dshift, var, gamma, beta, ctx.eps, needed[2:])
        return if_wanted(needed[0], dmean), if_wanted(needed[1], dvar), *parameters, None


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
        return *(if_wanted(n, g) for n, g in zip(needed, gradients, strict=True)), None, None


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
    return through_formula(formula, tensors, (dout,), needed)


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

            return *through_formula(formula, (z, center, scale, shift), (dout,), needed), None, None
        wanted = (needed[0], needed[2] or needed[3])
        dz, dscale, dshift = POOL_BWD(dout, picked, z, center, scale, shift, ctx.channels_last, wanted)
        gradients = (dz, None, dscale, dshift)
        return *(if_wanted(n, g) for n, g in zip(needed, gradients, strict=True)), None, None


class _LaidOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, channels_last):
        return LAID_OUT.below_autograd(ctx, x, channels_last)

    @staticmethod
    def backward(ctx, gradient):  # in whatever layout it comes, as that of a copy in PyTorch
        return gradient, None


BN_AFFINE.register(compute_bn_affine, _fake_bn_affine, _BnAffine)
BN_AFFINE_BWD.register(_bn_affine_bwd, _fake_bn_affine_bwd)
AFFINE_ADD_RELU.register(_affine_add_relu, _fake_affine_add_relu, _AffineAddRelu)
AFFINE_ADD_RELU_BWD.register(_affine_add_relu_bwd, _fake_affine_add_relu_bwd)
POOL.register(_affine_relu_max_pool, _fake_pool, _Pool)
POOL_BWD.register(_affine_relu_max_pool_bwd, _fake_pool_bwd)
LAID_OUT.register(_laid_out, _fake_laid_out, _LaidOut)
