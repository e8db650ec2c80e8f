"""Builds the C++/CUDA extension resnext._C where it can be built; everything else is in pyproject.toml.

Without torch or a working C++ compiler the package installs as pure Python, and one sentence says so. CUDA sources are
compiled when nvcc and a CUDA build of torch are present; RESNEXT_BUILD_CUDA=0 or 1 forces it off or on.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.errors import CCompilerError, ExecError, PlatformError

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
# LibTorch's stable ABI as of 2.11; with py_limited_api, torch itself sets Python's limited API: one binary for later versions.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def skip(reason: object) -> None:
    print(f"resnext: installing without the C++ extension: {reason}", file=sys.stderr)


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def with_cuda(torch, cuda_home: str | None) -> bool:
    choice = os.environ.get("RESNEXT_BUILD_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"resnext: expected RESNEXT_BUILD_CUDA to be 0, 1 or unset, got {choice!r}")
    possible = cuda_home is not None and torch.version.cuda is not None
    if choice == "1" and not possible:
        raise SystemExit(
            f"resnext: RESNEXT_BUILD_CUDA=1 needs nvcc (CUDA_HOME is {cuda_home}) and a CUDA build of torch "
            f"(this one is for {torch.version.cuda or 'the CPU'})"
        )
    return possible and choice != "0"


def extension() -> dict:
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        skip(f"torch cannot be imported ({error})")
        return {}
    if sys.platform == "win32":
        skip("the CPU kernels need GCC or Clang")
        return {}

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except (CCompilerError, ExecError, PlatformError, OSError) as error:
                skip(f"no working C++ compiler ({error})")

    flags = {"cxx": ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", STABLE_ABI]}
    arguments = {"sources": ["csrc/bindings.cpp", *sources("cpu", ".cpp")], "py_limited_api": True}
    kind = cpp_extension.CppExtension
    if with_cuda(torch, cpp_extension.CUDA_HOME):
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
        kind = cpp_extension.CUDAExtension
        arguments["sources"] += sources("cuda", ".cu")
        flags["nvcc"] = ["-std=c++17", "-O3", "-DUSE_CUDA", STABLE_ABI]
    return {
        "ext_modules": [kind("resnext._C", extra_compile_args=flags, **arguments)],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=cpp_extension.is_ninja_available())},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
