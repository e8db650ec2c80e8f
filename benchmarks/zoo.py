"""Convert networks of torchvision and timm with `resnext.fuse_` and compare each with itself before.

    python benchmarks/zoo.py --list
    python benchmarks/zoo.py --json benchmarks/results/epyc/zoo.json
    python benchmarks/zoo.py --names timm/resnext50_32x4d,torchvision/resnet18

By default: every network of the two libraries that holds a 3x3 convolution with more than one group and fewer groups
than channels, and some residual networks without. conversion.py says what is compared. Networks are converted in
processes of their own, so that one that crashes or does not end costs its line and nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import command_line
import conversion
import environment
import networks
import report
import torch
from command_line import Parser
from conversion import Row
from torch import nn

# Networks of dense convolutions: every kind of residual block that the two libraries have.
DENSE = (
    "torchvision/resnet18",
    "torchvision/resnet34",
    "torchvision/resnet50",
    "torchvision/resnet101",
    "torchvision/resnet152",
    "torchvision/wide_resnet50_2",
    "torchvision/quantized_resnet18",
    "torchvision/quantized_resnet50",
    "torchvision/vgg11_bn",
    "torchvision/densenet121",
    "torchvision/mobilenet_v2",
    "timm/resnet18",
    "timm/resnet18d",
    "timm/resnet50",
    "timm/resnet50d",
    "timm/resnet50_gn",
    "timm/resnetaa50",
    "timm/resnetblur50",
    "timm/resnetrs50",
    "timm/resnetv2_50",
    "timm/seresnet50",
    "timm/ecaresnet50d",
    "timm/skresnet18",
    "timm/legacy_seresnet18",
    "timm/res2net50_26w_4s",
    "timm/dla34",
    "timm/cspresnet50",
    "timm/darknet53",
    "timm/hrnet_w18_small",
    "timm/repvgg_b0",
    "timm/gernet_s",
)


def is_grouped(module: nn.Module) -> bool:
    """Whether a module is a 3x3 convolution with more than one group and fewer groups than channels."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and 1 < module.groups < module.in_channels


def known_names() -> list[str]:
    """Every network of torchvision and timm, as library/name."""
    networks.torchvision_resnet()  # makes torchvision importable, which timm imports
    import timm
    from torchvision import models

    return [f"torchvision/{name}" for name in models.list_models()] + [f"timm/{name}" for name in timm.list_models()]


def grouped_names() -> Iterator[str]:
    """The known networks that hold a grouped 3x3 convolution, built without memory where that can be."""
    for name in known_names():
        try:
            with torch.device("meta"):
                model = conversion.build(name)
        except NotImplementedError:  # computes with tensors while it is built
            model = conversion.build(name)
        if any(map(is_grouped, model.modules())):
            yield name


class Worker:
    """A process that converts one network after the other, with one thread: several compete less for cores."""

    def __init__(self) -> None:
        self._start()

    def convert(self, name: str, seconds: float) -> Row:
        """The line of a network; of a process that dies or needs more than ``seconds``, one that says so."""
        self._connection.send(name)
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
            failure = f"not done after {seconds:.0f} s"
        except EOFError:
            self._process.join()
            failure = f"the process ended with code {self._process.exitcode}"
        self.close()
        self._start()
        return Row(name, failure=failure)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the connection


def _work(connection: Connection) -> None:
    torch.set_num_threads(1)
    networks.torchvision_resnet()
    while True:
        name = connection.recv()
        try:
            row = conversion.compare(name)
        except Exception as error:
            traceback.print_exc()
            row = Row(name, failure=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        connection.send(row)


def convert_all(names: Sequence[str], seconds: float, workers: int) -> Iterator[Row]:
    """The lines of the networks, in order; each may take so many seconds."""
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    processes = [Worker() for _ in range(workers)]
    for worker in processes:
        idle.put(worker)

    def convert(name: str) -> Row:
        worker = idle.get()
        try:
            return worker.convert(name, seconds)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(convert, names)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in processes:
            worker.close()


def _parser() -> Parser:
    parser = Parser(description=__doc__.partition("\n")[0], epilog="Lists are separated by commas.")
    parser.add_argument("--names", metavar="NAMES", help="library/name,... (default: all there are, see above)")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--json", metavar="PATH", help="write everything, after each network anew")
    parser.add_argument("--csv", metavar="PATH", help="write the table")
    parser.add_argument("--resume", action="store_true", help="keep the lines that --json's file has, do the others")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit for one network (default: 600)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="networks at a time (default: a core each)"
    )
    return parser


def _write(path: str, about: dict[str, object], names: Sequence[str], rows: Sequence[Row]) -> None:
    result = {
        "complete": len(rows) == len(names),
        "wrong": sum(row.failure is not None for row in rows),
        "environment": about,
        "arguments": {"dtype": "torch.float32", "batch": conversion.IMAGES},
        "names": list(names),
        "rows": [row.record() for row in rows],
    }
    Path(path).write_text(json.dumps(result, indent=1) + "\n")


def _run(args: argparse.Namespace, parser: Parser) -> int:
    rows: list[Row] = []
    names = command_line.names(args.names)
    if args.resume:
        before = json.loads(Path(args.json).read_text())
        names = names or before["names"]
        rows = [Row(**row) for row in before["rows"] if row["name"] in names]
    if names:
        known = set(known_names())
        if unknown := [name for name in names if name not in known]:
            parser.error(f"--names: expected library/name of torchvision or timm, got {', '.join(unknown)}")
    else:
        grouped = list(grouped_names())
        print(f"{len(grouped)} networks with a grouped 3x3 convolution, {len(DENSE)} without", file=sys.stderr)
        names = [*grouped, *DENSE]
    if args.list:
        print("\n".join(names))
        return 0
    about = environment.describe(torch.device("cpu"))
    missing = [name for name in names if name not in {row.name for row in rows}]
    converted = convert_all(missing, args.seconds, args.workers)
    try:
        for row in command_line.progress(converted, len(missing), "network"):
            rows.append(row)
            if row.failure:
                print(f"WRONG: {row.name}: {row.failure}", file=sys.stderr)
            if args.json is not None:
                _write(args.json, about, names, rows)
    finally:
        converted.close()
        print(report.table(rows))
        if args.csv is not None:
            Path(args.csv).write_text(report.to_csv(rows))
    return 1 if any(row.failure for row in rows) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 after a wrong result, 2 for bad arguments, 130 if interrupted."""
    parser = _parser()
    args = parser.parse_args(argv)
    for option in ("json", "csv"):
        command_line.check_output(parser, option, getattr(args, option))
    if args.workers < 1:
        parser.error(f"--workers: expected at least 1, got {args.workers}")
    if args.resume and (args.json is None or not Path(args.json).exists()):
        parser.error(f"--resume: expected --json with a file of an earlier run, got {args.json}")
    return command_line.exit_code("zoo.py", lambda: _run(args, parser))


if __name__ == "__main__":
    sys.exit(main())
