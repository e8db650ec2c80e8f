"""Models whose forward is more than the operations it does: what a recording of one call would get wrong.

Each must compute after `resnext.fuse_` what it computed before, by running its own forward if need be.
"""

from __future__ import annotations

import contextlib
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

from .other_models import BLOCK, GROUPED, NormBlock, Other, conv3

CHAIN = {"": "chain"}


class Base(nn.Module):
    """Two convolutions with their norms, for forwards of all kinds."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv3(8, 8, groups=4), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv3(8, 8, groups=2), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def stem(self, x):
        return self.relu(self.bn1(self.conv1(x)))

    def end(self, out, x):
        return F.relu(self.bn2(self.conv2(out)) + x)

    def forward(self, x):
        return self.end(self.stem(x), x)


# --- random numbers, side effects, branches ---


class PythonRandom(Base):
    def forward(self, x):
        if self.training and random.random() < 0.5:
            return x * 1.0
        return super().forward(x)


class NumpyRandom(Base):
    def forward(self, x):
        return super().forward(x) * float(np.random.uniform(0.5, 1.5))


class TorchRandom(Base):
    def forward(self, x):
        keep = (torch.rand(x.shape[0], 1, 1, 1) < 0.5).to(x.dtype) if self.training else 1.0
        return F.relu(self.bn2(self.conv2(self.stem(x))) * keep + x)


class OwnGenerator(Base):
    """A generator that belongs to the module."""

    def __init__(self):
        super().__init__()
        self.generator = random.Random(1)

    def forward(self, x):
        return super().forward(x) * (1.0 if self.generator.random() < 0.5 else 0.5)


class SideEffect(Base):
    """Leaves its features behind."""

    def forward(self, x):
        self.features = self.stem(x)
        out = self.end(self.features, x)
        return out + self.features.mean()


class Collector(Base):
    """Leaves them in a list, which stays the same object."""

    def __init__(self):
        super().__init__()
        self.features: list[Tensor] = []

    def forward(self, x):
        out = super().forward(x)
        self.features.append(out)
        return out * len(self.features)


class Counter(Base):
    """Counts its calls, and warms up."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * min(1.0, self.calls / 4)


class BufferCounter(Base):
    """Counts in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class BufferCounterInPlace(BufferCounter):
    def forward(self, x):
        self.calls.add_(1)
        return Base.forward(self, x) * self.calls


class Branch(Base):
    def forward(self, x):
        if x.mean() > 0.5:
            return super().forward(x)
        return self.stem(x)


class BranchOnShape(Base):
    def forward(self, x):
        if x.shape[-1] > 100:
            return self.stem(x)
        return super().forward(x)


class Modes(Base):
    """Something else in training than in evaluation."""

    def forward(self, x):
        out = self.stem(x)
        if self.training:
            return self.end(out, x), out.mean((2, 3))
        return self.end(out, x)


class FunctionalDropout(Base):
    def forward(self, x):
        return self.end(F.dropout(self.stem(x), 0.4, self.training), x)


class AlwaysDropout(Base):
    def forward(self, x):
        return self.end(F.dropout2d(self.stem(x), 0.4), x)


class NoGrad(Base):
    """Frozen in the forward."""

    def forward(self, x):
        with torch.no_grad():
            out = self.stem(x)
        return self.end(out, x)


class Detach(Base):
    def forward(self, x):
        return self.end(self.stem(x.detach()), x)


class NoGradAround(nn.Module):
    """Freezes a block from outside."""

    def __init__(self):
        super().__init__()
        self.block, self.conv, self.bn = Base(), conv3(8, 8), nn.BatchNorm2d(8)

    def forward(self, x):
        with torch.no_grad():
            out = self.block(x)
        return F.relu(self.bn(self.conv(out)))


class NoAutocast(Base):
    """One part in full precision whatever the caller chose."""

    def forward(self, x):
        out = self.stem(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.end(out.to(self.conv2.weight.dtype), x)


class Tries(Base):
    """What a recording raises is caught."""

    def forward(self, x):
        scale = 1.0
        with contextlib.suppress(Exception):
            scale = 2.0 if float(x.mean()) < 1e6 else 1.0
        return super().forward(x) * scale


class Checkpointed(Base):
    def forward(self, x):
        out = checkpoint(self.stem, x, use_reentrant=False)
        return self.end(out, x)


class Settings(Base):
    """What to do is in all kinds of places, where it may be changed any time."""

    def __init__(self):
        super().__init__()
        self.residual = True
        self.options = {"residual": True}
        self.skips = [1.0]
        self.config = SimpleNamespace(residual=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.stem(x)))
        if self.residual and self.options["residual"] and self.config.residual and self.skips[-1] == 1.0:
            out = out + x
        return F.relu(out)


# --- aliasing ---


class InPlaceActivation(Base):
    """The ReLU changes what is added to it."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(F.relu(out, inplace=True))) + out


class InPlaceModule(Base):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        activation = self.relu(out)
        return F.relu(self.bn2(self.conv2(activation)) + out)


class InPlaceSum(Base):
    """The sum goes to the shortcut, which is read again."""

    def forward(self, x):
        identity = x * 2
        identity += self.bn2(self.conv2(self.stem(x)))
        return F.relu(identity) + identity


class InPlaceInput(Base):
    """The first ReLU changes the block's own input, and with it the shortcut."""

    def forward(self, x):
        x = x * 1.0
        out = self.bn1(self.conv1(F.relu(x, inplace=True)))
        return F.relu(self.bn2(self.conv2(F.relu(out))) + x)


class InPlaceView(Base):
    """A view of the norm's result, changed by the ReLU behind its back."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        half = out[:, :4]
        return torch.cat([self.relu(out), half], 1)


class TwoConsumers(Base):
    """The raw output of a convolution is used beside its norm's."""

    def forward(self, x):
        raw = self.conv1(x)
        out = self.conv2(F.relu(self.bn1(raw)))
        return F.relu(self.bn2(out) + raw), out


class NormTwiceRead(Base):
    """A norm's output with and without ReLU."""

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return F.relu(self.bn2(self.conv2(F.relu(out))) + out)


class SharedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Base()

    def forward(self, x):
        return self.block(self.block(x))


class SharedConv(Base):
    """One convolution with two norms: of two resolutions, or two domains."""

    def forward(self, x):
        return F.relu(self.bn2(self.conv1(self.relu(self.bn1(self.conv1(x))))) + x)


class SharedNorm(Base):
    """One norm behind two convolutions: its running statistics are updated twice."""

    def forward(self, x):
        return F.relu(self.bn1(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


# --- signatures ---


class Keywords(Base):
    def forward(self, x, *, scale: float = 1.0, return_features: bool = False):
        out = self.stem(x)
        result = self.end(out, x) * scale
        return (result, out) if return_features else result


class CallsWithKeywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Keywords()

    def forward(self, x):
        return self.block(x, scale=0.5), *self.block(x, return_features=True)


class TwoInputs(Base):
    def forward(self, x, y):
        return self.end(self.stem(y), x)


class OptionalInput(Base):
    def forward(self, x, y=None):
        return self.end(self.stem(x), x if y is None else y)


class CallsWithOptional(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = OptionalInput()

    def forward(self, x):
        return self.block(self.block(x), x)


class TakesList(nn.Module):
    """Multi-resolution: lists in, lists out."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Base(), Base()])

    def forward(self, x):
        return self._exchange([x, F.max_pool2d(x, 2)])

    def _exchange(self, maps):
        return [block(each) for block, each in zip(self.blocks, maps, strict=True)]


class ListBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.fuse = TakesListBlock()

    def forward(self, x):
        return self.fuse([x, x * 0.5])


class TakesListBlock(Base):
    def forward(self, maps):
        return {"out": self.end(self.stem(maps[0]), maps[1]), "size": maps[0].shape[-1]}


class Wrapper(nn.Module):
    """As DataParallel and its kin: hands on whatever it gets, and looks names up in what it wraps."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["module"], name)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


# --- convolutions that are more than that ---


class StandardizedConv(nn.Conv2d):
    """Another forward."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class SameConv(nn.Conv2d):
    """Pads by itself, around the plain forward."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))[..., 1:-1, 1:-1]


class GainConv(nn.Conv2d):
    """Another weight, by an override of the inner method."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 1.5, bias)


def with_convolution(make: Any) -> Base:
    model = Base()
    model.conv1 = make(model.conv1)
    return model


def of_class(cls: type[nn.Conv2d]) -> Base:
    return with_convolution(lambda conv: cls(8, 8, 3, padding=1, groups=4, bias=False))


def own_forward() -> Base:
    """A forward of the instance, as monkey patches leave it."""
    model = Base()
    model.forward = lambda x: F.relu(model.bn1(model.conv1(x)) * 3.0)
    return model


def patched_child() -> Base:
    model = Base()
    plain = model.relu.forward
    model.relu.forward = lambda x: plain(x) * 2.0
    return model


def strange_norms() -> Base:
    model = Base()
    model.bn1 = nn.BatchNorm2d(8, eps=0.1, momentum=None)
    model.bn2 = nn.BatchNorm2d(8, track_running_stats=False)
    return model


class SubclassedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2.0


def tied() -> nn.Module:
    model = nn.Sequential(Base(), Base())
    model[1].conv1.weight = model[0].conv1.weight
    return model


def torchvision_subclass() -> nn.Module:
    """torchvision's block with another forward."""
    from torchvision.models.resnet import Bottleneck

    class Scaled(Bottleneck):
        def forward(self, x):
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
            return self.relu(0.5 * out + x)

    return Scaled(8, 2, groups=2, base_width=128)


def torchvision_frozen() -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return NormBlock(FrozenBatchNorm2d)


MODELS = [
    Other("python-random", PythonRandom, grouped=GROUPED),
    Other("numpy-random", NumpyRandom, grouped=GROUPED),
    Other("torch-random", TorchRandom, grouped=GROUPED),
    Other("own-generator", OwnGenerator, grouped=GROUPED),
    Other("side-effect", SideEffect, grouped=GROUPED),
    Other("collector", Collector, grouped=GROUPED),
    Other("counter", Counter, grouped=GROUPED),
    Other("buffer-counter", BufferCounter, grouped=GROUPED),
    Other("buffer-counter-in-place", BufferCounterInPlace, BLOCK, GROUPED),
    Other("branch-on-data", Branch, grouped=GROUPED),
    Other("branch-on-shape", BranchOnShape, grouped=GROUPED),
    Other("modes", Modes, grouped=GROUPED),
    Other("functional-dropout", FunctionalDropout, grouped=GROUPED),
    Other("always-dropout", AlwaysDropout, BLOCK, GROUPED),
    Other("no-grad", NoGrad, grouped=GROUPED),
    Other("no-grad-around", NoGradAround, {"block": "block"}, ("block.conv1", "block.conv2")),
    Other("detach", Detach, BLOCK, GROUPED),
    Other("try", Tries, grouped=GROUPED),
    Other("checkpoint", Checkpointed, grouped=GROUPED),
    Other("in-place-activation", InPlaceActivation, grouped=GROUPED),
    Other("in-place-module", InPlaceModule, BLOCK, GROUPED),
    Other("in-place-sum", InPlaceSum, {"": "chain"}, GROUPED),
    Other("in-place-input", InPlaceInput, BLOCK, GROUPED),
    Other("in-place-view", InPlaceView, grouped=GROUPED),
    Other("two-consumers", TwoConsumers, grouped=GROUPED),
    Other("norm-twice-read", NormTwiceRead, BLOCK, GROUPED),
    Other("shared-block", SharedBlock, {"block": "block"}, ("block.conv1", "block.conv2")),
    Other("shared-conv", SharedConv, BLOCK, GROUPED),
    Other("shared-norm", SharedNorm, BLOCK, GROUPED),
    Other("keywords", CallsWithKeywords, BLOCK, ("block.conv1", "block.conv2")),
    Other("two-inputs", TwoInputs, BLOCK, GROUPED, shapes=((3, 8, 7, 6), (3, 8, 7, 6))),
    Other("optional-input", CallsWithOptional, {"block": "block"}, ("block.conv1", "block.conv2")),
    Other("list-of-maps", TakesList, {"blocks.0": "block", "blocks.1": "block"}),
    Other("list-argument", ListBlock, {"fuse": "block"}, ("fuse.conv1", "fuse.conv2")),
    Other("wrapper", lambda: Wrapper(Base()), {"module": "block"}, ("module.conv1", "module.conv2")),
    Other("data-parallel", lambda: nn.DataParallel(Base()), {"module": "block"}, ("module.conv1", "module.conv2")),
    Other("standardized-conv", lambda: of_class(StandardizedConv), BLOCK, ("conv1", "conv2")),
    Other("same-conv", lambda: of_class(SameConv), BLOCK, ("conv2",)),
    Other("gain-conv", lambda: of_class(GainConv), BLOCK, ("conv1", "conv2")),
    Other("weight-norm-hook", lambda: with_convolution(weight_norm), BLOCK, ("conv2",)),
    Other("weight-norm", lambda: with_convolution(parametrizations.weight_norm), BLOCK, ("conv2",)),
    Other("spectral-norm", lambda: with_convolution(parametrizations.spectral_norm), BLOCK, ("conv2",)),
    Other("own-forward", own_forward, grouped=GROUPED),
    Other("patched-child", patched_child, BLOCK, GROUPED),
    Other("strange-norms", strange_norms, BLOCK, GROUPED),
    Other("subclassed-norm", lambda: NormBlock(SubclassedNorm), grouped=GROUPED),
    Other("tied-weights", tied, {"0": "block", "1": "block"}),
    Other("torchvision-subclass", torchvision_subclass, CHAIN, ("conv2",)),
    Other("torchvision-frozen-norm", torchvision_frozen, BLOCK, GROUPED),
]
