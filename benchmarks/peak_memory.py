"""How much memory a call needs at its peak."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Memory that one call allocates at its peak, beyond what there was before: result, workspace, what backward keeps.

    On CUDA by the statistics of PyTorch's allocator. On the CPU by its profiler, which records every allocation of
    PyTorch's allocator; what a library takes from elsewhere (oneDNN's scratch memory) is seen by neither.
    """
    call()
    if device.type == "cuda":
        return _peak_cuda(call, device)
    return _peak_cpu(call)


def _peak_cuda(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def _peak_cpu(call: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler else reports its own stages
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        result = call()
        del result
    now = peak = 0
    events = (event for event in profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
