"""Time our residual blocks against torchvision's, with the memory they need and the bytes they move.

    python benchmarks/block.py --quick
    python benchmarks/block.py --blocks resnext50_32x4d --json out.json

Every block is checked before it is timed: no result of ours may be further from float64 than PyTorch's own (verify.py).
A wrong one is reported, left out and makes the exit code 1. benchmarks/NOTES.md says how to read the numbers.
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
import shapes
import torch
from command_line import Parser, Task
from contenders import FORMATS
from networks import Pair
from peak_memory import Memory, measure_memory
from shapes import Block
from timing import Budget, Timing, interleave
from torch import Tensor, nn
from traffic import moved_bytes
from verify import less_accurate

from resnext.kernels import use_backend

# In training, with the graph for backward built; the last is a forward and a backward pass.
PASSES = ("inference", "forward", "forward+backward")
CONTENDERS = (
    "ours",
    "ours_compiled",
    "ours_recompute",
    "nchw",
    "channels_last",
    "compiled_nchw",
    "compiled_channels_last",
)
EAGER = ("ours", "nchw", "channels_last")
FULL = Budget(seconds=1.5, min_rounds=5, max_rounds=100)
QUICK = Budget(seconds=0.3, min_rounds=3, max_rounds=20)


@dataclass(frozen=True)
class Operands:
    """A block's input and the gradient of its output, in NCHW."""

    x: Tensor
    dout: Tensor

    @classmethod
    def random(cls, block: Block, batch: int, dtype: torch.dtype, device: torch.device) -> Operands:
        """The input as a ReLU leaves it; the same in every run."""
        generator = torch.Generator(device).manual_seed(0)
        *_, last = block.convolutions[: 3 if block.bottleneck else 2]
        shapes_ = block.input_shape(batch), (batch, block.out_channels, *last.out_size)
        x, dout = (torch.randn(shape, generator=generator, device=device) for shape in shapes_)
        return cls(x.relu_().to(dtype), dout.to(dtype))

    def to(self, layout: str) -> Operands:
        """Both in a layout of `contenders.FORMATS`."""
        return Operands(*(t.contiguous(memory_format=FORMATS[layout]) for t in (self.x, self.dout)))

    def double(self) -> Operands:
        """Both in float64."""
        return Operands(self.x.double(), self.dout.double())


@dataclass(frozen=True)
class Row:
    """One pass of one block.

    Attributes:
        block: The block.
        batch: Images.
        pass_: One of `PASSES`.
        timings: Contender -> times.
        memory: Contender -> memory that one call needs, and what it keeps with its result (of forward: for backward).
        moved: Contender -> bytes moved (traffic.py) over the bytes of all convolutions' outputs; of the backward pass
            alone where the row has both. Compiled contenders are not counted.
    """

    block: Block
    batch: int
    pass_: str
    timings: Mapping[str, Timing]
    memory: Mapping[str, Memory]
    moved: Mapping[str, float]

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
        """Column -> text."""
        cells = {"block": self.block.name, "pass": self.pass_, "batch": str(self.batch)}
        cells |= {f"{name} ms": f"{timing.median * 1e3:.3f}" for name, timing in self.timings.items()}
        cells["ratio"] = f"{self.ratio:.2f}"
        cells |= {f"{name} MB (kept)": f"{m.peak * 1e-6:.1f} ({m.kept * 1e-6:.1f})" for name, m in self.memory.items()}
        return cells | {f"{name} moved": f"{moved:.1f}" for name, moved in self.moved.items()}

    def record(self) -> dict[str, object]:
        """Everything about the row, in seconds and bytes, ready for JSON."""
        return {
            "block": self.block.name,
            **dataclasses.asdict(self.block),
            "batch": self.batch,
            "pass": self.pass_,
            "seconds": {name: dataclasses.asdict(timing) for name, timing in self.timings.items()},
            "memory": {name: memory._asdict() for name, memory in self.memory.items()},
            "moved_over_convolution_outputs": dict(self.moved),
            "fastest_of_ours": self.ours,
            "fastest_baseline": self.baseline,
            "ratio": self.ratio,
        }


def call(module: nn.Module, operands: Operands, pass_: str, dtype: torch.dtype) -> Callable[[], dict[str, Tensor]]:
    """One pass as a function of nothing that returns its results by name."""
    device = operands.x.device
    if pass_ == "inference":

        def infer() -> dict[str, Tensor]:
            with torch.no_grad():
                return {"out": module(operands.x)}

        return infer
    x = operands.x.detach().requires_grad_()

    def forward() -> dict[str, Tensor]:
        with networks.autocast(device, dtype):
            return {"out": module(x)}

    if pass_ == "forward":
        return forward
    parameters = dict(module.named_parameters())

    def forward_backward() -> dict[str, Tensor]:
        out = forward()["out"]
        gradients = torch.autograd.grad(out, [x, *parameters.values()], operands.dout)
        return {"out": out.detach(), **dict(zip(["x", *parameters], gradients, strict=True))}

    return forward_backward


def mismatch(pair: Pair, operands: Operands, dtype: torch.dtype, training: bool) -> str | None:
    """Compare all results of training or inference with float64."""
    pass_ = PASSES[-1] if training else PASSES[0]
    device = operands.x.device
    wanted = call(networks.exact(pair, device, dtype, training=training), operands.double(), pass_, torch.float64)()
    results = {}
    for name in EAGER:
        module = networks.make(name, pair, device, dtype, training=training)
        results[name] = call(module, operands.to(networks.CONTENDERS[name].layout), pass_, dtype)()
    return less_accurate(results["ours"], [results["nchw"], results["channels_last"]], wanted, dtype)


def _moved(module: nn.Module, operands: Operands, pass_: str, dtype: torch.dtype) -> int:
    """Bytes that a pass moves; of forward+backward those of backward."""
    if pass_ != PASSES[-1]:
        return moved_bytes(call(module, operands, pass_, dtype))
    x = operands.x.detach().requires_grad_()
    with networks.autocast(x.device, dtype):
        out = module(x)
    return moved_bytes(lambda: torch.autograd.grad(out, [x, *module.parameters()], operands.dout))


def _measure(block: Block, pair: Pair, pass_: str, operands: Operands, args: argparse.Namespace) -> Row:
    """Time one pass of one block, weigh it and count its bytes."""
    torch.compiler.reset()  # a function compiles for a limited number of shapes: forget those of the last block
    training = pass_ != "inference"
    calls, moved = {}, {}
    for name in args.contenders:
        contender = networks.CONTENDERS[name]
        if contender.recompute and not training:
            continue
        module = networks.make(name, pair, args.device, args.dtype, training=training)
        placed = operands.to(contender.layout)
        calls[name] = call(module, placed, pass_, args.dtype)
        if contender.compiled is None:
            outputs = block.convolution_bytes(args.batch, args.dtype.itemsize)
            moved[name] = _moved(module, placed, pass_, args.dtype) / outputs
    return Row(
        block=block,
        batch=args.batch,
        pass_=pass_,
        timings=interleave(calls, args.device, QUICK if args.quick else FULL),
        memory={name: measure_memory(run, args.device) for name, run in calls.items()},
        moved=moved,
    )


def _parser() -> Parser:
    parser = Parser(
        description=__doc__.partition("\n")[0],
        epilog="Lists are separated by commas. Defaults: CUDA if there is a GPU; every block and pass.",
    )
    command_line.add_common_options(parser, quick="ResNeXt-50, small batch, few repetitions, nothing compiled")
    parser.add_argument("--batch", type=int, help="images; default: 8 on the CPU, 64 on CUDA (--quick: 2 and 16)")
    parser.add_argument("--blocks", help="networks and blocks, as --list names them")
    parser.add_argument("--passes", help=f"of {', '.join(PASSES)}")
    parser.add_argument("--contenders", help=f"of {', '.join(CONTENDERS)}; default: all")
    parser.add_argument("--backend", default="auto", help="force one of ours (default: auto)")
    parser.add_argument("--list", action="store_true", help="print the blocks and stop")
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, complete with defaults and as the objects they name. Bad ones end the program with code 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    command_line.check_common_options(parser, args)
    try:
        args.blocks = shapes.select_blocks(
            command_line.names(args.blocks) or (["resnext50_32x4d"] if args.quick else ["all"])
        )
    except ValueError as error:
        parser.error(f"--blocks: {error}")
    cuda = args.device.type == "cuda"
    args.passes = command_line.chosen(parser, "--passes", args.passes, PASSES) or list(PASSES)
    default = EAGER if args.quick else CONTENDERS
    args.contenders = command_line.chosen(parser, "--contenders", args.contenders, CONTENDERS) or list(default)
    networks.check_names(parser, args.contenders)
    if args.batch is None:
        args.batch = (16 if cuda else 2) if args.quick else (64 if cuda else 8)
    if args.batch < 1:
        parser.error(f"--batch: expected at least 1 image, got {args.batch}")
    return args


def _tasks(args: argparse.Namespace) -> Iterator[Task]:
    for block in args.blocks:
        operands = Operands.random(block, args.batch, args.dtype, args.device)
        pair = networks.block_pair(block)
        check = functools.cache(functools.partial(mismatch, pair, operands, args.dtype))
        for pass_ in args.passes:
            yield Task(
                f"{block.name} {pass_}",
                functools.partial(check, pass_ != "inference"),
                functools.partial(_measure, block, pair, pass_, operands, args),
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 after a wrong result, 2 for bad arguments, 130 if interrupted."""
    args = _parse(argv)
    if args.list:
        for network, found in shapes.BLOCKS.items():
            print(*(f"{network:<18}{block.name:<36}{count:>4}" for block, count in found.items()), sep="\n")
        return 0
    command_line.prepare(args.device)
    with use_backend(args.backend):
        return command_line.exit_code(
            "block.py", lambda: command_line.run(args, _tasks(args), len(args.blocks) * len(args.passes))
        )


if __name__ == "__main__":
    sys.exit(main())
