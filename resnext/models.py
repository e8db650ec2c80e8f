"""ResNet and ResNeXt with torchvision's structure, parameter names, constructor arguments and initial values.

A ``state_dict`` of torchvision's model of the same name loads strictly, and the other way round; the same
random seed gives the same initial weights. What differs is the computation: blocks and stem run fused where they can
(`resnext.fusion`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from resnext import fusion
from resnext.batch_norm import BatchNorm
from resnext.blocks import BasicBlock, Bottleneck, ResidualBlock, conv1x1
from resnext.fusion import ConvNorm


class ResNet(nn.Module):
    """A residual network for image classification: a stem, four stages of blocks, pooling and a classifier.

    Input (N, 3, H, W), normalised images; output (N, num_classes), logits before the softmax. The spatial
    size is divided by 32 on the way (by less where strides are replaced with dilation) and pooled, so any H
    and W will do. For the best speed on GPUs convert both the model and the images to
    ``torch.channels_last``.

    Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), table 1; Xie et al.,
    "Aggregated Residual Transformations for Deep Neural Networks" (arXiv:1611.05431), table 1.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: Number of blocks in each of the four stages.
        num_classes: Number of logits.
        zero_init_residual: Start every residual branch at zero (its last norm's weight), as in "Accurate,
            Large Minibatch SGD" (arXiv:1706.02677), section 5.1.
        groups: Groups of the 3x3 convolutions.
        width_per_group: Channels per group of the 3x3 convolutions in the first stage; they double with each
            stage.
        replace_stride_with_dilation: For each of the last three stages, whether to keep the resolution and
            dilate the 3x3 convolutions instead of halving it; None: never.
        norm_layer: Called with a number of channels, makes a normalisation; None: ``torch.nn.BatchNorm2d``.
        recompute: Save memory in training at the cost of time: see `recompute`, which can also be set later.

    Raises:
        ValueError: ``layers`` or ``replace_stride_with_dilation`` is not as above, or the block does not support
            ``groups`` or ``width_per_group``.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(
                f"ResNet: expected layers with 4 positive numbers of blocks, got {layers}; give one for each stage"
            )
        dilate = (False,) * 3 if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(
                f"ResNet: expected replace_stride_with_dilation with 3 flags or None, got {dilate}; "
                "give one for each of the stages 2, 3 and 4"
            )
        self._norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.groups = groups
        self.base_width = width_per_group
        self.inplanes = 64  # channels at the end of what is built so far; feature pyramids read it to size themselves
        self.dilation = 1

        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_stage(block, 64, layers[0])
        self.layer2 = self._make_stage(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_stage(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_stage(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._init_weights(zero_init_residual)
        self.recompute = recompute

    def _make_stage(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        num_blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        """Build a stage; its first block changes resolution and number of channels, the others keep them."""
        # The first block of a dilated stage still sees the grid of the stage before, hence that stage's
        # dilation.
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        out_planes = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != out_planes:
            downsample = nn.Sequential(conv1x1(self.inplanes, out_planes, stride), self._norm_layer(out_planes))

        stage = nn.Sequential()
        for index in range(num_blocks):
            first = index == 0
            stage.append(
                block(
                    self.inplanes,
                    planes,
                    stride=stride if first else 1,
                    downsample=downsample if first else None,
                    groups=self.groups,
                    base_width=self.base_width,
                    dilation=first_dilation if first else self.dilation,
                    norm_layer=self._norm_layer,
                )
            )
            self.inplanes = out_planes
        return stage

    def _init_weights(self, zero_init_residual: bool) -> None:
        """Draw the convolutions' weights (He et al., arXiv:1502.01852, by fan-out); norms already start as identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)):
                    last_norm = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                    if isinstance(last_norm.weight, Tensor):
                        nn.init.zeros_(last_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        x = self._stem(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def _stem(self, x: Tensor) -> Tensor:
        if self._why_stem_not_fused(x) is None:
            return fusion.stem(x, self._stem_convolution())
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        return self.maxpool(x)

    def why_not_fused(self) -> dict[str, str]:
        """Say which parts would run their children one by one, and why.

        Returns:
            The reason for each block, by its name in the model, and for the ``"stem"``; empty if all would run fused.
        """
        reasons = {"stem": self._why_stem_not_fused()}
        reasons |= {name: block.why_not_fused() for name, block in self._blocks()}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    @property
    def recompute(self) -> bool:
        """Whether in training every block computes its last convolution's output again in backward.

        Saves the memory of about a third of the activations. Assign to switch all blocks.
        """
        return all(block.recompute for _, block in self._blocks())

    @recompute.setter
    def recompute(self, value: bool) -> None:
        for _, block in self._blocks():
            block.recompute = value

    def _blocks(self) -> list[tuple[str, ResidualBlock]]:
        return [(name, module) for name, module in self.named_modules() if isinstance(module, ResidualBlock)]

    def _stem_convolution(self) -> ConvNorm:
        return ConvNorm("conv1", self.conv1, "bn1", cast(BatchNorm, self.bn1))

    def _why_stem_not_fused(self, x: Tensor | None = None) -> str | None:
        return (
            fusion.why_not_now(x)
            or fusion.why_not_module("relu", self.relu, nn.ReLU)
            or fusion.why_not_max_pool("maxpool", self.maxpool)
            or fusion.why_not_conv_norm(self._stem_convolution(), x)
        )


class ResNet18Fused(ResNet):
    """ResNet-18: 11.7 M parameters. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(BasicBlock, (2, 2, 2, 2), num_classes, **kwargs)


class ResNet34Fused(ResNet):
    """ResNet-34: 21.8 M parameters. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(BasicBlock, (3, 4, 6, 3), num_classes, **kwargs)


class ResNet50Fused(ResNet):
    """ResNet-50: 25.6 M parameters. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(Bottleneck, (3, 4, 6, 3), num_classes, **kwargs)


class ResNet101Fused(ResNet):
    """ResNet-101: 44.5 M parameters. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(Bottleneck, (3, 4, 23, 3), num_classes, **kwargs)


class ResNet152Fused(ResNet):
    """ResNet-152: 60.2 M parameters. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(Bottleneck, (3, 8, 36, 3), num_classes, **kwargs)


class ResNeXt50Fused(ResNet):
    """ResNeXt-50 32x4d: 25.0 M parameters, 32 groups of 4 to 32 channels. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(Bottleneck, (3, 4, 6, 3), num_classes, groups=32, width_per_group=4, **kwargs)


class ResNeXt101_32x8dFused(ResNet):  # noqa: N801  # the published name of the variant
    """ResNeXt-101 32x8d: 88.8 M parameters, 32 groups of 8 to 64 channels. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(Bottleneck, (3, 4, 23, 3), num_classes, groups=32, width_per_group=8, **kwargs)


class ResNeXt101_64x4dFused(ResNet):  # noqa: N801  # the published name of the variant
    """ResNeXt-101 64x4d: 83.5 M parameters, 64 groups of 4 to 32 channels. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(Bottleneck, (3, 4, 23, 3), num_classes, groups=64, width_per_group=4, **kwargs)


class WeightsEntry(Protocol):
    """What `_build` needs of a member of torchvision's weights enumerations."""

    def get_state_dict(self, *, progress: bool) -> Mapping[str, Any]:
        """Return the ``state_dict``, after a download if need be."""


Weights = Mapping[str, Any] | WeightsEntry
Model = TypeVar("Model", bound=ResNet)


def _build(variant: type[Model], weights: Weights | None, progress: bool, **kwargs: Any) -> Model:
    """Build a model and load ``weights`` into it, strictly."""
    if weights is not None and not isinstance(weights, Mapping) and not hasattr(weights, "get_state_dict"):
        raise TypeError(
            f"weights: expected None, a state_dict or an object with get_state_dict, got {weights!r}; "
            "torchvision's own are members of classes like torchvision.models.ResNeXt50_32X4D_Weights"
        )
    model = variant(**kwargs)
    if weights is not None:
        state = weights if isinstance(weights, Mapping) else weights.get_state_dict(progress=progress)
        model.load_state_dict(state)
    return model


# The builders below take torchvision's arguments: `weights` (a state_dict, or anything with get_state_dict),
# `progress` (show one if the weights are downloaded) and those of `ResNet`. They return a randomly
# initialised model otherwise.


def resnet18(*, weights: Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet18Fused:
    """Build `ResNet18Fused` as ``torchvision.models.resnet18`` builds its model."""
    return _build(ResNet18Fused, weights, progress, **kwargs)


def resnet34(*, weights: Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet34Fused:
    """Build `ResNet34Fused` as ``torchvision.models.resnet34`` builds its model."""
    return _build(ResNet34Fused, weights, progress, **kwargs)


def resnet50(*, weights: Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet50Fused:
    """Build `ResNet50Fused` as ``torchvision.models.resnet50`` builds its model."""
    return _build(ResNet50Fused, weights, progress, **kwargs)


def resnet101(*, weights: Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet101Fused:
    """Build `ResNet101Fused` as ``torchvision.models.resnet101`` builds its model."""
    return _build(ResNet101Fused, weights, progress, **kwargs)


def resnet152(*, weights: Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet152Fused:
    """Build `ResNet152Fused` as ``torchvision.models.resnet152`` builds its model."""
    return _build(ResNet152Fused, weights, progress, **kwargs)


def resnext50_32x4d(*, weights: Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNeXt50Fused:
    """Build `ResNeXt50Fused` as ``torchvision.models.resnext50_32x4d`` builds its model."""
    return _build(ResNeXt50Fused, weights, progress, **kwargs)


def resnext101_32x8d(*, weights: Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNeXt101_32x8dFused:
    """Build `ResNeXt101_32x8dFused` as ``torchvision.models.resnext101_32x8d`` builds its model."""
    return _build(ResNeXt101_32x8dFused, weights, progress, **kwargs)


def resnext101_64x4d(*, weights: Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNeXt101_64x4dFused:
    """Build `ResNeXt101_64x4dFused` as ``torchvision.models.resnext101_64x4d`` builds its model."""
    return _build(ResNeXt101_64x4dFused, weights, progress, **kwargs)


def wide_resnet50_2(*, weights: Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet50Fused:
    """Build ResNet-50 with twice the width in its 3x3 convolutions (Wide ResNet, arXiv:1605.07146)."""
    return _build(ResNet50Fused, weights, progress, width_per_group=128, **kwargs)


def wide_resnet101_2(*, weights: Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNet101Fused:
    """Build ResNet-101 with twice the width in its 3x3 convolutions (Wide ResNet, arXiv:1605.07146)."""
    return _build(ResNet101Fused, weights, progress, width_per_group=128, **kwargs)
