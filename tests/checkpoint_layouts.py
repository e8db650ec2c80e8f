"""One small ResNeXt, written the way public implementations and articles write theirs: other names, same function."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = (1, 2, 1, 1)
ARGUMENTS = {"layers": LAYERS, "num_classes": 10, "groups": 4, "width_per_group": 16}
"""Of torchvision's ResNet and ours: the 3x3 convolutions are then ``planes`` wide."""


def conv(inplanes: int, outplanes: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    groups = ARGUMENTS["groups"] if kernel_size == 3 and inplanes > 3 else 1
    return nn.Conv2d(inplanes, outplanes, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)


def projection(inplanes: int, outplanes: int, stride: int) -> list[nn.Module]:
    if stride == 1 and inplanes == outplanes:
        return []
    return [conv(inplanes, outplanes, 1, stride), nn.BatchNorm2d(outplanes)]


def stages(block: type[nn.Module]) -> list[nn.Sequential]:
    result, inplanes = [], 64
    for number, blocks in enumerate(LAYERS):
        planes, stage = 64 * 2**number, nn.Sequential()
        for index in range(blocks):
            stage.append(block(inplanes, planes, 2 if number and not index else 1))
            inplanes = 4 * planes
        result.append(stage)
    return result


def pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


class PytorchCifarBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = conv(inplanes, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, 4 * planes, 1)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.shortcut = nn.Sequential(*projection(inplanes, 4 * planes, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class PytorchCifar(nn.Module):
    """shortcut, linear."""

    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(PytorchCifarBlock)
        self.linear = nn.Linear(2048, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(pooled(self.layer4(self.layer3(self.layer2(self.layer1(x))))))


class ResNeXtPytorchBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv_reduce = conv(inplanes, planes, 1)
        self.bn_reduce = nn.BatchNorm2d(planes)
        self.conv_conv = conv(planes, planes, 3, stride)
        self.bn = nn.BatchNorm2d(planes)
        self.conv_expand = conv(planes, 4 * planes, 1)
        self.bn_expand = nn.BatchNorm2d(4 * planes)
        names = ("shortcut_conv", "shortcut_bn")
        self.shortcut = nn.Sequential(OrderedDict(zip(names, projection(inplanes, 4 * planes, stride), strict=False)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn_reduce(self.conv_reduce(x)))
        out = F.relu(self.bn(self.conv_conv(out)))
        return F.relu(self.bn_expand(self.conv_expand(out)) + self.shortcut(x))


class ResNeXtPytorch(nn.Module):
    """conv_reduce, conv_conv, conv_expand; stages and blocks by name; classifier."""

    def __init__(self):
        super().__init__()
        self.conv_1_3x3 = conv(3, 64, 3)
        self.bn_1 = nn.BatchNorm2d(64)
        for number, blocks in enumerate(stages(ResNeXtPytorchBlock), start=1):
            named = OrderedDict((f"stage_{number}_bottleneck_{index}", block) for index, block in enumerate(blocks))
            self.add_module(f"stage_{number}", nn.Sequential(named))
        self.classifier = nn.Linear(2048, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_1(self.conv_1_3x3(x)))
        return self.classifier(pooled(self.stage_4(self.stage_3(self.stage_2(self.stage_1(x))))))


class PytorchCifar100Block(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.residual_function = nn.Sequential(
            conv(inplanes, planes, 1),
            nn.BatchNorm2d(planes),
            nn.ReLU(),
            conv(planes, planes, 3, stride),
            nn.BatchNorm2d(planes),
            nn.ReLU(),
            conv(planes, 4 * planes, 1),
            nn.BatchNorm2d(4 * planes),
        )
        self.shortcut = nn.Sequential(*projection(inplanes, 4 * planes, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual_function(x) + self.shortcut(x))


class PytorchCifar100(nn.Module):
    """residual_function; stages conv2_x to conv5_x, stem conv1.0 and conv1.1."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(conv(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        self.conv2_x, self.conv3_x, self.conv4_x, self.conv5_x = stages(PytorchCifar100Block)
        self.fc = nn.Linear(2048, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(pooled(self.conv5_x(self.conv4_x(self.conv3_x(self.conv2_x(self.conv1(x)))))))


class SequentialUnitsBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Sequential(conv(inplanes, planes, 1), nn.BatchNorm2d(planes), nn.ReLU())
        self.conv2 = nn.Sequential(conv(planes, planes, 3, stride), nn.BatchNorm2d(planes), nn.ReLU())
        self.conv3 = nn.Sequential(conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes))
        if shortcut := projection(inplanes, 4 * planes, stride):
            self.conv4 = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.conv4(x) if hasattr(self, "conv4") else x
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + shortcut)


class SequentialUnits(nn.Module):
    """Convolution and norm in one Sequential, also the shortcut's, conv4; stages conv2 to conv5; dropout before fc."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.conv2, self.conv3, self.conv4, self.conv5 = stages(SequentialUnitsBlock)
        self.fc = nn.Sequential(nn.Dropout(), nn.Linear(2048, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(pooled(self.conv5(self.conv4(self.conv3(self.conv2(self.conv1(x)))))))


class IdentityDownsampleBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = conv(inplanes, planes, 1)
        self.batch_norm1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride)
        self.batch_norm2 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, 4 * planes, 1)
        self.batch_norm3 = nn.BatchNorm2d(4 * planes)
        self.identity_downsample = nn.Sequential(*projection(inplanes, 4 * planes, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.batch_norm1(self.conv1(x)))
        out = F.relu(self.batch_norm2(self.conv2(out)))
        return F.relu(self.batch_norm3(self.conv3(out)) + self.identity_downsample(x))


class IdentityDownsample(nn.Module):
    """identity_downsample, batch_norm1."""

    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 64, 7, 2)
        self.batch_norm1 = nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(IdentityDownsampleBlock)
        self.fc = nn.Linear(2048, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.batch_norm1(self.conv1(x))), 3, 2, 1)
        return self.fc(pooled(self.layer4(self.layer3(self.layer2(self.layer1(x))))))


class Features(nn.Module):
    """A known model's children in one Sequential, features, and a classifier of its own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.features = nn.Sequential(*list(model.children())[:-1])
        self.classifier = nn.Linear(2048, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def sequential(model: nn.Module) -> nn.Sequential:
    """A known model as nothing but a Sequential."""
    *children, head = model.children()
    return nn.Sequential(*children, nn.Flatten(), head)


class Mmpretrain(nn.Module):
    """ResNet-D: a deep stem of its own name, a pool in those shortcuts that reduce, backbone and head."""

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            channels, layers = (3, 32, 32, 64), []
            for index, (inplanes, outplanes) in enumerate(itertools.pairwise(channels)):
                convolution = nn.Conv2d(inplanes, outplanes, 3, 1 if index else 2, 1, bias=False)
                layers += [convolution, nn.BatchNorm2d(outplanes), nn.ReLU()]
            self.stem = nn.Sequential(*layers)
            self.layer1, self.layer2, self.layer3, self.layer4 = stages(self.block)

        @staticmethod
        def block(inplanes: int, planes: int, stride: int) -> nn.Module:
            block = PytorchCifarBlock(inplanes, planes, stride)
            del block.shortcut
            layers = projection(inplanes, 4 * planes, 1)
            if stride == 2:
                layers = [nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), *layers]
            block.downsample = nn.Sequential(*layers)
            block.__dict__["shortcut"] = block.downsample  # what the forward calls
            return block

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(self.stem(x), 3, 2, 1)
            return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def __init__(self):
        super().__init__()
        self.backbone = self.Backbone()
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(2048, 10)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(pooled(self.backbone(x)))


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Draw weights and statistics anew, none of them 0 or 1 as they start, and switch to evaluation."""
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif tensor.dim() == 1:
            tensor.normal_(std=0.2)
        else:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
    return model.eval()
