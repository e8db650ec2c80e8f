"""The arguments of `ResNet`: beside timm's and torchvision's networks of the same arguments, in float64."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import resnext
from resnext import ResNet
from resnext.blocks import BasicBlock, Bottleneck, DropPath

from .block_cases import resnet

timm_resnet = pytest.importorskip("timm.models.resnet")

KINDS = {BasicBlock: timm_resnet.BasicBlock, Bottleneck: timm_resnet.Bottleneck}


def small(block=Bottleneck, layers=(1, 1, 1), **arguments) -> ResNet:
    return ResNet(block, layers, **{"num_classes": 7, **arguments}).double()


def torchvisions() -> nn.Module:
    """What `small` makes, by torchvision."""
    model = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=7)
    model.layer4, model.fc = nn.Identity(), nn.Linear(1024, 7)
    return model.double()


def images(channels: int = 3, size: int = 40) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64)


def assert_same_results(ours: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """With the same weights and random numbers: outputs in training and evaluation, gradients and buffers."""
    ours.load_state_dict(plain.state_dict())
    results = []
    for model in (ours, plain):
        model.train()
        torch.manual_seed(3)
        out = model(x)
        out.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append((out, gradients, list(model.buffers()), model.eval()(x)))
    torch.testing.assert_close(*results)


# --- beside timm's ---

# Each with timm's arguments for the same network.
LIKE_TIMMS = {
    "in_chans": (Bottleneck, {"in_chans": 5}, {"in_chans": 5}),
    "no classifier": (Bottleneck, {"num_classes": 0}, {"num_classes": 0}),
    "deep stem": (BasicBlock, {"stem": "deep"}, {"stem_type": "deep", "stem_width": 32}),
    "avg_down": (Bottleneck, {"avg_down": True}, {"avg_down": True}),
    "avg_down, dilated": (Bottleneck, {"avg_down": True, "output_stride": 8}, {"avg_down": True, "output_stride": 8}),
    "output_stride of bottlenecks": (Bottleneck, {"output_stride": 8}, {"output_stride": 8}),
    "output_stride of basic blocks": (BasicBlock, {"output_stride": 8}, {"output_stride": 8}),
    "act_layer": (Bottleneck, {"act_layer": nn.SiLU}, {"act_layer": nn.SiLU}),
    "drop_rate": (BasicBlock, {"drop_rate": 0.4}, {"drop_rate": 0.4}),
    "drop_path_rate of basic blocks": (BasicBlock, {"drop_path_rate": 0.6}, {"drop_path_rate": 0.6}),
    "drop_path_rate of bottlenecks": (Bottleneck, {"drop_path_rate": 0.6}, {"drop_path_rate": 0.6}),
    "global_pool": (Bottleneck, {"global_pool": "max"}, {"global_pool": "max"}),
    "groups": (Bottleneck, {"groups": 4, "width_per_group": 16}, {"cardinality": 4, "base_width": 16}),
}


@pytest.mark.parametrize(("block", "arguments", "timms"), LIKE_TIMMS.values(), ids=LIKE_TIMMS.keys())
def test_equals_timms(block, arguments, timms):
    layers = (1, 1, 2)
    ours = small(block, layers, **arguments)
    usual = {"num_classes": 7, "channels": (64, 128, 256), "zero_init_last": False}
    plain = timm_resnet.ResNet(KINDS[block], layers, **{**usual, **timms}).double()
    plain.layer4 = nn.Identity()  # timm's forward calls it by its name
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert_same_results(ours, plain, images(arguments.get("in_chans", 3)))


def test_names_and_reductions_of_maps_are_timms():
    with torch.device("meta"):
        ours = ResNet(Bottleneck, (1, 1, 1, 1), output_stride=16)
        plain = timm_resnet.ResNet(timm_resnet.Bottleneck, (1, 1, 1, 1), output_stride=16)
    assert ours.feature_info[1:] == plain.feature_info[1:]
    assert ours.feature_info[0] == {**plain.feature_info[0], "module": "relu"}
    assert ours.num_features == plain.num_features == 2048


# --- beside torchvision's, changed by hand ---


def test_three_stages():
    assert_same_results(small(), torchvisions(), images())


def test_stride_in_1x1():
    ours, plain = small(stride_in_1x1=True), torchvisions()
    for block in (plain.layer2[0], plain.layer3[0]):
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    assert_same_results(ours, plain, images())


def test_cifar_stem():
    ours, plain = small(stem="cifar"), torchvisions()
    plain.conv1, plain.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    assert_same_results(ours, plain.double(), images(size=16))
    assert [info["reduction"] for info in ours.feature_info] == [1, 1, 2, 4]


def test_bias():
    """Of every convolution, and it starts at zero."""
    ours, plain = small(bias=True), torchvisions()
    convolutions = [module for module in ours.modules() if isinstance(module, nn.Conv2d)]
    assert all(torch.equal(conv.bias, torch.zeros_like(conv.bias)) for conv in convolutions)
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.rand(module.out_channels, dtype=torch.float64))
    assert_same_results(ours, plain, images())


def test_pool_size():
    """The classifier sees the pixels one by one; maps of other sizes are averaged to that many."""
    ours = small(BasicBlock, pool_size=3).eval()
    x = images()
    assert ours.fc.in_features == 9 * 256
    maps = ours.forward_features(x)
    assert maps.shape == (2, 256, 3, 3)
    torch.testing.assert_close(ours(x), ours.fc(maps.flatten(1)))
    assert ours(images(size=96)).shape == (2, 7)


# --- stochastic depth ---


def test_drop_path_rates_grow_linearly():
    model = small(layers=(1, 2, 2), drop_path_rate=0.2)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert model.layer1[0].drop_path is None  # of rate 0
    assert list(model.state_dict()) == list(small(layers=(1, 2, 2)).state_dict())


def test_drop_path_keeps_the_expectation():
    drop_path = DropPath(0.25)
    x = torch.ones(4000, 2, 1, 3)
    out = drop_path(x)
    kept = out[:, 0, 0, 0] != 0
    assert torch.equal(out, x * kept[:, None, None, None] / 0.75)  # whole images
    assert abs(kept.float().mean() - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5  # five standard deviations
    assert drop_path.eval()(x) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_drop_path_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=rf"expected a rate in \[0, 1\), got {rate}; give"):
        DropPath(rate)


# --- the classifier ---


def test_forward_in_two_halves():
    model = small(drop_rate=0.5).eval()
    x = images()
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape == (2, 1024, 3, 3)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))


def test_reset_classifier():
    model = small().eval()
    blocks = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("fc.")}
    for num_classes in (3, 0, 5):
        model.reset_classifier(num_classes)
        assert model.num_classes == num_classes
        assert model(images()).shape == (2, num_classes or 1024)
    assert model.get_classifier().weight.dtype == torch.float64
    assert not model.fc.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in blocks.items())
    with pytest.raises(ValueError, match="expected num_classes of at least 0, got -2; 0 means none"):
        model.reset_classifier(-2)


def test_classifier_replaced_by_hand():
    model = resnext.resnet18()
    model.fc = nn.Linear(512, 4)
    assert model.num_classes == model.config["num_classes"] == 4


# --- gradient checkpointing ---


def step(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A training step's output, gradients and buffers, and the activations that were kept for backward."""
    kept = []
    model.zero_grad()
    torch.manual_seed(4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = model.train()(x)
    out.square().mean().backward()
    results = [out, *[parameter.grad for parameter in model.parameters()], *model.buffers()]
    return results, [tensor for tensor in kept if tensor.dim() == 4]


@pytest.mark.parametrize("prepare", [lambda model: model, resnext.unfuse_], ids=["fused", "plain"])
def test_grad_checkpointing(prepare):
    """The same results, running statistics included, and less kept."""
    model = prepare(small(layers=(2, 1, 1), groups=4, width_per_group=16, drop_path_rate=0.5))
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing()
    x = images()
    (got, kept), (expected, kept_plainly) = step(model, x), step(plain, x)
    torch.testing.assert_close(got, expected)
    # Of each of the four blocks only the input: without, also the convolutions' outputs and weights.
    assert len(kept) <= len(kept_plainly) - 4 * 6

    again = pickle.loads(pickle.dumps(model))
    assert list(again.state_dict()) == list(plain.state_dict())
    assert len(step(again, x)[1]) == len(kept)
    model.set_grad_checkpointing(False)
    assert len(step(model, x)[1]) == len(kept_plainly)


def test_grad_checkpointing_without_gradients_and_compiled():
    model = small(BasicBlock, layers=(1, 1)).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        model.set_grad_checkpointing()
        torch.testing.assert_close(model(x), expected)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, x)[0], step(model, x)[0])


# --- wrong values ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": []}, r"expected layers with a positive number .*, got \[\]; ResNet-50 has"),
        ({"layers": [3, 4, 0, 3]}, "expected layers with a positive number"),
        ({"replace_stride_with_dilation": [True]}, r"3 flags or None, got \[True\]; give"),
        ({"output_stride": 12}, "expected output_stride to be one of 4, 8, 16, 32, got 12"),
        ({"output_stride": 32, "stem": "cifar"}, "expected output_stride to be one of 1, 2, 4, 8, got 32"),
        ({"output_stride": 8, "replace_stride_with_dilation": [True] * 3}, "got both, 8 and .*; leave one out"),
        ({"width_per_group": 0}, r"at least 64, got 64 \* 0, .*; raise base_width"),
        ({"groups": 0}, "expected groups of at least 1, got 0; give"),
        ({"block": BasicBlock, "groups": 32}, "groups=1 and base_width=64, got 32 and 64; use"),
        ({"block": BasicBlock, "stride_in_1x1": True}, "expected stride_in_1x1=False, got True; use"),
        ({"num_classes": -1}, "expected num_classes of at least 0, got -1; give"),
        ({"in_chans": 0}, "expected in_chans of at least 1, got 0; give"),
        ({"pool_size": 0}, "expected pool_size of at least 1, got 0; give"),
        ({"stem": "patch"}, "expected stem to be one of imagenet, cifar, deep, keras, got 'patch'"),
        ({"global_pool": "catavgmax"}, "expected global_pool to be one of avg, max, got 'catavgmax'"),
        ({"drop_rate": 1.0}, r"expected drop_rate in \[0, 1\), got 1.0; give"),
        ({"drop_path_rate": -0.1}, r"expected drop_path_rate in \[0, 1\), got -0.1; give"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_values(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        ResNet(**{"block": Bottleneck, "layers": [1, 2, 2, 2], **arguments})
