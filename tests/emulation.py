"""The CUDA operators of csrc/cuda on a CPU: the sources as they are, on the emulated device of tests/cuda_emulation."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from .cases import Case

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # resnext::cuda::Dtype
HOPPER_SHARED, ADA_SHARED, TURING_SHARED = 227 * 1024, 99 * 1024, 64 * 1024

# Where in an operator's tensors its images before and after are (which give the shape), and its weight or the gradient
# of it.
IMAGES = {
    "grouped_conv2d_fwd": (0, 3),
    "grouped_conv2d_dgrad": (2, 0),
    "grouped_conv2d_wgrad": (1, 0),
    "conv_stats_fwd": (0, 5),
    "conv_stats_dgrad": (10, 0),
    "conv_stats_wgrad": (5, 0),
    "conv_affine": (0, 6),
    "statistics": (0, 0),
    "statistics_bwd": (0, 0),
    "affine_add_relu": (0, 0),
    "affine_add_relu_bwd": (0, 0),
    "affine_mean": (0, 0),
    "affine_gate": (0, 0),
    "affine_gate_bwd": (0, 0),
    "gated_affine_bwd": (0, 0),
    "affine_relu_max_pool": (0, 4),
    "affine_relu_max_pool_bwd": (2, 0),
}
WEIGHTS = {
    "grouped_conv2d_fwd": 1,
    "grouped_conv2d_dgrad": 1,
    "grouped_conv2d_wgrad": 2,
    "conv_stats_fwd": 4,
    "conv_stats_dgrad": 5,
    "conv_stats_wgrad": 9,
    "conv_affine": 1,
}


@dataclass(frozen=True)
class Device:
    """What the launchers are told of the device, and the order in which its warps run (cuda_emulation.h).

    One multiprocessor: small problems already give a block several units, bands and splits.
    """

    multiprocessors: int = 1
    shared_memory: int = HOPPER_SHARED
    tensor_cores: bool = True
    descending: bool = False


class Emulator:
    """Stands in for ``resnext._C`` under kernels/extension.py. Convolutions in channels_last only."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._device = Device()
        self.launches = 0  # kernels of the latest call

    def serves_tensor_cores(self, case: Case, dtype: torch.dtype) -> bool:
        """Whether the tensor-core kernels are for this convolution, given enough shared memory."""
        sizes = [(ctypes.c_int64 * 4)(*shape) for shape in (case.input_shape, case.output_shape)]
        options = (ctypes.c_int64 * 4)(*case.stride, case.groups, True)
        return bool(self._library.serves_tensor_cores(*sizes, DTYPES[dtype], options))

    @contextmanager
    def on(self, **device) -> Iterator[None]:
        """Another device for the length of a block."""
        before, self._device = self._device, replace(self._device, **device)
        try:
            yield
        finally:
            self._device = before

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in IMAGES:
            raise AttributeError(name)
        return lambda *arguments: self._run(name, arguments)

    def _run(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """As the bindings do: results are made where a size stands in place of a tensor, and returned."""
        trailing = 4 if name in WEIGHTS else 1
        results = []

        def filled(argument: Any) -> Any:
            if isinstance(argument, tuple):
                wide, channels_last = (*argument[4:], *(False, arguments[-1])[len(argument) - 4 :])
                layout = torch.channels_last if channels_last else torch.contiguous_format
                dtype = torch.float32 if wide else arguments[0].dtype
                results.append(torch.empty(argument[:4], dtype=dtype, memory_format=layout))
            elif type(argument) is int:
                results.append(torch.empty(argument))
            else:
                return argument
            return results[-1]

        arguments = (*map(filled, arguments[:-trailing]), *arguments[-trailing:])
        tensors = [a for a in arguments if a is None or isinstance(a, Tensor)]
        options = [a for a in arguments if isinstance(a, int)]
        sizes = [(ctypes.c_int64 * 4)(*tensors[i].shape) for i in IMAGES[name]]
        weight_channels_last = False
        if name in WEIGHTS:
            assert options[-1], "the emulated convolutions are those of channels_last"
            weight_channels_last = not tensors[WEIGHTS[name]].is_contiguous()
        device = self._device
        self.launches = self._library.run_operator(
            name.encode(),
            *sizes,
            DTYPES[tensors[0].dtype],
            (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors)),
            (ctypes.c_int64 * len(options))(*options),
            weight_channels_last,
            device.multiprocessors,
            device.shared_memory,
            device.tensor_cores,
            device.descending,
        )
        assert self.launches >= 0, f"{name}: launch failed with CUDA error {-self.launches}"
        return results[0] if len(results) == 1 else tuple(results)


def build(folder: Path) -> Path:
    """Compile the emulation with the launchers, into ``folder``."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    here = ROOT / "tests" / "cuda_emulation"
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    includes = [f"-I{here}", *(f"-isystem{path}" for path in include_paths())]

    def run(*arguments: str | Path) -> None:
        done = subprocess.run([compiler, *flags, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compile_source(source: Path) -> Path:
        run(*includes, "-x", "c++", "-c", source, "-o", folder / f"{source.name}.o")
        return folder / f"{source.name}.o"

    sources = [*here.glob("*.cpp"), *(ROOT / "csrc" / "cuda").glob("*_launch.cu")]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, sources))
    run("-shared", *objects, "-o", folder / "emulated.so")
    return folder / "emulated.so"
