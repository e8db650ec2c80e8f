"""Compile the Triton launches of real layers ahead of time, with no GPU, and read what the machine code uses.

`python -m tests.aot` prints the table for one architecture.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from ahead_of_time import (
    SHARED_LIMITS,
    Usage,
    compile_launch,
    describe,
    machine_code,
    pointers,
    specialization,
    usage,
)

from resnext.kernels.config import Config, ConvProblem, choose_config
from resnext.kernels.grouped_conv_plan import is_crowded, plan
from resnext.kernels.launch import Launch

DTYPES = [(torch.bfloat16, True), (torch.float16, True), (torch.float32, True), (torch.float32, False)]  # with TF32
# (channels, groups, size of the strided layer's input) of every distinct stage.
STAGES = {
    "resnext50_32x4d": [(128, 32, 56), (256, 32, 56), (512, 32, 28), (1024, 32, 14)],
    "resnext101_32x8d": [(256, 32, 56), (512, 32, 56), (1024, 32, 28), (2048, 32, 14)],
    "resnext101_64x4d": [(256, 64, 56), (512, 64, 56), (1024, 64, 28), (2048, 64, 14)],
    "regnetx_3.2gf": [(96, 4, 112), (192, 8, 56), (432, 18, 28), (1008, 42, 14)],  # group width 24
    "regnety_1.6gf": [(48, 2, 112), (120, 5, 56), (336, 14, 28), (888, 37, 14)],  # group width 24
    "regnetx_6.4gf": [(168, 3, 112), (392, 7, 56), (784, 14, 28), (1624, 29, 14)],  # group width 56
    "regnetx_4.0gf": [(80, 2, 112), (240, 6, 56), (560, 14, 28), (1360, 34, 14)],  # group width 40
    "regnety_4gf": [(128, 2, 112), (192, 3, 56), (512, 8, 28), (1088, 17, 14)],  # group width 64
    "regnety_16gf": [(224, 2, 112), (448, 4, 56), (1232, 11, 28), (3024, 27, 14)],  # group width 112
}

# What a kernel does besides the convolution, by pass and name: its optional pointers, and whether it ends in a ReLU.
FUSIONS = {
    ("fwd", "prologue+statistics"): ("src_center src_scale src_shift partials", False),
    ("fwd", "statistics"): ("partials", False),
    ("fwd", "affine+residual+relu"): ("dst_scale dst_shift dst_side", True),
    ("dgrad", "gradient+relu"): (
        "src_z src_center src_scale src_shift dst_side dst_center dst_scale dst_shift partials",
        False,
    ),
    ("dgrad", "gradient"): ("src_z src_center src_scale src_shift", False),
    ("wgrad", "gradient+prologue"): ("grad_z grad_center grad_scale grad_shift x_center x_scale x_shift", False),
}


@dataclass(frozen=True)
class Build:
    """One thing to compile."""

    problem: ConvProblem
    allow_tf32: bool = True
    fusion: str = ""

    @property
    def config(self) -> Config:
        options = {"fused": bool(self.fusion), "crowded": is_crowded(self.fused)}
        return choose_config(self.problem, allow_tf32=self.allow_tf32, **options)

    @property
    def fused(self) -> frozenset[str]:
        names = FUSIONS[self.problem.op, self.fusion][0] if self.fusion else ""
        return frozenset(f"{name}_ptr" for name in names.split())

    @property
    def launch(self) -> Launch:
        return plan(
            self.problem,
            self.config,
            allow_tf32=self.allow_tf32,
            fused=self.fused,
            relu=bool(self.fusion) and FUSIONS[self.problem.op, self.fusion][1],
            taps_outside=self.problem.channels_last,  # models hold weights in the layout of their activations
        )

    @property
    def id(self) -> str:
        problem = self.problem
        dtype = str(problem.dtype).removeprefix("torch.")
        if problem.dtype == torch.float32:
            dtype = "tf32" if self.allow_tf32 else "float32"
        return f"{problem.op}-s{problem.stride[0]}-gw{problem.group_in}-{dtype}" + f"-{self.fusion}" * bool(self.fusion)


def problem(op: str, channels: int, groups: int, size: int, stride: int, dtype: torch.dtype) -> ConvProblem:
    return ConvProblem(op, 256, channels, channels, size, size, (stride, stride), groups, dtype, "cuda", True)


def all_builds(models: Sequence[str] = tuple(STAGES)) -> list[Build]:
    """Every distinct kernel that the layers of the models launch, in every pass and dtype, plain and fused."""
    stages = [stage for model in models for stage in STAGES[model]]
    passes = [("fwd", ""), ("dgrad", ""), ("wgrad", ""), *FUSIONS]
    builds: dict[tuple, Build] = {}
    for (channels, groups, size), (op, fusion), stride in itertools.product(stages, passes, (1, 2)):
        side = size if stride == 2 else (size + 1) // 2
        for dtype, tf32 in DTYPES:
            build = Build(problem(op, channels, groups, side, stride, dtype), tf32, fusion)
            builds.setdefault(specialization(build.launch, dtype), build)
    return list(builds.values())


def measure(build: Build, arch: int) -> Usage:
    """Compile, and read what the machine code uses."""
    return usage(compile_launch(build.launch, pointers(build.launch, build.problem.dtype), arch))


def assert_no_spills(launch: Launch, tensors: Mapping[str, torch.Tensor | None], arch: int, wide_loads: bool) -> None:
    """Compile a launch, and read the machine code; ``wide_loads``: whether there must be loads of 16 bytes."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    kernel = compile_launch(launch, dtypes, arch)
    code = machine_code(kernel)
    name = launch.kernel.__name__
    assert "EXIT" in code
    assert not re.findall(r"\b(?:STL|LDL)\b", code), f"{name}: registers spill"
    assert kernel.metadata.shared <= SHARED_LIMITS[arch]
    assert not wide_loads or re.search(r"LDG(?:STS)?\.E(?:\.\w+)*\.128", code), f"{name}: no 16-byte loads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_LIMITS))
    parser.add_argument("--models", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--only", default="", help="part of the builds' names, such as gw4-bfloat16")
    arguments = parser.parse_args()
    print("| build | settings | registers | shared memory, bytes | spills | matrix instruction |")
    print("|---|---|---|---|---|---|")
    for build in {(build.id, describe(build.config)): build for build in all_builds(arguments.models)}.values():
        if arguments.only in build.id:
            usage = measure(build, arguments.arch)
            row = (usage.registers, usage.shared, usage.spills, usage.matrix_instruction)
            print(f"| {build.id} | {describe(build.config)} | " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
