"""The named models: how many parameters, whose names and results they have, and how they are built again."""

import copy
import functools
import json

import pytest
import torch
from torch import Tensor, nn

import resnext
from resnext import FeatureMaps, GroupedConv2d, ResNet

from .block_cases import resnet

tv = pytest.importorskip("torchvision.models")

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    "resnet50_v1": 25_557_032,
    "resnet50_keras": 23_936_004,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "resnext50_32x2d": 14_593_448,
    "resnext50_64x4d": 45_192_488,
    "resnext101_32x4d": 44_177_704,
    "resnet18_cifar": 11_173_962,
    "resnet34_cifar": 21_282_122,
    "resnet50_cifar": 23_520_842,
    "resnet101_cifar": 42_512_970,
    "resnet152_cifar": 58_156_618,
    "resnext29_8x64d_cifar": 34_426_698,
    "resnext29_16x64d_cifar": 68_155_210,
    "resnext29_32x4d_cifar": 4_775_754,
}
# The groups of the 3x3 convolutions of each stage, and how many channels each of them has.
GROUPS = {
    "resnext50_32x4d": (32, [4, 8, 16, 32]),
    "resnext101_32x8d": (32, [8, 16, 32, 64]),
    "resnext101_64x4d": (64, [4, 8, 16, 32]),
    "resnext50_32x2d": (32, [2, 4, 8, 16]),
    "resnext50_64x4d": (64, [4, 8, 16, 32]),
    "resnext101_32x4d": (32, [4, 8, 16, 32]),
    "resnext29_8x64d_cifar": (8, [64, 128, 256]),
    "resnext29_16x64d_cifar": (16, [64, 128, 256]),
    "resnext29_32x4d_cifar": (32, [4, 8, 16]),
}


@functools.cache
def on_meta(name: str) -> ResNet:
    """The model without memory for its parameters; shared, so for looking at only."""
    with torch.device("meta"):
        return resnext.create_model(name)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


# --- structure ---


@pytest.mark.parametrize("name", ["resnet18", "resnet18_cifar", "resnet50_keras", "resnext50_32x4d"])
def test_models_run_fused_from_the_start(name):
    assert resnext.why_not_fused(resnext.create_model(name)) == {}


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    assert sum(parameter.numel() for parameter in on_meta(name).parameters()) == PARAMETERS[name]


def test_all_models_are_listed_and_exported():
    assert resnext.list_models() == sorted(PARAMETERS)
    assert resnext.list_models("resnext29_*64d*") == ["resnext29_16x64d_cifar", "resnext29_8x64d_cifar"]
    assert set(PARAMETERS) <= set(resnext.__all__)


@pytest.mark.parametrize("name", GROUPS)
def test_groups(name):
    groups, widths = GROUPS[name]
    model = on_meta(name)
    convolutions = [getattr(model, f"layer{stage + 1}")[0].conv2 for stage in range(len(widths))]
    assert all(isinstance(conv, GroupedConv2d) for conv in convolutions)
    assert [conv.groups for conv in convolutions] == [groups] * len(widths)
    assert [conv.weight.shape[1] for conv in convolutions] == widths


# The side of a model's images, and channels and side of each stage's maps, as the articles' tables have them.
MAPS = {
    "resnet18": (224, [(64, 56), (128, 28), (256, 14), (512, 7)]),
    "resnet50": (224, [(256, 56), (512, 28), (1024, 14), (2048, 7)]),
    "resnet50_v1": (224, [(256, 56), (512, 28), (1024, 14), (2048, 7)]),
    "resnet50_keras": (224, [(256, 55), (512, 28), (1024, 14), (2048, 7)]),
    "resnext50_32x4d": (224, [(256, 56), (512, 28), (1024, 14), (2048, 7)]),
    "resnext50_32x2d": (224, [(256, 56), (512, 28), (1024, 14), (2048, 7)]),
    "resnet18_cifar": (32, [(64, 32), (128, 16), (256, 8), (512, 4)]),
    "resnet50_cifar": (32, [(256, 32), (512, 16), (1024, 8), (2048, 4)]),
    "resnext29_8x64d_cifar": (32, [(256, 32), (512, 16), (1024, 8)]),
}


@pytest.mark.parametrize("name", MAPS)
def test_shapes_of_maps_and_logits(name):
    side, maps = MAPS[name]
    model, x = on_meta(name), torch.empty(2, 3, side, side, device="meta")
    logits = model(x)
    assert logits.shape == (2, model.num_classes)
    got = FeatureMaps(model)(x)[1:]
    assert [tuple(each.shape) for each in got] == [(2, channels, size, size) for channels, size in maps]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "resnext101_32x4d"])
def test_timms_model_of_the_same_name_has_the_same_state_dict(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model(name, pretrained=False)
    assert shapes(on_meta(name)) == shapes(theirs)


@pytest.mark.parametrize(
    ("name", "torchvisions"),
    [
        ("resnet50_v1", "resnet50"),
        ("resnext50_32x2d", "resnext50_32x4d"),
        ("resnext50_64x4d", "resnext50_32x4d"),
        ("resnet152_cifar", "resnet152"),
        ("resnet50_keras", "resnet50"),
    ],
)
def test_variants_have_the_names_of_torchvisions(name, torchvisions):
    with torch.device("meta"):
        keys = list(getattr(tv, torchvisions)().state_dict())
    assert [key for key in on_meta(name).state_dict() if key in keys] == keys


# --- results, where no other library has the model ---


def randomised(model: nn.Module) -> nn.Module:
    """In float64 and evaluation, with statistics like a trained network's."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.2)
    return model.double().eval()


@torch.no_grad()
def assert_same_logits(ours: nn.Module, plain: nn.Module, x: Tensor) -> None:
    randomised(ours)
    plain.double().eval().load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x.double()), plain(x.double()))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_cifar_models_are_torchvisions_without_the_first_strides(name):
    plain = getattr(tv, name)(num_classes=10)
    plain.conv1, plain.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    assert_same_logits(resnext.create_model(f"{name}_cifar"), plain, torch.randn(2, 3, 32, 32))


def test_narrow_resnext_is_torchvisions_with_narrower_groups():
    plain = resnet.ResNet(resnet.Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=2)
    assert_same_logits(resnext.resnext50_32x2d(), plain, torch.randn(1, 3, 40, 48))


class KerasBlock(nn.Module):
    """The identity block, or with a stride the convolution block, as in the ports of Keras's ResNet-50."""

    def __init__(self, channels: int, filters: tuple[int, int, int], stride: int | None = None) -> None:
        super().__init__()
        first, second, third = filters
        self.branch = nn.Sequential(
            nn.Conv2d(channels, first, 1, stride or 1),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, padding="same"),
            nn.BatchNorm2d(second),
            nn.ReLU(),
            nn.Conv2d(second, third, 1),
            nn.BatchNorm2d(third),
        )
        self.shortcut = nn.Sequential()
        if stride is not None:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, third, 1, stride), nn.BatchNorm2d(third))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def keras_resnet50(num_classes: int) -> nn.Sequential:
    layers = [nn.ZeroPad2d(3), nn.Conv2d(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2)]
    channels = 64
    for width, blocks, stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        filters = (width, width, 4 * width)
        layers.append(KerasBlock(channels, filters, stride))
        channels = 4 * width
        layers += [KerasBlock(channels, filters) for _ in range(blocks - 1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(7 * 7 * 2048, num_classes))


@torch.no_grad()
def test_keras_resnet50():
    """The article's network, written as it is there; parameters come in the same order, shortcuts' last."""
    ours, plain = randomised(resnext.resnet50_keras()), keras_resnet50(4).double().eval()
    values = list(ours.state_dict().values())
    assert [value.shape for value in plain.state_dict().values()] == [value.shape for value in values]
    plain.load_state_dict(dict(zip(plain.state_dict(), values, strict=True)))
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    stem = ours.maxpool(ours.relu(ours.bn1(ours.conv1(x))))
    assert stem.shape == (1, 64, 55, 55)
    torch.testing.assert_close(ours(x), plain(x))


# --- building again ---


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (lambda: resnext.resnet18(), {"architecture": "resnet18", "num_classes": 1000}),
        (lambda: resnext.ResNet18Fused(7), {"architecture": "resnet18", "num_classes": 7}),
        (lambda: resnext.resnet18_cifar(), {"architecture": "resnet18_cifar", "num_classes": 10}),
        (
            lambda: resnext.create_model("resnext50_32x4d", num_classes=3, stem="deep", output_stride=16),
            {"architecture": "resnext50_32x4d", "num_classes": 3, "stem": "deep", "output_stride": 16},
        ),
        (
            lambda: resnext.resnet50(replace_stride_with_dilation=(False, True, True)),
            {"architecture": "resnet50", "num_classes": 1000, "replace_stride_with_dilation": [False, True, True]},
        ),
    ],
    ids=["builder", "class", "another default", "arguments", "a tuple, which JSON has not"],
)
def test_config_builds_the_model_again(build, config):
    with torch.device("meta"):
        model = build()
        assert json.loads(json.dumps(model.config)) == config
        again = resnext.create_model(**{"name" if key == "architecture" else key: v for key, v in config.items()})
    assert str(again) == str(model)
    assert copy.deepcopy(model).config == model.config


def test_config_follows_the_classifier():
    with torch.device("meta"):
        model = resnext.resnet18()
        model.reset_classifier(3)
    assert model.config == {"architecture": "resnet18", "num_classes": 3}


def test_network_of_no_name_has_no_config():
    with torch.device("meta"):
        assert ResNet(resnext.blocks.BasicBlock, [1, 1, 1, 1]).config == {}


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("resnext50_32x4", "did you mean .*resnext50_32x4d"),
        ("vgg", r"resnext.list_models\(\) lists them"),
    ],
)
def test_unknown_name(name, advice):
    with pytest.raises(ValueError, match=f"expected the name of a model, got '{name}'; {advice}"):
        resnext.create_model(name)
