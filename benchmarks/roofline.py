"""The speed limits of the machine, measured in the same run as everything they are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timing import Budget, interleave

_BUDGET = Budget(seconds=1.0, min_rounds=3, max_rounds=30)


@dataclass(frozen=True)
class Roofline:
    """What the device reaches at its best.

    Attributes:
        copy_bytes_per_second: Of a large copy, bytes read plus bytes written.
        gemm_flops_per_second: Of a large square matrix product in the benchmark's dtype, or in float32, which a kernel
            may convert to, if that is faster: PyTorch's CPU product is slow in 16-bit types that the processor lacks.
    """

    copy_bytes_per_second: float
    gemm_flops_per_second: float

    def bound(self, num_bytes: int, num_flops: int) -> float:
        """Seconds below which nothing gets that moves so many bytes and does so many operations on matrix units."""
        return max(num_bytes / self.copy_bytes_per_second, num_flops / self.gemm_flops_per_second)


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure copy bandwidth and matrix rate, as fast as the device does them on random data.

    The 20th percentile rather than the median is the limit: other work on the machine only ever slows it down. A
    float32 product on CUDA uses TF32 if convolutions do.
    """
    cuda = device.type == "cuda"
    source = torch.empty(2**31 if cuda else 2**27, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    copy = interleave({"copy": lambda: target.copy_(source)}, device, _BUDGET)["copy"]
    gemm = max(_gemm_flops_per_second(device, kind) for kind in {dtype, torch.float32})
    return Roofline(2 * source.numel() / copy.p20, gemm)


def _gemm_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        gemm = interleave({"gemm": lambda: a @ b}, device, _BUDGET)["gemm"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / gemm.p20
