"""Time our grouped 3x3 convolution against PyTorch's, pass by pass, on the layers of real networks.

    python benchmarks/grouped_conv.py --quick
    python benchmarks/grouped_conv.py --layers resnext50_32x4d,regnety_040 --json out.json --plot out.png

Every pass is checked against float64 before it is timed, on samples of its result (verify.py); a wrong one is
reported, left out and makes the exit code 1.
benchmarks/NOTES.md says how the numbers are made and how to read them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import contenders
import environment
import report
import shapes
import torch
from contenders import BASELINES, COMPILED, EAGER, Operands
from roofline import Roofline, measure_roofline
from timing import Budget, interleave, keep_freed_memory, peak_bytes
from verify import mismatch

from resnext.kernels import BackendError, use_backend

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BACKENDS = ("auto", "triton", "cuda", "cpu", "torch")
FULL = Budget(seconds=0.8, min_rounds=5, max_rounds=100)
QUICK = Budget(seconds=0.3, min_rounds=5, max_rounds=30)
Item = TypeVar("Item")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(
        description=__doc__.partition("\n")[0],
        epilog="Lists are separated by commas. Defaults: CUDA if there is a GPU; every layer and pass.",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:<index>")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on CUDA")
    parser.add_argument("--batch", type=int, help="images; default: 8 on the CPU, 64 on CUDA (--quick: 2 and 16)")
    parser.add_argument("--layers", help="networks and layers, as --list names them")
    parser.add_argument("--passes", help=f"of {', '.join(shapes.PASSES)}")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="force one of ours (default: auto)")
    parser.add_argument("--baseline", help=f"of {', '.join(BASELINES)}; default: all on CUDA, the first two on the CPU")
    parser.add_argument("--json", metavar="PATH", help="write everything that was measured")
    parser.add_argument("--csv", metavar="PATH", help="write the table")
    parser.add_argument("--plot", metavar="PATH", help="write a bar chart as PNG (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="ResNeXt-50, small batch, few repetitions")
    parser.add_argument("--verify-only", action="store_true", help="check every pass, time nothing")
    parser.add_argument("--list", action="store_true", help="print the layers and stop")
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, complete with defaults and as the objects they name. Bad ones end the program with code 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    args.layers = _names(args.layers) or (["resnext50_32x4d"] if args.quick else ["all"])
    try:
        args.layers = shapes.select_layers(args.layers)
    except ValueError as error:
        parser.error(f"--layers: {error}")
    args.device = _device(parser, args.device)
    cuda = args.device.type == "cuda"
    args.dtype = DTYPES[args.dtype or ("bfloat16" if cuda else "float32")]
    args.passes = _chosen(parser, "--passes", args.passes, shapes.PASSES) or shapes.PASSES
    args.baseline = _chosen(parser, "--baseline", args.baseline, BASELINES) or (BASELINES if cuda else EAGER)
    if args.batch is None:
        args.batch = (16 if cuda else 2) if args.quick else (64 if cuda else 8)
    if args.batch < 1:
        parser.error(f"--batch: expected at least 1 image, got {args.batch}")
    for option in ("json", "csv", "plot"):
        path = getattr(args, option)
        if path is not None and (os.path.isdir(path) or not os.access(Path(path).resolve().parent, os.W_OK)):
            parser.error(f"--{option}: expected a file in a folder that exists and can be written to, got {path}")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: needs matplotlib, which is not installed; run `pip install matplotlib`")
    return args


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def _chosen(parser: _Parser, option: str, text: str | None, known: Sequence[str]) -> list[str]:
    names = _names(text)
    for name in names:
        if name not in known:
            parser.error(f"{option}: expected a list of {', '.join(known)}, got {name!r}")
    return [name for name in known if name in names]


def _device(parser: _Parser, name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device: expected cpu, cuda or cuda:<index>, got {name!r}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu, cuda or cuda:<index>, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device: {name!r} asked for, but PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _list_layers() -> str:
    lines = [f"{'network':<18}{'layer':<20}{'times':>6}{'groups':>8}{'GFLOP/image':>13}{'elements/image':>16}"]
    for network, layers in shapes.NETWORKS.items():
        lines += [
            f"{network:<18}{layer.name:<20}{count:>6}{layer.groups:>8}"
            f"{layer.flops(1) * 1e-9:>13.3f}{layer.bytes(1, 1):>16}"
            for layer, count in layers.items()
        ]
    return "\n".join(lines)


def _progress(items: Iterable[Item], total: int) -> Iterator[Item]:
    if importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        yield from tqdm(items, total=total, unit="pass", file=sys.stderr)
        return
    for done, item in enumerate(items, start=1):
        print(f"pass {done} of {total}", file=sys.stderr)
        yield item


def _work(args: argparse.Namespace) -> Iterator[tuple[str, Operands]]:
    for layer in args.layers:
        operands = Operands.random(layer, args.batch, args.dtype, args.device).to("channels_last")
        for pass_ in args.passes:
            yield pass_, operands


def _time(args: argparse.Namespace, roofline: Roofline, pass_: str, operands: Operands) -> report.Row:
    layer = operands.layer
    flops, num_bytes = layer.flops(args.batch), layer.bytes(args.batch, args.dtype.itemsize)
    if not set(COMPILED).isdisjoint(args.baseline):
        torch.compiler.reset()  # a function compiles for a limited number of shapes: forget those of the last layer
    calls = {name: contenders.baseline(name, pass_, operands) for name in args.baseline}
    calls = {report.OURS: functools.partial(contenders.ours, pass_, operands), **calls}
    return report.Row(
        layer=layer,
        pass_=pass_,
        backend=contenders.serving_backend(pass_, operands),
        flops=flops,
        bytes=num_bytes,
        bound=roofline.bound(num_bytes, flops),
        timings=interleave(calls, args.device, QUICK if args.quick else FULL),
        peak_bytes={name: peak_bytes(call, args.device) for name, call in calls.items()},
    )


def _run(args: argparse.Namespace) -> int:
    rows: list[report.Row] = []
    wrong = 0
    about = environment.describe(args.device)  # now, while the load average is not yet our own
    roofline = None if args.verify_only else measure_roofline(args.device, args.dtype)
    complete = False
    try:
        for pass_, operands in _progress(_work(args), len(args.layers) * len(args.passes)):
            message = mismatch(pass_, operands)
            if message is not None:
                wrong += 1
                print(f"WRONG: {operands.layer.name} {pass_}: {message}", file=sys.stderr)
            elif roofline is not None:
                rows.append(_time(args, roofline, pass_, operands))
        complete = True
    finally:
        if roofline is not None and (rows or complete):
            _publish(args, rows, about, roofline, wrong, complete)
    if args.verify_only:
        checked = len(args.layers) * len(args.passes)
        print(f"{checked - wrong} of {checked} passes agree with float64")
    return 1 if wrong else 0


def _publish(
    args: argparse.Namespace,
    rows: Sequence[report.Row],
    about: dict[str, Any],
    roofline: Roofline,
    wrong: int,
    complete: bool,
) -> None:
    """Show the rows and write the files that were asked for, of an interrupted run too."""
    machine = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    title = f"{machine}; torch {about['torch']}; {str(args.dtype).removeprefix('torch.')}, batch {args.batch}"
    print(
        f"{title}\n"
        f"roofline: copy {roofline.copy_bytes_per_second * 1e-9:.1f} GB/s, "
        f"matrix product {roofline.gemm_flops_per_second * 1e-12:.3f} TFLOP/s\n"
    )
    print(report.table(rows), report.summary(rows), sep="\n\n", flush=True)
    if args.device.type == "cpu" and about["load_average"] > 0.5 * about["cpus"]:
        print(
            f"The machine was busy before the start (load average {about['load_average']} on {about['cpus']} CPUs): "
            "where p20 and p80 lie far apart, the times are those of a thread waiting for a core"
        )
    if wrong:
        print(f"{wrong} passes are WRONG and were not timed")
    if args.json is not None:
        arguments = {name: str(value) for name, value in vars(args).items() if name != "layers"}
        text = report.to_json(
            rows,
            complete=complete,
            wrong_passes=wrong,
            environment=about,
            arguments=arguments,
            roofline=dataclasses.asdict(roofline),
        )
        Path(args.json).write_text(text)
    if args.csv is not None:
        Path(args.csv).write_text(report.to_csv(rows))
    if args.plot is not None and rows:
        report.plot(rows, title, args.plot)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 after a wrong result, 2 for bad arguments, 130 if interrupted."""
    args = _parse(argv)
    if args.list:
        print(_list_layers())
        return 0
    if args.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.cuda.set_device(args.device)
    else:
        keep_freed_memory()
    try:
        with torch.no_grad(), use_backend(args.backend):
            return _run(args)
    except BackendError as error:
        print(f"grouped_conv.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("grouped_conv.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
