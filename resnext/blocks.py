"""The residual blocks of ResNet and ResNeXt, in plain PyTorch; `resnext.fuse_` makes them run fused.

The names of a block's children are a file format: they are the ``state_dict`` keys that torchvision, timm and
thousands of checkpoints share.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from resnext.convert import fuse_


def conv1x1(in_planes: int, out_planes: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A 1x1 convolution, without bias unless asked for: a batch norm follows."""
    return nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=bias)


def conv3x3(
    in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A padded 3x3 convolution: the output's size is the input's divided by ``stride``, rounded up."""
    return nn.Conv2d(
        in_planes,
        out_planes,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
        bias=bias,
    )


class DropPath(nn.Module):
    """Stochastic depth: in training, zero a whole residual branch, independently for each image of the batch.

    What is kept is divided by the probability of keeping it, so that the expectation stays. Any shape with the batch
    first; the output has the input's.

    Source: Huang et al., "Deep Networks with Stochastic Depth" (arXiv:1603.09382).

    Args:
        rate: Probability of zeroing, at least 0 and less than 1.

    Raises:
        ValueError: ``rate`` is not in that range.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"DropPath: expected a rate in [0, 1), got {rate}; give the probability of dropping")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, in training with some images zeroed and the others scaled."""
        if not self.training:
            return x
        kept = 1 - self.rate
        mask = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(kept)
        return x * mask.div_(kept)

    def extra_repr(self) -> str:
        """The rate, for the printed module."""
        return f"rate={self.rate:.3g}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and -34.

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
        dilation: Dilation of the convolutions.
        norm_layer: Called with a number of channels, makes a normalisation; None: ``torch.nn.BatchNorm2d``.
        recompute: Save memory in training at the cost of time: fused, backward computes the last convolution's
            output again instead of keeping it. An attribute, which can be set later.
        act_layer: Called without arguments, makes an activation; None: ``torch.nn.ReLU(inplace=True)``.
        first_dilation: Dilation of the first convolution, where it differs; None: ``dilation``.
        bias: Whether the convolutions have biases.
        stride_in_1x1: Must be False: there is no 1x1 convolution.
        drop_path_rate: Probability of dropping the residual branch in training: see `DropPath`.

    Raises:
        ValueError: ``groups`` is not 1, ``base_width`` is not 64, or ``stride_in_1x1``.
    """

    expansion = 1

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
        *,
        act_layer: Callable[[], nn.Module] | None = None,
        first_dilation: int | None = None,
        bias: bool = False,
        stride_in_1x1: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if (groups, base_width) != (1, 64):
            raise ValueError(
                f"BasicBlock: expected groups=1 and base_width=64, got {groups} and {base_width}; use Bottleneck"
            )
        if stride_in_1x1:
            raise ValueError("BasicBlock: expected stride_in_1x1=False, got True; use Bottleneck")
        norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.conv1 = conv3x3(inplanes, planes, stride, 1, first_dilation or dilation, bias)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True) if act_layer is None else act_layer()
        self.conv2 = conv3x3(planes, planes, 1, 1, dilation, bias)
        self.bn2 = norm_layer(planes)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else None
        self.downsample = downsample
        self.stride = stride
        self.recompute = recompute
        fuse_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inplanes, H, W) to (N, planes, ceil(H / stride), ceil(W / stride))."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.drop_path is not None:
            out = self.drop_path(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution and a shortcut: the block of ResNet-50 and deeper, and of ResNeXt.

    The stride is in the 3x3 convolution, as in torchvision (often called v1.5); with ``stride_in_1x1`` in the first
    1x1, as in the ResNet paper.

    Input (N, inplanes, H, W), output (N, 4 * planes, ceil(H / stride), ceil(W / stride)).

    Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), figure 5, right; Xie et al.,
    "Aggregated Residual Transformations for Deep Neural Networks" (arXiv:1611.05431), figure 3(c).

    Args:
        inplanes: Channels of the input.
        planes: A quarter of the channels of the output.
        stride: Stride of the 3x3 convolution, or of the first 1x1.
        downsample: Module for the shortcut, needed where input and output differ in shape; None: the input
            itself.
        groups: Groups of the 3x3 convolution.
        base_width: Channels per group of the 3x3 convolution where ``planes`` is 64; they grow with
            ``planes``.
        dilation: Dilation of the 3x3 convolution.
        norm_layer: Called with a number of channels, makes a normalisation; None: ``torch.nn.BatchNorm2d``.
        recompute: Save memory in training at the cost of time: fused, backward computes the last convolution's
            output again instead of keeping it. An attribute, which can be set later.
        act_layer: Called without arguments, makes an activation; None: ``torch.nn.ReLU(inplace=True)``.
        first_dilation: Dilation in place of ``dilation``, here so that both blocks are built alike.
        bias: Whether the convolutions have biases.
        stride_in_1x1: Whether the first 1x1 convolution has the stride instead of the 3x3.
        drop_path_rate: Probability of dropping the residual branch in training: see `DropPath`.

    Raises:
        ValueError: ``base_width`` leaves less than one channel per group.
    """

    expansion = 4

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
        *,
        act_layer: Callable[[], nn.Module] | None = None,
        first_dilation: int | None = None,
        bias: bool = False,
        stride_in_1x1: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        group_width = planes * base_width // 64
        if group_width < 1:
            raise ValueError(
                f"Bottleneck: expected planes * base_width to be at least 64, got {planes} * {base_width}, "
                "less than one channel per group; raise base_width (width_per_group of the model)"
            )
        width = group_width * groups
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.conv1 = conv1x1(inplanes, width, stride1, bias)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride2, groups, first_dilation or dilation, bias)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion, 1, bias)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True) if act_layer is None else act_layer()
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else None
        self.downsample = downsample
        self.stride = stride
        self.recompute = recompute
        fuse_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inplanes, H, W) to (N, 4 * planes, ceil(H / stride), ceil(W / stride))."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.drop_path is not None:
            out = self.drop_path(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)
