"""The named models: ResNet and ResNeXt as torchvision and the articles have them.

A ``state_dict`` of torchvision's model of the same name loads strictly, and the other way round; the same
random seed gives the same initial weights. What differs is the computation: stem and blocks run fused where they can
(`resnext.fuse_`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from resnext.blocks import BasicBlock, Bottleneck
from resnext.resnet import ResNet


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
