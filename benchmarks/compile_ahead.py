"""Compile the Triton kernels of networks' convolutions into Triton's cache, by several processes at once.

    python benchmarks/compile_ahead.py --layers resnext50_32x4d --batch 256

A benchmark compiles what it meets, one kernel after the other: a minute for a network. Without a GPU this compiles for
an H200; Triton finds there what was compiled elsewhere if its version, Python's and the path of the cache
(TRITON_CACHE_DIR) are the same.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import sys
import time
from collections.abc import Sequence

import command_line
import shapes
import torch
from ahead_of_time import specialization
from command_line import Parser
from targets import AnyConfig, Target, all_targets, pointwise_layers, resources

from resnext.kernels import tuning
from resnext.kernels.launch import architecture


def settings(target: Target, device: torch.device) -> AnyConfig:
    """The launch settings of a target: measured on ``device``, or else the heuristic's."""
    places = {"fusion": target.fusion, "kernel_size": target.kernel_size}
    entry = tuning.lookup(target.problem, device, allow_tf32=target.allow_tf32, **places)  # type: ignore[arg-type]
    return target.candidates(device)[0] if entry is None or entry.config is None else entry.config


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.partition("\n")[0], epilog="Lists are separated by commas.")
    parser.add_argument("--layers", help="networks and layers, as grouped_conv.py --list names them")
    parser.add_argument("--batch", help="numbers of images; default: 256")
    parser.add_argument("--dtype", choices=command_line.DTYPES, default="bfloat16", help="default: bfloat16")
    command_line.add_jobs_option(parser)
    args = parser.parse_args(argv)
    names = command_line.names(args.layers) or ["resnext50_32x4d"]
    try:
        args.layers = shapes.select_layers(names)
    except ValueError as error:
        parser.error(f"--layers: {error}")
    args.pointwise = pointwise_layers(names)
    args.batch = command_line.batches(parser, args.batch or "256")
    args.dtype = command_line.DTYPES[args.dtype]
    args.jobs = command_line.jobs(parser, args.jobs)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 if a kernel does not compile, 2 for bad arguments."""
    args = _parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    passes = (list(tuning.FUSIONS), list(shapes.PASSES))
    every = all_targets(args.layers, args.pointwise, *passes, args.batch, args.dtype, device.type)
    wanted = {}
    for target in every:
        if target.op != "bwd":
            config = settings(target, device)
            wanted.setdefault(specialization(target.launch(config), target.dtype), (target, config))
    start, failed = time.monotonic(), 0
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        arch = architecture(device)
        futures = {pool.submit(resources, *each, arch): each for each in wanted.values()}
        for future in concurrent.futures.as_completed(futures):
            if isinstance(used := future.result(), str):
                target, config = futures[future]
                failed += 1
                print(f"{target.layer_name} {target.fusion} {target.op}, {config}: {used}", file=sys.stderr)
    print(f"{len(wanted) - failed} of {len(wanted)} kernels compiled, in {time.monotonic() - start:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
