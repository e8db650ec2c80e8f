"""Small models of torchvision and timm beside their converted copies, and how close the results must be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from resnext import fuse_, why_not_fused

from .block_cases import Results, buffers, forward_and_gradients, relative_errors

resnet = pytest.importorskip("torchvision.models").resnet


class NarrowResNet(resnet.ResNet):
    """torchvision's with an eighth of the channels in its stages, so that float64 is fast."""

    def _make_layer(self, block, planes: int, *args, **kwargs) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def torchvisions(**arguments) -> nn.Module:
    """A ResNeXt of 4, 8, 16 and 32 channels per group."""
    model = NarrowResNet(resnet.Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=32, **arguments)
    model.fc = nn.Linear(256, 10)
    return model


def timms() -> nn.Module:
    """A ResNeXt of 4, 8, 12 and 16 channels per group."""
    models = pytest.importorskip("timm.models.resnet")
    return models.ResNet(
        models.Bottleneck, (1, 1, 1, 1), num_classes=10, cardinality=4, base_width=16, channels=(16, 32, 48, 64)
    )


MODELS = {"torchvision": torchvisions, "timm": timms}


def randomised(model: nn.Module) -> nn.Module:
    """``model`` with parameters and running statistics of batch norms that are not their initial ones."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
    return model


def pair(make=torchvisions, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A model and its converted copy, in this order: the converted one, and the model."""
    plain = randomised(make()).to(dtype)
    model = copy.deepcopy(plain)
    fuse_(model)
    assert why_not_fused(model) == {}
    return model, plain


def images(dtype: torch.dtype = torch.float64, batch: int = 3) -> Tensor:
    """Of 40x32 pixels, so that the last maps have 2x1."""
    return torch.randn(batch, 3, 40, 32, generator=torch.Generator().manual_seed(5)).to(dtype)


def train_and_infer(model: nn.Module, x: Tensor) -> Results:
    """A training step, and evaluation without gradients after it."""
    results = {**forward_and_gradients(model.train(), x), **buffers(model)}
    with torch.no_grad():
        return results | {"inference": model.eval()(x)}


def assert_same(results: Results, expected: Results) -> None:
    """In float64, where nothing but the order of additions may differ."""
    wrong = {name: error for name, error in relative_errors(results, expected).items() if not error <= 1e-10}
    assert not wrong
