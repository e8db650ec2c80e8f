"""The Triton kernels compile for GPUs that are not here: no spills, shared memory in limits, matrix units in use.

A short list by default; `--all-configs` compiles every launch of every layer of `aot.STAGES`, for all architectures.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while its interpreter is on", allow_module_level=True)

from resnext.kernels.config import ConvProblem, TapsConfig

from . import aot
from .aot import Build, problem

HALF = (torch.bfloat16, True)
TF32 = (torch.float32, True)
FLOAT32 = (torch.float32, False)
# (channels, groups) by group width, and (op, stride, group width, dtype) of what the whole list does not add much to:
# every kernel form and pass, the widths with the most registers, and every kind of arithmetic.
WIDTHS = {4: (128, 32), 24: (192, 8), 32: (1024, 32), 64: (512, 8)}
CHOSEN = [
    *((op, stride, 4, HALF) for op in ("fwd", "dgrad", "wgrad") for stride in (1, 2)),
    *((op, stride, 32, HALF) for op in ("fwd", "dgrad", "wgrad") for stride in (1, 2)),
    ("fwd", 1, 64, HALF),
    ("dgrad", 2, 64, HALF),
    ("wgrad", 1, 64, HALF),
    ("wgrad", 2, 24, HALF),
    ("fwd", 1, 4, (torch.float16, True)),
    ("wgrad", 2, 4, (torch.float16, True)),
    ("fwd", 1, 4, TF32),
    ("dgrad", 2, 4, TF32),
    ("wgrad", 2, 4, TF32),
    ("wgrad", 1, 32, TF32),
    ("fwd", 1, 64, FLOAT32),
    ("wgrad", 1, 64, FLOAT32),
    ("dgrad", 2, 4, FLOAT32),
]
OTHER_ARCHITECTURES = [
    *(("fwd", 1, width, HALF) for width in (4, 32, 64)),
    ("dgrad", 2, 4, HALF),
    ("dgrad", 2, 64, HALF),
    ("wgrad", 2, 4, HALF),
    ("wgrad", 2, 32, HALF),
    ("wgrad", 1, 64, HALF),
    ("fwd", 1, 4, TF32),
    ("dgrad", 1, 4, TF32),
    ("fwd", 2, 32, TF32),
    ("fwd", 1, 64, FLOAT32),
]
# The same with what is fused, as `aot.FUSIONS` names it.
FORWARD, INPUT, WEIGHT = "prologue+statistics", "gradient+relu", "gradient+prologue"
FUSED = [
    *(("fwd", stride, 4, HALF, FORWARD) for stride in (1, 2)),
    *(("dgrad", stride, 4, HALF, INPUT) for stride in (1, 2)),
    *(("wgrad", stride, 4, HALF, WEIGHT) for stride in (1, 2)),
    ("dgrad", 2, 32, HALF, INPUT),
    ("wgrad", 2, 24, HALF, WEIGHT),
    ("dgrad", 1, 64, HALF, INPUT),
    ("fwd", 1, 4, HALF, "affine+residual+relu"),
    ("wgrad", 2, 4, TF32, WEIGHT),
]
FUSED_ON_OTHER_ARCHITECTURES = [
    ("fwd", 2, 4, HALF, "statistics"),
    ("dgrad", 1, 4, HALF, INPUT),
    ("dgrad", 2, 4, TF32, INPUT),
    ("wgrad", 2, 4, HALF, WEIGHT),
]


def make_build(op: str, stride: int, width: int, arithmetic: tuple[torch.dtype, bool], fusion: str = "") -> Build:
    dtype, allow_tf32 = arithmetic
    return Build(problem(op, *WIDTHS[width], 28, stride, dtype), allow_tf32, fusion)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "build" not in metafunc.fixturenames:
        return
    if metafunc.config.getoption("--all-configs"):
        pairs = [(build, arch) for arch in aot.SHARED_LIMITS for build in aot.all_builds()]
    else:
        pairs = [(make_build(*key), 90) for key in CHOSEN + FUSED]
        others = OTHER_ARCHITECTURES + FUSED_ON_OTHER_ARCHITECTURES
        pairs += [(make_build(*key), arch) for arch in (80, 100) for key in others]
    ids = [f"{build.id}-{build.problem.in_channels}x{build.problem.height}-sm{arch}" for build, arch in pairs]
    metafunc.parametrize(("build", "arch"), pairs, ids=ids)


def test_launch_compiles_within_the_machine(build, arch):
    usage = aot.measure(build, arch)
    assert usage.spills == 0
    assert usage.registers <= 255
    assert usage.shared <= aot.SHARED_LIMITS[arch]
    if build.problem.dtype != torch.float32 or build.allow_tf32:
        assert usage.matrix_instruction != "-"


@pytest.mark.parametrize(
    ("op", "stride", "fusion"),
    [("fwd", 1, ""), ("fwd", 2, ""), ("dgrad", 1, ""), ("dgrad", 2, ""), ("fwd", 1, FORWARD), ("dgrad", 1, INPUT)],
)
def test_weights_of_nchw_models_compile(op, stride, fusion):
    """The weight tiles are gathered from OIHW instead of OHWI memory."""
    nchw = dataclasses.replace(problem(op, 128, 32, 28, stride, torch.bfloat16), channels_last=False)
    build = Build(nchw, fusion=fusion)
    assert build.launch.constants["TAPS_OUTSIDE"] is False
    assert aot.measure(build, 90).spills == 0


@pytest.mark.parametrize("op", ["fwd", "dgrad", "wgrad"])
def test_mixed_strides_compile(op):
    """Narrow groups at stride (2, 1) take the taps kernels with merged groups, which no layer of the list does."""
    build = Build(ConvProblem(op, 8, 128, 128, 28, 28, (2, 1), 32, torch.bfloat16, "cuda", True))
    assert isinstance(build.config, TapsConfig)
    assert build.config.merged == 4
    assert aot.measure(build, 90).spills == 0


@pytest.mark.parametrize(
    ("op", "stride", "fusion"),
    [
        *((op, stride, "") for op in ("fwd", "dgrad", "wgrad") for stride in ((1, 1), (2, 2), (1, 2))),
        ("fwd", (1, 1), FORWARD),
        ("dgrad", (2, 2), INPUT),
        ("dgrad", (1, 2), INPUT),
        ("wgrad", (1, 1), WEIGHT),
    ],
    ids=str,
)
def test_sizes_of_one_compile(op, stride, fusion):
    """Triton turns arguments that are 1 into constants, on which some operations of run-time values do not exist."""
    build = Build(ConvProblem(op, 1, 1, 1, 1, 1, stride, 1, torch.float16, "cuda", True), fusion=fusion)
    assert "EXIT" in aot.machine_code(aot.compile_launch(build.launch, aot.pointers(build.launch, torch.float16), 90))


@pytest.mark.parametrize("channels", [15, 18, 24], ids=["odd", "even", "multiple-of-8"])
def test_any_channel_count_compiles(channels):
    """Channel counts that no vector load divides, three groups wide and with lanes to spare."""
    for op in ("fwd", "wgrad"):
        build = Build(ConvProblem(op, 2, channels, channels, 9, 9, (1, 1), 3, torch.float16, "cuda", True))
        assert aot.measure(build, 90).matrix_instruction != "-"
