"""The Triton kernels of a network's first convolution: numbers, corner cases, dispatch, machine code.

The numbers come from a GPU or else from Triton's interpreter, which must be chosen before Triton is first imported:
without a GPU `test_in_the_interpreter` runs this file in a process of its own. The machine code needs no GPU.
"""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace

import pytest
import torch

from resnext.kernels import dispatch
from resnext.kernels.config import ConvProblem, fits_stem

from .fused_numerics import Arithmetic, FusedCase, check_conv_affine, check_conv_stats, make
from .interpreter import DEVICE, arithmetic, compiles, here, not_here, run_tests

pytest.importorskip("triton")

from resnext.kernels import pointwise_conv, stem_conv
from resnext.kernels.config import Norm

CASES = [
    FusedCase("resnet", 2, 3, 64, 22, 18, kernel=7, stride=(2, 2)),
    FusedCase("odd-rows", 2, 3, 20, 9, 11, kernel=7, stride=(2, 2)),  # one element at a time
    FusedCase("cifar", 2, 3, 24, 9, 8, kernel=3),
    FusedCase("regnet", 3, 3, 32, 12, 10, kernel=3, stride=(2, 2)),
    FusedCase("one-channel", 2, 1, 16, 9, 8, kernel=7, stride=(2, 2)),
    FusedCase("four-channels", 1, 4, 80, 7, 9, kernel=7, stride=(2, 1)),  # two blocks of channels
    FusedCase("two-channels-5x5", 2, 2, 16, 6, 7, kernel=5, stride=(1, 2)),
    FusedCase("one-pixel", 3, 3, 16, 1, 1, kernel=7, stride=(2, 2)),
    FusedCase("narrower-than-the-kernel", 2, 3, 16, 5, 2, kernel=7, stride=(2, 2)),
]
BY_ID = {case.id: case for case in CASES}
HALF = [torch.float16, torch.bfloat16]


@not_here
def test_in_the_interpreter():
    run_tests(__file__, timeout=600)


def launchers(allow_tf32: bool = False) -> SimpleNamespace:
    names = ("conv_stats_fwd", "conv_stats_bwd", "conv_affine")
    return SimpleNamespace(
        **{name: functools.partial(getattr(stem_conv, name), allow_tf32=allow_tf32) for name in names}
    )


@here
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_case(case):
    check_conv_stats(launchers(), case, prologue=False, device=DEVICE)
    check_conv_affine(launchers(), case, device=DEVICE)


@here
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_half_precision(case, dtype):
    options = {"arithmetic": arithmetic(dtype), "device": DEVICE}
    check_conv_stats(launchers(), case, dtype, prologue=False, weight_channels_last=True, **options)
    check_conv_affine(launchers(), case, dtype, **options)


@here
def test_tf32():
    options = {"arithmetic": Arithmetic(u_acc=2.0**-11), "device": DEVICE}
    check_conv_stats(launchers(allow_tf32=True), BY_ID["cifar"], prologue=False, **options)


@here
def test_with_a_prologue():
    """Images have none; what has one all the same is served."""
    check_conv_stats(launchers(), BY_ID["cifar"], device=DEVICE, stores=2)


@here
@pytest.mark.parametrize("parts", [{"scaled": False, "residual": False}, {"shifted": False, "relu": False}], ids=str)
def test_parts_of_the_inference_launcher(parts):
    check_conv_affine(launchers(), BY_ID["regnet"], torch.float16, device=DEVICE, **parts)


def operands(case: FusedCase, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, dz."""
    generator = torch.Generator().manual_seed(0)
    options = {"channels_last": True, "device": DEVICE}
    x = make((case.batch, case.in_channels, case.height, case.width), dtype, generator, **options)
    weight = make((case.out_channels, case.in_channels, case.kernel, case.kernel), dtype, generator, **options)
    return x, weight, make(case.output_shape, dtype, generator, **options)


@here
@pytest.mark.parametrize("case", ["resnet", "cifar"])
def test_nan_stays_where_it_is_seen(case):
    """Elements beside a window are loaded with it, and count for nothing."""
    case = BY_ID[case]
    x, weight, dz = operands(case)
    place = (weight, case.stride, 1, True)
    clean = stem_conv.conv_stats_fwd(x, None, *place, False)[0]
    poisoned = x.clone()
    poisoned[0, :, 4, 5] = float("nan")
    dirty = stem_conv.conv_stats_fwd(poisoned, None, *place, False)[0]
    seen = torch.nn.functional.conv2d(
        poisoned.isnan().any(1, keepdim=True).double(),
        torch.ones(1, 1, case.kernel, case.kernel, dtype=torch.float64, device=DEVICE),
        stride=case.stride,
        padding=case.kernel // 2,
    ).expand(dirty.shape)
    assert dirty[seen > 0].isnan().all()
    assert torch.equal(dirty[seen == 0], clean[seen == 0])
    dz = dz.masked_fill(seen > 0, 0.0)
    dw = stem_conv.conv_stats_bwd(dz[1:], None, poisoned[1:], None, *place, (False, True))[3]
    assert dw.isfinite().all()


@here
def test_addresses_that_are_no_multiple_of_four():
    x, weight, _ = operands(BY_ID["resnet"])
    expected = stem_conv.conv_stats_fwd(x, None, weight, (2, 2), 1, True, False)[0]
    moved = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:]
    moved = moved.as_strided(x.shape, x.stride()).copy_(x)
    assert moved.data_ptr() % 4 == 2
    assert torch.equal(stem_conv.conv_stats_fwd(moved, None, weight, (2, 2), 1, True, False)[0], expected)


@here
def test_with_a_batch_norm():
    x, weight, _ = operands(BY_ID["resnet"])
    gamma, beta = torch.randn(2, 64, device=DEVICE)
    z, mean, var, scale, shift = stem_conv.conv_norm_fwd(x, None, weight, (2, 2), 1, True, Norm(gamma, beta, 1e-5))
    expected = stem_conv.conv_stats_fwd(x, None, weight, (2, 2), 1, True, True)
    assert all(map(torch.equal, (z, mean, var), expected))
    torch.testing.assert_close(scale, gamma * (var + 1e-5).rsqrt())
    assert torch.equal(shift, beta)


@here
def test_unrounded_gradient():
    case = BY_ID["regnet"]
    x, weight, dz = operands(case)
    arguments = (dz, None, x, None, weight, case.stride, 1, True, (False, True))
    dw = stem_conv.conv_stats_bwd(*arguments, deferred=True)[3]
    assert dw.dtype == torch.float32
    assert torch.equal(dw.half(), stem_conv.conv_stats_bwd(*arguments)[3])


# --- dispatch ---


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"weight_shape": (32, 3, 3, 3)}, True),
        ({"weight_shape": (64, 3, 1, 7)}, True),
        ({"input_shape": (2, 4, 224, 224), "weight_shape": (64, 4, 7, 7)}, True),
        ({"input_shape": (2, 5, 224, 224), "weight_shape": (64, 5, 3, 3)}, False),
        ({"weight_shape": (64, 3, 11, 11)}, False),
        ({"weight_shape": (64, 3, 1, 1)}, False),
        ({"input_shape": (2, 4, 8, 8), "weight_shape": (4, 1, 3, 3), "groups": 4}, False),
        ({"channels_last": False}, False),
        ({"dtype": torch.float64}, False),
        ({"input_shape": (1, 3, 2**15, 2**15)}, False),
    ],
)
def test_what_is_a_stem(changes, fits):
    usual = {"input_shape": (2, 3, 224, 224), "weight_shape": (64, 3, 7, 7), "groups": 1}
    usual |= {"dtype": torch.bfloat16, "channels_last": True}
    assert fits_stem(**(usual | changes)) == fits


@pytest.mark.parametrize(
    ("dtype", "channels_last", "served"),
    [(torch.bfloat16, True, True), (torch.float32, True, False), (torch.bfloat16, False, False)],
)
def test_who_serves_it_on_a_gpu(monkeypatch, dtype, channels_last, served):
    monkeypatch.setattr(dispatch, "unsupported", lambda name, dtype, device: None if name == "triton" else "no")
    monkeypatch.setattr(dispatch, "measured", lambda *args: None)
    dispatch._fused_launchers.cache_clear()
    problem = ("fwd", (2, 3, 64, 64), (64, 3, 7, 7), (2, 2), 1, dtype, torch.device("cuda"), channels_last)
    try:
        assert (dispatch.fused_launchers(*problem) is stem_conv) == served
        dense = ("fwd", (2, 64, 8, 8), (64, 64, 1, 1), (1, 1), 1, torch.bfloat16, torch.device("cuda"), True)
        assert dispatch.fused_launchers(*dense) is pointwise_conv
    finally:
        dispatch._fused_launchers.cache_clear()


# --- machine code ---

FUSED = {
    "fwd": [("partials_ptr",), ("y_scale_ptr", "y_shift_ptr"), ()],
    "wgrad": [("z_ptr", "z_center_ptr", "z_scale_ptr", "z_shift_ptr")],
}


@compiles
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("op", ["fwd", "wgrad"])
@pytest.mark.parametrize(
    ("size", "channels", "kernel", "stride", "dtype"),
    [
        (224, 64, 7, 2, torch.bfloat16),
        (224, 32, 3, 2, torch.bfloat16),
        (32, 64, 3, 1, torch.float16),
        (224, 64, 7, 2, torch.float32),
    ],
)
def test_no_spills(size, channels, kernel, stride, dtype, op, arch):
    from . import aot

    problem = ConvProblem(op, 256, 3, channels, size, size, (stride, stride), 1, dtype, "cuda", True)
    for fused in FUSED[op]:
        relu = "y_scale_ptr" in fused
        launch = stem_conv.plan(problem, (kernel, kernel), allow_tf32=True, fused=frozenset(fused), relu=relu)
        narrow = ("x_ptr", "weight_ptr", "y_ptr", "grad_ptr", "z_ptr")
        names = [name for name in launch.kernel.arg_names if name.endswith("_ptr") and name not in launch.constants]
        tensors = {name: dtype if name in narrow else torch.float32 for name in names}
        kernel_ = aot.compile_launch(launch, tensors, arch)
        code = aot.machine_code(kernel_)
        assert "EXIT" in code
        assert not re.findall(r"\b(?:STL|LDL)\b", code), "registers spill"
        assert kernel_.metadata.shared <= aot.SHARED_LIMITS[arch]
