"""The residual blocks of ResNet and ResNeXt.

The names of a block's children are a file format: they are the ``state_dict`` keys that torchvision, timm and
thousands of checkpoints share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from resnext import fusion
from resnext.fusion import ConvNorm
from resnext.layers import GroupedConv2d


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias: a batch norm follows."""
    return nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False)


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> GroupedConv2d:
    """A padded 3x3 convolution without bias: the output's size is the input's divided by ``stride``, rounded up."""
    return GroupedConv2d(
        in_planes,
        out_planes,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
        bias=False,
    )


class ResidualBlock(nn.Module):
    """What `BasicBlock` and `Bottleneck` share: the choice between fused operators and the children one by one.

    Fused, the batch norms and ReLUs become parts of the convolutions beside them (`resnext.fusion`). Outputs,
    gradients and running statistics are those of the children one by one, up to rounding.

    Inference keeps the batch norms folded into the convolutions until a parameter or buffer changes. A change through
    ``Tensor.data`` leaves no trace: call ``eval()`` after it.

    Attributes:
        recompute: Whether backward computes the last convolution's output again instead of keeping it in memory.
    """

    relu: nn.Module
    downsample: Any  # None, or a module, most often a Sequential of a 1x1 convolution and a batch norm
    recompute: bool

    _branch: ClassVar[tuple[tuple[str, str], ...]]
    """Names of the convolutions of the residual branch, each with its norm's."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inplanes, H, W) to (N, planes * expansion, ceil(H / stride), ceil(W / stride))."""
        if self.why_not_fused(x) is not None:
            return self._forward_children(x)
        branch, shortcut = self._convolutions()
        if fusion.infers(x, branch, shortcut):
            return fusion.infer(self, x, branch, shortcut)
        return fusion.train(x, branch, shortcut, self.recompute)

    def why_not_fused(self, x: Tensor | None = None) -> str | None:
        """Say why a call would run the children one by one, or return None if it would run fused.

        Args:
            x: The input of that call; None: judge by what is known without it.
        """
        if reason := fusion.why_not_now(x) or fusion.why_not_module("relu", self.relu, nn.ReLU):
            return reason
        if self.downsample is not None:
            if reason := fusion.why_not_module("downsample", self.downsample, nn.Sequential):
                return reason
            if len(self.downsample) != 2:
                return f"downsample has {len(self.downsample)} children, not a convolution and a batch norm"
        branch, shortcut = self._convolutions()
        for pair in [*branch, shortcut]:
            if pair is not None and (reason := fusion.why_not_conv_norm(pair, x)):
                return reason
        return None

    def train(self, mode: bool = True) -> ResidualBlock:
        """Switch between training and evaluation; what evaluation has folded is folded anew."""
        fusion.forget(self)
        return super().train(mode)

    def _convolutions(self) -> tuple[list[ConvNorm], ConvNorm | None]:
        """The convolutions of the residual branch, and that of the shortcut if it has one."""
        branch = [ConvNorm(conv, getattr(self, conv), bn, getattr(self, bn)) for conv, bn in self._branch]
        if self.downsample is None:
            return branch, None
        return branch, ConvNorm("downsample.0", self.downsample[0], "downsample.1", self.downsample[1])

    def _forward_children(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and -34.

    Both 3x3 convolutions are `GroupedConv2d` with one group: a backend is chosen for them as for any other
    problem, and it may well be plain PyTorch's ungrouped convolution (`resnext.explain` tells).

    Input (N, inplanes, H, W), output (N, planes, ceil(H / stride), ceil(W / stride)).

    Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), figure 5, left.

    Args:
        inplanes: Channels of the input.
        planes: Channels of the output.
        stride: Stride of the first convolution.
        downsample: Module for the shortcut, needed where input and output differ in shape; None: the input
            itself.
        groups: Must be 1; here so that both blocks are built alike.
        base_width: Must be 64, likewise.
        dilation: Must be 1, likewise.
        norm_layer: Called with a number of channels, makes a normalisation; None: ``torch.nn.BatchNorm2d``.
        recompute: Save memory in training at the cost of time: see `ResidualBlock.recompute`.

    Raises:
        ValueError: ``groups`` is not 1 or ``base_width`` is not 64.
        NotImplementedError: ``dilation`` is not 1.
    """

    expansion = 1
    _branch = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if (groups, base_width) != (1, 64):
            raise ValueError(
                f"BasicBlock: expected groups=1 and base_width=64, got {groups} and {base_width}; use Bottleneck"
            )
        if dilation != 1:
            raise NotImplementedError(f"BasicBlock: expected dilation 1, got {dilation}; use Bottleneck")
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride
        self.recompute = recompute

    def _forward_children(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(ResidualBlock):
    """A 1x1, a 3x3 and a 1x1 convolution and a shortcut: the block of ResNet-50 and deeper, and of ResNeXt.

    The 3x3 convolution is a `GroupedConv2d`, also with one group, where it is plain PyTorch's unless a backend
    is forced (`resnext.explain` tells); a dilated one is always plain PyTorch's. The stride is in the 3x3
    convolution, as in torchvision (often called v1.5), not in the first 1x1 as in the ResNet paper.

    Input (N, inplanes, H, W), output (N, 4 * planes, ceil(H / stride), ceil(W / stride)).

    Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), figure 5, right; Xie et al.,
    "Aggregated Residual Transformations for Deep Neural Networks" (arXiv:1611.05431), figure 3(c).

    Args:
        inplanes: Channels of the input.
        planes: A quarter of the channels of the output.
        stride: Stride of the 3x3 convolution.
        downsample: Module for the shortcut, needed where input and output differ in shape; None: the input
            itself.
        groups: Groups of the 3x3 convolution.
        base_width: Channels per group of the 3x3 convolution where ``planes`` is 64; they grow with
            ``planes``.
        dilation: Dilation of the 3x3 convolution.
        norm_layer: Called with a number of channels, makes a normalisation; None: ``torch.nn.BatchNorm2d``.
        recompute: Save memory in training at the cost of time: see `ResidualBlock.recompute`.

    Raises:
        ValueError: ``base_width`` leaves less than one channel per group.
    """

    expansion = 4
    _branch = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        group_width = planes * base_width // 64
        if group_width < 1:
            raise ValueError(
                f"Bottleneck: expected planes * base_width to be at least 64, got {planes} * {base_width}, "
                "less than one channel per group; raise base_width (width_per_group of the model)"
            )
        width = group_width * groups
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.recompute = recompute

    def _forward_children(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)
