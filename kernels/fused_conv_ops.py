"""The convolutions under fused.py: schemas, what runs, what a compiler sees, and derivatives; as in fused_ops.py."""

from __future__ import annotations

import torch

from . import checks, composed, dispatch, reference
from .config import Norm
from .fused_ops import affine_of, bn_affine_formula, bn_affine_gradients, compute_bn_affine, multiplied, vector_like
from .operators import DIMS, Operator, if_wanted, or_empty, through_formula
from .ops import dense, dense_weight, empty, is_dense

_PROLOGUE = "Tensor? center, Tensor? scale, Tensor? shift"
CONV_STATS = Operator(
    "_conv_stats", f"(Tensor x, {_PROLOGUE}, Tensor weight, {DIMS}, bool stats) -> (Tensor, Tensor, Tensor)"
)
CONV_NORM = Operator(
    "_conv_norm",
    f"(Tensor x, {_PROLOGUE}, Tensor weight, Tensor? gamma, Tensor? beta, float eps, {DIMS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
CONV_STATS_BWD = Operator(
    "_conv_stats_bwd",
    f"(Tensor dz, Tensor? z, Tensor? mean, Tensor? dmean, Tensor? dvar, Tensor x, {_PROLOGUE}, Tensor weight, {DIMS}, "
    "bool[2] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)
CONV_AFFINE = Operator(
    "_conv_affine",
    f"(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, bool relu, {DIMS}) -> Tensor",
)

_FORMULA = composed.Composed(reference)


# --- what runs ---


def _launchers(pass_, x, weight, stride, groups, channels_last):
    return dispatch.fused_launchers(pass_, x.shape, weight.shape, stride, groups, x.dtype, x.device, channels_last)


def cast_weight(weight, x, *dims):
    """A weight of any dtype as the convolutions of ``x`` below take it: in the dtype of ``x``, or as it is."""
    return weight if weight.dtype == x.dtype else _cast(_launchers("fwd", x, weight, *dims), weight, x)


def _cast(launchers, weight, x):
    takes_weight = getattr(launchers, "takes_weight", None)
    return weight if takes_weight is not None and takes_weight(weight, x) else weight.to(x.dtype)


def _served(pass_, x, affine, weight, stride, groups, channels_last):
    """What serves a convolution with statistics, and the arguments that its passes share."""
    stride = tuple(stride)
    launchers = _launchers(pass_, x, weight, stride, groups, channels_last)
    if weight.dtype != x.dtype:
        weight = _cast(launchers, weight, x)
    operands = dense(x, channels_last), affine_of(*affine), dense_weight(weight)
    return launchers, (*operands, stride, groups, channels_last)


def _conv_stats(x, center, scale, shift, weight, stride, groups, channels_last, stats):
    launchers, arguments = _served("fwd", x, (center, scale, shift), weight, stride, groups, channels_last)
    z, mean, var = launchers.conv_stats_fwd(*arguments, stats)
    if stats:
        return z, mean, var
    empty = x.new_empty(0, dtype=checks.vector_dtype(x.dtype))
    return z, empty, torch.empty_like(empty)


def _conv_norm(x, center, scale, shift, weight, gamma, beta, eps, stride, groups, channels_last):
    results, _ = compute_conv_norm(
        x, (center, scale, shift), weight, Norm(gamma, beta, eps), stride, groups, channels_last
    )
    return results


def compute_conv_norm(x, affine, weight, norm, stride, groups, channels_last):
    """What `CONV_NORM` returns; and whether the running statistics of ``norm`` have been updated."""
    launchers, arguments = _served("fwd", x, affine, weight, stride, groups, channels_last)
    if getattr(launchers, "merges", False):
        gamma, beta = (None if vector is None else vector.contiguous() for vector in norm[:2])
        return launchers.conv_norm_fwd(*arguments, norm._replace(gamma=gamma, beta=beta)), norm.running is not None
    z, mean, var = launchers.conv_stats_fwd(*arguments, True)
    return (z, mean, var, *compute_bn_affine(mean, var, *norm[:3])), False


def _conv_stats_bwd(dz, z, mean, dmean, dvar, x, center, scale, shift, weight, stride, groups, channels_last, wanted):
    source = None if z is None else (z, mean, dmean, dvar)
    dims = stride, groups, channels_last
    return or_empty(x, *conv_stats_gradients(dz, source, x, (center, scale, shift), weight, *dims, wanted))


def conv_stats_gradients(
    dz,
    source,
    x,
    affine,
    weight,
    stride,
    groups,
    channels_last,
    wanted,
    *,
    deferred=False,
    grad_scale=None,
    onto=None,
):
    """What `CONV_STATS_BWD` returns; ``source``: z, its mean, dmean and dvar, or None.

    ``weight`` may be what `cast_weight` returns, and has a gradient of its own dtype then; its layout is that of
    `checks.gradient_channels_last`. ``deferred``: whether dscale may come as partial sums of dscale and dshift, which
    `fused_ops.compute_bn_affine_bwd` takes, with dshift None, and the weight's gradient as float32. ``grad_scale``:
    what ``dz`` is yet to be multiplied by, a vector over channels, or None; there is a ``source`` then. ``onto``: a
    tensor like x that x's gradient is added to and returned as, or None.
    """
    launchers, arguments = _served("dgrad", x, affine, weight, stride, groups, channels_last)
    if source is not None:
        z, *vectors = source
        source = (dense(z, channels_last), *(vector.contiguous() for vector in vectors))
    also = {"deferred": True} if deferred and getattr(launchers, "merges", False) else {}
    dz = dense(dz, channels_last)
    if grad_scale is not None:
        if getattr(launchers, "scales", False):
            also["grad_scale"] = grad_scale
        else:
            dz = multiplied(dz, grad_scale)
    if onto is not None and channels_last and getattr(launchers, "adds", False) and is_dense(onto, True):
        also["onto"] = onto
    dx, *dvectors, dw = launchers.conv_stats_bwd(dz, source, *arguments, tuple(wanted), **also)
    if onto is not None and dx is not None and dx is not onto:
        dx = onto.add_(dx)
    if dw is not None:
        dw = dense(dw, checks.gradient_channels_last(arguments[2], channels_last))
    return dx, *dvectors, dw


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


# --- what a compiler sees ---


def _fake_conv_stats(x, center, scale, shift, weight, stride, groups, channels_last, stats):
    size = checks.output_size(x.shape[2:], stride)
    z = empty(x, (x.shape[0], weight.shape[0], *size), channels_last)
    channels = weight.shape[0] if stats else 0
    return z, vector_like(x, channels), vector_like(x, channels)


def _fake_conv_norm(x, center, scale, shift, weight, gamma, beta, eps, stride, groups, channels_last):
    results = _fake_conv_stats(x, center, scale, shift, weight, stride, groups, channels_last, True)
    return *results, *(vector_like(x, weight.shape[0]) for _ in range(2))


def _fake_conv_stats_bwd(
    dz, z, mean, dmean, dvar, x, center, scale, shift, weight, stride, groups, channels_last, wanted
):
    dx = empty(x, x.shape, channels_last) if wanted[0] else x.new_empty(0)
    of_dw = checks.gradient_channels_last(dense_weight(weight), channels_last)
    dw = empty(weight, weight.shape, of_dw) if wanted[1] else x.new_empty(0)
    if wanted[0] and scale is not None:
        return dx, vector_like(x, x.shape[1]), vector_like(x, x.shape[1]), dw
    return dx, x.new_empty(0), x.new_empty(0), dw


def _fake_conv_affine(x, weight, scale, shift, residual, relu, stride, groups, channels_last):
    return empty(x, (x.shape[0], weight.shape[0], *checks.output_size(x.shape[2:], stride)), channels_last)


# --- derivatives ---


def conv_stats_formula(x, center, scale, shift, weight, *rest):
    """What `CONV_STATS` computes, in plain PyTorch."""
    prologue = None if scale is None else (center, scale, shift)
    return _FORMULA.conv_stats_fwd(x, prologue, weight, *rest)


def _or_zeros(like, *gradients):
    return tuple(torch.zeros_like(like) if gradient is None else gradient for gradient in gradients)


def _gradients(ctx, dz, dmean, dvar, z, mean, x, center, scale, shift, weight):
    """Of x, center, scale, shift and weight, from those of z and its statistics; z and mean None: these have none."""
    needed = ctx.needs_input_grad[:5]
    wants_dx, wants_dw = needed[0] or needed[2] or needed[3], needed[4]
    dx, dscale, dshift, dw = CONV_STATS_BWD(
        dz, z, mean, dmean, dvar, x, center, scale, shift, weight, *ctx.dims, (wants_dx, wants_dw)
    )
    return (
        if_wanted(needed[0], dx),
        None,
        if_wanted(needed[2], dscale),
        if_wanted(needed[3], dshift),
        if_wanted(wants_dw, dw),
    )


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
        *operands, z, mean = ctx.saved_tensors
        unneeded = (None,) * (len(ctx.dims) + 1)
        if torch.is_grad_enabled():

            def formula(*operands):
                return conv_stats_formula(*operands, *ctx.dims, ctx.stats)

            return *through_formula(formula, operands, (dz, dmean, dvar), ctx.needs_input_grad[:5]), *unneeded
        if dmean is None and dvar is None:
            z = mean = None
            if dz is None:
                return (None,) * 5 + unneeded
        else:
            (dz,) = _or_zeros(z, dz)
            dmean, dvar = _or_zeros(mean, dmean, dvar)
        return *_gradients(ctx, dz, dmean, dvar, z, mean, *operands), *unneeded


class _ConvNorm(torch.autograd.Function):
    """`_ConvStats` and `_BnAffine`; the statistics are results that nothing depends on but through the affine."""

    @staticmethod
    def forward(ctx, x, center, scale, shift, weight, gamma, beta, eps, *dims):
        results = CONV_NORM.below_autograd(ctx, x, center, scale, shift, weight, gamma, beta, eps, *dims)
        z, mean, var, _, _ = results
        ctx.eps, ctx.dims = eps, dims
        ctx.set_materialize_grads(False)
        if any(ctx.needs_input_grad[:5]):
            ctx.mark_non_differentiable(mean, var)
            ctx.save_for_backward(x, center, scale, shift, weight, gamma, beta, z, mean, var)
        else:  # a convolution that is not trained, of an input that needs no gradient
            ctx.mark_non_differentiable(z, mean, var)
            ctx.save_for_backward(None, None, None, None, None, gamma, beta, None, mean, var)
        return results

    @staticmethod
    def backward(ctx, dz, _mean, _var, dnew_scale, dnew_shift):
        *operands, gamma, beta, z, mean, var = ctx.saved_tensors
        needed = ctx.needs_input_grad[:7]
        unneeded = (None,) * (1 + len(ctx.dims))
        if torch.is_grad_enabled():

            def formula(*tensors):
                *operands, gamma, beta = tensors
                results = (None, mean, var)
                if z is not None:
                    results = conv_stats_formula(*operands, *ctx.dims, True)
                return results[0], *bn_affine_formula(*results[1:], gamma, beta, ctx.eps)

            tensors = (*operands, gamma, beta)
            return *through_formula(formula, tensors, (dz, dnew_scale, dnew_shift), needed), *unneeded
        if dnew_scale is None and dnew_shift is None:
            if dz is None:
                return (None,) * 7 + unneeded
            return *_gradients(ctx, dz, None, None, None, None, *operands), None, None, *unneeded
        dnew_scale, dnew_shift = _or_zeros(mean, dnew_scale, dnew_shift)
        dmean, dvar, dgamma, dbeta = bn_affine_gradients(dnew_scale, dnew_shift, var, gamma, beta, ctx.eps, needed[5:])
        if z is None:
            return *(None,) * 5, dgamma, dbeta, *unneeded
        (dz,) = _or_zeros(z, dz)
        return *_gradients(ctx, dz, dmean, dvar, z, mean, *operands), dgamma, dbeta, *unneeded


CONV_STATS.register(_conv_stats, _fake_conv_stats, _ConvStats)
CONV_NORM.register(_conv_norm, _fake_conv_norm, _ConvNorm)
CONV_STATS_BWD.register(_conv_stats_bwd, _fake_conv_stats_bwd)
CONV_AFFINE.register(_conv_affine, _fake_conv_affine)
