"""Models as backbones: `features_only` beside timm's."""

import copy
import json
import pickle
import re

import pytest
import torch
from torch import nn

import resnext
from resnext import FeatureMaps, ResNet
from resnext.blocks import Bottleneck

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def model() -> ResNet:
    model = ResNet(Bottleneck, (1, 1, 1), num_classes=5, groups=4, width_per_group=16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.double().eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 40, 56, dtype=torch.float64)


@pytest.mark.parametrize("out_indices", [None, (1, 2, 4), (0,), (2, -1)], ids=str)
def test_equals_timms(out_indices):
    """Maps, names of parameters and what is said of them; stages behind the last map are left out."""
    arguments = {} if out_indices is None else {"out_indices": out_indices}
    plain = timm.create_model("resnet18", pretrained=False, features_only=True, **arguments).double().eval()
    ours = resnext.create_model("resnet18", features_only=True, **arguments).double().eval()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 45, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x), plain(x))
    info, plain_info = ours.feature_info, plain.feature_info
    assert info.channels() == plain_info.channels() == [each.shape[1] for each in ours(x)]
    assert info.reduction() == plain_info.reduction()
    assert info.module_name() == [name.replace("act1", "relu") for name in plain_info.module_name()]
    assert len(info) == len(plain_info) == 5
    assert info[2] == {"num_chs": 128, "reduction": 8, "module": "layer2"}
    assert [each["num_chs"] for each in info.get_dicts()] == info.channels()


def test_shares_the_models_modules(model, images):
    maps = FeatureMaps(model, out_indices=(0, 3))
    assert maps.layer1 is model.layer1
    assert [name for name, _ in maps.named_parameters()] == [
        name for name, _ in model.named_parameters() if not name.startswith("fc.")
    ]
    stem, last = maps(images)
    torch.testing.assert_close(stem, model.relu(model.bn1(model.conv1(images))))
    torch.testing.assert_close(last, model.forward_features(images))
    assert not maps.training


def test_gradients(model, images):
    plain = copy.deepcopy(model).train()
    maps = FeatureMaps(copy.deepcopy(model)).train()
    sum(each.square().mean() for each in maps(images)).backward()
    outputs = [plain.relu(plain.bn1(plain.conv1(images)))]
    outputs.append(plain.layer1(plain.maxpool(outputs[0])))
    outputs.append(plain.layer2(outputs[1]))
    outputs.append(plain.layer3(outputs[2]))
    sum(each.square().mean() for each in outputs).backward()
    for name, parameter in maps.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)


def test_weights_are_those_of_the_whole_model():
    state = resnext.resnet18().state_dict()
    maps = resnext.resnet18(weights=state, features_only=True, out_indices=[1])
    assert all(torch.equal(value, state[name]) for name, value in maps.state_dict().items())
    assert not hasattr(maps, "layer2")


def test_config():
    maps = resnext.resnet18_cifar(in_chans=1, features_only=True, out_indices=[1, -1])
    config = json.loads(json.dumps(maps.config))
    assert config == {
        "architecture": "resnet18_cifar",
        "num_classes": 10,
        "in_chans": 1,
        "features_only": True,
        "out_indices": [1, 4],
    }
    again = resnext.create_model(config.pop("architecture"), **config)
    assert again.load_state_dict(maps.state_dict())
    assert FeatureMaps(ResNet(Bottleneck, (1,))).config == {}


def test_copies_and_checkpointing(model, images):
    maps = FeatureMaps(model, out_indices=(1, 3))
    again = pickle.loads(pickle.dumps(maps))
    assert type(again).__name__ == "FeatureMaps"
    again.set_grad_checkpointing()
    got, expected = again(images), maps(images)
    torch.testing.assert_close(got, expected)
    got[1].sum().backward()
    expected[1].sum().backward()
    torch.testing.assert_close(again.conv1.weight.grad, maps.conv1.weight.grad)


@pytest.mark.parametrize("out_indices", [(), (4,), (-5,), (2, 1), (1, 1), (-1, 3)], ids=str)
def test_wrong_out_indices(model, out_indices):
    message = f"expected out_indices from -4 to 3 in increasing order, got {out_indices}; 0 is the stem"
    with pytest.raises(ValueError, match=re.escape(message)):
        FeatureMaps(model, out_indices)
