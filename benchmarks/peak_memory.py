"""How much memory a call needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from profiling import unnoticed


class Memory(NamedTuple):
    """Bytes beyond what was allocated before a call.

    Attributes:
        peak: The most while it ran: result, workspace, what backward keeps.
        kept: What was left with its result, such as the tensors that backward will need.
    """

    peak: int
    kept: int


def measure_memory(call: Callable[[], object], device: torch.device) -> Memory:
    """Run ``call`` twice and say what the second time allocates.

    On CUDA by the statistics of PyTorch's allocator. On the CPU by its profiler, which records every allocation of
    PyTorch's allocator; what a library takes from elsewhere (oneDNN's scratch memory) is seen by neither.
    """
    call()
    return _measure_cuda(call, device) if device.type == "cuda" else _measure_cpu(call)


def _measure_cuda(call: Callable[[], object], device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    kept = torch.cuda.memory_allocated(device) - before
    del result
    return Memory(torch.cuda.max_memory_allocated(device) - before, kept)


def _measure_cpu(call: Callable[[], object]) -> Memory:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler else reports its own stages
    with unnoticed(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        result = call()
    del result
    now = peak = 0
    events = (event for event in profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return Memory(peak, now)
