"""`ResNet`: the network behind all models, with torchvision's structure, parameter names and initial values.

Plain PyTorch from end to end; the constructor ends with `resnext.fuse_`, which makes stem and blocks run fused where
they can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnext.blocks import BasicBlock, Bottleneck, conv1x1, conv3x3
from resnext.convert import fuse_, why_not_fused
from resnext.stages import checkpoint_stages

Norm = Callable[..., nn.Module]
Act = Callable[[], nn.Module]


class Stem(NamedTuple):
    """What stands before the first stage: a convolution, or three that are ``deep``, and 3x3 max pooling by 2."""

    kernel_size: int
    stride: int
    pool_padding: int | None  # None: no pooling
    deep: bool = False

    @property
    def reduction(self) -> int:
        """By how much it divides height and width."""
        return self.stride if self.pool_padding is None else 2 * self.stride


STEMS = {
    "imagenet": Stem(kernel_size=7, stride=2, pool_padding=1),
    "cifar": Stem(kernel_size=3, stride=1, pool_padding=None),
    "deep": Stem(kernel_size=3, stride=2, pool_padding=1, deep=True),
    "keras": Stem(kernel_size=7, stride=2, pool_padding=0),
}
GLOBAL_POOLS = {"avg": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d}


class ResNet(nn.Module):
    """A residual network for image classification: a stem, stages of blocks, pooling and a classifier.

    Input (N, in_chans, H, W), normalised images; output (N, num_classes), logits before the softmax. The spatial
    size is divided by 32 on the way (by less with other stems, fewer stages or dilation) and pooled, so any H
    and W will do. For the best speed on GPUs convert both the model and the images to
    ``torch.channels_last``.

    Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), table 1; Xie et al.,
    "Aggregated Residual Transformations for Deep Neural Networks" (arXiv:1611.05431), table 1.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: Number of blocks in each stage, most often four stages.
        num_classes: Number of logits; 0: no classifier, the output is the pooled features.
        zero_init_residual: Start every residual branch at zero (its last norm's weight), as in "Accurate,
            Large Minibatch SGD" (arXiv:1706.02677), section 5.1.
        groups: Groups of the 3x3 convolutions.
        width_per_group: Channels per group of the 3x3 convolutions in the first stage; they double with each
            stage.
        replace_stride_with_dilation: For each stage but the first, whether to keep the resolution and
            dilate the 3x3 convolutions instead of halving it; None: never.
        norm_layer: Called with a number of channels, makes a normalisation; None: ``torch.nn.BatchNorm2d``.
        recompute: Save memory in training at the cost of time: see `recompute`, which can also be set later.
        in_chans: Channels of the images.
        stem: ``"imagenet"``: 7x7 convolution with stride 2, and 3x3 max pooling with stride 2. ``"cifar"``: 3x3
            convolution, for small images. ``"deep"``: three 3x3 convolutions in place of the 7x7, as in ResNet-C and -D
            (timm's names). ``"keras"``: imagenet's without padding in the pooling, as in Keras's first ResNet50.
        output_stride: By how much the network divides H and W, by dilation instead of the last strides; for
            segmentation 8 or 16 in place of 32. Instead of ``replace_stride_with_dilation``.
        stride_in_1x1: Whether a bottleneck's stride is in its first 1x1 convolution, as in the ResNet paper, and not
            in the 3x3, as in torchvision.
        avg_down: Average pooling in shortcuts instead of a stride, as in ResNet-D (arXiv:1812.01187, figure 2c).
        bias: Whether the convolutions have biases.
        act_layer: Called without arguments, makes an activation; None: ``torch.nn.ReLU(inplace=True)``.
        drop_rate: Probability of dropout before the classifier.
        drop_path_rate: Probability of dropping the residual branch of the last block in training (stochastic depth);
            it grows linearly from 0 at the first block.
        global_pool: ``"avg"`` or ``"max"``.
        pool_size: Height and width of what pooling leaves; the classifier sees all of its pixels.

    Attributes:
        num_features: Channels of the last stage.
        feature_info: Of the stem and each stage, what timm's has: ``num_chs``, ``reduction`` and ``module``.

    Raises:
        ValueError: An argument is not as above, or the block does not support it.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Norm | None = None,
        recompute: bool = False,
        *,
        in_chans: int = 3,
        stem: str = "imagenet",
        output_stride: int | None = None,
        stride_in_1x1: bool = False,
        avg_down: bool = False,
        bias: bool = False,
        act_layer: Act | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        pool_size: int = 1,
    ) -> None:
        super().__init__()
        if not layers or min(layers) < 1:
            raise ValueError(
                f"ResNet: expected layers with a positive number of blocks for each stage, got {layers}; "
                "ResNet-50 has (3, 4, 6, 3)"
            )
        for name, number, least in [
            ("in_chans", in_chans, 1),
            ("groups", groups, 1),
            ("num_classes", num_classes, 0),
            ("pool_size", pool_size, 1),
        ]:
            if number < least:
                raise ValueError(f"ResNet: expected {name} of at least {least}, got {number}; give a larger number")
        _check_choice("stem", stem, STEMS)
        _check_choice("global_pool", global_pool, GLOBAL_POOLS)
        for name, rate in [("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)]:
            if not 0 <= rate < 1:
                raise ValueError(f"ResNet: expected {name} in [0, 1), got {rate}; give the probability of dropping")

        norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        act_layer = _relu if act_layer is None else act_layer
        self._named: dict[str, Any] = {}  # what the named models are built from
        self.groups = groups
        self.base_width = width_per_group
        self.inplanes = 64  # channels at the end of what is built so far; feature pyramids read it to size themselves
        self.dilation = 1

        self._make_stem(STEMS[stem], in_chans, norm_layer, act_layer, bias)
        reduction = STEMS[stem].reduction
        dilated = _dilated_stages(len(layers), reduction, replace_stride_with_dilation, output_stride)
        last = max(1, sum(layers) - 1)
        rates = iter(drop_path_rate * index / last for index in range(sum(layers)))
        for index, (num_blocks, dilate) in enumerate(zip(layers, dilated, strict=True)):
            stage = self._make_stage(
                block,
                64 << index,
                [next(rates) for _ in range(num_blocks)],
                stride=1 if index == 0 else 2,
                dilate=dilate,
                avg_down=avg_down,
                norm_layer=norm_layer,
                act_layer=act_layer,
                bias=bias,
                stride_in_1x1=stride_in_1x1,
                recompute=recompute,
            )
            self.add_module(f"layer{index + 1}", stage)
            reduction *= 1 if index == 0 or dilate else 2
            self.feature_info.append({"num_chs": self.inplanes, "reduction": reduction, "module": f"layer{index + 1}"})
        self.num_features = self.inplanes
        self.avgpool = GLOBAL_POOLS[global_pool]((pool_size, pool_size))
        self.dropout = nn.Dropout(drop_rate) if drop_rate else None
        self._pixels = pool_size**2
        self.fc = self._make_classifier(num_classes)
        self._init_weights(zero_init_residual)
        fuse_(self)

    def _make_stem(self, stem: Stem, in_chans: int, norm_layer: Norm, act_layer: Act, bias: bool) -> None:
        width = self.inplanes
        if stem.deep:
            half = width // 2
            self.conv1: nn.Module = nn.Sequential(
                conv3x3(in_chans, half, stem.stride, bias=bias),
                norm_layer(half),
                act_layer(),
                conv3x3(half, half, bias=bias),
                norm_layer(half),
                act_layer(),
                conv3x3(half, width, bias=bias),
            )
        else:
            self.conv1 = nn.Conv2d(in_chans, width, stem.kernel_size, stem.stride, stem.kernel_size // 2, bias=bias)
        self.bn1 = norm_layer(width)
        self.relu = act_layer()
        self.maxpool = nn.Identity() if stem.pool_padding is None else nn.MaxPool2d(3, 2, stem.pool_padding)
        self.feature_info: list[dict[str, Any]] = [{"num_chs": width, "reduction": stem.stride, "module": "relu"}]

    def _make_stage(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        drop_path_rates: Sequence[float],
        stride: int,
        dilate: bool,
        avg_down: bool,
        **arguments: Any,
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
            downsample = nn.Sequential()
            if avg_down:
                downsample.append(_average(stride, dilate))
            downsample.append(conv1x1(self.inplanes, out_planes, 1 if avg_down else stride, arguments["bias"]))
            downsample.append(arguments["norm_layer"](out_planes))

        stage = nn.Sequential()
        for index, rate in enumerate(drop_path_rates):
            first = index == 0
            stage.append(
                block(
                    self.inplanes,
                    planes,
                    stride=stride if first else 1,
                    downsample=downsample if first else None,
                    groups=self.groups,
                    base_width=self.base_width,
                    dilation=self.dilation,
                    first_dilation=first_dilation if first else None,
                    drop_path_rate=rate,
                    **arguments,
                )
            )
            self.inplanes = out_planes
        return stage

    def _make_classifier(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features * self._pixels, num_classes) if num_classes else nn.Identity()

    def _init_weights(self, zero_init_residual: bool) -> None:
        """Draw the convolutions' weights (He et al., arXiv:1502.01852, by fan-out); norms already start as identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if zero_init_residual:
            for block in self._blocks():
                last_norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
                if isinstance(last_norm.weight, Tensor):
                    nn.init.zeros_(last_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to the last stage's output (N, num_features, H', W')."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.maxpool(x)
        for stage in self._stages():
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the last stage's output to logits, or with ``pre_logits`` to the classifier's input (N, features)."""
        x = torch.flatten(self.avgpool(x), 1)
        if self.dropout is not None:
            x = self.dropout(x)
        return x if pre_logits else self.fc(x)

    @property
    def num_classes(self) -> int:
        """Number of logits, also of a linear layer that has taken the classifier's place; 0 without one."""
        return getattr(self.fc, "out_features", 0)

    @property
    def config(self) -> dict[str, Any]:
        """How to build this model again: ``"architecture"``, a name for `create_model`, and its keyword arguments.

        Empty unless it was built as a named model.
        """
        return {**self._named, "num_classes": self.num_classes} if self._named else {}

    def get_classifier(self) -> nn.Module:
        """The linear layer that computes the logits, or ``torch.nn.Identity`` without one."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one, randomly initialised; 0 classes: by none.

        An optimizer made before does not know the new parameters.

        Raises:
            ValueError: ``num_classes`` is negative.
        """
        if num_classes < 0:
            raise ValueError(f"reset_classifier: expected num_classes of at least 0, got {num_classes}; 0 means none")
        like = next(self.parameters())
        self.fc = self._make_classifier(num_classes).to(like.device, like.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether backward keeps each block's input only and runs the block again: least memory, a third more time.

        Running statistics of batch norms follow each batch once all the same. For less saving at less cost see
        `recompute`.
        """
        checkpoint_stages(self._stages(), enable)

    def why_not_fused(self) -> dict[str, str]:
        """Say which converted modules would run their children one by one, and why: `resnext.why_not_fused`."""
        return why_not_fused(self)

    @property
    def recompute(self) -> bool:
        """Whether in training every fused block computes its last convolution's output again in backward.

        Saves the memory of about a third of the activations. Assign to switch all blocks.
        """
        return all(block.recompute for block in self._blocks())

    @recompute.setter
    def recompute(self, value: bool) -> None:
        for block in self._blocks():
            block.recompute = value

    def _stages(self) -> list[nn.Sequential]:
        return [getattr(self, info["module"]) for info in self.feature_info[1:]]

    def _blocks(self) -> list[BasicBlock | Bottleneck]:
        return [module for module in self.modules() if isinstance(module, (BasicBlock, Bottleneck))]


def _relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def _average(stride: int, dilate: bool) -> nn.Module:
    """ResNet-D's pooling of the shortcut: over 2x2 pixels, of which a border may have fewer, by the block's stride."""
    if stride != 1:
        return nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
    if dilate:  # over as many pixels, without the stride
        return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, 1))
    return nn.Identity()


def _dilated_stages(
    stages: int, reduction: int, replace_stride_with_dilation: Sequence[bool] | None, output_stride: int | None
) -> list[bool]:
    """Of each stage, whether it has dilation instead of a stride."""
    if output_stride is None:
        flags = [False] * (stages - 1) if replace_stride_with_dilation is None else [*replace_stride_with_dilation]
        if len(flags) != stages - 1:
            raise ValueError(
                f"ResNet: expected replace_stride_with_dilation with {stages - 1} flags or None, got "
                f"{replace_stride_with_dilation}; give one for each stage but the first"
            )
        return [False, *flags]
    if replace_stride_with_dilation is not None:
        raise ValueError(
            f"ResNet: expected output_stride or replace_stride_with_dilation, got both, {output_stride} and "
            f"{replace_stride_with_dilation}; leave one out"
        )
    strides = [reduction << index for index in range(stages)]
    _check_choice("output_stride", output_stride, strides)
    return [stride > output_stride for stride in strides]


def _check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise ValueError(f"ResNet: expected {name} to be one of {known}, got {value!r}; choose one of them")
