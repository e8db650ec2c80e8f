"""What a right answer of the fused launchers is: float64 oracles on the same rounded inputs, and derived bounds.

With u the unit roundoff of float32 (of the products, where TF32 rounds them) and u_d that of the tensors' dtype, the
bounds follow the data as it flows (Higham, 2002, sections 3.1 and 4.2), every intermediate with a bound of its own:

    a = relu(affine(x))             e_a = u_d |a| + 4 u (|scale| (|x| + |center|) + |shift|)
    g = dz + dmean/n + 2 dvar/n (z - mean)      e_g alike, with 6 u
    a sum of n products of p, q     (n + 1) u sum |p||q|  +  sum (e_p |q| + |p| e_q + e_p e_q)
    the stored result               + u_d |result|

Where the activation is within its bound of zero the ReLU's mask may fall either way: the whole gradient is allowed as
error there. Statistics are those of the stored z: Chan, Golub & LeVeque (1983) bound the relative error of the variance
by n u sqrt(1 + mean^2 / var).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnext.kernels import extension, reference

from . import winograd_numerics
from .numerics import require

U = 2.0**-24


@dataclass(frozen=True)
class FusedCase:
    """One fused convolution, 3x3 with padding 1 or 1x1; ``id`` says why it is in the list."""

    id: str
    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    groups: int = 1
    kernel: int = 3
    stride: tuple[int, int] = (1, 1)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        height = (self.height - 1) // self.stride[0] + 1
        width = (self.width - 1) // self.stride[1] + 1
        return self.batch, self.out_channels, height, width


GROUPED_CASES = [
    FusedCase("gw4-resnext50-stage1", 2, 32, 32, 8, 8, 8),
    FusedCase("gw8-stride2", 2, 32, 32, 8, 8, 4, stride=(2, 2)),
    FusedCase("gw16-stride2-odd", 1, 32, 32, 7, 9, 2, stride=(2, 2)),
    FusedCase("gw32-7x7", 2, 64, 64, 7, 7, 2),
    FusedCase("gw64", 1, 128, 128, 4, 5, 2),
    FusedCase("gw24-regnet", 1, 48, 48, 5, 6, 2),
    FusedCase("gw1-depthwise", 2, 16, 16, 7, 6, 16),
    FusedCase("gw3-not-a-power-of-two", 1, 12, 12, 5, 9, 4),
    FusedCase("stride-2-1", 1, 16, 16, 7, 6, 4, stride=(2, 1)),
    FusedCase("widens-in-group", 1, 8, 24, 6, 6, 4),
    FusedCase("1x1-image", 3, 16, 16, 1, 1, 4),
    FusedCase("taller-than-a-band", 1, 16, 16, 67, 3, 4, stride=(2, 2)),
]
POINTWISE_CASES = [
    FusedCase("whole-blocks", 2, 32, 64, 8, 8, kernel=1),
    FusedCase("odd-channels", 2, 24, 40, 5, 7, kernel=1),
    FusedCase("few-channels", 1, 3, 5, 6, 5, kernel=1),
    FusedCase("stride2", 2, 32, 48, 7, 8, kernel=1, stride=(2, 2)),
    FusedCase("stride-1-2", 1, 16, 16, 5, 6, kernel=1, stride=(1, 2)),
    FusedCase("one-pixel", 3, 16, 32, 1, 1, kernel=1),
    FusedCase("more-rows-than-a-block", 1, 16, 32, 17, 19, kernel=1),
    FusedCase("wide", 1, 160, 144, 3, 3, kernel=1),
]
# Shapes (N, C, H, W) of the elementwise launchers.
ELEMENTWISE_SHAPES = {
    "whole-blocks": (2, 32, 8, 8),
    "odd": (3, 24, 5, 7),
    "one-channel": (2, 1, 5, 6),
    "one-pixel": (5, 16, 1, 1),
    "three-channels": (2, 3, 9, 4),
    "many-channels": (1, 300, 3, 2),
    "more-rows-than-a-block": (1, 8, 67, 35),
}


@dataclass(frozen=True)
class Arithmetic:
    """What a backend rounds: unit roundoffs of a store (2: it truncates), of float32 sums (or TF32 products)."""

    out_roundings: float = 1.0
    u_acc: float = U

    def u(self, dtype: torch.dtype) -> float:
        return self.out_roundings * torch.finfo(dtype).eps / 2

    def smallest(self, dtype: torch.dtype) -> float:
        info = torch.finfo(dtype)
        return self.out_roundings * info.smallest_normal * info.eps / 2


def make(shape, dtype, generator, *, channels_last=False, integers=False, device="cpu") -> Tensor:
    if integers:
        tensor = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    else:
        tensor = torch.randn(shape, generator=generator).to(dtype)
    if len(shape) == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return tensor.to(device)


def make_affine(channels: int, generator, *, integers=False, centered=True, device="cpu") -> reference.Affine:
    """Vectors (center, scale, shift) with some negative scales."""
    center, scale, shift = (
        make((channels,), torch.float32, generator, integers=integers, device=device) for _ in range(3)
    )
    return center if centered else None, scale, shift


def double(value: Any) -> Any:
    """The same in float64 on the CPU, in contiguous layout; tuples and None too."""
    if isinstance(value, tuple):
        return tuple(double(v) for v in value)
    return None if value is None else value.detach().cpu().double().contiguous()


def assert_within(name: str, actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    value = double(actual)
    require((value - expected).abs(), bound, value, expected, name=f"{name}: ")


def assert_layout(name: str, tensor: Tensor, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert tensor.stride() == torch.empty(tensor.shape, memory_format=layout).stride(), f"{name}: {tensor.stride()}"


# --- the oracles' parts: values with the bound of their error ---


@dataclass(frozen=True)
class Bounded:
    value: Tensor
    error: Tensor


def _column(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def affine_size(affine: reference.Affine, v: Tensor) -> tuple[Tensor, Tensor]:
    """affine(v) and the sum of the magnitudes of its terms, in float64."""
    center, scale, shift = affine
    center = torch.zeros_like(scale) if center is None else center
    value = _column(scale) * (v - _column(center)) + _column(shift)
    return value, _column(scale.abs()) * (v.abs() + _column(center.abs())) + _column(shift.abs())


def bounded_activation(
    x: Tensor, affine: reference.Affine | None, dtype: torch.dtype, arithmetic: Arithmetic
) -> tuple[Bounded, Tensor, Tensor]:
    """relu(affine(x)), where its gradient passes, and where that may fall either way."""
    x = double(x)
    if affine is None:
        return Bounded(x, torch.zeros_like(x)), torch.ones_like(x), torch.zeros_like(x)
    before, size = affine_size(double(affine), x)
    slack = 4 * U * size
    a = before.clamp(min=0)
    unsure = (before.abs() <= slack + arithmetic.smallest(dtype)).double() * (slack > 0)
    error = arithmetic.u(dtype) * (a + slack) + slack + arithmetic.smallest(dtype)
    return Bounded(a, error * (before > -slack)), (before > 0).double(), unsure


def bounded_gradient(dz, grad_prologue, dtype: torch.dtype, arithmetic: Arithmetic) -> Bounded:
    """dz + dmean / n + 2 dvar / n (z - mean)."""
    dz = double(dz)
    if grad_prologue is None:
        return Bounded(dz, torch.zeros_like(dz))
    z, mean, dmean, dvar = double(grad_prologue)
    n = z.numel() // z.shape[1]
    value = dz + _column(dmean / n) + _column(2 * dvar / n) * (z - _column(mean))
    size = dz.abs() + _column(dmean.abs() / n) + _column(2 * dvar.abs() / n) * (z.abs() + _column(mean.abs()))
    return Bounded(value, arithmetic.u(dtype) * value.abs() + 6 * U * size + arithmetic.smallest(dtype))


def bounded_product(
    op, p: Bounded, q: Bounded, terms: int, arithmetic: Arithmetic, winograd: tuple[str, int] | None = None
) -> Bounded:
    """A bilinear op, sums of ``terms`` products each, before the result is stored.

    ``winograd``: the pass and its groups, if it is computed so (winograd_numerics.py).
    """
    value = op(p.value, q.value)
    largest = (p.value.abs() + p.error, q.value.abs() + q.error)
    size = op(*largest)
    spread = size - op(p.value.abs(), q.value.abs())
    if winograd is not None:
        pass_, groups = winograd
        size = winograd_numerics.magnitude(pass_, *largest, groups)
        terms += winograd_numerics.ROUNDINGS
    return Bounded(value, (terms + 1) * arithmetic.u_acc * size + spread.clamp(min=0))


def assert_statistics(z: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and variance of the channels of ``z`` as it is stored."""
    assert mean.dtype == var.dtype == torch.float32
    z = double(z)
    n = z.numel() // z.shape[1]
    exact_mean = z.mean((0, 2, 3))
    exact_var = (z - _column(exact_mean)).square().mean((0, 2, 3))
    step = (n + 8) * U
    largest = z.abs().amax((0, 2, 3))
    assert_within("mean", mean, exact_mean, step * largest + 1e-45)
    spread = (exact_var * (exact_var + exact_mean.square())).sqrt()
    assert_within("var", var, exact_var, step * spread + (step * largest).square() + 1e-45)


# --- the launchers, one by one ---


def check_conv_stats(
    launchers: Any,
    case: FusedCase,
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = True,
    prologue: bool = True,
    centered: bool = True,
    stats: bool = True,
    weight_channels_last: bool = False,
    stores: int = 1,
    arithmetic: Arithmetic = Arithmetic(),
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Run ``conv_stats_fwd`` and ``conv_stats_bwd`` of ``launchers`` on a case, and check every result.

    ``stores``: how often a gradient on its way through a prologue is rounded (2: after the convolution too).
    """
    generator = torch.Generator().manual_seed(seed)
    options = {"channels_last": channels_last, "device": device}
    input_shape = (case.batch, case.in_channels, case.height, case.width)
    weight_shape = (case.out_channels, case.in_channels // case.groups, case.kernel, case.kernel)
    x = make(input_shape, dtype, generator, **options)
    weight = make(weight_shape, dtype, generator, channels_last=weight_channels_last, device=device)
    affine = make_affine(case.in_channels, generator, centered=centered, device=device) if prologue else None
    place = (case.stride, case.groups, channels_last)
    before = [t.clone() for t in (x, weight)]

    z, mean, var = launchers.conv_stats_fwd(x, affine, weight, *place, stats)
    assert_layout("z", z, channels_last)
    assert z.dtype == dtype
    u_d, smallest = arithmetic.u(dtype), arithmetic.smallest(dtype)
    exact_weight = Bounded(double(weight), torch.zeros_like(double(weight)))
    a, passes, unsure = bounded_activation(x, affine, dtype, arithmetic)

    def conv(left, right):
        return reference.fwd(left, right, None, case.stride, case.groups, False)

    def winograd(op):
        by_tiles = launchers is extension and winograd_numerics.serves(op, case, channels_last, device)
        return (op, case.groups) if by_tiles else None

    terms = case.kernel**2 * weight_shape[1]
    expected = bounded_product(conv, a, exact_weight, terms, arithmetic, winograd("fwd"))
    assert_within("z", z, expected.value, expected.error * (1 + u_d) + u_d * expected.value.abs() + smallest)
    if stats:
        assert_statistics(z, mean, var)
    else:
        assert mean is None
        assert var is None

    dz = make(case.output_shape, dtype, generator, **options)
    count = z.numel() // z.shape[1]
    grad_prologue = None
    if stats:
        dmean, dvar = (
            count**0.5 * make((case.out_channels,), torch.float32, generator, device=device) for _ in range(2)
        )
        grad_prologue = (z, mean, dmean, dvar)
    dx, dscale, dshift, dw = launchers.conv_stats_bwd(dz, grad_prologue, x, affine, weight, *place, (True, True))
    assert all(torch.equal(t, b) for t, b in zip((x, weight), before, strict=True)), "an argument was changed"
    assert_layout("dx", dx, channels_last)
    g = bounded_gradient(dz, grad_prologue, dtype, arithmetic)

    def dgrad(left, right):
        return reference.bwd(left, a.value, right, case.stride, case.groups, False, (True, False))[0]

    terms = case.kernel**2 * case.out_channels // case.groups
    t = bounded_product(dgrad, g, exact_weight, terms, arithmetic, winograd("dgrad"))
    t = Bounded(t.value, t.error + (stores - 1) * (u_d * (t.value.abs() + t.error) + smallest))
    scale = torch.ones(case.in_channels, dtype=torch.float64) if affine is None else double(affine[1])
    masked = t.value * passes
    masked_error = torch.where(unsure > 0, t.error + t.value.abs(), t.error * passes)
    value = _column(scale) * masked
    error = _column(scale.abs()) * masked_error * (1 + 2 * U + u_d) + (2 * U + u_d) * value.abs() + smallest
    assert_within("dx", dx, value, error)
    if affine is None:
        assert dscale is None
        assert dshift is None
    else:
        pixels = case.batch * case.height * case.width
        assert dscale.dtype == dshift.dtype == torch.float32
        assert_channel_sums(dscale, dshift, masked, masked_error, x, affine[0], pixels, 0.0)

    def wgrad(left, right):
        exact = (left, right, exact_weight.value, case.stride, case.groups, False)
        return reference.bwd(*exact, (False, True))[1]

    expected = bounded_product(wgrad, g, a, count, arithmetic, winograd("wgrad"))
    assert_within("dw", dw, expected.value, expected.error * (1 + u_d) + u_d * expected.value.abs() + smallest)
    assert dw.dtype == dtype

    again = launchers.conv_stats_bwd(dz, grad_prologue, x, affine, weight, *place, (True, True))
    for name, first, second in zip(("dx", "dscale", "dshift", "dw"), (dx, dscale, dshift, dw), again, strict=True):
        assert first is second is None or torch.equal(first, second), f"{name}: not the same bits twice"
    only_dx = launchers.conv_stats_bwd(dz, grad_prologue, x, affine, weight, *place, (True, False))
    assert only_dx[3] is None
    assert torch.equal(only_dx[0], dx)
    only_dw = launchers.conv_stats_bwd(dz, grad_prologue, x, affine, weight, *place, (False, True))
    assert only_dw[:3] == (None, None, None)
    assert torch.equal(only_dw[3], dw)


def assert_channel_sums(dscale, dshift, t, t_error, v, center, pixels, extra) -> None:
    """Sums over N, H, W of t and of t * (v - center)."""
    over = (0, 2, 3)
    v = double(v)
    center = torch.zeros(v.shape[1], dtype=torch.float64) if center is None else double(center)
    size = v.abs() + _column(center.abs())
    bound = (t_error + ((pixels + 2) * U + extra) * (t.abs() + t_error)).sum(over)
    assert_within("dshift", dshift, t.sum(over), bound + 1e-45)
    bound = (size * (t_error + ((pixels + 5) * U + extra) * (t.abs() + t_error))).sum(over)
    assert_within("dscale", dscale, (t * (v - _column(center))).sum(over), bound + 1e-45)


def check_conv_affine(
    launchers: Any,
    case: FusedCase,
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = True,
    scaled: bool = True,
    shifted: bool = True,
    residual: bool = True,
    relu: bool = True,
    stores: int = 1,
    arithmetic: Arithmetic = Arithmetic(),
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Run ``conv_affine`` on a case; ``stores``: how often the result is rounded (2: the convolution's own too)."""
    generator = torch.Generator().manual_seed(seed)
    options = {"channels_last": channels_last, "device": device}
    x = make((case.batch, case.in_channels, case.height, case.width), dtype, generator, **options)
    weight_shape = (case.out_channels, case.in_channels // case.groups, case.kernel, case.kernel)
    weight = make(weight_shape, dtype, generator, device=device)
    scale, shift = (make((case.out_channels,), torch.float32, generator, device=device) for _ in range(2))
    scale, shift = scale if scaled else None, shift if shifted else None
    other = make(case.output_shape, dtype, generator, **options) if residual else None
    y = launchers.conv_affine(x, weight, scale, shift, other, relu, case.stride, case.groups, channels_last)
    assert_layout("y", y, channels_last)
    assert y.dtype == dtype

    def conv(left, right):
        return reference.fwd(left, right, None, case.stride, case.groups, False)

    x, weight = (Bounded(double(t), torch.zeros_like(double(t))) for t in (x, weight))
    by_tiles = launchers is extension and winograd_numerics.serves("fwd", case, channels_last, device)
    winograd = ("fwd", case.groups) if by_tiles else None
    z = bounded_product(conv, x, weight, case.kernel**2 * weight_shape[1], arithmetic, winograd)
    ones = torch.ones(case.out_channels, dtype=torch.float64)
    scale, shift = ones if scale is None else double(scale), ones * 0 if shift is None else double(shift)
    other = torch.zeros_like(z.value) if other is None else double(other)
    value = _column(scale) * z.value + _column(shift) + other
    size = _column(scale.abs()) * z.value.abs() + _column(shift.abs()) + other.abs()
    u_d = arithmetic.u(dtype)
    between = (stores - 1) * u_d * _column(scale.abs()) * (z.value.abs() + z.error)
    error = _column(scale.abs()) * z.error + 6 * U * size + between
    if relu:
        value, error = value.clamp(min=0), torch.where(value > -error, error, 0.0)
    assert_within("y", y, value, error * (1 + u_d) + u_d * value.abs() + arithmetic.smallest(dtype))


def check_statistics(launchers: Any, z: Tensor, channels_last: bool, arithmetic: Arithmetic = Arithmetic()) -> None:
    """Run ``statistics`` and ``statistics_bwd`` on ``z``."""
    mean, var = launchers.statistics(z, channels_last)
    assert_statistics(z, mean, var)
    generator = torch.Generator().manual_seed(1)
    dz = make(tuple(z.shape), z.dtype, generator, channels_last=channels_last, device=z.device)
    dmean, dvar = (make(tuple(mean.shape), torch.float32, generator, device=z.device) for _ in range(2))
    g = launchers.statistics_bwd(dz, z, mean, dmean, dvar, channels_last)
    assert_layout("g", g, channels_last)
    expected = bounded_gradient(dz, (z, mean, dmean, dvar), z.dtype, arithmetic)
    assert_within("g", g, expected.value, expected.error)


def check_affine_add_relu(
    launchers: Any,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = True,
    residual: str = "plain",
    centered: bool = True,
    arithmetic: Arithmetic = Arithmetic(),
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Run ``affine_add_relu``, its backward and ``affine_add``; ``residual``: "none", "plain" or "affine"."""
    generator = torch.Generator().manual_seed(seed)
    options = {"channels_last": channels_last, "device": device}
    z = make(shape, dtype, generator, **options)
    affine = make_affine(shape[1], generator, centered=centered, device=device)
    other = make(shape, dtype, generator, **options) if residual != "none" else None
    other_affine = make_affine(shape[1], generator, centered=centered, device=device) if residual == "affine" else None
    out = launchers.affine_add_relu(z, affine, other, other_affine, channels_last)
    assert_layout("out", out, channels_last)
    value, size = affine_size(double(affine), double(z))
    if other_affine is not None:
        other_value, other_size = affine_size(double(other_affine), double(other))
        value, size = value + other_value, size + other_size
    elif other is not None:
        value, size = value + double(other), size + double(other).abs()
    u_d, smallest = arithmetic.u(dtype), arithmetic.smallest(dtype)
    slack = 8 * U * size
    bound = slack + u_d * (value.clamp(min=0) + slack) + smallest
    assert_within("out", out, value.clamp(min=0), torch.where(value > -slack, bound, 0.0))
    without_relu = launchers.affine_add(z, affine, other, other_affine, channels_last)
    assert_layout("without a ReLU", without_relu, channels_last)
    assert_within("without a ReLU", without_relu, value, slack + u_d * (value.abs() + slack) + smallest)

    dout = make(shape, dtype, generator, **options)
    kept = other if other_affine is not None else None
    place = (channels_last, (True, residual != "none", True))
    results = launchers.affine_add_relu_bwd(dout, out, z, affine, kept, other_affine, *place)
    dz, dresidual, dscale, dshift, dresidual_scale = results
    t = torch.where(double(out) > 0, double(dout), 0.0)
    zeros = torch.zeros_like(t)
    pixels = shape[0] * shape[2] * shape[3]
    value = _column(double(affine[1])) * t
    assert_layout("dz", dz, channels_last)
    assert_within("dz", dz, value, (u_d + 2 * U) * value.abs() + smallest)
    assert_channel_sums(dscale, dshift, t, zeros, z, affine[0], pixels, 0.0)
    if residual == "none":
        assert dresidual is None
        recomputed = launchers.affine_add_relu_bwd(dout, None, z, affine, None, None, *place)
        for name, first, second in zip(("dz", "dscale", "dshift"), (dz, dscale, dshift), recomputed[::2], strict=False):
            if name == "dz":
                assert torch.equal(first, second), "dz: without `out` another mask"
    else:
        value = t if other_affine is None else _column(double(other_affine[1])) * t
        assert_within("dresidual", dresidual, value, (u_d + 2 * U) * value.abs() + smallest)
        assert_layout("dresidual", dresidual, channels_last)
    if other_affine is None:
        assert dresidual_scale is None
    else:
        assert_channel_sums(dresidual_scale, dshift, t, zeros, other, other_affine[0], pixels, 0.0)
    again = launchers.affine_add_relu_bwd(dout, out, z, affine, kept, other_affine, *place)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(results, again, strict=True))
    only_dz = launchers.affine_add_relu_bwd(
        dout, out, z, affine, kept, other_affine, channels_last, (True, False, False)
    )
    assert torch.equal(only_dz[0], dz)
    assert only_dz[1:] == (None,) * 4


def check_pool(
    launchers: Any,
    z: Tensor,
    affine: reference.Affine,
    channels_last: bool,
    arithmetic: Arithmetic = Arithmetic(),
) -> None:
    """Run ``affine_relu_max_pool`` and its backward on finite ``z``."""
    out, taps = launchers.affine_relu_max_pool(z, affine, channels_last, True)
    without, no_taps = launchers.affine_relu_max_pool(z, affine, channels_last, False)
    assert torch.equal(out, without)
    assert no_taps is None
    assert_layout("out", out, channels_last)
    assert_layout("taps", taps, channels_last)
    assert taps.dtype == torch.uint8
    assert int(taps.max()) < 9
    a, passes, unsure = bounded_activation(z, affine, z.dtype, arithmetic)
    window_error = F.max_pool2d(a.error, 3, 2, 1)
    assert_within("out", out, F.max_pool2d(a.value, 3, 2, 1), window_error)
    dout = make(tuple(out.shape), z.dtype, torch.Generator().manual_seed(2), channels_last=channels_last)
    dz, dscale, dshift = launchers.affine_relu_max_pool_bwd(
        dout.to(z.device), taps, z, affine, channels_last, (True, True)
    )
    assert_layout("dz", dz, channels_last)
    tap = taps.cpu().long().contiguous()
    row = torch.arange(out.shape[2])[:, None] * 2 - 1 + tap // 3
    column = torch.arange(out.shape[3]) * 2 - 1 + tap % 3
    place = (row * z.shape[3] + column).flatten(2)
    picked = a.value.flatten(2).gather(2, place).view(out.shape)
    assert_within("picked by taps", picked, F.max_pool2d(a.value, 3, 2, 1), 2 * window_error)
    t, size = (
        torch.zeros(z.shape, dtype=torch.float64).flatten(2).scatter_add_(2, place, d.flatten(2)).view(z.shape)
        for d in (double(dout), double(dout).abs())
    )
    scale = double(affine[1])
    error = torch.where(unsure > 0, size, 4 * U * size * passes)
    value = _column(scale) * t * passes
    u_d = arithmetic.u(z.dtype)
    bound = _column(scale.abs()) * error * (1 + u_d + 2 * U) + (u_d + 2 * U) * value.abs()
    assert_within("dz", dz, value, bound + arithmetic.smallest(z.dtype))
    assert_channel_sums(dscale, dshift, t * passes, error, z, affine[0], z.numel() // z.shape[1], 0.0)
