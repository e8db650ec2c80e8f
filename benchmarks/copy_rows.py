"""How fast a GPU copies an NHWC tensor in narrow blocks of channels, by their width and by the order of the programs.

    python benchmarks/copy_rows.py --json out.json

The packed grouped convolution reads rows of a few channels: 16 in a 16-bit type are 32 bytes, a sector of the L2 and a
quarter of its line. The prediction (NOTES.md): such rows cost within 5% of whole lines as long as programs with
neighbouring channel blocks run at the same time (``channels fastest``).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import environment
import torch
import triton
import triton.language as tl
from timing import Budget, interleave

CHANNELS = 256
BLOCK_CHANNELS = (16, 32, 64, 128, 256)


@triton.jit
def _copy_kernel(
    x_ptr,
    y_ptr,
    num_rows,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_FASTEST: tl.constexpr,
):
    """Copy BLOCK_M rows of BLOCK_C channels of x (num_rows, CHANNELS)."""
    pid = tl.program_id(0)
    if CHANNELS_FASTEST:
        pid_m, pid_c = pid // (CHANNELS // BLOCK_C), pid % (CHANNELS // BLOCK_C)
    else:
        num_blocks_m = tl.cdiv(num_rows, BLOCK_M)
        pid_m, pid_c = pid % num_blocks_m, pid // num_blocks_m
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs = offs_m[:, None] * CHANNELS + pid_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (offs_m < num_rows)[:, None]
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask, other=0.0), mask=mask)


def copy_rows(x: torch.Tensor, block_channels: int, channels_fastest: bool) -> torch.Tensor:
    """Copy x (rows, CHANNELS), contiguous, in blocks of 8192 elements, ``block_channels`` wide."""
    y = torch.empty_like(x)
    block_m = 8192 // block_channels
    grid = (triton.cdiv(x.shape[0], block_m) * (CHANNELS // block_channels),)
    _copy_kernel[grid](
        x_ptr=x,
        y_ptr=y,
        num_rows=x.shape[0],
        CHANNELS=CHANNELS,
        BLOCK_M=block_m,
        BLOCK_C=block_channels,
        CHANNELS_FASTEST=channels_fastest,
        num_warps=4,
    )
    return y


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="PATH", help="write the results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("copy_rows.py: error: needs a CUDA GPU, and PyTorch sees none", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    x = torch.randn(2**21, CHANNELS, device=device).to(torch.bfloat16)  # 1 GiB, far beyond any L2
    calls: dict[str, Callable[[], torch.Tensor]] = {"torch clone": x.clone}
    for block_channels in BLOCK_CHANNELS:
        for order in ("channels", "rows"):
            name = f"{block_channels * x.element_size():>3} B, {order} fastest"
            calls[name] = functools.partial(copy_rows, x, block_channels, order == "channels")
    for name, call in calls.items():
        if not torch.equal(call(), x):
            print(f"copy_rows.py: WRONG: {name} is not a copy", file=sys.stderr)
            return 1
    timings = interleave(calls, device, Budget(seconds=3.0, min_rounds=10, max_rounds=50))
    num_bytes = 2 * x.numel() * x.element_size()
    rates = {name: num_bytes / timing.median for name, timing in timings.items()}
    for name, rate in rates.items():
        print(f"{name:<24}{rate * 1e-9:>8.0f} GB/s")
    if args.json is not None:
        result = {"environment": environment.describe(device), "bytes_per_second": rates}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
