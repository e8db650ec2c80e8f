"""`GroupedConv2d` as a drop-in `torch.nn.Conv2d`: same results, same parameters, same behaviour as a module."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from resnext import GroupedConv2d, grouped_conv2d

from .numerics import Exact, assert_close

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Layer:
    """A 3x3 layer of ResNeXt-50 32x4d: the network's channels and stride on a small image."""

    group_width: int
    stride: int
    size: tuple[int, int]
    bias: bool

    def make(self, conv_class: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
        channels = 32 * self.group_width
        return conv_class(channels, channels, 3, self.stride, 1, groups=32, bias=self.bias)


# Stride 2 at group width 4 and bias are not in the network, but a user's variant of it may have them.
RESNEXT_LAYERS = {
    "gw4-stride1": Layer(4, 1, (14, 14), bias=False),
    "gw4-stride1-bias": Layer(4, 1, (5, 8), bias=True),
    "gw4-stride2-bias": Layer(4, 2, (14, 14), bias=True),
    "gw8-stride2": Layer(8, 2, (14, 14), bias=False),
    "gw8-stride1-bias": Layer(8, 1, (7, 9), bias=True),
    "gw16-stride2-odd": Layer(16, 2, (7, 9), bias=False),
    "gw16-stride1-bias": Layer(16, 1, (7, 7), bias=True),
    "gw32-stride2-bias": Layer(32, 2, (7, 6), bias=True),
    "gw32-stride1": Layer(32, 1, (4, 4), bias=False),
}


def forward_and_gradients(conv: nn.Conv2d, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of everything for the output gradient ``grad``."""
    x = x.detach().requires_grad_()
    y = conv(x)
    names = ["x", *(name for name, _ in conv.named_parameters())]
    gradients = torch.autograd.grad(y, [x, *conv.parameters()], grad)
    return {"y": y.detach(), **{f"d{name}": value for name, value in zip(names, gradients, strict=True)}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", RESNEXT_LAYERS.values(), ids=RESNEXT_LAYERS.keys())
def test_equals_conv2d(layer, layout):
    """Output and gradients within the rounding of float32 sums (see numerics) of plain PyTorch's in float64."""
    conv = layer.make().to(memory_format=LAYOUTS[layout])
    x = torch.randn(2, conv.in_channels, *layer.size).to(memory_format=LAYOUTS[layout])
    grad = torch.randn_like(conv(x))

    got = forward_and_gradients(GroupedConv2d.from_conv(conv), x, grad)
    double = copy.deepcopy(conv).double()
    value = forward_and_gradients(double, x.double(), grad.double())
    for parameter in double.parameters():
        parameter.data.abs_()
    magnitude = forward_and_gradients(double, x.double().abs(), grad.double().abs())

    in_kernel, in_output = 9 * layer.group_width, grad[:, 0].numel()
    terms = {"y": in_kernel + layer.bias, "dx": in_kernel, "dweight": in_output, "dbias": in_output}
    assert got.keys() == value.keys()
    for name in value:
        assert_close(got[name], Exact(value[name], magnitude[name], terms[name]))
    assert got["y"].stride() == conv(x).stride()


# What is PyTorch's to compute is computed by PyTorch: bitwise the same.
PLAIN = {
    "5x5": {"kernel_size": 5, "padding": 2},
    "1x1": {"kernel_size": 1},
    "dilation 2": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "same, 5x5": {"kernel_size": 5, "padding": "same"},
    "stride 3": {"kernel_size": 3, "padding": 1, "stride": 3},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "float64": {"kernel_size": 3, "padding": 1, "dtype": torch.float64},
}


@pytest.mark.parametrize("arguments", PLAIN.values(), ids=PLAIN.keys())
def test_the_rest_is_pytorch(arguments):
    conv = nn.Conv2d(8, 12, groups=4, **arguments)
    ours = GroupedConv2d.from_conv(conv)
    x = torch.randn(2, 8, 9, 7, dtype=conv.weight.dtype)
    assert torch.equal(ours(x), conv(x))


def test_same_padding_is_ours_too():
    conv = GroupedConv2d(8, 8, 3, padding="same", groups=4)
    as_number = GroupedConv2d(8, 8, 3, padding=1, groups=4)
    as_number.load_state_dict(conv.state_dict())
    x = torch.randn(2, 8, 5, 6)
    assert torch.equal(conv(x), as_number(x))


def test_unbatched_input():
    conv = GroupedConv2d(8, 8, 3, padding=1, groups=4)
    x = torch.randn(8, 5, 6)
    assert torch.equal(conv(x), conv(x[None])[0])


def test_frozen_weight_gets_no_gradient():
    conv = GroupedConv2d(8, 8, 3, padding=1, groups=4)
    conv.weight.requires_grad_(False)
    x = torch.randn(2, 8, 5, 6, requires_grad=True)
    conv(x).sum().backward()
    assert conv.weight.grad is None
    assert x.grad is not None
    assert conv.bias.grad is not None


def test_wrong_number_of_channels_is_pytorchs_error():
    x = torch.randn(2, 6, 5, 5)
    arguments = (8, 8, 3, 1, 1, 1, 4)
    with pytest.raises(Exception) as plain:  # noqa: PT011  # whatever PyTorch raises is what we compare with
        nn.Conv2d(*arguments)(x)
    with pytest.raises(plain.type, match=r"expected x with .* 8 channels, got 6"):
        GroupedConv2d(*arguments)(x)


def test_constructor_and_initial_values():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 2), dilation=2, groups=4, bias=True)
    torch.manual_seed(0)
    ours = GroupedConv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 2), dilation=2, groups=4, bias=True)
    assert repr(ours) == "Grouped" + repr(conv)
    assert list(ours.state_dict()) == list(conv.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), conv.parameters(), strict=True))


def test_pickle_and_deepcopy():
    conv = GroupedConv2d(8, 8, 3, padding=1, groups=4).eval()
    x = torch.randn(2, 8, 5, 6)
    for copied in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert type(copied) is GroupedConv2d
        assert not copied.training
        assert copied.weight is not conv.weight
        assert torch.equal(copied(x), conv(x))


def test_symbolic_trace_has_one_node():
    model = nn.Sequential(GroupedConv2d(8, 8, 3, padding=1, groups=4), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [grouped_conv2d]
    x = torch.randn(2, 8, 5, 6)
    assert torch.equal(traced(x), model(x))


CHANGED = {
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", amount=0.5),
    "weight_norm": parametrizations.weight_norm,
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED.keys())
def test_pruning_and_parametrization(change):
    """The weight that reaches the convolution is the changed one, and its gradient reaches the original."""
    conv = GroupedConv2d(8, 8, 3, padding=1, groups=4, bias=False)
    plain = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
    plain.load_state_dict(conv.state_dict())
    change(conv)
    change(plain)
    x = torch.randn(2, 8, 5, 6)
    assert torch.equal(conv(x), grouped_conv2d(x, plain.weight, groups=4))
    conv(x).sum().backward()
    grouped_conv2d(x, plain.weight, groups=4).sum().backward()
    assert [name for name, _ in conv.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for ours, theirs in zip(conv.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("bias", [True, False])
def test_from_conv_shares_parameters(bias):
    conv = nn.Conv2d(8, 12, 3, 2, 1, 1, 4, bias, dtype=torch.bfloat16).eval()
    conv.weight.requires_grad_(False)
    random_state = torch.get_rng_state()
    ours = GroupedConv2d.from_conv(conv)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert repr(ours) == "Grouped" + repr(conv)
    assert ours.weight is conv.weight
    assert ours.bias is conv.bias
    assert not ours.training


def with_hook(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_forward_hook(lambda *_: None)
    return conv


def with_forward_of_its_own(conv: nn.Conv2d) -> nn.Conv2d:
    conv.forward = lambda x: x
    return conv


def with_a_buffer(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_buffer("scale", torch.ones(1))
    return conv


REFUSED = {
    "its own forward": (with_forward_of_its_own, ValueError, "own attributes, got forward; remove"),
    "a buffer": (with_a_buffer, ValueError, "own attributes, got scale; remove"),
    "a hook": (with_hook, ValueError, "expected one without hooks, got forward_hooks; remove"),
    "pruned": (CHANGED["pruned"], ValueError, "forward_pre_hooks"),
    "parametrized": (CHANGED["weight_norm"], TypeError, "got ParametrizedConv2d; give one, or undo"),
    "one already": (GroupedConv2d.from_conv, TypeError, "got GroupedConv2d; it is one already"),
    "another module": (lambda _: nn.Conv1d(8, 8, 3), TypeError, "expected a torch.nn.Conv2d, got Conv1d"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_from_conv_refuses(change, error, message):
    conv = change(nn.Conv2d(8, 8, 3))
    with pytest.raises(error, match=message):
        GroupedConv2d.from_conv(conv)
