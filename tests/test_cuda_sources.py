"""The CUDA sources without a GPU: compiled by nvcc and read back. tests/test_cuda_emulation.py runs them."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_90a"]
INSTANTIATIONS = {
    "direct_conv": 14,  # 3 dtypes x (2 passes + bias + inference), and 16-bit gradients in float32
    "tensor_core_conv": 48,  # 2 dtypes x 2 strides x packed or not x (2 passes, plain and training, + bias + inference)
    "direct_wgrad": 3,
    "tensor_core_wgrad": 8,  # 2 dtypes x 2 strides x plain or training
    "channel": 90,  # 3 dtypes x (8 jobs x 3 layouts + 2 pools x 2 layouts), and those of wide gradients
    "sum_splits": 6,  # 3 dtypes of weights, 2 or 3 sums per channel, and those of images
    "merge_moments": 1,
}


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


@pytest.fixture(scope="module")
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
    names = {kernel.name for kernel in kernels}  # some sources share an instantiation
    counts = {
        name: sum(re.search(rf"\d{name}_kernel", symbol) is not None for symbol in names) for name in INSTANTIATIONS
    }
    assert counts == INSTANTIATIONS
    assert len(names) == sum(counts.values())
    spilled = [kernel for kernel in kernels if kernel.stack_bytes or kernel.spill_bytes]
    assert not spilled


def test_tensor_core_kernels_use_tensor_cores(compiled: dict[str, tuple[Path, list[Kernel]]]):
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    seen = set()
    for name in ("conv_launch.cu", "conv_stats_launch.cu", "wgrad_launch.cu"):
        listing = subprocess.run(
            [cuobjdump, "-sass", str(compiled[name][0])], capture_output=True, text=True, check=True
        )
        for function in listing.stdout.split("Function : ")[1:]:
            symbol = function.split(maxsplit=1)[0]
            assert ("HMMA.16816.F32" in function) == ("tensor_core" in symbol), symbol
            assert ("LDGSTS" in function) == ("tensor_core" in symbol), symbol  # cp.async
            seen.add(symbol)
    assert sum("tensor_core" in s for s in seen) == sum(
        n for name, n in INSTANTIATIONS.items() if "tensor_core" in name
    )
