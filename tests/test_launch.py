"""Launches by Triton's own launchers on a CUDA driver that is none: what the kernels are given, and how often compiled.

The driver (driver_emulation/libcuda.c) is built here, and takes the place of CUDA's in a process of its own, in which
tensors on the CPU stand for those on a GPU: `test_on_an_emulated_driver` runs this file there.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while its interpreter is on", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from resnext.kernels import batch_norm, grouped_conv, max_pool, pointwise_conv, statistics, stem_conv  # noqa: E402
from resnext.kernels.config import Norm, Running, pointwise_config, problem_of  # noqa: E402
from resnext.kernels.launch import Launch  # noqa: E402

HERE = Path(__file__).parent
EMULATED = "RESNEXT_EMULATED_DRIVER" in os.environ
emulated = pytest.mark.skipif(not EMULATED, reason="run by test_on_an_emulated_driver")


@pytest.mark.skipif(EMULATED, reason="the tests below run in this process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_on_an_emulated_driver(tmp_path):
    from triton.backends import nvidia

    include = Path(nvidia.__file__).parent / "include"
    library = tmp_path / "libcuda.so.1"
    source = HERE / "driver_emulation" / "libcuda.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-I", include, source, "-o", library], check=True)
    folder = str(tmp_path)
    environment = {"RESNEXT_EMULATED_DRIVER": str(library), "TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command, cwd=HERE.parent, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


class Driver:
    """The part of Triton's driver that asks PyTorch for the device and the stream."""

    def __init__(self):
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(scope="module")
def library():
    """The driver, with Triton on it."""
    driver.set_active(Driver())
    return ctypes.CDLL(os.environ["RESNEXT_EMULATED_DRIVER"])


def launches(function) -> list[tuple[Launch, dict]]:
    """The launches that a function makes, on tensors with whatever they hold."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", lambda self, **tensors: seen.append((self, tensors)))
        function()
    return seen


def compiled_for(library, launch: Launch, tensors: dict):
    """What Triton compiles for a launch."""
    library.emulation_expect(0)
    seen = []
    straight_to = Launch._straight_to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "_straight_to", lambda *args: seen.append(args[1]) or straight_to(*args))
        launch._compiled.clear()
        launch(**tensors)
    (compiled,) = seen
    return compiled


def expected(launch: Launch, tensors: dict, compiled) -> list[tuple[int, int]]:
    """Every argument of the machine code, as (bytes that count, their value)."""
    found = []
    for name, kind in compiled.src.signature.items():
        if kind == "constexpr":
            continue
        if name in launch.blocks:
            tensor = tensors[name]
            rows, columns = tensor.numel() // tensor.shape[1], tensor.shape[1]
            found += [(8, tensor.data_ptr()), (4, rows), (4, columns), (8, columns), (8, 1)]
        elif name in tensors:
            found.append((8, tensors[name].data_ptr()))
        elif kind == "fp32":
            found.append((4, *struct.unpack("I", struct.pack("f", launch.sizes[name]))))
        else:
            found.append(({"i32": 4, "i64": 8}[kind], launch.sizes[name]))
    return found


def given(library, arguments: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int]]:
    """What the last launch was given, in the same form; its grid, threads and shared memory."""
    values, shape = (ctypes.c_ulonglong * 128)(), (ctypes.c_uint * 5)()
    library.emulation_last(values, shape)
    pairs = zip(arguments, values, strict=False)
    return [(size, value % 256**size) for (size, _), value in pairs], list(shape)


def check(library, launch: Launch, tensors: dict) -> None:
    """Launch by way of Triton, then past it: both times the kernel gets what it is for."""
    compiled = compiled_for(library, launch, tensors)
    arguments = expected(launch, tensors, compiled)
    library.emulation_expect(len(arguments))
    launch._compiled.clear()
    for known in (0, 1):
        assert len(launch._compiled) == known
        before = library.emulation_launches()
        launch(**tensors)
        assert library.emulation_launches() == before + 1
        values, (programs, y, z, threads, shared) = given(library, arguments)
        assert values == arguments
        assert (programs, y, z) == (launch.programs, 1, 1)
        assert threads == 32 * launch.options["num_warps"]
        assert shared == compiled.metadata.shared


def activation(channels: int, dtype: torch.dtype = torch.bfloat16, size: int = 8) -> torch.Tensor:
    return torch.zeros(2, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)


def vectors(channels: int, count: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(channels) for _ in range(count))


def grouped() -> None:
    x, weight = activation(32), torch.zeros(32, 4, 3, 3, dtype=torch.bfloat16)
    grouped_conv.fwd(x, weight, None, (1, 1), 8, True)
    grouped_conv.fwd(x, weight, torch.zeros(32, dtype=torch.bfloat16), (2, 2), 8, True)
    grouped_conv.conv_stats_fwd(x, vectors(32, 3), weight, (1, 1), 8, True, True)
    grouped_conv.conv_stats_bwd(
        x, (x, *vectors(32, 3)), x, (None, *vectors(32, 2)), weight, (1, 1), 8, True, (True, True)
    )


def pointwise() -> None:
    x, weight = activation(32), torch.zeros(64, 32, 1, 1, dtype=torch.bfloat16)
    z = activation(64)
    pointwise_conv.conv_stats_fwd(x, vectors(32, 3), weight, (1, 1), 1, True, True)
    pointwise_conv.conv_affine(x, weight, *vectors(64, 2), z, True, (1, 1), 1, True)
    pointwise_conv.conv_stats_bwd(z, (z, *vectors(64, 3)), x, vectors(32, 3), weight, (1, 1), 1, True, (True, True))


def stem() -> None:
    x, weight = activation(3), torch.zeros(64, 3, 7, 7, dtype=torch.bfloat16)
    z = activation(64, size=4)
    running = Running(*vectors(64, 2), torch.zeros((), dtype=torch.int64), 0.1)
    stem_conv.conv_norm_fwd(x, None, weight, (2, 2), 1, True, Norm(*vectors(64, 2), 1e-5, running))
    stem_conv.conv_affine(x, weight, *vectors(64, 2), None, True, (2, 2), 1, True)
    stem_conv.conv_stats_bwd(z, (z, *vectors(64, 3)), x, None, weight, (2, 2), 1, True, (False, True))


def described() -> None:
    """The same by tensor descriptors."""
    x, weight, z = activation(64), torch.zeros(64, 64, 1, 1, dtype=torch.bfloat16), activation(64)
    configs = {}
    for op in ("fwd", "dgrad", "wgrad"):
        problem = problem_of(op, x.shape, weight.shape, (1, 1), 1, x.dtype, x.device, True)
        configs[op] = replace(pointwise_config(problem), tensor_descriptors=True)
    pointwise_conv.conv_stats_fwd(x, vectors(64, 3), weight, (1, 1), 1, True, True, config=configs["fwd"])
    pointwise_conv.conv_stats_bwd(
        *(z, (z, *vectors(64, 3)), x, vectors(64, 3), weight, (1, 1), 1, True, (True, True)),
        dgrad_config=configs["dgrad"],
        wgrad_config=configs["wgrad"],
    )


def elementwise() -> None:
    z, affine = activation(32), vectors(32, 3)
    batch_norm.statistics(z, True)
    batch_norm.affine_add_relu(z, affine, z, None, True)
    batch_norm.affine_add_relu_bwd(z, z, z, affine, None, None, True, (True, True, True))
    batch_norm.bn_affine(*vectors(32, 4), 1e-5)
    batch_norm.bn_affine_bwd(*vectors(32, 3), None, 1e-5)
    running = Running(*vectors(32, 2), torch.zeros((), dtype=torch.int64), 0.1)
    batch_norm.statistics(z, True, Norm(*vectors(32, 2), 1e-5, running))
    batch_norm.bn_affine_bwd(statistics.PartialSums(torch.zeros(5, 2, 32), 0, 1), None, *vectors(32, 2), 1e-5)
    _, taps = max_pool.affine_relu_max_pool(z, affine, True, True)
    max_pool.affine_relu_max_pool_bwd(activation(32, size=4), taps, z, affine, True, (True, True))


def one_pixel() -> None:
    """Sizes of 1, which Triton takes for constants."""
    x = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
    grouped_conv.fwd(x, torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16), None, (1, 1), 1, True)
    batch_norm.affine_add_relu(x, vectors(1, 3), None, None, True)


@emulated
@pytest.mark.parametrize("function", [grouped, pointwise, stem, described, elementwise, one_pixel])
def test_kernels_get_their_arguments(function, library):
    for launch, tensors in launches(function):
        check(library, launch, tensors)


@emulated
def test_descriptors_are_among_them(library):
    blocks = [set(launch.blocks) for launch, _ in launches(described) if launch.blocks]
    assert blocks == [{"x_ptr", "weight_ptr"}, {"grad_ptr", "z_ptr", "weight_ptr"}, {"grad_ptr", "z_ptr", "x_ptr"}]


@emulated
def test_other_dtypes_are_other_kernels(library):
    """One launch, and parameters in another dtype."""
    mean, var, gamma, beta = vectors(48, 4)
    half = [gamma.half(), beta.half()]
    ((launch, single),) = launches(lambda: batch_norm.bn_affine(mean, var, gamma, beta, 1e-5))
    ((again, mixed),) = launches(lambda: batch_norm.bn_affine(mean, var, *half, 1e-5))
    assert launch is again
    kernels = [compiled_for(library, launch, tensors) for tensors in (single, mixed)]
    assert kernels[0].hash != kernels[1].hash
    launch(**single)
    assert len(launch._compiled) == 2


@emulated
def test_what_is_not_aligned_goes_to_triton(library, monkeypatch):
    """It compiles other code for addresses that are no multiples of 16, which may not be kept for all."""
    shifted = torch.zeros(2 * 8 * 8 * 32 + 1, dtype=torch.bfloat16)[1:].view(2, 8, 8, 32).permute(0, 3, 1, 2)
    assert shifted.data_ptr() % 16
    affine = vectors(32, 3)
    ((launch, tensors),) = launches(lambda: batch_norm.affine_add_relu(activation(32), affine, None, None, True))
    compiled_for(library, launch, tensors)
    asked = []
    run = type(launch.kernel).run
    monkeypatch.setattr(type(launch.kernel), "run", lambda *args, **kwargs: asked.append(1) or run(*args, **kwargs))
    launch(**tensors)
    assert not asked
    for times in (1, 2):
        launch(**{**tensors, "z_ptr": shifted})
        assert len(asked) == times
    assert len(launch._compiled) == 1
    launch(**tensors)
    assert len(asked) == 2
