"""Fair timing: all contenders in one process, in turn, each repetition measured by itself."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Shorter kernels are replayed from a CUDA graph: launching them takes the CPU as long as running them takes the GPU.
GRAPH_BELOW_SECONDS = 50e-6
FLUSHES = 4
# cuDNN tries its algorithms in the first call, a compiled function compiles; on the CPU one call warms all there is.
WARM_UP_CALLS = {"cuda": 3, "cpu": 1}


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender.

    Attributes:
        median: Over all rounds.
        p20: 20th percentile.
        p80: 80th percentile.
        p95: 95th percentile.
        p99: 99th percentile; of few rounds little less than the longest.
        rounds: How often it was measured.
        replayed: Whether as a CUDA graph.
    """

    median: float
    p20: float
    p80: float
    p95: float
    p99: float
    rounds: int
    replayed: bool = False


@dataclass(frozen=True)
class Budget:
    """How long to measure: for ``seconds``, but ``min_rounds`` at least and ``max_rounds`` at most."""

    seconds: float
    min_rounds: int
    max_rounds: int

    def rounds(self, round_seconds: float) -> int:
        """Rounds that fit, given how long one takes."""
        return max(self.min_rounds, min(self.max_rounds, int(self.seconds / round_seconds)))


Contenders = Mapping[str, Callable[[], object]]


def interleave(contenders: Contenders, device: torch.device, budget: Budget) -> dict[str, Timing]:
    """Time functions round-robin, so that whatever the machine does meanwhile meets all of them alike.

    Each call allocates its own result, on the CPU by the system's allocator, on CUDA by PyTorch's caching one. On CUDA
    the L2 cache is overwritten before every call, and where any contender takes less than 50 us all are replayed from
    CUDA graphs. On the CPU a contender finds the caches as the one before left them; each round starts with another.

    Args:
        contenders: Name -> function that computes one result on ``device``.
        device: Where they run.
        budget: How many rounds to spend.
    """
    for call in contenders.values():
        for _ in range(WARM_UP_CALLS[device.type]):
            call()
    if device.type == "cuda":
        return _interleave_cuda(contenders, device, budget)
    return _interleave_cpu(contenders, budget)


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, where its allocator is glibc's.

    By default glibc gives the memory of large results back and asks for it again, zeroed, page by page: thousands of
    faults that hit every second or third call of any contender, and cost more than many a convolution.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def _summary(samples: list[float], replayed: bool = False) -> Timing:
    # "inclusive" treats the samples as the whole population, so that a handful already has percentiles.
    percents = statistics.quantiles(samples, n=100, method="inclusive")
    chosen = (percents[p - 1] for p in (20, 80, 95, 99))
    return Timing(statistics.median(samples), *chosen, len(samples), replayed)


def _round_robin(
    contenders: Contenders, rounds: int, seconds: Callable[[Callable[[], object]], float]
) -> dict[str, list[float]]:
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for start in range(rounds):
        for turn in range(len(names)):
            name = names[(start + turn) % len(names)]
            samples[name].append(seconds(contenders[name]))
    return samples


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # freed outside the measurement: giving memory back is not part of the convolution
    return seconds


def _interleave_cpu(contenders: Contenders, budget: Budget) -> dict[str, Timing]:
    rounds = budget.rounds(sum(_cpu_seconds(call) for call in contenders.values()))
    return {name: _summary(samples) for name, samples in _round_robin(contenders, rounds, _cpu_seconds).items()}


def _interleave_cuda(contenders: Contenders, device: torch.device, budget: Budget) -> dict[str, Timing]:
    # Overwriting four times the L2, a few times, also keeps the GPU busy while the CPU queues what is measured: once
    # (60 us on an H200) was less than it takes to queue two small operators in C++ and one in PyTorch.
    size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28)
    flush = torch.empty(size, dtype=torch.int8, device=device)

    def seconds(call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(FLUSHES):
            flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    once = [seconds(call) for call in contenders.values()]
    replayed = min(once) < GRAPH_BELOW_SECONDS
    if replayed:
        contenders = {name: captured(call) for name, call in contenders.items()}
    rounds = budget.rounds(sum(once) + len(once) * FLUSHES * seconds(flush.zero_))
    samples = _round_robin(contenders, rounds, seconds)
    return {name: _summary(values, replayed) for name, values in samples.items()}


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of one call; its result lives in the graph's own memory pool."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
