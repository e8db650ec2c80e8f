"""The Triton kernel of a bottleneck's second half: numbers and machine code.

The numbers come from a GPU or else from Triton's interpreter, which must be chosen before Triton is first imported:
without a GPU `test_in_the_interpreter` runs this file in a process of its own. The machine code needs no GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from resnext.kernels import reference
from resnext.kernels.config import ConvProblem, TapsConfig, bottleneck_tail_config

from .fused_numerics import (
    GROUPED_CASES,
    Arithmetic,
    Bounded,
    FusedCase,
    U,
    assert_layout,
    assert_within,
    bounded_product,
    double,
    make,
)
from .interpreter import DEVICE, arithmetic, compiles, here, not_here, run_tests

pytest.importorskip("triton")

from resnext.kernels.bottleneck_tail import bottleneck_tail, plan

from . import aot

BY_ID = {case.id: case for case in GROUPED_CASES}


@not_here
def test_in_the_interpreter():
    run_tests(__file__, timeout=600)


def make_arguments(case: FusedCase, dtype: torch.dtype, out_channels: int, channels_last: bool) -> list[Tensor]:
    """x, then weight, scale and shift of both convolutions, then the residual."""
    generator = torch.Generator().manual_seed(0)
    options = {"channels_last": channels_last, "device": DEVICE}
    batch, mid_channels, *size = case.output_shape
    arguments = [make((batch, case.in_channels, case.height, case.width), dtype, generator, **options)]
    for shape in ((mid_channels, case.in_channels // case.groups, 3, 3), (out_channels, mid_channels, 1, 1)):
        arguments.append(make(shape, dtype, generator, **options))
        arguments += [make((shape[0],), torch.float32, generator, device=DEVICE) for _ in range(2)]
    return [*arguments, make((batch, out_channels, *size), dtype, generator, **options)]


def bounded_affine(
    z: Bounded, scale: Tensor, shift: Tensor, side: Tensor | float, u_out: float, smallest: float
) -> Bounded:
    """relu(scale * z + shift + side), rounded; no error where that is surely negative."""
    scale, shift = (double(vector)[:, None, None] for vector in (scale, shift))
    value = scale * z.value + shift + side
    size = scale.abs() * (z.value.abs() + z.error) + shift.abs() + abs(side)
    slack = scale.abs() * z.error + 4 * U * size
    error = slack + u_out * (value.clamp(min=0) + slack) + smallest
    return Bounded(value.clamp(min=0), torch.where(value > -slack, error, 0.0))


def exact(value: Tensor) -> Bounded:
    return Bounded(double(value), torch.zeros_like(double(value)))


def check(actual: Tensor, case: FusedCase, arguments: list[Tensor], out_roundings: float = 1.0) -> None:
    arithmetic = Arithmetic(out_roundings)
    x, weight2, scale2, shift2, weight3, scale3, shift3, residual = arguments
    rounding = arithmetic.u(x.dtype), arithmetic.smallest(x.dtype)

    def conv(stride, groups):
        return lambda left, right: reference.fwd(left, right, None, stride, groups, False)

    terms = 9 * weight2.shape[1]
    z = bounded_product(conv(case.stride, case.groups), exact(x), exact(weight2), terms, arithmetic)
    mid = bounded_affine(z, scale2, shift2, 0.0, *rounding)
    z = bounded_product(conv((1, 1), 1), mid, exact(weight3), weight3.shape[1], arithmetic)
    expected = bounded_affine(z, scale3, shift3, double(residual), *rounding)
    assert_within("y", actual, expected.value, expected.error)


@here
@pytest.mark.parametrize(
    "case",
    ["gw4-resnext50-stage1", "gw8-stride2", "gw64", "gw24-regnet", "gw3-not-a-power-of-two", "widens-in-group"],
)
def test_every_kind_of_group(case):
    case = BY_ID[case]
    arguments = make_arguments(case, torch.float32, 20, True)
    y = bottleneck_tail(*arguments, case.stride, case.groups, True, allow_tf32=False)
    assert_layout("y", y, True)
    check(y, case, arguments)


@here
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, channels_last):
    # The interpreter stores bfloat16 by cutting digits off, an error of up to one step instead of half a step.
    out_roundings = arithmetic(dtype).out_roundings
    case = BY_ID["stride-2-1"]
    arguments = make_arguments(case, dtype, 40, channels_last)
    y = bottleneck_tail(*arguments, case.stride, case.groups, channels_last)
    assert_layout("y", y, channels_last)
    check(y, case, arguments, out_roundings)


@here
@pytest.mark.parametrize(
    "changes",
    [{"block_n": 16}, {"block_m": 16, "merged": 1}, {"merged": 3}, {"block_m": 128, "block_n": 64, "num_warps": 8}],
    ids=str,
)
def test_every_setting(changes):
    case = BY_ID["gw4-resnext50-stage1"]
    arguments = make_arguments(case, torch.float32, 40, True)
    problem = ConvProblem("fwd", 2, 32, 32, 8, 8, (1, 1), 8, torch.float32, DEVICE, True)
    config = replace(bottleneck_tail_config(problem, 40), **changes)
    check(bottleneck_tail(*arguments, (1, 1), 8, True, config=config, allow_tf32=False), case, arguments)


@here
def test_what_is_not_finite_keeps_to_its_group():
    """The first group's middle channels become -Inf, which ReLU makes zeros, as it makes of any negative number."""
    case = BY_ID["gw4-resnext50-stage1"]
    arguments = make_arguments(case, torch.float32, 40, True)
    x, weight2, scale2 = arguments[:3]
    weight2[:4].abs_()
    scale2[:4].abs_()
    x[:, :4] = -float("inf")
    y = bottleneck_tail(*arguments, (1, 1), 8, True, allow_tf32=False)
    x[:, :4] = -1e6
    check(y, case, arguments)


def layer(width: int, groups: int, size: int, stride: int = 1, dtype: torch.dtype = torch.bfloat16) -> ConvProblem:
    return ConvProblem("fwd", 256, width, width, size, size, (stride, stride), groups, dtype, "cuda", True)


@pytest.mark.parametrize("allow_tf32", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_settings_hold_merged_groups_whole(dtype, allow_tf32):
    for width in (1, 3, 4, 8, 16, 24, 32, 48, 64, 112):
        config = bottleneck_tail_config(layer(8 * width, 8, 7, dtype=dtype), 24 * width, allow_tf32=allow_tf32)
        assert 1 <= config.merged <= 8
        assert config.merged == 1 or config.merged * width <= config.block_k
        assert all(block >= 16 and block & (block - 1) == 0 for block in (config.block_n, config.block_k))


@compiles
@pytest.mark.parametrize(
    ("problem", "allow_tf32", "arch"),
    [
        *((layer(width, 32, size), True, 90) for width, size in ((128, 56), (256, 28), (512, 14), (1024, 7))),
        (layer(128, 2, 28), True, 90),
        (layer(256, 32, 56, 2), True, 80),
        (layer(256, 32, 56, 2), True, 100),
        *((layer(128, 32, 56, dtype=torch.float32), True, arch) for arch in (80, 100)),
        (layer(128, 32, 56, dtype=torch.float32), False, 90),
    ],
)
def test_launch_compiles_within_the_machine(problem, allow_tf32, arch):
    config = bottleneck_tail_config(problem, 2 * problem.in_channels, allow_tf32=allow_tf32)
    assert isinstance(config, TapsConfig)
    launch = plan(problem, 2 * problem.in_channels, config, allow_tf32=allow_tf32, taps_outside=True)
    usage = aot.usage(aot.compile_launch(launch, aot.pointers(launch, problem.dtype), arch))
    assert usage.spills == 0
    assert usage.registers <= 255
    assert usage.shared <= aot.SHARED_LIMITS[80]  # the settings are the same for every architecture
    if allow_tf32:
        assert usage.matrix_instruction.startswith({80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch])
