"""Blocks and whole networks as contenders: torchvision's or timm's, and what `resnext.fuse_` makes of them.

In a 16-bit dtype training is mixed precision (autocast, float32 parameters); in inference the parameters are of that
dtype too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import conversion
import torch
import torch.nn.functional as F
from command_line import Parser
from contenders import FORMATS
from shapes import Block
from timing import Timing
from torch import Tensor, nn

from resnext import fuse_
from resnext.convert import FusedModule

TRAINING, INFERENCE = "training", "inference"
_KEPT: list[torch.library.Library] = []


def torchvision_resnet() -> ModuleType:
    """torchvision.models.resnet, whose models ours are compared with; without torchvision the program ends."""
    try:
        from torchvision.models import resnet
    except ModuleNotFoundError:
        raise SystemExit(
            "torchvision, whose models ours are compared with, is not installed; run `pip install torchvision`"
        ) from None
    except RuntimeError:  # its CUDA build beside a CPU build of PyTorch: operators it extends are absent
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        from torchvision.models import resnet
    return resnet


@dataclass(frozen=True)
class Pair:
    """A module, and converted with `fuse_`, with the same parameters and buffers, in float32 and NCHW on the CPU."""

    ours: nn.Module
    plain: nn.Module


def block_pair(block: Block) -> Pair:
    """A block, its parameters the same in every run; the norms' are spread about 1 and 0, as in a trained network."""
    resnet = torchvision_resnet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = _build(block, resnet)
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
    return _pair(plain)


def _pair(plain: nn.Module) -> Pair:
    ours = copy.deepcopy(plain)
    fuse_(ours)
    return Pair(ours, plain)


def _build(block: Block, module: ModuleType) -> nn.Module:
    downsample = None
    if block.projects:
        convolution = nn.Conv2d(block.in_channels, block.out_channels, 1, block.stride, bias=False)
        downsample = nn.Sequential(convolution, nn.BatchNorm2d(block.out_channels))
    kind = module.Bottleneck if block.bottleneck else module.BasicBlock
    settings = {"groups": block.groups, "base_width": block.base_width}
    return kind(block.in_channels, block.planes, block.stride, downsample, **settings)


def model_pair(name: str) -> Pair:
    """A network by its name, its parameters the same in every run.

    Args:
        name: Of one of torchvision's, or ``"timm/"`` and that of one of timm's.
    """
    torchvision_resnet()  # first, since timm imports torchvision too
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = conversion.build(name if "/" in name else f"torchvision/{name}")
        _settle(plain)
    return _pair(plain)


@torch.no_grad()
def _settle(model: nn.Module) -> None:
    """Give the norms running statistics that fit the initial weights: without, activations grow from block to block."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(torch.randn(4, 3, 64, 64))
    for norm in norms:
        norm.momentum = 0.1
        norm.num_batches_tracked.zero_()


@dataclass(frozen=True)
class Contender:
    """One way to run a module.

    Attributes:
        ours: Whether it is our module.
        layout: Of the module and its input.
        compiled: Arguments of ``torch.compile``; None: eager.
        graphed: Whether calls are replayed from a CUDA graph.
        recompute: Whether our blocks trade time for memory (their attribute ``recompute``).
        training: Whether it can train.
    """

    ours: bool = False
    layout: str = "channels_last"
    compiled: Mapping[str, Any] | None = None
    graphed: bool = False
    recompute: bool = False
    training: bool = True


CONTENDERS: Mapping[str, Contender] = {
    "ours": Contender(ours=True),
    "ours_nchw": Contender(ours=True, layout="nchw"),
    "ours_recompute": Contender(ours=True, recompute=True),
    "ours_compiled": Contender(ours=True, compiled={}),
    "ours_graphed": Contender(ours=True, graphed=True),
    "nchw": Contender(layout="nchw"),
    "channels_last": Contender(),
    "compiled_nchw": Contender(layout="nchw", compiled={}),
    "compiled_channels_last": Contender(compiled={}),
    "max_autotune": Contender(compiled={"mode": "max-autotune"}),
    "frozen": Contender(compiled={"options": {"freezing": True}}, training=False),
    "graphed": Contender(graphed=True),
}


def fastest(timings: Mapping[str, Timing], *, ours: bool) -> str:
    """The fastest contender of ours, or of PyTorch's."""
    return min((name for name in timings if CONTENDERS[name].ours is ours), key=lambda name: timings[name].median)


def check_names(parser: Parser, names: Sequence[str]) -> None:
    """End the program unless there is something of ours to compare with something of PyTorch's."""
    if len({CONTENDERS[name].ours for name in names}) < 2:
        parser.error(f"--contenders: expected at least one of ours and one of PyTorch's, got {', '.join(names)}")


def make(name: str, pair: Pair, device: torch.device, dtype: torch.dtype, *, training: bool) -> nn.Module:
    """A contender's module, ready to be called on inputs in its layout."""
    contender = CONTENDERS[name]
    module = copy.deepcopy(pair.ours if contender.ours else pair.plain)
    for each in module.modules():
        if isinstance(each, FusedModule):
            each.recompute = contender.recompute
    module = module.to(device, dtype if not training else None, memory_format=FORMATS[contender.layout])
    module.train(training)
    return module if contender.compiled is None else torch.compile(module, dynamic=False, **contender.compiled)


def exact(pair: Pair, device: torch.device, dtype: torch.dtype, *, training: bool) -> nn.Module:
    """The plain module in float64, with the parameters as contenders round them."""
    module = copy.deepcopy(pair.plain).to(device)
    with torch.no_grad():
        for child in module.modules():
            if not training or isinstance(child, (nn.Conv2d, nn.Linear)):  # what autocast casts
                for tensor in [*child.parameters(recurse=False), *child.buffers(recurse=False)]:
                    if tensor.is_floating_point():
                        tensor.copy_(tensor.to(dtype))
    return module.double().train(training)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision in a 16-bit dtype, nothing in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16))


def training_step(module: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Forward, cross entropy, backward and an update of SGD with momentum, as a function of nothing."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        with autocast(images.device, dtype):
            loss = F.cross_entropy(module(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(module: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A forward pass, as a function of nothing."""

    def infer() -> Tensor:
        with torch.inference_mode():
            return module(images)

    return infer
