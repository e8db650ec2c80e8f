"""The CUDA sources without a GPU: compiled by nvcc and read back, and run by the emulation in tests/cuda_emulation."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from .cases import CASES, Case, make_tensors
from .numerics import assert_close, exact

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["conv_launch.cu", "grouped_conv.cu", "wgrad_launch.cu"]
ARCHITECTURES = ["sm_80", "sm_90a"]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # resnext::cuda::Dtype
HOPPER_SHARED, ADA_SHARED, TURING_SHARED = 227 * 1024, 99 * 1024, 64 * 1024
OPS = ["fwd", "dgrad", "wgrad"]

# Problems that reach parts of the tensor-core kernels that the shared list does not.
TENSOR_CORE_CASES = [
    Case("packed-two-slabs", 1, 80, 80, 5, 6, 20, bias=True),
    Case("packed-gw1-slab", 2, 64, 64, 4, 5, 64),
    Case("packed-two-slabs-stride2", 1, 80, 80, 6, 5, 20, (2, 2)),
    Case("more-images-than-a-strip", 6, 16, 16, 5, 7, 4),
    Case("more-images-than-a-strip-stride2", 5, 16, 16, 7, 9, 4, (2, 2)),
    Case("two-column-strips-stride2", 1, 16, 16, 4, 70, 4, (2, 2)),
    Case("gw32-two-column-strips", 1, 32, 32, 4, 40, 1, bias=True),
    Case("gw32-two-groups-stride2", 3, 64, 64, 7, 7, 2, (2, 2)),
    Case("gw48-two-groups", 1, 96, 96, 3, 5, 2),
    Case("bands", 1, 16, 16, 41, 5, 2),
    Case("bands-stride2", 1, 16, 16, 42, 6, 2, (2, 2)),
]


class Emulator:
    """The launchers of csrc/cuda on the emulated device. Tensors are NCHW in shape and channels_last in memory."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.make_shape.restype = ctypes.c_void_p

    def _shape(self, case: Case) -> ctypes.c_void_p:
        sizes = (case.batch, case.in_channels, case.out_channels, case.height, case.width, case.groups, *case.stride)
        return ctypes.c_void_p(self.library.make_shape((ctypes.c_int64 * 8)(*sizes)))

    def uses_tensor_cores(self, case: Case, dtype: torch.dtype) -> bool:
        shape = self._shape(case)
        served = self.library.uses_tensor_cores(shape, DTYPES[dtype])
        self.library.free_shape(shape)
        return bool(served)

    def run(
        self,
        op: str,
        case: Case,
        tensors: dict[str, Tensor | None],
        *,
        shared_memory: int = HOPPER_SHARED,
        tensor_cores: bool = True,
        descending: bool = False,
    ) -> Tensor:
        names = {"fwd": ["x", "weight", "bias"], "dgrad": ["grad", "weight"], "wgrad": ["grad", "x"]}[op]
        size = {"fwd": case.output_shape, "dgrad": case.input_shape, "wgrad": case.weight_shape}[op]
        layout = torch.contiguous_format if op == "wgrad" else torch.channels_last
        inputs = [tensors[name] for name in names]
        out = torch.empty(size, dtype=inputs[0].dtype, memory_format=layout)
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in [*inputs, out]]
        shape = self._shape(case)
        self.library.set_descending_order(descending)
        launch = getattr(self.library, f"emulated_{op}")
        status = launch(shape, DTYPES[out.dtype], shared_memory, int(tensor_cores), *pointers)
        self.library.free_shape(shape)
        assert status == 0, f"launch failed with CUDA error {status}"
        return out


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = ROOT / "tests" / "cuda_emulation"
    library = tmp_path_factory.mktemp("cuda_emulation") / "emulated.so"
    sources = [str(folder / "driver.cpp"), str(folder / "cuda_emulation.cpp")]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    includes = [f"-I{folder}", *(f"-isystem{path}" for path in include_paths())]
    built = subprocess.run([compiler, *flags, *includes, *sources, "-o", str(library)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return Emulator(library)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *TENSOR_CORE_CASES], ids=lambda case: case.id)
def test_emulated_kernels_match_the_oracle(emulator: Emulator, case: Case, dtype: torch.dtype):
    """Small integers exactly (fibers in descending order), random values within the derived bound."""
    integers = make_tensors(case, dtype, channels_last=True, integers=True)
    values = make_tensors(case, dtype, channels_last=True)
    for op in OPS:
        got = emulator.run(op, case, integers, descending=True)
        torch.testing.assert_close(got, exact(op, case, integers).value.to(dtype), rtol=0, atol=0)
        assert_close(emulator.run(op, case, values), exact(op, case, values))
