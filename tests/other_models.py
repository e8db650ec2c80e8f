"""Residual networks and others as many people write them, each in a habit of its own; odd_models.py has the odd ones.

Small, so that the tests are fast; with both strides and shortcuts of both kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Other:
    """A model that we did not write.

    Attributes:
        id: What is special about it.
        build: Makes it, in float32.
        fused: Name -> kind of what should be fused in it: "block" or "chain".
        grouped: Names of the grouped 3x3 convolutions in it that should be converted.
        shapes: Of its inputs.
    """

    id: str
    build: Callable[[], nn.Module]
    fused: Mapping[str, str] = field(default_factory=dict, hash=False)
    grouped: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ((3, 8, 7, 6),)


def conv3(channels: int, planes: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, planes, 3, stride, 1, groups=groups, bias=bias)


def conv1(channels: int, planes: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, planes, 1, stride, bias=bias)


# --- residual networks ---


class CifarBlock(nn.Module):
    """Functional ReLU; an empty Sequential is the identity."""

    def __init__(self, channels: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv3(channels, planes, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv3(planes, planes), nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != planes:
            self.shortcut = nn.Sequential(conv1(channels, planes, stride), nn.BatchNorm2d(planes))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv3(3, 8), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(CifarBlock(8, 8), CifarBlock(8, 8))
        self.layer2 = nn.Sequential(CifarBlock(8, 12, 2), CifarBlock(12, 12))
        self.linear = nn.Linear(12, 5)

    def forward(self, x):
        out = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        out = F.avg_pool2d(out, out.size()[2:])
        return self.linear(out.view(out.size(0), -1))


class BranchBlock(nn.Module):
    """The whole branch in one Sequential, and a ReLU made in the forward."""

    def __init__(self, channels: int, planes: int, stride: int):
        super().__init__()
        self.residual_function = nn.Sequential(
            *(conv1(channels, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            *(conv3(8, 8, stride, groups=4), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            *(conv1(8, planes), nn.BatchNorm2d(planes)),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != planes:
            self.shortcut = nn.Sequential(conv1(channels, planes, stride), nn.BatchNorm2d(planes))

    def forward(self, x):
        return nn.ReLU(inplace=True)(self.residual_function(x) + self.shortcut(x))


class ReduceExpandBlock(nn.Module):
    """ResNeXt's block under other names, in-place functional ReLUs, and a shortcut that is entered by name."""

    def __init__(self, channels: int, planes: int, stride: int):
        super().__init__()
        self.conv_reduce, self.bn_reduce = conv1(channels, 8), nn.BatchNorm2d(8)
        self.conv_conv, self.bn = conv3(8, 8, stride, groups=4), nn.BatchNorm2d(8)
        self.conv_expand, self.bn_expand = conv1(8, planes), nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if channels != planes:
            self.shortcut.add_module("shortcut_conv", conv1(channels, planes, stride))
            self.shortcut.add_module("shortcut_bn", nn.BatchNorm2d(planes))

    def forward(self, x):
        bottleneck = F.relu(self.bn_reduce(self.conv_reduce(x)), inplace=True)
        bottleneck = F.relu(self.bn(self.conv_conv(bottleneck)), inplace=True)
        bottleneck = self.bn_expand(self.conv_expand(bottleneck))
        return F.relu(self.shortcut(x) + bottleneck, inplace=True)


class PreactivationBlock(nn.Module):
    """Norm and ReLU before the convolutions; the shortcut starts behind the first."""

    def __init__(self, channels: int, planes: int, stride: int = 1):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, planes, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), conv3(planes, planes, groups=4)
        self.shortcut = conv1(channels, planes, stride)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + shortcut


class Squeeze(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(inplace=True), nn.Linear(4, channels), nn.Sigmoid())

    def forward(self, x):
        n, c, _, _ = x.size()
        return x * self.fc(x.mean((2, 3))).view(n, c, 1, 1).expand_as(x)


class SqueezeBlock(nn.Module):
    """Squeeze and excitation behind the grouped convolution, or before the sum."""

    def __init__(self, inside: bool):
        super().__init__()
        self.conv1, self.bn1 = conv1(8, 8), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv3(8, 8, groups=4), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = conv1(8, 8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.se, self.inside = Squeeze(8), inside

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        if self.inside:
            out = self.se(out)
        out = self.bn3(self.conv3(out))
        if not self.inside:
            out = self.se(out)
        out += x
        return self.relu(out)


class SumBlock(nn.Module):
    """A block whose sum and ReLU are written as ``end`` says."""

    def __init__(self, end: Callable[[Tensor, Tensor], Tensor], projects: bool = False):
        super().__init__()
        self.conv1, self.bn1 = conv3(8, 8, groups=2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv3(8, 8, groups=4), nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(conv1(8, 8), nn.BatchNorm2d(8)) if projects else None
        self.end = end

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        return self.end(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))), identity)


class AveragingBlock(nn.Module):
    """ResNet-D's shortcut: average pooling and an unstrided convolution."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv3(8, 8, 2, groups=4), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv3(8, 12), nn.BatchNorm2d(12)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), conv1(8, 12), nn.BatchNorm2d(12)
        )
        self.act1 = self.act2 = nn.ReLU(inplace=True)

    def forward(self, x):
        shortcut = self.downsample(x)
        x = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(x + shortcut)


class Residual(nn.Module):
    def __init__(self, function: nn.Module):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x) + x


class NormBlock(nn.Module):
    """A block with any norm, activation, bias and dropout."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        act: Callable[[], nn.Module] = nn.ReLU,
        bias: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.conv1, self.norm1 = conv3(8, 8, groups=4, bias=bias), norm(8)
        self.conv2, self.norm2 = conv3(8, 8, groups=2, bias=bias), norm(8)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.act = act()

    def forward(self, x):
        out = self.dropout(self.act(self.norm1(self.conv1(x))))
        return self.act(self.norm2(self.conv2(out)) + x)


class FrozenNorm(nn.Module):
    """A batch norm of buffers, as detection networks have it."""

    def __init__(self, channels: int):
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class ListNet(nn.Module):
    """Loops over lists of modules; keeps the result of every stage."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([CifarBlock(8, 8), CifarBlock(8, 12, 2)])
        self.heads = nn.ModuleDict({"a": conv1(8, 4, bias=True), "b": conv1(12, 4, bias=True)})

    def forward(self, x):
        out = {}
        for block, (name, head) in zip(self.blocks, self.heads.items(), strict=True):
            x = block(x)
            out[name] = head(x)
        return out


# --- others ---


class DoubleConv(nn.Module):
    def __init__(self, channels: int, planes: int):
        super().__init__()
        self.double_conv = nn.Sequential(
            *(conv3(channels, planes), nn.BatchNorm2d(planes), nn.ReLU(inplace=True)),
            *(conv3(planes, planes), nn.BatchNorm2d(planes), nn.ReLU(inplace=True)),
        )

    def forward(self, x):
        return self.double_conv(x)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.inc, self.pool = DoubleConv(8, 8), nn.MaxPool2d(2)
        self.down, self.up = DoubleConv(8, 12), nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.out = DoubleConv(16, 4)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.up(self.down(self.pool(x1)))
        height, width = x1.size()[2] - x2.size()[2], x1.size()[3] - x2.size()[3]
        x2 = F.pad(x2, [width // 2, width - width // 2, height // 2, height - height // 2])
        return self.out(torch.cat([x1, x2], dim=1))


class ShuffleUnit(nn.Module):
    """Splits, shuffles and joins channels."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(
            *(conv1(4, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            *(conv3(4, 4, groups=4), nn.BatchNorm2d(4)),
            *(conv1(4, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        )

    def forward(self, x):
        left, right = x.chunk(2, dim=1)
        out = torch.cat((left, self.branch(right)), dim=1)
        n, c, h, w = out.size()
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class DenseLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(8), conv1(8, 16)
        self.norm2, self.conv2 = nn.BatchNorm2d(16), conv3(16, 4, groups=2)

    def forward(self, x):
        out = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, out], 1)


def separable(channels: int, planes: int) -> nn.Sequential:
    return nn.Sequential(
        *(conv3(channels, channels, groups=channels), nn.BatchNorm2d(channels), nn.ReLU6(inplace=True)),
        *(conv1(channels, planes), nn.BatchNorm2d(planes), nn.ReLU(inplace=True)),
    )


def vgg() -> nn.Sequential:
    return nn.Sequential(
        *(conv3(8, 8, bias=True), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(conv3(8, 12, bias=True), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 4)),
    )


def without_affine(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.weight = norm.bias = None
    return norm


def conv_norm_act() -> nn.Sequential:
    return nn.Sequential(conv3(8, 8, groups=4), nn.BatchNorm2d(8), nn.ReLU())


BLOCK, GROUPED = {"": "block"}, ("conv1", "conv2")
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "out + identity": lambda out, identity: F.relu(out + identity),
    "identity + out": lambda out, identity: F.relu(identity + out, inplace=True),
    "torch.add": lambda out, identity: torch.relu(torch.add(out, identity)),
    "out.add": lambda out, identity: out.add(identity).relu(),
    "out.add_": lambda out, identity: out.add_(identity).relu_(),
    "relu_": lambda out, identity: F.relu_(out + identity),
}
WRITTEN_SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "into a view": lambda out, identity: torch.relu(identity.contiguous().add_(out)),
    "into a part": lambda out, identity: torch.relu(identity[:, :].add_(out)),
}
UNFUSED_SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "alpha": lambda out, identity: torch.relu(torch.add(out, identity, alpha=2)),
    "difference": lambda out, identity: torch.relu(out - identity),
    "of the result twice": lambda out, identity: torch.relu(out + out) + identity,
    "and a number": lambda out, identity: torch.relu(out + 0.5) + identity,
    "no ReLU": lambda out, identity: out + identity,
    "maximum": lambda out, identity: torch.relu(torch.maximum(out, identity)),
}

MODELS = [
    Other(
        "cifar-resnet",
        CifarResNet,
        {"": "chain", "layer1.0": "block", "layer1.1": "block", "layer2.0": "block", "layer2.1": "block"},
        shapes=((3, 3, 8, 8),),
    ),
    Other(
        "branch-in-one-sequential",
        lambda: BranchBlock(8, 8, 1),
        {"": "block", "residual_function": "chain"},
        ("residual_function.3",),
    ),
    Other(
        "branch-in-one-sequential-projected",
        lambda: BranchBlock(8, 12, 2),
        {"": "block", "residual_function": "chain"},
        ("residual_function.3",),
    ),
    Other("reduce-expand", lambda: ReduceExpandBlock(8, 8, 1), BLOCK, ("conv_conv",)),
    Other("reduce-expand-projected", lambda: ReduceExpandBlock(8, 12, 2), BLOCK, ("conv_conv",)),
    Other("preactivation", lambda: PreactivationBlock(8, 12, 2), {"": "chain"}, ("conv2",)),
    Other("squeeze-inside", lambda: SqueezeBlock(inside=True), BLOCK, ("conv2",)),
    Other("squeeze-before-sum", lambda: SqueezeBlock(inside=False), BLOCK, ("conv2",)),
    *(Other(f"sum-{name}", lambda end=end: SumBlock(end), BLOCK, GROUPED) for name, end in SUMS.items()),
    *(
        Other(f"sum-{name}", lambda end=end: SumBlock(end), {"": "chain"}, GROUPED)
        for name, end in UNFUSED_SUMS.items()
    ),
    Other("sum-projected", lambda: SumBlock(SUMS["identity + out"], projects=True), BLOCK, GROUPED),
    Other("averaging-shortcut", AveragingBlock, BLOCK, ("conv1",)),
    Other("residual-wrapper", lambda: Residual(conv_norm_act()), {"function": "chain"}, ("function.0",)),
    Other("leaky", lambda: NormBlock(act=lambda: nn.LeakyReLU(0.1)), grouped=GROUPED),
    Other("silu", lambda: NormBlock(act=nn.SiLU), grouped=GROUPED),
    Other("group-norm", lambda: NormBlock(lambda channels: nn.GroupNorm(2, channels)), grouped=GROUPED),
    Other("instance-norm", lambda: NormBlock(nn.InstanceNorm2d), grouped=GROUPED),
    Other("frozen-norm", lambda: NormBlock(FrozenNorm), grouped=GROUPED),
    Other("norm-without-affine", lambda: NormBlock(without_affine), BLOCK, GROUPED),
    Other("biased-convolutions", lambda: NormBlock(bias=True), BLOCK, GROUPED),
    Other("dropout-between", lambda: NormBlock(dropout=0.3), BLOCK, GROUPED),
    Other("lists", ListNet, {"blocks.0": "block", "blocks.1": "block"}),
    Other("vgg", vgg, {"": "chain"}),
    Other("unet", UNet, {"inc.double_conv": "chain", "down.double_conv": "chain", "out.double_conv": "chain"}),
    Other("shuffle", ShuffleUnit, {"branch": "chain"}),
    Other("dense-layer", DenseLayer, {"": "chain"}, ("conv2",)),
    Other("separable", lambda: separable(8, 12), {"": "chain"}),
    Other("conv-norm-act", conv_norm_act, {"": "chain"}, ("0",)),
]
