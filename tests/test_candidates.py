"""Launch settings worth measuring: that every form is among them, that they compile, and that they compute right.

The numbers come from a GPU or else from Triton's interpreter, in a process of its own, as in test_triton_numerics.py.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from ahead_of_time import (
    SHARED_LIMITS,
    Usage,
    compile_launch,
    describe,
    exceeds,
    machine_code,
    pointers,
    specialization,
    usage,
)
from shapes import Layer
from targets import Gate, Target, resources

from resnext.kernels.candidates import candidates
from resnext.kernels.config import StripsConfig, TapsConfig

from .interpreter import DEVICE, INTERPRETED, compiles, here, not_here, run_tests

CPU = torch.device("cpu")
STAGE1 = Layer(128, 128, 56, 56, 1, 32)
STRIDED = Layer(256, 256, 56, 56, 2, 32)
STAGE4 = Layer(1024, 1024, 7, 7, 1, 32)
WIDE = Layer(512, 512, 14, 14, 1, 8)
POINTWISE = Layer(128, 256, 56, 56, 1, 1)


def target(layer, fusion="plain", op="fwd", kernel_size=3, dtype=torch.bfloat16, batch=256, device="cuda"):
    return Target(layer, kernel_size, fusion, op, batch, dtype, device)


def pick(of: Target, **settings):
    """The first candidate with these settings."""
    configs = of.candidates(CPU)
    return next(c for c in configs if all(getattr(c, name, None) == value for name, value in settings.items()))


@pytest.mark.parametrize("op", ["fwd", "dgrad", "wgrad"])
@pytest.mark.parametrize("layer", [STAGE1, STRIDED, STAGE4], ids=lambda layer: layer.name)
def test_narrow_groups_have_every_form(layer, op):
    configs = target(layer, op=op).candidates(CPU)
    strips = [config for config in configs if isinstance(config, StripsConfig)]
    assert {config.strip for config in strips} == {1, 2, 4}
    assert {config.num_stages for config in strips} == ({2, 3} if op == "wgrad" else {2, 3, 4})
    tiles = {(16, 1), (32, 2), (16, 2) if layer is STAGE4 else (32, 1)}
    assert {(config.block_m, config.num_warps) for config in strips} >= tiles
    assert ((64, 4) in {(config.block_m, config.num_warps) for config in strips}) == (layer is STAGE4)
    widths = {config.merged * layer.group_width for config in strips}
    assert widths == ({32} if layer is STAGE4 else {16, 32})  # channels: rows of 32 and of 64 bytes
    assert len({config.splits if op == "wgrad" else config.band for config in strips}) > 1
    assert sum(isinstance(config, TapsConfig) for config in configs) >= 5


def test_wide_groups_have_tiles_no_wider_than_a_group():
    configs = target(WIDE).candidates(CPU)
    assert all(isinstance(config, TapsConfig) for config in configs)
    assert {config.block_n for config in configs} == {32, 64}
    assert {config.num_stages for config in configs} == {2, 3, 4}


def test_operands_move_where_the_machine_can():
    """Into registers for wgmma where a load left them elsewhere; by descriptors where there are some."""
    for of, arch, wanted in (
        (target(STAGE4), 90, True),
        (target(STAGE4, "affine"), 90, True),
        (target(STAGE4, "stats"), 90, False),
        (target(STAGE4), 80, False),
        (target(STAGE4), 100, False),
        (target(STAGE1), 90, False),
        (target(STAGE4, op="wgrad"), 90, False),
    ):
        configs = candidates(of.problem, fusion=of.fusion, arch=arch)
        moved = [config for config in configs if getattr(config, "source_in_registers", False)]
        assert bool(moved) == wanted
        assert all((config.block_m, config.num_warps) == (64, 4) for config in moved)


def test_strips_of_two_warps_may_use_all_registers():
    """Where much is computed besides; one warp has them there anyway."""
    for fusion, dtype, limits in (
        ("plain", torch.bfloat16, {1: {None}, 2: {None}}),
        ("affine", torch.bfloat16, {1: {None}, 2: {None}}),
        ("stats", torch.bfloat16, {1: {255}, 2: {None, 255}}),
        ("plain", torch.float32, {1: {255}, 2: {None, 255}}),
    ):
        strips = [c for c in target(STAGE1, fusion, dtype=dtype).candidates(CPU) if isinstance(c, StripsConfig)]
        for num_warps, limit in limits.items():
            assert {config.max_registers for config in strips if config.num_warps == num_warps} == limit


def test_what_exceeds_the_machine():
    assert exceeds(Usage(255, 1000, 0, "-"), 1000) is None
    assert exceeds(Usage(255, 1001, 0, "-"), 1000) == "1001 bytes of shared memory, of 1000"
    assert exceeds(Usage(255, 0, 3, "-"), 1000) == "3 spills"


def test_settings_in_words():
    strips = dataclasses.replace(target(STAGE1).candidates(CPU)[0], max_registers=255, source_in_registers=True)
    words = "strips merged 4 M 16 strip 4 warps 1 stages 3"
    assert describe(strips) == f"{words} registers 255 source in registers"
    described = pick(
        target(POINTWISE, "stats", "dgrad", kernel_size=1),
        block_k=64,
        block_n=128,
        num_stages=3,
        tensor_descriptors=True,
    )
    assert describe(described) == "M 64 N 128 K 64 warps 4 stages 3 tensor descriptors"


def test_launches_that_share_a_kernel_are_told_from_others():
    of = target(STAGE1)
    kernels = {config: specialization(of.launch(config), of.dtype) for config in of.candidates(CPU)}
    heights = [config for config in kernels if isinstance(config, StripsConfig) and config.strip == 1]
    heights = [config for config in heights if config.merged == 4]
    assert len(set(kernels.values())) < len(kernels)
    assert len({kernels[config] for config in heights}) == 9


TWO_WARPS = {"strip": 4, "block_m": 32, "num_warps": 2, "num_stages": 3}
# Settings that no heuristic chooses, of every kernel; and what comes of them: whether they fit, and the instruction.
COMPILED = {
    "rows": (target(STAGE1), {"strip": 1, "block_m": 32, "num_warps": 2, "num_stages": 3}, True, "HMMA"),
    "strips-2": (target(STAGE1, "stats"), {"strip": 2, "block_m": 16, "num_warps": 1, "num_stages": 4}, True, "HMMA"),
    "too-many-registers": (target(STAGE1), {"strip": 4, "block_m": 32, "num_warps": 1, "num_stages": 2}, False, "HMMA"),
    "two-warps": (target(STAGE1, "stats"), TWO_WARPS | {"max_registers": 255}, True, "HMMA"),
    "two-warps-unlimited": (target(STAGE1, "stats"), TWO_WARPS | {"max_registers": None}, False, "HMMA"),
    "taps": (target(STAGE1), {"block_m": 128, "block_k": 16, "num_warps": 4, "num_stages": 2}, True, "HGMMA"),
    "wide-tile": (
        target(STAGE1, "stats"),
        {"merged": 8, "strip": 2, "block_m": 16, "max_registers": 255},
        True,
        "HMMA",
    ),
    "wgmma": (target(STAGE4), {"strip": 1, "block_m": 64, "num_warps": 4, "num_stages": 2}, True, "HGMMA"),
    "dgrad-stride2": (target(STRIDED, "stats", "dgrad"), {"strip": 1, "num_warps": 1, "num_stages": 4}, True, "HMMA"),
    "wgrad": (target(STAGE1, op="wgrad"), {"merged": 4, "strip": 1, "block_m": 32, "num_warps": 2}, True, "HMMA"),
    "pointwise": (
        target(POINTWISE, "stats", kernel_size=1),
        {"block_m": 128, "block_n": 256, "num_warps": 8, "num_stages": 2},
        True,
        "HGMMA",
    ),
    "pointwise-residual": (
        target(POINTWISE, "affine", kernel_size=1),
        {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 3, "walkers": 66},
        True,
        "HGMMA",
    ),
}


@compiles
@pytest.mark.parametrize("name", COMPILED)
def test_candidates_compile_and_what_spills_is_found_out(name):
    of, settings, fits, instruction = COMPILED[name]
    used = resources(of, pick(of, **settings), 90)
    assert isinstance(used, Usage), used
    assert (exceeds(used, SHARED_LIMITS[90]) is None) == fits, used
    assert used.matrix_instruction.startswith(instruction)


LONG_STRIPS = {"strip": 2, "block_m": 64, "num_warps": 4, "num_stages": 2}
WIDE_TILE = {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 3}
# Settings that move operands otherwise, and an instruction by which the machine code shows it.
MOVED = {
    "shared-memory": (target(STAGE4), LONG_STRIPS, r"HGMMA\S+ R\d+, gdesc\[UR\d+\],"),
    "registers": (target(STAGE4), LONG_STRIPS | {"source_in_registers": True}, r"HGMMA\S+ R\d+, R\d+, gdesc\[UR\d+\],"),
    "descriptors": (
        target(POINTWISE, "stats", kernel_size=1),
        WIDE_TILE | {"tensor_descriptors": True},
        r"UTMALDG\.2D",
    ),
    "descriptors-dgrad": (
        target(POINTWISE, "stats", "dgrad", kernel_size=1),
        {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 3, "tensor_descriptors": True},
        r"UTMALDG\.2D",
    ),
    "descriptors-wgrad": (
        target(POINTWISE, "stats", "wgrad", kernel_size=1),
        {"block_m": 64, "block_n": 128, "block_k": 128, "num_warps": 8, "num_stages": 3, "tensor_descriptors": True},
        r"UTMALDG\.2D",
    ),
    "descriptors-residual": (
        target(POINTWISE, "affine", kernel_size=1),
        WIDE_TILE | {"tensor_descriptors": True},
        r"UTMALDG\.2D",
    ),
}


@compiles
@pytest.mark.parametrize("name", MOVED)
def test_operands_move_as_the_settings_say(name):
    of, settings, instruction = MOVED[name]
    launch = of.launch(pick(of, **settings))
    kernel = compile_launch(launch, pointers(launch, of.dtype), 90)
    assert re.search(instruction, machine_code(kernel))
    if name == "registers":
        assert not re.search(MOVED["shared-memory"][2], machine_code(kernel))
    assert exceeds(usage(kernel), SHARED_LIMITS[90]) is None


@compiles
def test_every_candidate_compiles(request):
    """Minutes: every kernel of three layers."""
    if not request.config.getoption("--all-configs"):
        pytest.skip("slow; --all-configs runs it")
    for of in (target(STAGE1), target(STAGE4, "stats"), target(STRIDED, "stats", "dgrad")):
        kernels = {specialization(of.launch(config), of.dtype): config for config in of.candidates(CPU)}
        used = [resources(of, config, 90) for config in kernels.values()]
        assert all(isinstance(each, Usage) for each in used)
        assert sum(exceeds(each, SHARED_LIMITS[90]) is None for each in used) > len(used) // 3


def test_what_does_not_compile_is_a_reason(monkeypatch):
    monkeypatch.setattr("targets.compile_launch", lambda *_: 1 / 0)
    of = target(STAGE1)
    assert resources(of, of.candidates(CPU)[0], 90) == "does not compile (ZeroDivisionError)"


@not_here
def test_in_the_interpreter():
    run_tests(__file__, timeout=300)


@here
@pytest.mark.parametrize(
    ("layer", "fusion", "op", "settings"),
    [
        (Layer(16, 16, 5, 4, 1, 4), "plain", "fwd", {"strip": 1, "block_m": 32, "num_warps": 2, "num_stages": 3}),
        (Layer(16, 16, 5, 4, 2, 4), "stats", "dgrad", {"strip": 4, "block_m": 32, "num_warps": 2, "num_stages": 2}),
        (Layer(16, 16, 5, 4, 1, 4), "plain", "wgrad", {"strip": 1, "block_m": 32, "num_stages": 2}),
        (Layer(64, 64, 3, 4, 1, 2), "stats", "fwd", {"strip": 1, "block_m": 64, "num_warps": 4, "num_stages": 2}),
        (Layer(64, 64, 3, 4, 1, 2), "affine", "fwd", {"block_m": 128, "block_k": 32, "num_warps": 8}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_candidates_compute_right(layer, fusion, op, settings):
    of = target(layer, fusion, op, dtype=torch.float32, batch=2, device=DEVICE)
    device = torch.device(DEVICE)
    tensors = of.operands(device)
    config = pick(of, **settings)
    assert config != of.candidates(device)[0]
    result = of.run(of.triton(), tensors, **of.settings(config))
    gate = Gate(of, tensors)
    assert gate.mismatch(result) is None
    name = next(iter(result))
    assert gate.mismatch(result | {name: result[name] * 1.5}) is not None


@here
@pytest.mark.parametrize(("fusion", "op"), [("stats", "fwd"), ("plain", "dgrad"), ("plain", "wgrad")])
def test_wider_tiles_compute_right(fusion, op):
    """Twice the groups that one tile needs."""
    of = target(Layer(64, 64, 5, 4, 1, 16), fusion, op, dtype=torch.float32, batch=2, device=DEVICE)
    device = torch.device(DEVICE)
    tensors = of.operands(device)
    narrow = next(config for config in of.candidates(device) if isinstance(config, StripsConfig))
    config = dataclasses.replace(narrow, merged=2 * narrow.merged, num_warps=2)
    result = of.run(of.triton(), tensors, **of.settings(config))
    assert Gate(of, tensors).mismatch(result) is None


@here
@pytest.mark.skipif(not INTERPRETED, reason="small enough for the interpreter, and enough there")
def test_pointwise_candidates_compute_right():
    for fusion, op in (("stats", "fwd"), ("stats", "wgrad"), ("affine", "fwd")):
        of = target(Layer(16, 32, 3, 4, 1, 1), fusion, op, 1, torch.float32, 2, DEVICE)
        tensors = of.operands(torch.device(DEVICE))
        for config in of.candidates(CPU)[::40]:
            assert Gate(of, tensors).mismatch(of.run(of.triton(), tensors, **of.settings(config))) is None


@here
@pytest.mark.parametrize(
    ("of", "settings"),
    [
        (target(Layer(64, 64, 3, 4, 1, 2), dtype=torch.float16, batch=2, device=DEVICE), {"source_in_registers": True}),
        (
            target(Layer(16, 32, 3, 4, 1, 1), "affine", "fwd", 1, torch.float16, 2, DEVICE),
            {"tensor_descriptors": True},
        ),
        (
            target(Layer(16, 32, 3, 4, 2, 1), "stats", "dgrad", 1, torch.float16, 2, DEVICE),
            {"tensor_descriptors": True},
        ),
        (
            target(Layer(16, 32, 3, 4, 1, 1), "stats", "wgrad", 1, torch.float16, 2, DEVICE),
            {"tensor_descriptors": True},
        ),
    ],
    ids=["registers", "descriptors", "descriptors-dgrad", "descriptors-wgrad"],
)
def test_moved_operands_compute_right(of, settings):
    tensors = of.operands(torch.device(DEVICE))
    config = pick(of, **settings)
    assert Gate(of, tensors).mismatch(of.run(of.triton(), tensors, **of.settings(config))) is None
