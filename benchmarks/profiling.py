"""PyTorch's profiler beside our operators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from resnext.kernels import calls


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Let calls go as they go without a profiler, to which operators would show themselves one by one."""
    original = calls._profiled
    calls._profiled = lambda: False
    try:
        yield
    finally:
        calls._profiled = original
