"""The named models: ResNet and ResNeXt as torchvision and the articles have them, and `create_model`.

A ``state_dict`` of torchvision's model of the same name loads strictly, and the other way round; the same
random seed gives the same initial weights. What differs is the computation: stem and blocks run fused where they can
(`resnext.fuse_`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Any, Literal, Protocol, TypeVar, cast, overload

from resnext.blocks import BasicBlock, Bottleneck
from resnext.features import FeatureMaps
from resnext.resnet import ResNet


def _set_config(model: ResNet, architecture: str, arguments: Mapping[str, Any]) -> None:
    """Let `ResNet.config` say how ``model`` was built: by what name and keyword arguments."""
    model._named = {"architecture": architecture, **arguments}


class ResNet18Fused(ResNet):
    """ResNet-18: 11.7 M parameters. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(BasicBlock, (2, 2, 2, 2), num_classes, **kwargs)
        _set_config(self, "resnet18", kwargs)


class ResNet34Fused(ResNet):
    """ResNet-34: 21.8 M parameters. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(BasicBlock, (3, 4, 6, 3), num_classes, **kwargs)
        _set_config(self, "resnet34", kwargs)


class ResNet50Fused(ResNet):
    """ResNet-50: 25.6 M parameters. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(Bottleneck, (3, 4, 6, 3), num_classes, **kwargs)
        _set_config(self, "resnet50", kwargs)


class ResNet101Fused(ResNet):
    """ResNet-101: 44.5 M parameters. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(Bottleneck, (3, 4, 23, 3), num_classes, **kwargs)
        _set_config(self, "resnet101", kwargs)


class ResNet152Fused(ResNet):
    """ResNet-152: 60.2 M parameters. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(Bottleneck, (3, 8, 36, 3), num_classes, **kwargs)
        _set_config(self, "resnet152", kwargs)


class ResNeXt50Fused(ResNet):
    """ResNeXt-50 32x4d: 25.0 M parameters, 32 groups of 4 to 32 channels. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(Bottleneck, (3, 4, 6, 3), num_classes, groups=32, width_per_group=4, **kwargs)
        _set_config(self, "resnext50_32x4d", kwargs)


class ResNeXt101_32x8dFused(ResNet):  # noqa: N801  # the published name of the variant
    """ResNeXt-101 32x8d: 88.8 M parameters, 32 groups of 8 to 64 channels. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(Bottleneck, (3, 4, 23, 3), num_classes, groups=32, width_per_group=8, **kwargs)
        _set_config(self, "resnext101_32x8d", kwargs)


class ResNeXt101_64x4dFused(ResNet):  # noqa: N801  # the published name of the variant
    """ResNeXt-101 64x4d: 83.5 M parameters, 64 groups of 4 to 32 channels. Keyword arguments as for `ResNet`."""

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(Bottleneck, (3, 4, 23, 3), num_classes, groups=64, width_per_group=4, **kwargs)
        _set_config(self, "resnext101_64x4d", kwargs)


class WeightsEntry(Protocol):
    """What builders need of a member of torchvision's weights enumerations."""

    def get_state_dict(self, *, progress: bool) -> Mapping[str, Any]:
        """Return the ``state_dict``, after a download if need be."""


Weights = Mapping[str, Any] | WeightsEntry
Model = TypeVar("Model", bound=ResNet)
Model_co = TypeVar("Model_co", bound=ResNet, covariant=True)


class Builder(Protocol[Model_co]):
    """A function that builds a named model, randomly initialised unless weights are given.

    Args:
        weights: A ``state_dict``, or anything with ``get_state_dict``, as the members of torchvision's weights
            enumerations; loaded strictly.
        progress: Whether to show a progress bar if the weights are downloaded.
        features_only: Return a `FeatureMaps` instead of the model.
        out_indices: Which maps that returns; None: all.
        **kwargs: As for `ResNet`.

    Raises:
        TypeError: ``weights`` is something else.
        RuntimeError: The ``state_dict`` is not this model's.
        ValueError: An argument of `ResNet` or `FeatureMaps` is wrong.
    """

    @overload
    def __call__(
        self,
        *,
        weights: Weights | None = None,
        progress: bool = True,
        features_only: Literal[False] = False,
        **kwargs: Any,
    ) -> Model_co: ...

    @overload
    def __call__(
        self,
        *,
        weights: Weights | None = None,
        progress: bool = True,
        features_only: Literal[True],
        out_indices: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> FeatureMaps: ...


_BUILDERS: dict[str, Builder[ResNet]] = {}


def _named(build: Callable[..., Model]) -> Builder[Model]:
    """Make a builder, found by `create_model` under the function's name, of one that takes `ResNet`'s arguments."""

    @functools.wraps(build)
    def builder(
        *,
        weights: Weights | None = None,
        progress: bool = True,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Model | FeatureMaps:
        if weights is not None and not isinstance(weights, Mapping) and not hasattr(weights, "get_state_dict"):
            raise TypeError(
                f"weights: expected None, a state_dict or an object with get_state_dict, got {weights!r}; "
                "torchvision's own are members of classes like torchvision.models.ResNeXt50_32X4D_Weights"
            )
        model = build(**kwargs)
        _set_config(model, build.__name__, kwargs)
        if weights is not None:
            state = weights if isinstance(weights, Mapping) else weights.get_state_dict(progress=progress)
            model.load_state_dict(state)
        return FeatureMaps(model, out_indices) if features_only else model

    named = cast(Builder[Model], builder)
    _BUILDERS[build.__name__] = named
    return named


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that `create_model` knows and that match a shell-style pattern, sorted."""
    return sorted(name for name in _BUILDERS if fnmatch(name, pattern))


def create_model(name: str, **kwargs: Any) -> ResNet | FeatureMaps:
    """Build a model by its name, one of `list_models`; arguments as for every `Builder`.

    Raises:
        ValueError: There is no model of that name, or an argument is wrong.
    """
    if name not in _BUILDERS:
        close = get_close_matches(name, _BUILDERS)
        advice = f"did you mean {' or '.join(close)}?" if close else "resnext.list_models() lists them"
        raise ValueError(f"create_model: expected the name of a model, got {name!r}; {advice}")
    return _BUILDERS[name](**kwargs)


@_named
def resnet18(**kwargs: Any) -> ResNet18Fused:
    """Build `ResNet18Fused`, torchvision's model of this name."""
    return ResNet18Fused(**kwargs)


@_named
def resnet34(**kwargs: Any) -> ResNet34Fused:
    """Build `ResNet34Fused`, torchvision's model of this name."""
    return ResNet34Fused(**kwargs)


@_named
def resnet50(**kwargs: Any) -> ResNet50Fused:
    """Build `ResNet50Fused`, torchvision's model of this name."""
    return ResNet50Fused(**kwargs)


@_named
def resnet101(**kwargs: Any) -> ResNet101Fused:
    """Build `ResNet101Fused`, torchvision's model of this name."""
    return ResNet101Fused(**kwargs)


@_named
def resnet152(**kwargs: Any) -> ResNet152Fused:
    """Build `ResNet152Fused`, torchvision's model of this name."""
    return ResNet152Fused(**kwargs)


@_named
def wide_resnet50_2(**kwargs: Any) -> ResNet50Fused:
    """Build ResNet-50 with 3x3 convolutions of twice the width (Wide ResNet, arXiv:1605.07146): 68.9 M parameters."""
    return ResNet50Fused(width_per_group=128, **kwargs)


@_named
def wide_resnet101_2(**kwargs: Any) -> ResNet101Fused:
    """Build ResNet-101 with 3x3 convolutions of twice the width (Wide ResNet): 126.9 M parameters."""
    return ResNet101Fused(width_per_group=128, **kwargs)


@_named
def resnet50_v1(**kwargs: Any) -> ResNet50Fused:
    """Build ResNet-50 with its strides where the paper has them, in the first 1x1 convolutions: 25.6 M parameters."""
    return ResNet50Fused(stride_in_1x1=True, **kwargs)


@_named
def resnet50_keras(num_classes: int = 4, **kwargs: Any) -> ResNet50Fused:
    """Build the ResNet-50 of identity and convolution blocks, from Keras's first and its many ports: 23.9 M parameters.

    Biased convolutions, strides in the first 1x1 convolutions, max pooling without padding (55x55 pixels of images of
    224x224), and a classifier that sees all 7x7 pixels of the last map instead of their mean. The ports end in softmax
    and train with a cross-entropy loss, which applies softmax once more; this model returns logits.
    """
    return ResNet50Fused(num_classes, stem="keras", bias=True, stride_in_1x1=True, pool_size=7, **kwargs)


@_named
def resnext50_32x4d(**kwargs: Any) -> ResNeXt50Fused:
    """Build `ResNeXt50Fused`, torchvision's model of this name."""
    return ResNeXt50Fused(**kwargs)


@_named
def resnext101_32x8d(**kwargs: Any) -> ResNeXt101_32x8dFused:
    """Build `ResNeXt101_32x8dFused`, torchvision's model of this name."""
    return ResNeXt101_32x8dFused(**kwargs)


@_named
def resnext101_64x4d(**kwargs: Any) -> ResNeXt101_64x4dFused:
    """Build `ResNeXt101_64x4dFused`, torchvision's model of this name."""
    return ResNeXt101_64x4dFused(**kwargs)


@_named
def resnext50_32x2d(**kwargs: Any) -> ResNet:
    """Build a ResNeXt-50 no wider than ResNet-50, with 32 groups of 2 to 16 channels: 14.6 M parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=2, **kwargs)


@_named
def resnext50_64x4d(**kwargs: Any) -> ResNet:
    """Build a ResNeXt-50 with 64 groups of 4 to 32 channels: 45.2 M parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), groups=64, width_per_group=4, **kwargs)


@_named
def resnext101_32x4d(**kwargs: Any) -> ResNet:
    """Build the paper's ResNeXt-101 with 32 groups of 4 to 32 channels: 44.2 M parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=4, **kwargs)


@_named
def resnet18_cifar(num_classes: int = 10, **kwargs: Any) -> ResNet18Fused:
    """Build ResNet-18 for images of 32x32 pixels: 3x3 stem, no max pooling: 11.2 M parameters."""
    return ResNet18Fused(num_classes, stem="cifar", **kwargs)


@_named
def resnet34_cifar(num_classes: int = 10, **kwargs: Any) -> ResNet34Fused:
    """Build ResNet-34 for images of 32x32 pixels: 3x3 stem, no max pooling: 21.3 M parameters."""
    return ResNet34Fused(num_classes, stem="cifar", **kwargs)


@_named
def resnet50_cifar(num_classes: int = 10, **kwargs: Any) -> ResNet50Fused:
    """Build ResNet-50 for images of 32x32 pixels: 3x3 stem, no max pooling: 23.5 M parameters."""
    return ResNet50Fused(num_classes, stem="cifar", **kwargs)


@_named
def resnet101_cifar(num_classes: int = 10, **kwargs: Any) -> ResNet101Fused:
    """Build ResNet-101 for images of 32x32 pixels: 3x3 stem, no max pooling: 42.5 M parameters."""
    return ResNet101Fused(num_classes, stem="cifar", **kwargs)


@_named
def resnet152_cifar(num_classes: int = 10, **kwargs: Any) -> ResNet152Fused:
    """Build ResNet-152 for images of 32x32 pixels: 3x3 stem, no max pooling: 58.2 M parameters."""
    return ResNet152Fused(num_classes, stem="cifar", **kwargs)


@_named
def resnext29_8x64d_cifar(num_classes: int = 10, **kwargs: Any) -> ResNet:
    """Build the paper's ResNeXt for CIFAR, three stages, 8 groups of 64 to 256 channels: 34.4 M parameters."""
    return ResNet(Bottleneck, (3, 3, 3), num_classes, groups=8, width_per_group=64, stem="cifar", **kwargs)


@_named
def resnext29_32x4d_cifar(num_classes: int = 10, **kwargs: Any) -> ResNet:
    """Build a small ResNeXt for CIFAR, three stages, 32 groups of 4 to 16 channels: 4.8 M parameters."""
    return ResNet(Bottleneck, (3, 3, 3), num_classes, groups=32, width_per_group=4, stem="cifar", **kwargs)


@_named
def resnext29_16x64d_cifar(num_classes: int = 10, **kwargs: Any) -> ResNet:
    """Build the paper's ResNeXt for CIFAR, three stages, 16 groups of 64 to 256 channels: 68.2 M parameters."""
    return ResNet(Bottleneck, (3, 3, 3), num_classes, groups=16, width_per_group=64, stem="cifar", **kwargs)
