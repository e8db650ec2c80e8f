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
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

from .cases import CASES, Case, make_tensors
from .numerics import assert_close, exact

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["conv_launch.cu", "grouped_conv.cu", "wgrad_launch.cu"]
ARCHITECTURES = ["sm_80", "sm_90a"]
INSTANTIATIONS = {
    "direct_conv": 6,  # 3 dtypes x 2 passes
    "tensor_core_conv": 16,  # 2 dtypes x 2 passes x 2 strides x packed or not
    "direct_wgrad": 3,
    "tensor_core_wgrad": 4,  # 2 dtypes x 2 strides
    "wgrad_reduce": 3,
}
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
    Case("several-units-per-split", 50, 64, 64, 5, 6, 16),
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
        # The kernels read weights in OIHW order; the operators around them, which are not emulated, bring them to it.
        inputs = [tensors[name].contiguous() if name == "weight" else tensors[name] for name in names]
        out = torch.empty(size, dtype=inputs[0].dtype, memory_format=layout)
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in [*inputs, out]]
        shape = self._shape(case)
        self.library.set_descending_order(descending)
        launch = getattr(self.library, f"emulated_{op}")
        status = launch(shape, DTYPES[out.dtype], shared_memory, int(tensor_cores), *pointers)
        self.library.free_shape(shape)
        assert status == 0, f"launch failed with CUDA error {status}"
        return out


@pytest.fixture(autouse=True)
def one_thread():
    """The oracle's problems are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.mark.parametrize("shared_memory", [HOPPER_SHARED, ADA_SHARED], ids=["hopper", "ada"])
@pytest.mark.parametrize("groups", [1, 2], ids=["gw128", "gw64"])
def test_wide_groups_fit_the_shared_memory_they_get(emulator: Emulator, groups: int, shared_memory: int):
    """Fewer output tiles per block, down to the direct kernel, must not change the result."""
    case = Case("wide", 1, 128, 128, 3, 34, groups, bias=True)
    tensors = make_tensors(case, torch.bfloat16, channels_last=True, integers=True)
    for op in OPS:
        got = emulator.run(op, case, tensors, shared_memory=shared_memory)
        torch.testing.assert_close(got, exact(op, case, tensors).value.bfloat16(), rtol=0, atol=0)


def test_without_tensor_cores_or_alignment_the_direct_kernels_serve(emulator: Emulator):
    case = Case("fallback", 1, 16, 16, 4, 5, 4)
    tensors = make_tensors(case, torch.float16, channels_last=True, integers=True)
    shifted = dict(tensors)
    for name in ("x", "grad"):  # the same values, two bytes off a 16-byte boundary
        values = tensors[name]
        storage = torch.empty(values.numel() + 1, dtype=values.dtype)
        shifted[name] = torch.as_strided(storage, values.shape, values.stride(), 1).copy_(values)
        assert shifted[name].data_ptr() % 16 != 0
    for op in OPS:
        expected = exact(op, case, tensors).value.half()
        got = emulator.run(op, case, tensors, shared_memory=TURING_SHARED, tensor_cores=False)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        torch.testing.assert_close(emulator.run(op, case, shifted), expected, rtol=0, atol=0)


def test_tensor_cores_serve_the_shapes_they_are_for(emulator: Emulator):
    """Otherwise the tests above would pass on the direct kernels alone."""
    for width, channels in [(1, 64), (2, 64), (4, 128), (8, 256), (16, 512), (32, 1024), (64, 256), (112, 448)]:
        case = Case("served", 1, channels, channels, 7, 7, channels // width)
        assert emulator.uses_tensor_cores(case, torch.float16), case
        assert emulator.uses_tensor_cores(case, torch.bfloat16), case
        assert not emulator.uses_tensor_cores(case, torch.float32), case


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=["stride1", "stride2"])
@pytest.mark.parametrize("width", [1, 4, 8], ids=lambda width: f"gw{width}")
def test_nan_and_inf_stay_in_their_group(emulator: Emulator, width: int, stride: tuple[int, int], bad: float):
    """Groups share a matrix tile; a bad value must reach exactly the results of its own group that read it."""
    case = Case("bad-value", 1, 16, 16, 5, 6, 16 // width, stride, True)
    for name, op, channel in [("x", "fwd", 3), ("grad", "dgrad", 9), ("weight", "fwd", 5), ("x", "wgrad", 3)]:
        for row, col in [(1, 1), (-1, -1)]:
            tensors = make_tensors(case, torch.float16, channels_last=True)
            position = (channel, 0, row, col) if name == "weight" else (0, channel, row, col)
            tensors[name][position] = 0.0
            clean = exact(op, case, tensors)
            tensors[name][position] = bad
            expected = exact(op, case, tensors).value
            got = emulator.run(op, case, tensors)
            finite = expected.isfinite()
            assert not finite.all()
            torch.testing.assert_close(got[~finite].double(), expected[~finite], rtol=0, atol=0, equal_nan=True)
            assert_close(torch.where(finite, got, clean.value.half()), clean)


def test_same_call_same_bits(emulator: Emulator):
    case = Case("repeat", 3, 32, 32, 9, 7, 8)
    tensors = make_tensors(case, torch.float16, channels_last=True)
    for op in OPS:
        first, second = emulator.run(op, case, tensors), emulator.run(op, case, tensors, descending=True)
        assert torch.equal(first.view(torch.int16), second.view(torch.int16))


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton carries."""
    try:
        from triton import backends
    except ImportError:
        return shutil.which("cuobjdump")
    carried = Path(backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or shutil.which(str(carried))


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports about one kernel."""

    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def parse_ptxas(log: str) -> list[Kernel]:
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '\w+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
        r"Used (\d+) registers",
        re.DOTALL,
    )
    return [Kernel(m[1], int(m[4]), int(m[2]), int(m[3])) for m in pattern.finditer(log)]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Kernel]]]:
    """Every CUDA source compiled for every architecture: object file and ptxas' report."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("nvcc")
    # As setup.py and torch's CUDAExtension do; USE_CUDA opens the CUDA part of PyTorch's stable C interface.
    flags = [
        *COMMON_NVCC_FLAGS,
        "-std=c++17",
        "-O3",
        "-Werror",
        "all-warnings",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHITECTURES]
    includes = [f"-isystem={path}" for path in include_paths()]

    def compile_source(name: str) -> tuple[Path, list[Kernel]]:
        target = folder / f"{name}.o"
        command = ["nvcc", *flags, *targets, *includes, "-Xptxas", "-v", "-Xcompiler", "-fPIC", "-c"]
        done = subprocess.run(
            [*command, str(ROOT / "csrc/cuda" / name), "-o", str(target)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return target, parse_ptxas(done.stdout + done.stderr)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SOURCES, pool.map(compile_source, SOURCES), strict=True))


def test_sources_compile_without_spills(compiled: dict[str, tuple[Path, list[Kernel]]]):
    kernels = [kernel for _, reports in compiled.values() for kernel in reports]
    assert len(kernels) == len(ARCHITECTURES) * sum(INSTANTIATIONS.values())
    spilled = [kernel for kernel in kernels if kernel.stack_bytes or kernel.spill_bytes]
    assert not spilled


def test_tensor_core_kernels_use_tensor_cores(compiled: dict[str, tuple[Path, list[Kernel]]]):
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    seen = 0
    for name in ("conv_launch.cu", "wgrad_launch.cu"):
        listing = subprocess.run(
            [cuobjdump, "-sass", str(compiled[name][0])], capture_output=True, text=True, check=True
        )
        for function in listing.stdout.split("Function : ")[1:]:
            symbol = function.split(maxsplit=1)[0]
            assert ("HMMA.16816.F32" in function) == ("tensor_core" in symbol), symbol
            assert ("LDGSTS" in function) == ("tensor_core" in symbol), symbol  # cp.async
            seen += "tensor_core" in symbol
    assert seen == len(ARCHITECTURES) * sum(n for name, n in INSTANTIATIONS.items() if "tensor_core" in name)
