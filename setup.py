"""Builds the C++/CUDA extension resnext._C where it can be built; everything else is in pyproject.toml.

Without torch or a working C++ compiler the package installs as pure Python, and one sentence says so; a compiler that
works but fails on our sources is an error. CUDA sources are compiled when nvcc and a CUDA build of torch are present (a
GPU need not be); RESNEXT_BUILD_CUDA=0 or 1 forces it off or on, and TORCH_CUDA_ARCH_LIST chooses the architectures.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
# LibTorch's stable ABI as of 2.11; torch adds Python's limited API itself. One binary serves all later versions.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def why_not() -> str | None:
    """Why the extension cannot be built here, or None."""
    try:
        from torch.utils.cpp_extension import get_cxx_compiler
    except (ImportError, OSError) as error:
        return f"torch cannot be imported ({error}); install it and use --no-build-isolation"
    if sys.platform == "win32":
        return "the CPU kernels need GCC or Clang"
    include = f"-I{sysconfig.get_paths()['include']}"
    command = [*shlex.split(get_cxx_compiler()), "-x", "c++", "-std=c++17", "-fsyntax-only", include, "-"]
    try:
        probe = subprocess.run(
            command, input="#include <Python.h>\n#include <optional>\n", capture_output=True, text=True
        )
    except OSError as error:
        return f"no C++ compiler ({error})"
    return None if probe.returncode == 0 else f"no working C++ compiler ({shlex.join(command)}: {probe.stderr.strip()})"


def with_cuda() -> bool:
    """Whether to compile the CUDA sources."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    choice = os.environ.get("RESNEXT_BUILD_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"resnext: expected RESNEXT_BUILD_CUDA to be 0, 1 or unset, got {choice!r}; unset it")
    possible = torch.version.cuda is not None and CUDA_HOME is not None and Path(CUDA_HOME, "bin", "nvcc").exists()
    if choice == "1" and not possible:
        raise SystemExit(
            f"resnext: RESNEXT_BUILD_CUDA=1 expected nvcc and a CUDA build of torch, got CUDA_HOME={CUDA_HOME} and "
            f"torch {torch.__version__}; install them, or set RESNEXT_BUILD_CUDA=0"
        )
    return possible and choice != "0"


def extension() -> dict:
    """The arguments of setup() that build the extension."""
    from torch.utils import cpp_extension

    flags = {"cxx": ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", STABLE_ABI]}
    patterns, kind = ["*.cpp", "cpu/*.cpp"], cpp_extension.CppExtension
    if with_cuda():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
        flags["cxx"].append("-DRESNEXT_CUDA")
        flags["nvcc"] = ["-std=c++17", "-O3", "-DUSE_CUDA", STABLE_ABI]
        patterns, kind = [*patterns, "cuda/*.cu"], cpp_extension.CUDAExtension
    sources = sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc").glob(pattern))
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*h"))
    module = kind("resnext._C", sources, depends=headers, extra_compile_args=flags, py_limited_api=True)
    build = cpp_extension.BuildExtension.with_options(use_ninja=cpp_extension.is_ninja_available())
    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": [module], "cmdclass": {"build_ext": build}, "options": options}


if reason := why_not():
    if os.environ.get("RESNEXT_BUILD_CUDA") == "1":
        raise SystemExit(f"resnext: RESNEXT_BUILD_CUDA=1 expected a build environment, got none: {reason}")
    print(f"resnext: installing without the C++ extension: {reason}", file=sys.stderr)
setup(**({} if reason else extension()))
