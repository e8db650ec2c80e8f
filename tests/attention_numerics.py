"""What a right answer of channel attention's launchers is, by the bounds of fused_numerics.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused_numerics import (
    Arithmetic,
    U,
    affine_size,
    assert_channel_sums,
    assert_layout,
    assert_within,
    double,
    make,
    make_affine,
)

OVER = (2, 3)
ROUNDS_AS_IT_SHOULD = Arithmetic()
# Of `check_attention`: what blocks ask for, and the other forms.
OPTIONS = [
    {"affine": affine, "relu": relu, "residual": residual, "centered": residual != "plain"}
    for affine, relu, residual in [
        (True, True, "none"),
        (True, False, "plain"),
        (True, False, "affine"),
        (True, True, "affine"),
        (False, False, "none"),
        (False, True, "plain"),
    ]
]


def check_attention(
    launchers: Any,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = True,
    affine: bool = True,
    relu: bool = True,
    residual: str = "none",
    centered: bool = True,
    arithmetic: Arithmetic = ROUNDS_AS_IT_SHOULD,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Run the four launchers; ``residual``: "none", "plain" or "affine"."""
    generator = torch.Generator().manual_seed(seed)
    options = {"channels_last": channels_last, "device": device}
    z, dout = (make(shape, dtype, generator, **options) for _ in range(2))
    gate, added = (make((*shape[:2], 1, 1), torch.float32, generator, device=device) for _ in range(2))
    of_z = make_affine(shape[1], generator, centered=centered, device=device) if affine else None
    other = make(shape, dtype, generator, **options) if residual != "none" else None
    of_other = make_affine(shape[1], generator, centered=centered, device=device) if residual == "affine" else None
    u_d, smallest = arithmetic.u(dtype), arithmetic.smallest(dtype)
    pixels, count = shape[2] * shape[3], shape[0] * shape[2] * shape[3]

    before, size = (double(z), double(z).abs()) if of_z is None else affine_size(double(of_z), double(z))
    slack = torch.zeros_like(size) if of_z is None else 4 * U * size
    passes, unsure = torch.ones_like(before), torch.zeros_like(before)
    if relu:
        passes, unsure = (before > 0).double(), ((before.abs() <= slack + smallest) & (slack > 0)).double()
    a = before * passes
    slack = slack * (passes + unsure).clamp(max=1)

    mean = launchers.affine_mean(z, of_z, relu, channels_last)
    assert mean.dtype == torch.float32
    bound = (slack + (pixels + 3) * U * (a.abs() + slack)).mean(OVER, keepdim=True)
    assert_within("mean", mean, a.mean(OVER, keepdim=True), bound + 1e-45)

    out = launchers.affine_gate(z, of_z, relu, gate, other, of_other, channels_last)
    assert_layout("out", out, channels_last)
    assert out.dtype == dtype
    value, spread = double(gate) * a, double(gate).abs() * (slack + 4 * U * (a.abs() + slack))
    if other is not None:
        of_residual = (double(other), double(other).abs())
        if of_other is not None:
            of_residual = affine_size(double(of_other), double(other))
        value, spread = value + of_residual[0], spread * (1 + U) + 6 * U * (of_residual[1] + value.abs())
        spread = torch.where(value > -spread, spread, 0.0)
        value = value.clamp(min=0)
    assert_within("out", out, value, spread + u_d * (value.abs() + spread) + smallest)

    t = double(dout) if other is None else torch.where(double(out) > 0, double(dout), 0.0)
    kept = other if of_other is not None else None
    given = None if other is None else out
    place = (channels_last, other is not None)
    results = launchers.affine_gate_bwd(dout, given, z, of_z, relu, kept, of_other, *place)
    dgate, dresidual, dscale, dshift = results
    bound = (t.abs() * (slack + (pixels + 3) * U * (a.abs() + slack))).sum(OVER, keepdim=True)
    assert_within("dgate", dgate, (t * a).sum(OVER, keepdim=True), bound + 1e-45)
    if other is None:
        assert dresidual is None
    else:
        expected = t if of_other is None else double(of_other[1])[:, None, None] * t
        assert_layout("dresidual", dresidual, channels_last)
        assert_within("dresidual", dresidual, expected, (u_d + 2 * U) * expected.abs() + smallest)
    if of_other is None:
        assert dscale is None
        assert dshift is None
    else:
        assert_channel_sums(dscale, dshift, t, torch.zeros_like(t), other, of_other[0], count, 0.0)
    again = launchers.affine_gate_bwd(dout, given, z, of_z, relu, kept, of_other, *place)
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(results, again, strict=True))
    only_gate = launchers.affine_gate_bwd(dout, given, z, of_z, relu, kept, of_other, channels_last, False)
    assert torch.equal(only_gate[0], dgate)
    assert only_gate[1] is None

    for parts in ((dout, given, gate, added), (dout, given, gate, None), (None, None, None, added)):
        _check_activation(launchers, z, of_z, relu, parts, t, passes, unsure, channels_last, arithmetic)


def _check_activation(
    launchers: Any,
    z: Tensor,
    affine: Any,
    relu: bool,
    parts: tuple[Tensor | None, ...],
    t: Tensor,
    passes: Tensor,
    unsure: Tensor,
    channels_last: bool,
    arithmetic: Arithmetic,
) -> None:
    dout, _, gate, added = parts
    dz, dscale, dshift = launchers.gated_affine_bwd(z, affine, relu, *parts, channels_last)
    of_gate = torch.zeros_like(t) if dout is None else double(gate) * t
    of_mean = torch.zeros_like(t) if added is None else double(added).expand_as(t)
    da = of_gate + of_mean
    error = 3 * U * (of_gate.abs() + of_mean.abs())
    masked, masked_error = da * passes, torch.where(unsure > 0, error + da.abs(), error * passes)
    u_d, smallest = arithmetic.u(z.dtype), arithmetic.smallest(z.dtype)
    scale = torch.ones(z.shape[1], dtype=torch.float64) if affine is None else double(affine[1])
    value = scale[:, None, None] * masked
    bound = scale.abs()[:, None, None] * masked_error * (1 + 2 * U + u_d) + (2 * U + u_d) * value.abs() + smallest
    assert_layout("dz", dz, channels_last)
    assert_within("dz", dz, value, bound)
    if affine is None:
        assert dscale is None
        assert dshift is None
        return
    assert_channel_sums(dscale, dshift, masked, masked_error, z, affine[0], z.numel() // z.shape[1], 0.0)
