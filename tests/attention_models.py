"""Models with channel attentions as others write them, for `fuse_`: what is fused, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .other_models import BLOCK, Other, conv1, conv3

CHANNELS = 8
Attend = Callable[["Attended", Tensor], Tensor]


class Attended(nn.Module):
    """A block with an attention that ``attend`` computes, behind its second convolution or its last."""

    def __init__(self, attend: Attend, last: bool, projects: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv1(8, CHANNELS), nn.BatchNorm2d(CHANNELS)
        self.conv2, self.bn2 = conv3(CHANNELS, CHANNELS, groups=2), nn.BatchNorm2d(CHANNELS)
        self.conv3, self.bn3 = conv1(CHANNELS, 8), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Conv2d(CHANNELS, 4, 1), nn.Conv2d(4, CHANNELS, 1)
        self.linear1, self.linear2 = nn.Linear(CHANNELS, 4), nn.Linear(4, CHANNELS)
        self.pool, self.relu, self.sigmoid = nn.AdaptiveAvgPool2d(1), nn.ReLU(inplace=True), nn.Sigmoid()
        self.dropout, self.flatten = nn.Dropout(0.5), nn.Flatten()
        self.downsample = nn.Sequential(conv1(8, 8), nn.BatchNorm2d(8)) if projects else None
        self.attend, self.last = attend, last

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        if not self.last:
            out = self.attend(self, out)
        out = self.bn3(self.conv3(out))
        if self.last:
            out = self.attend(self, out)
        return torch.relu(out + identity)


def layers(m: Attended, mean: Tensor) -> Tensor:
    return m.sigmoid(m.fc2(m.relu(m.fc1(mean))))


def linear_layers(m: Attended, mean: Tensor) -> Tensor:
    return torch.sigmoid(m.linear2(F.relu(m.linear1(mean))))


def with_sizes(m: Attended, x: Tensor) -> Tensor:
    images, channels, _, _ = x.size()
    gate = linear_layers(m, m.pool(x).view(images, channels)).view(images, channels, 1, 1)
    return x * gate.expand_as(x)


def with_shape(m: Attended, x: Tensor) -> Tensor:
    gate = linear_layers(m, x.mean(dim=(2, 3))).view(x.shape[0], x.shape[1], 1, 1)
    return gate * x


def flattened(m: Attended, x: Tensor) -> Tensor:
    return x * linear_layers(m, torch.flatten(m.pool(x), 1))[:, :, None, None]


def unsqueezed(m: Attended, x: Tensor) -> Tensor:
    return x * linear_layers(m, m.flatten(m.pool(x))).unsqueeze(2).unsqueeze(-1)


def squeezed(m: Attended, x: Tensor) -> Tensor:
    mean = m.pool(x).squeeze(-1).squeeze(2)
    return x * linear_layers(m, mean).reshape((x.size(0), -1, 1, 1))


def shaped_before_sigmoid(m: Attended, x: Tensor) -> Tensor:
    images, channels = x.shape[0], x.shape[1]
    y = m.linear2(F.relu(m.linear1(m.pool(x).view(images, channels)).unsqueeze(2)).squeeze(2))
    return x * m.sigmoid(y.view(images, channels, 1, 1))


def minus_one(m: Attended, x: Tensor) -> Tensor:
    """A number of images that is left to be found."""
    return x * linear_layers(m, m.pool(x).view(-1, CHANNELS)).view(-1, CHANNELS, 1, 1)


def of_rows(m: Attended, x: Tensor) -> Tensor:
    """A gate that is not what it looks like: of the first channels of two images, if there were so many."""
    gate = torch.sigmoid(m.linear2(F.relu(m.linear1(m.pool(x).view(x.size(0), CHANNELS)))))
    return x * gate.view(gate.size(0), 2, 4, 1).flatten(1)[:, :, None, None]


def in_place(m: Attended, x: Tensor) -> Tensor:
    x *= layers(m, m.pool(x.detach()))
    return x


def with_maximum(m: Attended, x: Tensor) -> Tensor:
    return x * torch.sigmoid(m.fc2(m.relu(m.fc1(m.pool(x)))) + m.fc2(m.relu(m.fc1(F.adaptive_max_pool2d(x, 1)))))


def written_before(m: Attended, x: Tensor) -> Tensor:
    """The mean is of what the activation was before it is written to."""
    mean = m.pool(x)
    y = x + 0
    y.add_(1)
    return x * layers(m, mean) + 0.1 * y


def changed_between(m: Attended, x: Tensor) -> Tensor:
    gate = layers(m, m.pool(x))
    x = x.clone()
    return x.add_(0.5) * gate


class Written(nn.Module):
    """A norm's result that is written to behind its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(8, 8, groups=2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv3(8, 8, groups=2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        gate = out.mean((2, 3), keepdim=True).sigmoid()
        out.add_(1)
        return torch.relu(out * gate + x)


class WrittenLate(nn.Module):
    """What a gate is made of, or the gate, is written to when it has been read: without gradients."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = conv3(8, 8, groups=2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.what = what

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.bn(self.conv(x))
        mean = out.mean((2, 3), keepdim=True)
        y = self.fc(mean)
        if self.what == "mean":
            mean.mul_(2)
        gate = torch.sigmoid(y)
        gated = out * gate
        if self.what == "gate":
            gate.mul_(3)
        return torch.relu(gated + x), mean


class WrittenOut(nn.Module):
    """A product that is written over the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(8, 8, groups=2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv3(8, 8, groups=2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        shortcut = out.detach().clone()
        out = self.bn2(self.conv2(out))
        torch.mul(shortcut, 2.0, out=shortcut)
        return torch.relu(out + shortcut)


class GateIsShortcut(nn.Module):
    """A mean gates one convolution's input, and is the shortcut around that; images have one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv1(8, 8), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv3(8, 8, groups=2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        mean = out.mean((2, 3), keepdim=True)
        return torch.relu(self.bn2(self.conv2(out * mean)) + mean)


class WrittenAfter(nn.Module):
    """The gated activation is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(8, 8, groups=2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn(self.conv(x)))
        out = out * torch.sigmoid(out.mean((2, 3), keepdim=True))
        out += 1
        return out


class GateOfAnother(nn.Module):
    """The mean of one activation gates another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(8, 8, groups=2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv3(8, 8, groups=2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.relu(self.bn1(self.conv1(x)))
        other = torch.relu(self.bn2(self.conv2(x)))
        gated = one * other.mean((2, 3), keepdim=True)
        return torch.relu(gated + other * one.mean((2, 3), keepdim=True))


class Unused(nn.Module):
    """One mean gates, another is for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(8, 8, groups=2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv3(8, 8, groups=2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        mean = out.mean((2, 3), keepdim=True)
        out.mean((2, 3), keepdim=True)
        return torch.relu(out * torch.sigmoid(mean) + x)


class Returned(nn.Module):
    """The means are results too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv3(8, 8, groups=2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.relu(self.bn(self.conv(x)))
        mean = out.mean((2, 3), keepdim=True)
        return out * torch.tanh(mean), mean


class NoSum(nn.Module):
    """A chain: the gated activation goes on to another convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(8, 8, groups=2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.fc = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = out * torch.sigmoid(self.fc(F.adaptive_avg_pool2d(out, (1, 1))))
        return self.bn2(self.conv2(out))


class Dropped(Attended):
    """A dropout between the attention and the sum."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: x * layers(m, m.pool(x)), True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv3(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.dropout(self.attend(self, out)) + x)


# Each is fused, in both places, as far as its mean and its product go.
ATTENTIONS: dict[str, Attend] = {
    "module": lambda m, x: x * layers(m, m.pool(x)),
    "gate-first": lambda m, x: layers(m, m.pool(x)) * x,
    "mean": lambda m, x: torch.mul(x, layers(m, x.mean((2, 3), keepdim=True))),
    "torch.mean": lambda m, x: x.mul(layers(m, torch.mean(x, dim=[-1, -2], keepdim=True))),
    "functional": lambda m, x: x * torch.sigmoid(m.fc2(F.relu(m.fc1(F.adaptive_avg_pool2d(x, 1))))),
    "sizes": with_sizes,
    "shape": with_shape,
    "flattened": flattened,
    "unsqueezed": unsqueezed,
    "squeezed": squeezed,
    "shaped-before-sigmoid": shaped_before_sigmoid,
    "minus-one": minus_one,
    "of-rows": of_rows,
    "hard-sigmoid": lambda m, x: x * F.hardsigmoid(m.fc2(m.relu(m.fc1(m.pool(x))))),
    "tanh": lambda m, x: x * torch.tanh(m.fc2(m.fc1(m.pool(x)))),
    "one-layer": lambda m, x: x * torch.sigmoid(m.fc2(m.fc1(m.pool(x)))),
    "no-layer": lambda m, x: x * torch.sigmoid(m.pool(x)),
    "two-means": lambda m, x: x * layers(m, m.pool(x) + x.mean((2, 3), keepdim=True)),
    "twice": lambda m, x: x * (layers(m, m.pool(x)) + layers(m, 2 * m.pool(x))),
    "of-its-gate": lambda m, x: x * (layers(m, m.pool(x)) * m.pool(x)),
    "dropout-between": lambda m, x: x * m.sigmoid(m.fc2(m.dropout(m.relu(m.fc1(m.pool(x)))))),
    "no-tensor": lambda m, x: x * m.pool(x).shape[1],
    "one-number": lambda m, x: x * layers(m, m.pool(x)).mean(1, keepdim=True),
}
# And these are not.
OTHERS: dict[str, Attend] = {
    "maximum": with_maximum,
    "written-before": written_before,
    "changed-between": changed_between,
    "no-mean": lambda m, x: x * torch.sigmoid(m.fc2(m.fc1(x))),
    "row-means": lambda m, x: x * x.mean(3, keepdim=True),
    "of-itself": lambda m, x: x * x.mean((2, 3), keepdim=True) + x,
}

MODELS = [
    *(
        Other(f"attention-{name}-{'last' if last else 'inside'}", lambda a=attend, last=last: Attended(a, last), BLOCK)
        for name, attend in ATTENTIONS.items()
        for last in (False, True)
    ),
    Other("attention-projects", lambda: Attended(ATTENTIONS["module"], True, projects=True), BLOCK),
    *(
        Other(f"no-attention-{name}-inside", lambda a=attend: Attended(a, False), BLOCK)
        for name, attend in OTHERS.items()
    ),
    *(
        Other(f"no-attention-{name}-last", lambda a=attend: Attended(a, True), {"": "chain"})
        for name, attend in OTHERS.items()
    ),
    Other("no-attention-in-place", lambda: Attended(in_place, True), {"": "chain"}),
    Other("attention-written", Written, {"": "chain"}),
    Other("attention-written-out", WrittenOut, {"": "chain"}),
    Other("attention-is-shortcut", GateIsShortcut, BLOCK, shapes=((5, 8, 1, 1),)),
    Other("attention-written-after", WrittenAfter, {"": "chain"}, shapes=((3, 8, 1, 1),)),
    Other("attention-of-another", GateOfAnother, {"": "chain"}),
    Other("attention-unused", Unused, BLOCK),
    Other("attention-returned", Returned, {"": "chain"}),
    Other("attention-no-sum", NoSum, {"": "chain"}),
    Other("attention-dropped", Dropped, {"": "chain"}),
]
