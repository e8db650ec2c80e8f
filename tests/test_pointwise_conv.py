"""The Triton kernels of the 1x1 convolution: numbers, corner cases, launch settings, machine code.

The numbers come from a GPU or else from Triton's interpreter, which must be chosen before Triton is first imported:
without a GPU `test_in_the_interpreter` runs this file in a process of its own. The machine code needs no GPU.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from resnext.kernels.candidates import pointwise_candidates
from resnext.kernels.config import (
    ConvProblem,
    PointwiseConfig,
    fits_descriptors,
    pointwise_by_triton,
    pointwise_config,
)

from .fused_numerics import (
    POINTWISE_CASES,
    Arithmetic,
    FusedCase,
    assert_statistics,
    check_conv_affine,
    check_conv_stats,
    make,
    make_affine,
)
from .interpreter import DEVICE, arithmetic, compiles, here, not_here, run_tests

pytest.importorskip("triton")

from resnext.kernels import pointwise_conv

from . import aot

OPS = ("fwd", "dgrad", "wgrad")
BY_ID = {case.id: case for case in POINTWISE_CASES}


@not_here
def test_in_the_interpreter():
    run_tests(__file__, timeout=600)


def launchers(allow_tf32: bool = False, **configs: PointwiseConfig) -> SimpleNamespace:
    """The launchers without TF32 unless asked for, and with given settings of some passes."""
    forward = {"config": configs.get("fwd"), "allow_tf32": allow_tf32}
    backward = {"dgrad_config": configs.get("dgrad"), "wgrad_config": configs.get("wgrad"), "allow_tf32": allow_tf32}
    return SimpleNamespace(
        conv_stats_fwd=functools.partial(pointwise_conv.conv_stats_fwd, **forward),
        conv_stats_bwd=functools.partial(pointwise_conv.conv_stats_bwd, **backward),
        conv_affine=functools.partial(pointwise_conv.conv_affine, **forward),
    )


@here
@pytest.mark.parametrize("case", POINTWISE_CASES, ids=lambda case: case.id)
def test_every_case(case):
    check_conv_stats(launchers(), case, device=DEVICE)
    check_conv_affine(launchers(), case, device=DEVICE)


@here
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["odd-channels", "stride2", "more-rows-than-a-block"])
def test_half_precision(case, dtype):
    options = {"arithmetic": arithmetic(dtype), "device": DEVICE}
    check_conv_stats(launchers(), BY_ID[case], dtype, **options)
    check_conv_affine(launchers(), BY_ID[case], dtype, **options)


@here
def test_tf32():
    options = {"arithmetic": Arithmetic(u_acc=2.0**-11), "device": DEVICE}
    check_conv_stats(launchers(allow_tf32=True), BY_ID["stride2"], **options)
    check_conv_affine(launchers(allow_tf32=True), BY_ID["wide"], **options)


@here
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize(
    "parts",
    [
        {"prologue": False},
        {"prologue": False, "stats": False},
        {"stats": False, "centered": False},
        {"weight_channels_last": True},
    ],
    ids=lambda parts: "-".join(parts),
)
def test_parts_of_the_training_launchers(parts, channels_last):
    check_conv_stats(launchers(), BY_ID["stride2"], channels_last=channels_last, device=DEVICE, **parts)


@here
@pytest.mark.parametrize(
    "parts",
    [
        {"scaled": False},
        {"shifted": False, "residual": False},
        {"relu": False},
        {"scaled": False, "shifted": False, "residual": False, "relu": False},
        {"channels_last": False},
    ],
    ids=lambda parts: "-".join(parts),
)
def test_parts_of_the_inference_launcher(parts):
    check_conv_affine(launchers(), BY_ID["odd-channels"], device=DEVICE, **parts)


def gradient_operands(case: FusedCase) -> tuple:
    """dz, what its prologue takes, x, its affine and the weight; what `conv_stats_bwd` takes first."""
    generator = torch.Generator().manual_seed(0)
    options = {"channels_last": True, "device": DEVICE}
    x = make((case.batch, case.in_channels, case.height, case.width), torch.float16, generator, **options)
    weight = make((case.out_channels, case.in_channels, 1, 1), torch.float16, generator, device=DEVICE)
    dz, z = (make(case.output_shape, torch.float16, generator, **options) for _ in range(2))
    vectors = [make((case.out_channels,), torch.float32, generator, device=DEVICE) for _ in range(3)]
    affine = make_affine(case.in_channels, generator, device=DEVICE)
    return dz, (z, *vectors), x, affine, weight, case.stride, 1, True, (True, True)


@here
@pytest.mark.parametrize("case", ["odd-channels", "stride2"])
def test_a_gradient_that_is_scaled_on_load(case):
    """By powers of two: the same bits as of what was scaled before."""
    dz, *others = gradient_operands(BY_ID[case])
    scale = 2.0 ** torch.randint(-3, 3, (dz.shape[1],), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = pointwise_conv.conv_stats_bwd(dz * scale[:, None, None].half(), *others)
    for got, wanted in zip(pointwise_conv.conv_stats_bwd(dz, *others, grad_scale=scale), expected, strict=True):
        assert torch.equal(got, wanted)


@here
@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("case", ["odd-channels", "stride2"])
def test_a_gradient_that_is_added_to_another(case, prologue):
    *before, affine, weight, stride, groups, channels_last, wanted = gradient_operands(BY_ID[case])
    others = (affine if prologue else None, weight, stride, groups, channels_last, wanted)
    dx, *vectors_and_dw = pointwise_conv.conv_stats_bwd(*before, *others)
    held = make(tuple(dx.shape), torch.float16, torch.Generator().manual_seed(2), channels_last=True, device=DEVICE)
    sums = held.float() + dx.float()
    got, *rest = pointwise_conv.conv_stats_bwd(*before, *others, onto=held)
    assert got is held
    # One rounding where there were two.
    torch.testing.assert_close(got.float(), sums, rtol=2.0**-10, atol=2.0**-11 * dx.abs().max().item())
    unseen = (dx == 0) & (sums == held.float())
    assert torch.equal(got[unseen].float(), sums[unseen])
    for result, wanted_result in zip(rest, vectors_and_dw, strict=True):
        assert result is wanted_result is None or torch.equal(result, wanted_result)


VARIANTS = {
    "block_m-16": {"block_m": 16},
    "block_m-32-num_warps-8": {"block_m": 32, "num_warps": 8},
    "block_n-16": {"block_n": 16},
    "block_n-128-num_stages-1": {"block_n": 128, "num_stages": 1},
    "block_k-16-num_stages-3": {"block_k": 16, "num_stages": 3},
    "block_k-64": {"block_k": 64},
    "walkers-1": {"walkers": 1},
    "walkers-2-block_m-16": {"walkers": 2, "block_m": 16},
    "walkers-more-than-work": {"walkers": 99, "block_k": 16},
    "splits-3": {"splits": 3, "block_m": 16},
    "splits-more-than-work": {"splits": 7},
}


@here
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_setting(changes):
    case = BY_ID["stride2"]
    sizes = (case.batch, case.in_channels, case.out_channels, case.height, case.width, case.stride)
    configs = {}
    for op in OPS:
        config = pointwise_config(ConvProblem(op, *sizes, 1, torch.float32, DEVICE, True))
        configs[op] = replace(config, **(changes if op == "wgrad" else {**changes, "splits": 1}))
    check_conv_stats(launchers(**configs), case, device=DEVICE)


def described(case, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """The launchers with tensor descriptors wherever these serve the case."""
    sizes = (case.batch, case.in_channels, case.out_channels, case.height, case.width, case.stride)
    problems = {op: ConvProblem(op, *sizes, 1, dtype, DEVICE, True) for op in OPS}
    configs = {op: pointwise_config(problem) for op, problem in problems.items()}
    configs = {op: replace(c, tensor_descriptors=fits_descriptors(problems[op])) for op, c in configs.items()}
    assert configs["dgrad"].tensor_descriptors
    return launchers(**configs)


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["odd-channels", "stride2", "one-pixel", "more-rows-than-a-block", "wide"])
def test_tensor_descriptors(case, dtype):
    """Blocks that reach beyond pixels and channels, and an input gradient with strides."""
    options = {"arithmetic": arithmetic(dtype), "device": DEVICE}
    check_conv_stats(described(BY_ID[case], dtype), BY_ID[case], dtype, **options)
    if BY_ID[case].stride == (1, 1):
        check_conv_affine(described(BY_ID[case], dtype), BY_ID[case], dtype, **options)


@here
def test_tensors_that_descriptors_do_not_reach():
    """Views that start in the middle of 16 bytes: the same result by pointers."""
    case = BY_ID["odd-channels"]
    generator = torch.Generator().manual_seed(0)
    weight = make((40, 24, 1, 1), torch.float32, generator, device=DEVICE)
    x = make((2, 24, 5, 7), torch.float32, generator, channels_last=True, device=DEVICE)
    shifted = torch.empty(weight.numel() + 1, device=DEVICE)[1:].view_as(weight).copy_(weight)
    assert shifted.data_ptr() % 16
    results = [described(case).conv_stats_fwd(x, None, w, (1, 1), 1, True, False)[0] for w in (weight, shifted)]
    assert torch.equal(*results)


def test_tensor_descriptors_where_rows_are_aligned():
    for op, in_channels, out_channels, stride, dtype, wanted in (
        ("fwd", 8, 3, 1, torch.float16, True),
        ("fwd", 4, 8, 1, torch.float16, False),
        ("fwd", 4, 8, 1, torch.float32, True),
        ("fwd", 64, 64, 2, torch.float16, False),
        ("dgrad", 64, 64, 2, torch.float16, True),
        ("dgrad", 64, 60, 1, torch.float16, False),
        ("dgrad", 60, 64, 1, torch.float16, False),
        ("wgrad", 64, 64, 1, torch.float16, True),
        ("wgrad", 64, 64, 2, torch.float16, False),
        ("wgrad", 64, 60, 1, torch.float16, False),
        ("wgrad", 60, 64, 1, torch.float16, False),
    ):
        problem = make_problem(op, in_channels, out_channels, stride=stride, dtype=dtype)
        assert fits_descriptors(problem) == wanted
        described = [config for config in pointwise_candidates(problem) if config.tensor_descriptors]
        assert bool(described) == wanted
        assert not any(config.tensor_descriptors for config in pointwise_candidates(problem, arch=80))
        if not wanted:
            config = replace(pointwise_config(problem), tensor_descriptors=True)
            with pytest.raises(ValueError, match="conv2d 1x1: expected a problem that tensor descriptors serve"):
                pointwise_conv.plan(problem, config, allow_tf32=True)


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_small_integers_are_exact(dtype):
    """Sums of small integers are exact in float32, and small enough here for every dtype to hold them."""
    generator = torch.Generator().manual_seed(0)
    options = {"dtype": dtype, "generator": generator, "integers": True, "device": DEVICE}
    x, weight = make((2, 20, 5, 6), channels_last=True, **options), make((12, 20, 1, 1), **options)
    dz = make((2, 12, 3, 6), channels_last=True, **options)
    place = ((2, 1), 1, True)
    z, _, _ = launchers().conv_stats_fwd(x, None, weight, *place, True)
    dx, _, _, dw = launchers().conv_stats_bwd(dz, None, x, None, weight, *place, (True, True))
    x, weight, dz = (tensor.double().cpu().requires_grad_() for tensor in (x, weight, dz))
    wanted = F.conv2d(x, weight, stride=place[0])
    gradients = torch.autograd.grad(wanted, (x, weight), dz)
    for result, exact in zip((z, dx, dw), (wanted, *gradients), strict=True):
        assert exact.abs().max() <= 256
        assert torch.equal(result.cpu().double(), exact)


@here
@pytest.mark.parametrize("pixels", [(4, 8), (5, 27)], ids=["whole-block", "ragged"])
def test_statistics_of_a_constant_channel_and_of_a_far_mean(pixels):
    """Channel 0 is constant; channel 1 has mean 1e3 and standard deviation 1e-2, about 160 steps of float32."""
    generator = torch.Generator().manual_seed(0)
    x = make((2, 2, *pixels), torch.float32, generator, channels_last=True)
    x[:, 0] = 1.1
    x[:, 1] = 1e3 + 1e-2 * x[:, 1]
    weight = torch.eye(2)[:, :, None, None]
    z, mean, var = launchers().conv_stats_fwd(x.to(DEVICE), None, weight.to(DEVICE), (1, 1), 1, True, True)
    assert torch.equal(z.cpu(), x)
    assert_statistics(z, mean, var)


@here
def test_a_nan_or_inf_keeps_to_its_pixel_and_its_channel():
    """Of x: the pixel's outputs, and the input channel's weight gradients. Of a prologue: the channel's."""
    generator = torch.Generator().manual_seed(0)
    x = make((1, 8, 3, 5), torch.float32, generator, channels_last=True, device=DEVICE)
    weight = make((8, 8, 1, 1), torch.float32, generator, device=DEVICE)
    dz = make((1, 8, 3, 5), torch.float32, generator, channels_last=True, device=DEVICE)
    x[0, 3, 1, 2] = float("nan")
    vectors = torch.zeros(8, device=DEVICE), torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    z, _, _ = launchers().conv_stats_fwd(x, vectors, weight, (1, 1), 1, True, False)
    bad = z.isnan().any(1)[0]
    assert bad[1, 2]
    assert bad.sum() == 1
    dx, dscale, dshift, dw = launchers().conv_stats_bwd(dz, None, x, vectors, weight, (1, 1), 1, True, (True, True))
    assert dx.isfinite().all()  # scale * t, and ReLU's mask lets the gradient of a NaN pass
    assert dscale.isnan().nonzero().flatten().tolist() == [3]
    assert dshift.isfinite().all()
    assert dw.isnan().any((0, 2, 3)).nonzero().flatten().tolist() == [3]
    dead_center = torch.zeros(8, device=DEVICE)
    dead_center[5] = float("inf")
    _, dscale, dshift, dw = launchers().conv_stats_bwd(
        dz, None, x.nan_to_num(), (dead_center, *vectors[1:]), weight, (1, 1), 1, True, (True, True)
    )
    assert torch.equal(dscale.isfinite(), dead_center.isfinite())
    assert dshift.isfinite().all()
    assert dw.isfinite().all()


def make_problem(op, in_channels, out_channels, *, batch=256, size=(56, 56), stride=1, dtype=torch.bfloat16):
    return ConvProblem(op, batch, in_channels, out_channels, *size, (stride, stride), 1, dtype, "cuda", True)


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@pytest.mark.parametrize("op", OPS)
def test_settings_are_valid_for_every_size(op):
    for channels in (1, 3, 16, 24, 64, 100, 256, 2048, 7392):
        for dtype, allow_tf32 in ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False)):
            for batch, size in ((1, (1, 1)), (256, (56, 56)), (2**20, (7, 9))):
                problem = make_problem(op, channels, 2 * channels, batch=batch, size=size, dtype=dtype)
                for config in pointwise_candidates(problem, allow_tf32=allow_tf32, num_sms=16):
                    assert min(config.block_m, config.block_n, config.block_k) >= 16
                    assert all(map(is_power_of_two, (config.block_m, config.block_n, config.block_k)))
                    assert config.num_warps in (4, 8)
                    assert config.num_stages in (2, 3, 4)
                    assert config.splits >= 1
                    assert config.splits == 1 or op == "wgrad"
                    assert config.walkers is None or (op == "fwd" and config.walkers >= 1)


def test_candidates_begin_with_the_heuristics_choice():
    problem = make_problem("fwd", 128, 256)
    configs = pointwise_candidates(problem, affine=True)
    assert configs[0] == pointwise_config(problem, affine=True) != pointwise_config(problem)
    assert len(configs) == len(set(configs)) > 10


def test_more_multiprocessors_never_get_fewer_programs():
    problem = make_problem("wgrad", 256, 128)
    splits = [pointwise_config(problem, num_sms=num_sms).splits for num_sms in (1, 16, 132, 512)]
    assert splits == sorted(splits)


@pytest.mark.parametrize("op", OPS)
def test_triton_serves_what_memory_limits(op):
    """Of ResNeXt-50's stages the first, in float32 and in inference the second too."""
    stages = (128, 256, 512, 1024)
    for options, wanted in (({}, 1), ({"dtype": torch.float32}, 2)):
        served = [pointwise_by_triton(make_problem(op, width, 2 * width, **options)) for width in stages]
        assert served == [True] * wanted + [False] * (4 - wanted)
    served = [pointwise_by_triton(make_problem("fwd", width, 2 * width), affine=True) for width in stages]
    assert served == [True, True, False, False]


def test_too_many_pixels_are_refused():
    problem = make_problem("fwd", 8, 8, batch=2**20, size=(64, 64))
    with pytest.raises(
        ValueError, match=r"conv2d 1x1: expected at most 2147418112 pixels and programs .* got 4294967296"
    ):
        pointwise_conv.plan(problem, pointwise_config(problem), allow_tf32=True)


# Pointers of what is computed besides, by pass.
X = "x_center_ptr x_scale_ptr x_shift_ptr"
Z = "grad_scale_ptr z_ptr z_center_ptr z_scale_ptr z_shift_ptr"
FUSIONS = {
    "fwd-statistics": "partials_ptr",
    "fwd-prologue+statistics": f"{X} partials_ptr",
    "fwd-affine+relu": "y_scale_ptr y_shift_ptr",
    "fwd-affine+residual+relu": "y_scale_ptr y_shift_ptr residual_ptr",
    "dgrad-gradient": Z,
    "dgrad-gradient+relu": f"{Z} x_ptr {X} partials_ptr",
    "wgrad-gradient": Z,
    "wgrad-gradient+prologue": f"{Z} {X}",
}
MOST_OPERANDS = ("fwd-prologue+statistics", "dgrad-gradient+relu", "wgrad-gradient+prologue")
ARITHMETIC = {
    "bfloat16": (torch.bfloat16, True),
    "float16": (torch.float16, True),
    "tf32": (torch.float32, True),
    "float32": (torch.float32, False),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arch" not in metafunc.fixturenames:
        return
    if metafunc.config.getoption("--all-configs"):
        cases = list(itertools.product(FUSIONS, ARITHMETIC, (1, 2), sorted(aot.SHARED_LIMITS)))
    else:
        cases = [(fusion, "bfloat16", 1, 90) for fusion in FUSIONS]
        cases += [(fusion, "bfloat16", 2, arch) for fusion in MOST_OPERANDS for arch in (80, 100)]
        cases += [(fusion, "tf32", 2, 90) for fusion in MOST_OPERANDS]
        cases += [("dgrad-gradient+relu", "float32", 1, 90), ("dgrad-gradient+relu", "tf32", 2, 80)]
    metafunc.parametrize(("fusion", "name", "stride", "arch"), cases)


def compiled(problem: ConvProblem, fusion: str, arch: int, allow_tf32: bool = True) -> aot.Usage:
    affine = "affine" in fusion
    config = pointwise_config(problem, affine=affine, allow_tf32=allow_tf32, arch=arch)
    fused = frozenset(FUSIONS[fusion].split())
    options = {"relu": affine, "adds": problem.op == "dgrad"}
    launch = pointwise_conv.plan(problem, config, allow_tf32=allow_tf32, fused=fused, **options)
    return aot.usage(aot.compile_launch(launch, aot.pointers(launch, problem.dtype), arch))


@compiles
def test_launch_compiles_within_the_machine(fusion, name, stride, arch):
    """Channels as in ResNeXt-50's second stage; `--all-configs` for every architecture and arithmetic."""
    dtype, allow_tf32 = ARITHMETIC[name]
    problem = make_problem(fusion.partition("-")[0], 256, 512, stride=stride, dtype=dtype)
    usage = compiled(problem, fusion, arch, allow_tf32)
    assert usage.spills == 0
    assert usage.registers <= 255
    assert usage.shared <= aot.SHARED_LIMITS[90 if arch == 90 else 80]  # all but Hopper's have the same settings
    if allow_tf32:
        assert usage.matrix_instruction.startswith({80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch])


@compiles
@pytest.mark.parametrize("fusion", MOST_OPERANDS)
def test_odd_sizes_compile(fusion):
    """Sizes of 1, which Triton makes constants, and channel counts that no vector load divides."""
    op = fusion.partition("-")[0]
    for problem in (
        make_problem(op, 1, 1, batch=1, size=(1, 1), stride=2),
        make_problem(op, 24, 15, batch=3, size=(5, 7), stride=2),
    ):
        assert compiled(problem, fusion, 90).spills == 0
