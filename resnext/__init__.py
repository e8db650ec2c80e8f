"""Fast grouped convolutions for PyTorch, and the ResNeXt and ResNet models built on them."""

from resnext.kernels import explain, grouped_conv2d, use_backend
from resnext.layers import GroupedConv2d
from resnext.models import (
    ResNet,
    ResNet18Fused,
    ResNet34Fused,
    ResNet50Fused,
    ResNet101Fused,
    ResNet152Fused,
    ResNeXt50Fused,
    ResNeXt101_32x8dFused,
    ResNeXt101_64x4dFused,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

# A literal: the build reads it from this file's syntax tree, without importing torch.
__version__ = "0.1.0"

__all__ = [
    "GroupedConv2d",
    "ResNeXt50Fused",
    "ResNeXt101_32x8dFused",
    "ResNeXt101_64x4dFused",
    "ResNet",
    "ResNet18Fused",
    "ResNet34Fused",
    "ResNet50Fused",
    "ResNet101Fused",
    "ResNet152Fused",
    "__version__",
    "explain",
    "grouped_conv2d",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "use_backend",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
