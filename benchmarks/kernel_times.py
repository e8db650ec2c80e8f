"""Which kernels a network's step spends its time in on a GPU, by PyTorch's profiler; Triton's also against their bytes.

    python benchmarks/kernel_times.py --batch 256 --dtype bfloat16 --json out.json

For each contender and mode: the step, what the host alone takes (a step of two images), the kernels' times by name,
and our Triton launches one by one, by what memory bandwidth leaves to gain: their time less that of reading and writing
each operand once. Harder to read than the other benchmarks, and the one that says what to improve.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import command_line
import environment
import model
import networks
import torch
from command_line import Parser
from profiling import unnoticed
from roofline import measure_roofline

from resnext.kernels.launch import Launch

SMALL = 2  # Images of the step that shows what the host takes.
WARM_UP = 3  # Steps until the allocator has all the memory that a step wants.
Record = dict[str, Any]


@contextlib.contextmanager
def recorded(launches: list[Record]) -> Iterator[None]:
    """Note what Triton is given to launch: the kernel, its settings, and the shapes and bytes of its tensors."""
    original = Launch.__call__

    def call(self: Launch, **tensors: torch.Tensor | None) -> None:
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        operands = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in given.values()}
        launches.append(
            {
                "name": self.kernel.__name__,
                "shapes": {name: list(tensor.shape) for name, tensor in given.items()},
                "bytes": sum(operands.values()),
                "constants": {name: value for name, value in self.constants.items() if value is not None},
                "options": self.options,
                "programs": self.programs,
            }
        )
        original(self, **tensors)

    Launch.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        Launch.__call__ = original  # type: ignore[method-assign]


def profiled(step: Callable[[], object]) -> list[Record]:
    """Everything one step runs on the GPU, in order: name and microseconds, with what `recorded` knows of Triton's."""
    launches: list[Record] = []
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with unnoticed(), recorded(launches), torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return matched(events, launches)


def matched(events: Sequence[Record], launches: Sequence[Record]) -> list[Record]:
    """The trace's kernels, copies and fills by their start, and each of Triton's with its launch."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    ran = sorted((event for event in events if event.get("cat") in kinds), key=lambda event: event["ts"])
    names, waiting = {launch["name"] for launch in launches}, iter(launches)
    found = []
    for event in ran:
        row = {"name": event["name"], "microseconds": event["dur"]}
        if event["name"] in names:
            launch = next(waiting)
            if launch["name"] != event["name"]:
                raise RuntimeError(f"expected {launch['name']} to run next, the profiler saw {event['name']}")
            row |= launch | {"registers": event.get("args", {}).get("registers per thread")}
        found.append(row)
    return found


def _seconds(step: Callable[[], object], repeats: int) -> float:
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def by_name(rows: Sequence[Record]) -> list[tuple[str, int, float, float]]:
    """(name, how often, microseconds, bytes) of all kernels of a name, those that take longest first."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for row in rows:
        each = sums[row["name"]]
        each[0] += 1
        each[1] += row["microseconds"]
        each[2] += row.get("bytes", 0)
    found = [(name, int(count), time, moved) for name, (count, time, moved) in sums.items()]
    return sorted(found, key=lambda each: -each[2])


def merged(rows: Sequence[Record]) -> list[Record]:
    """Equal kernels as one row, with how often they ran and their microseconds together; the longest first."""
    found: dict[str, Record] = {}
    for row in rows:
        kind = {key: value for key, value in row.items() if key not in ("microseconds", "registers")}
        one = found.setdefault(json.dumps(kind, default=str), row | {"count": 0, "microseconds": 0.0})
        one["count"] += 1
        one["microseconds"] = round(one["microseconds"] + row["microseconds"], 3)
    return sorted(found.values(), key=lambda row: -row["microseconds"])


def by_gain(rows: Sequence[Record], bytes_per_second: float) -> list[tuple[float, int, float, float, Record]]:
    """(microseconds to gain, how often, microseconds, those of the bytes, launch) of equal Triton launches."""
    found = []
    for row in merged([row for row in rows if "bytes" in row]):
        count, time_ = row["count"], row["microseconds"]
        floor = row["bytes"] / bytes_per_second * 1e6
        found.append((time_ - count * floor, count, time_ / count, floor, row))
    return sorted(found, key=lambda each: -each[0])


def _show(name: str, result: Record, bytes_per_second: float, lines: int) -> None:
    rows = result["kernels"]
    total = sum(row["microseconds"] for row in rows)
    print(
        f"\n{name}: {result['step_seconds'] * 1e3:.2f} ms a step, kernels {total / 1e3:.2f} ms in {len(rows)}; "
        f"{SMALL} images {result['small_step_seconds'] * 1e3:.2f} ms"
    )
    for kernel, count, time_, moved in by_name(rows)[:lines]:
        rate = f"{moved / time_ * 1e-3:7.0f} GB/s" if moved else " " * 12
        print(f"{time_ / 1e3:9.3f} ms {count:5d} {rate}  {kernel[:90]}")
    for gain, count, time_, floor, launch in by_gain(rows, bytes_per_second)[:lines]:
        shapes = {key.removesuffix("_ptr"): value for key, value in launch["shapes"].items() if len(value) == 4}
        warps = launch["options"].get("num_warps")
        print(f"{gain:9.0f} us to gain: {count} x {time_:.1f} us, bytes {floor:.1f} us; {launch['name']} {shapes}")
        print(f"{'':13}{warps} warps, {launch['registers']} registers, {launch['programs']} programs")


def _measure(args: argparse.Namespace, mode: str, contender: str, pair: networks.Pair) -> Record:
    images, labels = model.make_batch(args.batch[0], args.size, args.device)
    small = model.call(contender, pair, mode, images[:SMALL], labels[:SMALL], args.dtype)
    small_seconds = _seconds(small, 10)
    step = model.call(contender, pair, mode, images, labels, args.dtype)
    seconds = _seconds(step, 5)
    return {"step_seconds": seconds, "small_step_seconds": small_seconds, "kernels": profiled(step)}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.partition("\n")[0], epilog="Needs a CUDA GPU.")
    command_line.add_device_options(parser)
    model.add_model_options(parser, batch="256")
    parser.add_argument("--mode", help=f"of {', '.join(model.MODES)} (default: both)")
    parser.add_argument("--contenders", help=f"of {', '.join(networks.CONTENDERS)} (default: ours,channels_last)")
    parser.add_argument("--lines", type=int, default=15, help="of each table (default: 15)")
    parser.add_argument("--json", metavar="PATH", help="write every kernel of every step")
    args = parser.parse_args(argv)
    args.quick = False
    command_line.check_device_options(parser, args)
    if args.device.type != "cuda":
        parser.error("--device: kernels are timed on a CUDA GPU only, and PyTorch sees none")
    model.check_model_options(parser, args, batch="256")
    command_line.check_output(parser, "json", args.json)
    if len(args.model) > 1 or len(args.batch) > 1:
        parser.error("--model and --batch: expected one each")
    args.mode = command_line.chosen(parser, "--mode", args.mode, model.MODES) or list(model.MODES)
    known = list(networks.CONTENDERS)
    args.contenders = command_line.chosen(parser, "--contenders", args.contenders, known) or ["ours", "channels_last"]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 for bad arguments."""
    args = _parse(argv)
    command_line.prepare(args.device)
    bandwidth = measure_roofline(args.device, args.dtype).copy_bytes_per_second
    pair = networks.model_pair(args.model[0])
    rows: list[Record] = []
    for mode in args.mode:
        for contender in args.contenders:
            row = _measure(args, mode, contender, pair)
            _show(f"{mode} {contender}", row, bandwidth, args.lines)
            seconds = sum(kernel["microseconds"] for kernel in row["kernels"]) * 1e-6
            row |= {"kernel_seconds": seconds, "kernels": merged(row["kernels"])}
            rows.append({"model": args.model[0], "mode": mode, "contender": contender, **row})
    if args.json is not None:
        arguments = {"batch": args.batch[0], "size": args.size, "dtype": str(args.dtype), "backend": args.backend}
        about = {"environment": environment.describe(args.device), "arguments": arguments}
        result = {**about, "copy_bytes_per_second": bandwidth, "rows": rows}
        Path(args.json).write_text(json.dumps(result, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
