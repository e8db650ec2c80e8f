"""Measure the memory that a training step of our networks and of torchvision's needs at its peak.

    python benchmarks/memory.py --quick
    python benchmarks/memory.py --model resnext50_32x4d --batch 64,256 --json out.json

What a step allocates beyond parameters and optimizer state: activations, gradients, workspace (peak_memory.py).
Networks are checked first, as in model.py.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import command_line
import model
import networks
import torch
from command_line import Parser, Task
from networks import TRAINING, Pair
from peak_memory import measure_memory
from torch import Tensor

from resnext.kernels import use_backend

CONTENDERS = ("ours", "ours_nchw", "ours_recompute", "ours_compiled", "nchw", "channels_last", "compiled_channels_last")
EAGER = ("ours", "ours_recompute", "nchw", "channels_last")


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        model: Its name.
        batch: Images per step.
        size: Pixels of an image's side.
        peak_bytes: Contender -> bytes.
    """

    model: str
    batch: int
    size: int
    peak_bytes: Mapping[str, int]

    @property
    def ratio(self) -> float:
        """Memory of PyTorch's most frugal contender over ours, without recomputing."""
        frugal = min(peak for name, peak in self.peak_bytes.items() if not networks.CONTENDERS[name].ours)
        return frugal / self.peak_bytes["ours"]

    def cells(self) -> dict[str, str]:
        """Column -> text."""
        cells = {"model": self.model, "mode": TRAINING, "batch": str(self.batch)}
        cells |= {f"{name} MB": f"{peak * 1e-6:.1f}" for name, peak in self.peak_bytes.items()}
        return cells | {"ratio": f"{self.ratio:.2f}"}

    def record(self) -> dict[str, object]:
        """Everything about the row, in bytes, ready for JSON."""
        return {
            **{name: getattr(self, name) for name in ("model", "batch", "size", "ratio")},
            "peak_bytes": dict(self.peak_bytes),
        }


def _measure(name: str, pair: Pair, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Row:
    """Measure one network."""
    torch.compiler.reset()  # what was compiled for another batch size
    peaks = {}
    for contender in args.contenders:
        step = model.call(contender, pair, TRAINING, images, labels, args.dtype)
        peaks[contender] = measure_memory(step, args.device).peak
        del step  # and with it the contender's parameters
    return Row(name, len(images), args.size, peaks)


def _parser() -> Parser:
    parser = Parser(
        description=__doc__.partition("\n")[0],
        epilog="Lists are separated by commas. Defaults: CUDA if there is a GPU.",
    )
    command_line.add_common_options(parser, quick="a small batch, nothing compiled")
    model.add_model_options(parser, batch="8 on the CPU, 64,256 on CUDA")
    parser.add_argument("--contenders", help=f"of {', '.join(CONTENDERS)} (default: all)")
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, complete with defaults and as the objects they name. Bad ones end the program with code 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    command_line.check_common_options(parser, args)
    model.check_model_options(parser, args, batch="64,256" if args.device.type == "cuda" else "8")
    contenders = command_line.chosen(parser, "--contenders", args.contenders, CONTENDERS)
    args.contenders = contenders or list(EAGER if args.quick else CONTENDERS)
    networks.check_names(parser, args.contenders)
    if "ours" not in args.contenders:
        parser.error(f"--contenders: expected ours among them, got {', '.join(args.contenders)}")
    return args


def _tasks(args: argparse.Namespace) -> Iterator[Task]:
    for name in args.model:
        pair = networks.model_pair(name)
        for batch in args.batch:
            images, labels = model.make_batch(batch, args.size, args.device)
            yield Task(
                f"{name}, batch {batch}",
                functools.partial(model.mismatch, pair, TRAINING, images, labels, args.dtype),
                functools.partial(_measure, name, pair, images, labels, args),
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 after a wrong result, 2 for bad arguments, 130 if interrupted."""
    args = _parse(argv)
    command_line.prepare(args.device)
    total = len(args.model) * len(args.batch)
    with use_backend(args.backend):
        return command_line.exit_code("memory.py", lambda: command_line.run(args, _tasks(args), total))


if __name__ == "__main__":
    sys.exit(main())
