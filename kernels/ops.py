"""The public functions, and the operators under them.

A 3x3 convolution y = conv(x, w) is linear in x and in w, so with <,> the sum over all elements the three passes are the
derivatives of one trilinear form T(x, w, g) = <conv(x, w), g>:

    fwd   = dT/dg = conv(x, w)          dgrad = dT/dx          wgrad = dT/dw

Each is linear in its two arguments, and its derivatives are the other two. So there are three operators, each with one
`torch.autograd.Function` registered as its Autograd kernel, and every order of differentiation, reverse and forward,
stays inside them.

A compiled or exported graph holds one node per pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import calls, checks, dispatch, reference
from .operators import DIMS, Operator

_FWD = Operator("_grouped_conv2d_fwd", f"(Tensor x, Tensor weight, Tensor? bias, {DIMS}) -> Tensor")
_DGRAD = Operator("_grouped_conv2d_dgrad", f"(Tensor grad, Tensor weight, SymInt[2] input_size, {DIMS}) -> Tensor")
_WGRAD = Operator("_grouped_conv2d_wgrad", f"(Tensor grad, Tensor x, {DIMS}) -> Tensor")


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution with the semantics of `torch.nn.functional.conv2d`, served by our kernels where they apply.

    Ours: 3x3 kernels with padding 1, dilation 1 and stride 1 or 2 per axis, two groups or more, any number of channels
    per group, in float32, float16 and bfloat16 on CUDA and CPU (C_out/groups and C_in/groups may differ). Everything
    else is handed to ``F.conv2d``; dense convolutions (groups 1) too, unless a backend is forced. `explain` tells which
    backend serves a call, and why.

    Differentiable any number of times in ``x``, ``weight`` and ``bias``, in reverse and in forward mode; inside
    torch.func transforms through ``F.conv2d``. Accumulates in float32 and rounds once. Deterministic. Under
    autocast the arguments are cast as ``F.conv2d`` casts them.

    Args:
        x: Input, (N, C_in, H, W) or (C_in, H, W), in any memory layout.
        weight: Filters, (C_out, C_in / groups, kernel_h, kernel_w), of x's dtype and device.
        bias: One value per output channel, (C_out,), or None.
        stride: One or two integers >= 1, in pixels.
        padding: One or two integers >= 0, in pixels, or ``"same"`` or ``"valid"``. The default is 1, not 0.
        dilation: One or two integers >= 1.
        groups: Number of groups; divides C_in and C_out.

    Returns:
        (N, C_out, H_out, W_out), or (C_out, H_out, W_out) for a 3-D input, with H_out = floor((H + 2 * padding -
        dilation * (kernel_h - 1) - 1) / stride) + 1. channels_last where ``F.conv2d`` returns channels_last: if x or
        weight is (on GPUs not in float64).

    Raises:
        RuntimeError, TypeError, ValueError: Whatever ``F.conv2d`` raises for the same arguments, with what was
            expected, what came and what to do in front of PyTorch's words.
        BackendError: If a forced backend cannot serve the call.

    Source: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", 2017, figure 3(c).
    """
    key = calls.key_of("fwd", (x, weight, bias), (stride, padding, dilation, groups))
    if (y := calls.serve(key, x, weight, bias)) is not None:
        return y
    x, weight, bias = checks.autocast(x, weight, bias)
    if message := checks.invalid_conv2d(x, weight, bias, stride, padding, dilation, groups):
        return _refused_by_pytorch(message, x, weight, bias, stride, padding, dilation, groups)
    strides = checks.pair(stride)
    if _left_to_pytorch("grouped_conv2d", x, weight, strides, padding, checks.pair(dilation), groups):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if x.dim() == 3:
        x = x.unsqueeze(0)
        return _FWD(x, weight, bias, strides, groups, checks.output_channels_last(x, weight)).squeeze(0)
    dims = (strides, groups, checks.output_channels_last(x, weight))
    _remember(key, "fwd", x.shape, weight.shape, (x, weight, bias), dims)
    return _FWD(x, weight, bias, *dims)


def grouped_conv2d_dgrad(
    grad: Tensor, weight: Tensor, input_size: Sequence[int], stride: int | Sequence[int] = 1, groups: int = 1
) -> Tensor:
    """Gradient of the input of a 3x3, padding 1, dilation 1 `grouped_conv2d`, from the gradient of its output.

    The counterpart of `torch.nn.grad.conv2d_input`; what backward calls. Differentiable in both tensors.

    Args:
        grad: Gradient of the output, (N, C_out, H_out, W_out), any layout.
        weight: Filters, (C_out, C_in / groups, 3, 3), of grad's dtype and device.
        input_size: (H, W) of the convolution's input.
        stride: One or two integers, each 1 or 2.
        groups: Number of groups.

    Returns:
        (N, C_in, H, W), channels_last if grad or weight is.

    Raises:
        ValueError: If shapes, dtypes, devices or sizes do not fit together.
        BackendError: If a forced backend cannot serve the call.
    """
    name = "grouped_conv2d_dgrad"
    key = calls.key_of("dgrad", (grad, weight), (input_size, stride, groups))
    if (dx := calls.serve(key, grad, weight)) is not None:
        return dx
    strides = _check_stride_and_groups(name, stride, groups)
    size = checks.pair(input_size)
    if len(size) != 2 or not all(checks.is_integer(s) and s >= 0 for s in size):
        raise ValueError(f"{name}: expected input_size (H, W), two integers >= 0, got {input_size!r}")
    if grad.dim() != 4 or weight.dim() != 4:
        shapes = f"{tuple(grad.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"{name}: expected grad and weight of 4 dimensions, got {shapes}")
    x = grad.new_empty(1).expand(grad.shape[0], weight.shape[1] * groups, *size)
    _check_backward(name, grad, x, weight, strides, groups)
    dims = (strides, groups, checks.output_channels_last(grad, weight))
    if _left_to_pytorch(name, x, weight, strides, 1, (1, 1), groups):
        return reference.dgrad(grad, weight, size, *dims)
    _remember(key, "dgrad", x.shape, weight.shape, (grad, weight), dims, size)
    return _DGRAD(grad, weight, size, *dims)


def grouped_conv2d_wgrad(grad: Tensor, x: Tensor, stride: int | Sequence[int] = 1, groups: int = 1) -> Tensor:
    """Gradient of the weight of a 3x3, padding 1, dilation 1 `grouped_conv2d`, from the gradient of its output.

    The counterpart of `torch.nn.grad.conv2d_weight`; what backward calls. Differentiable in both tensors.

    Args:
        grad: Gradient of the output, (N, C_out, H_out, W_out), any layout.
        x: Input of the convolution, (N, C_in, H, W), of grad's dtype and device, any layout.
        stride: One or two integers, each 1 or 2.
        groups: Number of groups.

    Returns:
        (C_out, C_in / groups, 3, 3), channels_last if grad or x is.

    Raises:
        ValueError: If shapes, dtypes, devices or sizes do not fit together.
        BackendError: If a forced backend cannot serve the call.
    """
    name = "grouped_conv2d_wgrad"
    key = calls.key_of("wgrad", (grad, x), (stride, groups))
    if (dw := calls.serve(key, grad, x)) is not None:
        return dw
    strides = _check_stride_and_groups(name, stride, groups)
    if grad.dim() != 4 or x.dim() != 4:
        raise ValueError(f"{name}: expected grad and x of 4 dimensions, got {tuple(grad.shape)} and {tuple(x.shape)}")
    weight = x.new_empty(1).expand(grad.shape[1], x.shape[1] // groups, 3, 3)
    _check_backward(name, grad, x, weight, strides, groups)
    dims = (strides, groups, checks.output_channels_last(grad, x))
    if _left_to_pytorch(name, x, weight, strides, 1, (1, 1), groups):
        return reference.wgrad(grad, x, *dims)
    _remember(key, "wgrad", x.shape, weight.shape, (grad, x), dims)
    return _WGRAD(grad, x, *dims)


def _remember(key, op, input_shape, weight_shape, tensors, dims, *sizes) -> None:
    """Let the launcher that this call's operator will choose serve its like at once, if it takes the tensors as is."""
    if key is None:
        return
    strides, groups, channels_last = dims
    first, second, *bias = tensors
    fits = is_dense(second, channels_last) if op == "wgrad" else is_dense_weight(second)
    if fits and is_dense(first, channels_last) and all(each is None or each.is_contiguous() for each in bias):
        problem = (op, input_shape, weight_shape, strides, groups, first.dtype, first.device, channels_last)
        calls.remember(key, getattr(dispatch.launchers(*problem), op), *sizes, *dims)


def _left_to_pytorch(name: str, *problem) -> bool:
    """Whether PyTorch's own convolution serves a valid call; an error if a backend is forced that then cannot."""
    reason = dispatch.why_plain_torch(*problem)
    if reason and (forced := dispatch.forced_backend()) not in (None, "torch"):
        raise dispatch.BackendError(
            f"{name}: the {forced} backend was asked for and cannot serve this call: {reason}; leave "
            "use_backend/RESNEXT_BACKEND at auto for plain PyTorch"
        )
    return reason is not None


def _refused_by_pytorch(message: str, *args) -> Tensor:
    """Let PyTorch judge a call that our checks refuse: its class of error, our words before its own."""
    try:
        return F.conv2d(*args)
    except (RuntimeError, TypeError, ValueError) as error:
        raise type(error)(f"grouped_conv2d: {message} (PyTorch: {error})") from error


def _check_stride_and_groups(name: str, stride: int | Sequence[int], groups: int) -> tuple[int, int]:
    if not checks.is_integer(groups) or groups < 1:
        raise ValueError(f"{name}: expected groups to be an integer >= 1, got {groups!r}")
    strides = checks.pair(stride)
    if len(strides) != 2 or any(s not in (1, 2) for s in strides):
        raise ValueError(
            f"{name}: expected stride 1 or 2 per axis, got {stride}; torch.nn.grad serves other convolutions"
        )
    return strides


def _check_backward(name: str, grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], groups: int) -> None:
    message = checks.invalid_conv2d(x, weight, None, stride, 1, 1, groups)
    if message is None and tuple(weight.shape[2:]) != checks.KERNEL_SIZE:
        message = f"expected a weight of shape (C_out, C_in/groups, 3, 3), got {tuple(weight.shape)}"
    if message is None and grad.dtype != x.dtype:
        message = f"expected grad and x of one dtype, got {grad.dtype} and {x.dtype}"
    if message is None and not grad.is_floating_point():
        message = f"expected a floating-point dtype, got {grad.dtype}"
    if message is None and grad.device != x.device:
        message = f"expected grad and x on one device, got {grad.device} and {x.device}"
    if message is None:
        size = checks.output_size(x.shape[2:], stride)
        message = checks.invalid_grad(grad, (x.shape[0], weight.shape[0], *size))
    if message is not None:
        raise ValueError(f"{name}: {message}")


# --- the three operators: what runs, what a compiler sees ---


def is_dense(tensor: Tensor, channels_last: bool) -> bool:
    """Whether the tensor is dense in the given layout."""
    return tensor.is_contiguous(memory_format=checks.memory_format(channels_last))


def is_dense_weight(weight: Tensor) -> bool:
    """Whether the weight is dense in either layout."""
    return weight.is_contiguous(memory_format=torch.channels_last) or weight.is_contiguous()


def dense(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor itself where it is dense in the given layout, else a copy that is."""
    return tensor.contiguous(memory_format=checks.memory_format(channels_last))


def dense_weight(weight: Tensor) -> Tensor:
    """The weight, dense in either layout: copying weights would cost more than some of the convolutions."""
    return weight if is_dense_weight(weight) else weight.contiguous()


def _fwd(x, weight, bias, stride, groups, channels_last):
    stride = tuple(stride)
    problem = ("fwd", x.shape, weight.shape, stride, groups, x.dtype, x.device, channels_last)
    bias = None if bias is None else bias.contiguous()
    return dispatch.launchers(*problem).fwd(
        dense(x, channels_last), dense_weight(weight), bias, stride, groups, channels_last
    )


def _dgrad(grad, weight, input_size, stride, groups, channels_last):
    stride, input_size = tuple(stride), tuple(input_size)
    shape = (grad.shape[0], weight.shape[1] * groups, *input_size)
    problem = ("dgrad", shape, weight.shape, stride, groups, grad.dtype, grad.device, channels_last)
    return dispatch.launchers(*problem).dgrad(
        dense(grad, channels_last), dense_weight(weight), input_size, stride, groups, channels_last
    )


def _wgrad(grad, x, stride, groups, channels_last):
    stride = tuple(stride)
    shape = (grad.shape[1], x.shape[1] // groups, 3, 3)
    problem = ("wgrad", x.shape, shape, stride, groups, x.dtype, x.device, channels_last)
    return dispatch.launchers(*problem).wgrad(
        dense(grad, channels_last), dense(x, channels_last), stride, groups, channels_last
    )


def empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """An uninitialised dense tensor of the dtype and on the device of ``like``."""
    layout = checks.memory_format(channels_last)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _fake_fwd(x, weight, bias, stride, groups, channels_last):
    size = checks.output_size(x.shape[2:], stride)
    return empty(x, (x.shape[0], weight.shape[0], *size), channels_last)


def _fake_dgrad(grad, weight, input_size, stride, groups, channels_last):
    return empty(grad, (grad.shape[0], weight.shape[1] * groups, *input_size), channels_last)


def _fake_wgrad(grad, x, stride, groups, channels_last):
    return empty(grad, (grad.shape[1], x.shape[1] // groups, 3, 3), channels_last)


# --- their derivatives ---
#
# No setup_context: with it, `apply` inspects the signature of `forward` in every call, longer than all else takes.


def _save(ctx, first: Tensor, second: Tensor) -> None:
    """Keep each of two operands only if the other one's gradient is wanted."""
    first_wanted, second_wanted = ctx.needs_input_grad[:2]
    ctx.save_for_backward(first if second_wanted else None, second if first_wanted else None)
    ctx.save_for_forward(first, second)


def _product_rule(ctx, op, first_tangent: Tensor | None, second_tangent: Tensor | None, *rest) -> Tensor | None:
    """op(d first, second) + op(first, d second), without the terms whose tangent is None."""
    first, second = ctx.saved_tensors
    tangent = None if first_tangent is None else op(first_tangent, second, *rest)
    if second_tangent is None:
        return tangent
    other = op(first, second_tangent, *rest)
    return other if tangent is None else tangent + other


class _Fwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *dims):
        y = _FWD.below_autograd(ctx, x, weight, bias, *dims)
        ctx.dims, ctx.input_size, ctx.output_shape = dims, tuple(x.shape[2:]), y.shape
        _save(ctx, x, weight)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _DGRAD(grad, weight, ctx.input_size, *ctx.dims)
        if ctx.needs_input_grad[1]:
            dw = _WGRAD(grad, x, *ctx.dims)
        if ctx.needs_input_grad[2]:
            db = grad.sum((0, 2, 3))
        return dx, dw, db, *(None,) * len(ctx.dims)

    @staticmethod
    def jvp(ctx, dx, dw, db, *_):
        tangent = _product_rule(ctx, _FWD, dx, dw, None, *ctx.dims)
        if db is None:
            return tangent
        db = db[:, None, None].expand(ctx.output_shape)
        return db.contiguous() if tangent is None else tangent + db


class _Dgrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, weight, *dims):
        ctx.dims = dims
        _save(ctx, grad, weight)
        return _DGRAD.below_autograd(ctx, grad, weight, *dims)

    @staticmethod
    def backward(ctx, dx):
        grad, weight = ctx.saved_tensors
        _, *dims = ctx.dims
        d_grad = d_weight = None
        if ctx.needs_input_grad[0]:
            d_grad = _FWD(dx, weight, None, *dims)
        if ctx.needs_input_grad[1]:
            d_weight = _WGRAD(grad, dx, *dims)
        return d_grad, d_weight, *(None,) * len(ctx.dims)

    @staticmethod
    def jvp(ctx, d_grad, d_weight, *_):
        return _product_rule(ctx, _DGRAD, d_grad, d_weight, *ctx.dims)


class _Wgrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, x, *dims):
        ctx.dims, ctx.input_size = dims, tuple(x.shape[2:])
        _save(ctx, grad, x)
        return _WGRAD.below_autograd(ctx, grad, x, *dims)

    @staticmethod
    def backward(ctx, dw):
        grad, x = ctx.saved_tensors
        d_grad = dx = None
        if ctx.needs_input_grad[0]:
            d_grad = _FWD(x, dw, None, *ctx.dims)
        if ctx.needs_input_grad[1]:
            dx = _DGRAD(grad, dw, ctx.input_size, *ctx.dims)
        return d_grad, dx, *(None,) * len(ctx.dims)

    @staticmethod
    def jvp(ctx, d_grad, dx, *_):
        return _product_rule(ctx, _WGRAD, d_grad, dx, *ctx.dims)


_FWD.register(_fwd, _fake_fwd, _Fwd)
_DGRAD.register(_dgrad, _fake_dgrad, _Dgrad)
_WGRAD.register(_wgrad, _fake_wgrad, _Wgrad)
