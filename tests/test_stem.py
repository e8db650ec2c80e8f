"""The stem of the models, fused, and what the models say of their parts."""

import copy

import pytest
import torch
from torch import nn

from resnext import ResNet
from resnext.blocks import BasicBlock, Bottleneck
from resnext.convert import fuse_

from .block_cases import LAYOUTS, assert_same_results, resnet, train_and_evaluate


def pair(norm=nn.BatchNorm2d, change=None) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's, whose outputs are those of the stem; ``change`` comes after the conversion."""
    ours = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm)
    plain = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm)
    ours.load_state_dict(plain.state_dict())
    for model in (ours, plain):
        torch.manual_seed(6)
        nn.init.normal_(model.bn1.weight)
        nn.init.normal_(model.bn1.bias)
        for name in ("layer1", "layer2", "layer3", "layer4", "avgpool", "fc"):
            setattr(model, name, nn.Identity())
    fuse_(ours)
    if change is not None:
        change(ours)
        change(plain)
    return ours, plain


def images() -> torch.Tensor:
    return torch.randn(2, 3, 23, 18)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_equals_torchvisions_stem(dtype, layout):
    ours, plain = pair()
    assert ours.why_not_fused() == {}
    assert_same_results(ours, plain, images(), dtype, layout, train_and_evaluate)


NORMS = {
    "cumulative average": lambda channels: nn.BatchNorm2d(channels, momentum=None),
    "no running statistics": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "synchronised, alone": nn.SyncBatchNorm,
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_settings_of_batch_norm(norm):
    assert_same_results(*pair(norm), images(), torch.float64, protocol=train_and_evaluate)


def hook(model: nn.Module) -> None:
    model.conv1.register_forward_hook(lambda _, inputs, output: output * 2)


CHANGES = {
    "another pooling": (
        lambda model: setattr(model, "maxpool", nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        "maxpool is MaxPool2d(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=True), "
        "not a 3x3 pooling with stride 2 and padding 1",
    ),
    "no pooling": (lambda model: setattr(model, "maxpool", nn.Identity()), "maxpool is Identity, not MaxPool2d"),
    "another activation": (lambda model: setattr(model, "relu", nn.SiLU()), "relu is SiLU, not ReLU"),
    "a hook": (hook, "conv1 has a forward hook"),
    "another norm": (lambda model: setattr(model, "bn1", nn.GroupNorm(4, 64)), "bn1 is GroupNorm, not BatchNorm2d"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_modules_run_one_by_one(change, reason):
    ours, plain = pair(change=change)
    assert ours.why_not_fused() == {"": reason}
    x = images()
    assert torch.equal(ours(x), plain(x))


def test_any_stem_of_3x3_pooling():
    """A user's smaller convolution is fused as well."""

    def change(model: nn.Module) -> None:
        torch.manual_seed(7)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.MaxPool2d((3, 3), (2, 2), (1, 1), (1, 1))

    ours, plain = pair(change=change)
    fuse_(ours)
    assert ours.why_not_fused() == {}
    assert_same_results(ours, plain, images(), torch.float64, protocol=train_and_evaluate)


def test_stem_saves_its_raw_output_only():
    stem, _ = pair()
    saved = []

    def pack(tensor):
        if tensor.dim() == 4 and tensor.data_ptr() != stem.conv1.weight.data_ptr():
            saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    x = images()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stem(x)
    raw = (2, 64, 12, 9)
    taps = ((2, 64, 6, 5), torch.uint8)
    expected = {(tuple(x.shape), torch.float32), (raw, torch.float32), taps}
    assert set(saved) == expected


# --- what a model says of its parts ---


def small() -> ResNet:
    return ResNet(Bottleneck, [2, 1, 1, 1], num_classes=10, groups=32, width_per_group=4)


def test_reasons_by_block():
    model = small()
    assert model.why_not_fused() == {}
    model.layer1[1].bn2 = nn.GroupNorm(32, 128)
    model.layer3[0].relu = nn.SiLU()
    assert model.why_not_fused() == {
        "layer1.1": "bn2 is GroupNorm, not BatchNorm2d",
        "layer3.0": "relu is SiLU, not ReLU",
    }


def test_recompute_switches_all_blocks():
    model = small()
    assert not model.recompute
    model.recompute = True
    assert [block.recompute for block in model.modules() if isinstance(block, Bottleneck)] == [True] * 5
    model.layer1[0].recompute = False
    assert not model.recompute
    assert ResNet(Bottleneck, [1, 1, 1, 1], recompute=True).recompute
    assert copy.deepcopy(model).layer2[0].recompute
