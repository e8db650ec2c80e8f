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
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import command_line
import contenders
import environment
import report
import shapes
import torch
from command_line import Parser
from contenders import BASELINES, COMPILED, EAGER, Operands
from peak_memory import measure_memory
from roofline import Roofline, measure_roofline
from timing import Budget, interleave
from verify import mismatch

from resnext.kernels import use_backend

BACKENDS = ("auto", "triton", "cuda", "cpu", "torch")
FULL = Budget(seconds=0.8, min_rounds=5, max_rounds=100)
QUICK = Budget(seconds=0.3, min_rounds=5, max_rounds=30)


def _parser() -> Parser:
    parser = Parser(
        description=__doc__.partition("\n")[0],
        epilog="Lists are separated by commas. Defaults: CUDA if there is a GPU; every layer and pass.",
    )
    command_line.add_common_options(parser, quick="ResNeXt-50, small batch, few repetitions")
    parser.add_argument("--batch", type=int, help="images; default: 8 on the CPU, 64 on CUDA (--quick: 2 and 16)")
    parser.add_argument("--layers", help="networks and layers, as --list names them")
    parser.add_argument("--passes", help=f"of {', '.join(shapes.PASSES)}")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="force one of ours (default: auto)")
    parser.add_argument("--baseline", help=f"of {', '.join(BASELINES)}; default: all on CUDA, the first two on the CPU")
    parser.add_argument("--plot", metavar="PATH", help="write a bar chart as PNG (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="print the layers and stop")
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, complete with defaults and as the objects they name. Bad ones end the program with code 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    args.layers = command_line.names(args.layers) or (["resnext50_32x4d"] if args.quick else ["all"])
    try:
        args.layers = shapes.select_layers(args.layers)
    except ValueError as error:
        parser.error(f"--layers: {error}")
    command_line.check_common_options(parser, args)
    cuda = args.device.type == "cuda"
    args.passes = command_line.chosen(parser, "--passes", args.passes, shapes.PASSES) or shapes.PASSES
    baseline = command_line.chosen(parser, "--baseline", args.baseline, BASELINES)
    args.baseline = baseline or (BASELINES if cuda else EAGER)
    if args.batch is None:
        args.batch = (16 if cuda else 2) if args.quick else (64 if cuda else 8)
    if args.batch < 1:
        parser.error(f"--batch: expected at least 1 image, got {args.batch}")
    command_line.check_output(parser, "plot", args.plot)
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: needs matplotlib, which is not installed; run `pip install matplotlib`")
    return args


def _list_layers() -> str:
    lines = [f"{'network':<18}{'layer':<20}{'times':>6}{'groups':>8}{'GFLOP/image':>13}{'elements/image':>16}"]
    for network, layers in shapes.NETWORKS.items():
        lines += [
            f"{network:<18}{layer.name:<20}{count:>6}{layer.groups:>8}"
            f"{layer.flops(1) * 1e-9:>13.3f}{layer.bytes(1, 1):>16}"
            for layer, count in layers.items()
        ]
    return "\n".join(lines)


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
        peak_bytes={name: measure_memory(call, args.device).peak for name, call in calls.items()},
    )


def _run(args: argparse.Namespace) -> int:
    rows: list[report.Row] = []
    wrong = 0
    about = environment.describe(args.device)  # now, while the load average is not yet our own
    roofline = None if args.verify_only else measure_roofline(args.device, args.dtype)
    complete = False
    try:
        for pass_, operands in command_line.progress(_work(args), len(args.layers) * len(args.passes), "pass"):
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
    title = f"{command_line.machine(about)}; {str(args.dtype).removeprefix('torch.')}, batch {args.batch}"
    print(
        f"{title}\n"
        f"roofline: copy {roofline.copy_bytes_per_second * 1e-9:.1f} GB/s, "
        f"matrix product {roofline.gemm_flops_per_second * 1e-12:.3f} TFLOP/s\n"
    )
    print(report.table(rows), report.summary(rows), sep="\n\n", flush=True)
    command_line.print_if_busy(about)
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
    command_line.prepare(args.device)
    with torch.no_grad(), use_backend(args.backend):
        return command_line.exit_code("grouped_conv.py", lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
