"""Run a few GPU tests under NVIDIA's compute-sanitizer: three shapes of each family of kernels.

    python benchmarks/sanitize.py [--tool memcheck | racecheck] [--list]

The exit code is 0 if the tool found nothing and the tests passed, 1 if not, 77 where the tool or a GPU is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import environment
import torch

TOOL = "compute-sanitizer"
SKIPPED = 77  # What build systems take for "skipped".
# Of tests/test_gpu.py and tests/test_pointwise_conv.py; both of our GPU backends run those of the former.
SELECTED = {
    "grouped convolution, every pass: strips, strips with stride 2, taps": [
        f"tests/test_gpu.py::test_every_pass[{backend}-{case}-torch.float16-nhwc]"
        for case in ("gw4-resnext50-stage1", "gw8-stride2-resnext50-stage2", "gw64-stride2")
        for backend in ("triton", "cuda")
    ],
    "the same with what is fused": [
        f"tests/test_gpu.py::test_fused_convolutions[{backend}-{case}-torch.float16-nhwc]"
        for case in ("gw4-resnext50-stage1", "gw8-stride2", "gw64")
        for backend in ("triton", "cuda")
    ],
    "elementwise passes and the pool": [
        f"tests/test_gpu.py::test_elementwise[{backend}-{shape}-torch.float16-nhwc]"
        for shape in ("(2, 32, 8, 8)", "(3, 24, 5, 7)", "(1, 8, 67, 35)")
        for backend in ("triton", "cuda")
    ],
    "1x1 convolution": [
        f"tests/test_pointwise_conv.py::test_every_case[{case}]" for case in ("whole-blocks", "odd-channels", "stride2")
    ],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tool", choices=("memcheck", "racecheck"), default="memcheck", help="default: memcheck")
    parser.add_argument("--list", action="store_true", help="print the tests and stop")
    args = parser.parse_args(argv)
    tests = [test for family in SELECTED.values() for test in family]
    if args.list:
        print("\n".join(tests))
        return 0
    tool = shutil.which(TOOL) or shutil.which(TOOL, path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if tool is None or not torch.cuda.is_available():
        missing = "a CUDA GPU" if tool is not None else f"{TOOL} on the PATH (it is part of the CUDA toolkit)"
        print(f"sanitize.py: skipped: needs {missing}; nothing was checked", file=sys.stderr)
        return SKIPPED
    command = [tool, "--tool", args.tool, "--error-exitcode", "1", "--target-processes", "all"]
    # PyTorch's allocator hands out parts of large blocks, in which the tool sees no end of a tensor.
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    return 1 if subprocess.run(command, cwd=environment.ROOT, env=variables).returncode else 0


if __name__ == "__main__":
    sys.exit(main())
