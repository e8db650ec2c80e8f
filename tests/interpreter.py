"""Triton's kernels in tests: on a GPU in this process, otherwise in the interpreter in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .fused_numerics import Arithmetic

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_HERE = INTERPRETED or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"

here = pytest.mark.skipif(not RUNS_HERE, reason="run by test_in_the_interpreter")
compiles = pytest.mark.skipif(INTERPRETED, reason="Triton compiles nothing while its interpreter is on")
not_here = pytest.mark.skipif(RUNS_HERE, reason="the tests below run in this process")


def run_tests(file: str, timeout: float) -> None:
    """Run a file of tests in the interpreter; they must pass within ``timeout`` seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def arithmetic(dtype: torch.dtype) -> Arithmetic:
    """What Triton's stores round; the interpreter's cut bfloat16 off, an error of up to one step instead of half."""
    return Arithmetic(2.0 if INTERPRETED and dtype == torch.bfloat16 else 1.0)
