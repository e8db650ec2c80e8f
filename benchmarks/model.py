"""Time whole networks converted with `resnext.fuse_` against themselves: images per second, latency, both modes.

    python benchmarks/model.py --quick
    python benchmarks/model.py --model resnext50_32x4d --batch 1,8,64,256 --json out.json

Every network is checked before it is timed: its logits and gradients may be no further from float64 than PyTorch's own
(verify.py). A wrong one is reported, left out and makes the exit code 1. benchmarks/NOTES.md says how to read the
numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import command_line
import networks
import torch
import torch.nn.functional as F
from command_line import Parser, Task
from contenders import FORMATS
from networks import INFERENCE, TRAINING, Pair
from timing import Budget, Timing, captured, interleave
from torch import Tensor
from verify import less_accurate

from resnext.kernels import use_backend

MODELS = (
    "resnext50_32x4d",
    "resnet50",
    "resnet18",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "regnet_y_3_2gf",
    "timm/seresnext50_32x4d",
    "timm/regnety_040",
)
MODES = (TRAINING, INFERENCE)
EAGER = ("ours", "nchw", "channels_last")
DEFAULTS = {
    "cpu": (*EAGER, "ours_nchw", "ours_compiled", "compiled_nchw", "compiled_channels_last", "frozen"),
    "cuda": (
        *EAGER,
        "ours_compiled",
        "ours_graphed",
        "compiled_channels_last",
        "max_autotune",
        "graphed",
    ),
}
GATE_IMAGES = 8


@dataclass(frozen=True)
class Row:
    """One network in one mode.

    Attributes:
        model: Its name.
        mode: Of `MODES`.
        batch: Images per step.
        size: Pixels of an image's side.
        timings: Contender -> times.
    """

    model: str
    mode: str
    batch: int
    size: int
    timings: Mapping[str, Timing]

    @property
    def ours(self) -> str:
        """Our fastest contender."""
        return networks.fastest(self.timings, ours=True)

    @property
    def baseline(self) -> str:
        """PyTorch's fastest contender."""
        return networks.fastest(self.timings, ours=False)

    @property
    def ratio(self) -> float:
        """Time of PyTorch's fastest over that of ours."""
        return self.timings[self.baseline].median / self.timings[self.ours].median

    def cells(self) -> dict[str, str]:
        """Column -> text: images per second, and the latency of the fastest two in milliseconds."""
        cells = {"model": self.model, "mode": self.mode, "batch": str(self.batch)}
        cells |= {name: f"{self.batch / timing.median:.1f}" for name, timing in self.timings.items()}
        cells["ratio"] = f"{self.ratio:.2f}"
        for title, name in (("ours", self.ours), ("PyTorch", self.baseline)):
            timing = self.timings[name]
            percentiles = (timing.median, timing.p95, timing.p99)
            cells[f"{title} p50/p95/p99 ms"] = " / ".join(f"{seconds * 1e3:.2f}" for seconds in percentiles)
        return cells

    def record(self) -> dict[str, object]:
        """Everything about the row, in seconds, ready for JSON."""
        return {
            **{name: getattr(self, name) for name in ("model", "mode", "batch", "size")},
            "seconds": {name: dataclasses.asdict(timing) for name, timing in self.timings.items()},
            "images_per_second": {name: self.batch / timing.median for name, timing in self.timings.items()},
            "fastest_of_ours": self.ours,
            "fastest_baseline": self.baseline,
            "ratio": self.ratio,
        }


def make_batch(batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (N, 3, size, size), float32 and NCHW, and labels (N,); the same in every run."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator, device=device)
    return images, torch.randint(1000, (batch,), generator=generator, device=device)


def call(name: str, pair: Pair, mode: str, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """A contender in one mode as a function of nothing."""
    contender = networks.CONTENDERS[name]
    module = networks.make(name, pair, images.device, dtype, training=mode == TRAINING)
    images = images.contiguous(memory_format=FORMATS[contender.layout])
    if mode == TRAINING:
        run = networks.training_step(module, images, labels, dtype)
    else:
        run = networks.inference(module, images.to(dtype))
    return captured(run) if contender.graphed else run


def mismatch(pair: Pair, mode: str, images: Tensor, labels: Tensor, dtype: torch.dtype) -> str | None:
    """Compare logits, and in training the gradient of all parameters, with float64, on the first few images."""
    images, labels = images[:GATE_IMAGES], labels[:GATE_IMAGES]
    training, device = mode == TRAINING, images.device

    def results(module: torch.nn.Module, images: Tensor, autocast: torch.dtype) -> dict[str, Tensor]:
        if not training:
            return {"logits": networks.inference(module, images)()}
        with networks.autocast(device, autocast):
            logits = module(images)
            loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        return {"logits": logits.detach(), "gradient": torch.cat([gradient.flatten() for gradient in gradients])}

    placed = images if training else images.to(dtype)
    wanted = results(networks.exact(pair, device, dtype, training=training), placed.double(), torch.float64)
    found = {}
    for name in (*EAGER, "ours_nchw"):
        module = networks.make(name, pair, device, dtype, training=training)
        layout = FORMATS[networks.CONTENDERS[name].layout]
        found[name] = results(module, placed.contiguous(memory_format=layout), dtype)
    baselines = [found["nchw"], found["channels_last"]]
    reasons = (less_accurate(found[name], baselines, wanted, dtype) for name in ("ours", "ours_nchw"))
    return next(filter(None, reasons), None)


def _measure(model: str, pair: Pair, mode: str, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Row:
    """Time one network in one mode."""
    torch.compiler.reset()  # what was compiled for another batch size
    usable = [name for name in args.contenders if mode == INFERENCE or networks.CONTENDERS[name].training]
    calls = {name: call(name, pair, mode, images, labels, args.dtype) for name in usable}
    budget = Budget(seconds=args.seconds, min_rounds=5, max_rounds=500)
    return Row(model, mode, len(images), args.size, interleave(calls, args.device, budget))


def add_model_options(parser: Parser, *, batch: str) -> None:
    """Add the options that say which network runs on what; ``batch`` says what the default is."""
    parser.add_argument("--model", help=f"of {', '.join(MODELS)} (default: the first)")
    parser.add_argument("--batch", help=f"images per step; default: {batch} (--quick: 2)")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side (default: 224)")
    parser.add_argument("--backend", default="auto", help="force one of ours (default: auto)")


def check_model_options(parser: Parser, args: argparse.Namespace, *, batch: str) -> None:
    """Make objects of what `add_model_options` has parsed. Bad arguments end the program with code 2."""
    args.model = command_line.chosen(parser, "--model", args.model, MODELS) or [MODELS[0]]
    args.batch = command_line.batches(parser, args.batch or ("2" if args.quick else batch))
    if args.size < 32:
        parser.error(f"--size: expected at least 32 pixels, got {args.size}")


def _parser() -> Parser:
    parser = Parser(
        description=__doc__.partition("\n")[0],
        epilog="Lists are separated by commas. Defaults: CUDA if there is a GPU; training and inference.",
    )
    command_line.add_common_options(parser, quick="a small batch, few repetitions, nothing compiled")
    add_model_options(parser, batch="1,8 on the CPU, 1,8,64,256 on CUDA")
    parser.add_argument("--mode", help=f"of {', '.join(MODES)} (default: both)")
    parser.add_argument("--seconds", type=float, help="to measure a line of the table for (default: 20; --quick: 1)")
    parser.add_argument(
        "--contenders",
        help=f"of {', '.join(networks.CONTENDERS)}; default on CUDA all but frozen, ours_nchw, ours_recompute and "
        "compiled_nchw, on the CPU all but those for GPUs and ours_recompute",
    )
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, complete with defaults and as the objects they name. Bad ones end the program with code 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    command_line.check_common_options(parser, args)
    cuda = args.device.type == "cuda"
    check_model_options(parser, args, batch="1,8,64,256" if cuda else "1,8")
    args.mode = command_line.chosen(parser, "--mode", args.mode, MODES) or list(MODES)
    if args.seconds is None:
        args.seconds = 1.0 if args.quick else 20.0
    default = EAGER if args.quick else DEFAULTS[args.device.type]
    known = list(networks.CONTENDERS)
    args.contenders = command_line.chosen(parser, "--contenders", args.contenders, known) or list(default)
    networks.check_names(parser, args.contenders)
    if not cuda and (graphed := [name for name in args.contenders if networks.CONTENDERS[name].graphed]):
        parser.error(f"--contenders: {', '.join(graphed)} need a CUDA GPU, and --device is {args.device}")
    return args


def _tasks(args: argparse.Namespace) -> Iterator[Task]:
    for model in args.model:
        pair = networks.model_pair(model)
        for mode in args.mode:
            for batch in args.batch:
                images, labels = make_batch(batch, args.size, args.device)
                yield Task(
                    f"{model} {mode}, batch {batch}",
                    functools.partial(mismatch, pair, mode, images, labels, args.dtype),
                    functools.partial(_measure, model, pair, mode, images, labels, args),
                )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 after a wrong result, 2 for bad arguments, 130 if interrupted."""
    args = _parse(argv)
    command_line.prepare(args.device)
    total = len(args.model) * len(args.mode) * len(args.batch)
    with use_backend(args.backend):
        return command_line.exit_code("model.py", lambda: command_line.run(args, _tasks(args), total))


if __name__ == "__main__":
    sys.exit(main())
