"""`fuse_` and `unfuse_`: the report, the arguments, and what stays as it was."""

from __future__ import annotations

import builtins
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from resnext import GroupedConv2d, fuse_, unfuse_, why_not_fused
from resnext.convert import Fused, FuseReport, Skipped

from .converted import images, pair, resnet
from .test_plan import Block, BranchesOnMode, maps, unit

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    """A block, a convolution alone, one that cannot be converted, and a block that cannot."""
    modules = {
        "block": Block(),
        "conv": nn.Conv2d(8, 8, 3, padding=1, groups=4),
        "dilated": nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4),
        "odd": BranchesOnMode(),
    }
    model = nn.Sequential()
    for name, module in modules.items():
        model.add_module(name, module)
    return model.double()


def test_report():
    report = fuse_(network())
    assert report == FuseReport(
        fused=[
            Fused("block", "block", "Block"),
            Fused("block.conv1", "convolution", "Conv2d"),
            Fused("block.conv2", "convolution", "Conv2d"),
            Fused("conv", "convolution", "Conv2d"),
            Fused("odd.conv1", "convolution", "Conv2d"),
            Fused("odd.conv2", "convolution", "Conv2d"),
        ],
        skipped=[
            Skipped("dilated", "Conv2d", "dilation is (2, 2), not 1"),
            Skipped("odd", "BranchesOnMode", "its forward computes something else in training than in evaluation"),
        ],
    )
    assert str(report).splitlines() == [
        "fused: 1 block, 0 chains, 5 convolutions; left as they are: 2",
        "module       type            fused as     why not",
        "block        Block           block",
        "block.conv1  Conv2d          convolution",
        "block.conv2  Conv2d          convolution",
        "conv         Conv2d          convolution",
        "odd.conv1    Conv2d          convolution",
        "odd.conv2    Conv2d          convolution",
        "dilated      Conv2d          -            dilation is (2, 2), not 1",
        "odd          BranchesOnMode  -            its forward computes something else in training than in evaluation",
    ]


def test_a_block_alone():
    report = fuse_(Block())
    assert str(report).splitlines()[2].split() == ["(model)", "Block", "block"]


def test_filter():
    """By name or by module; what is not wanted stays exactly what it is, and may be converted later."""
    model = network()
    classes = {name: type(module) for name, module in model.named_modules()}
    report = fuse_(model, lambda module, name: name.startswith("block") and not isinstance(module, nn.Conv2d))
    assert report == FuseReport([Fused("block", "block", "Block")], [])
    changed = [name for name, module in model.named_modules() if type(module) is not classes[name]]
    assert changed == ["block"]
    assert len(fuse_(model).fused) == 6


def test_strict():
    """All or nothing."""
    model = network()
    classes = [type(module) for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    message = r"fuse_: expected nothing to be left as it is, got\n(.*\n)+use filter_fn or strict=False"
    with pytest.raises(ValueError, match=message) as error:
        fuse_(model, strict=True)
    assert "dilation is (2, 2), not 1" in str(error.value)
    assert [type(module) for module in model.modules()] == classes
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert fuse_(model, lambda _, name: name not in ("dilated", "odd"), strict=True).skipped == []


def test_backend():
    """Of every converted module's forward, until it is converted with another one."""
    model = unit().eval()
    fuse_(model, backend="cuda")
    x = maps().float()
    with torch.no_grad(), pytest.raises(RuntimeError, match="the cuda backend was asked for and cannot serve"):
        model(x)
    fuse_(model, backend="torch")
    with torch.no_grad():
        torch.testing.assert_close(model(x), unfuse_(copy.deepcopy(model))(x))


WRONG = {
    "unknown backend": (lambda: fuse_(Block(), backend="cudnn"), ValueError, "got 'cudnn'"),
    "weights": (
        lambda: fuse_(Block().state_dict()),
        TypeError,
        "fuse_: expected a torch.nn.Module .*, got OrderedDict",
    ),
    "scripted": (
        lambda: fuse_(torch.jit.script(unit())),
        TypeError,
        "got RecursiveScriptModule; give a model, and convert it",
    ),
    "filter by name": (
        lambda: fuse_(Block(), "conv1"),
        TypeError,
        "expected filter_fn to be called with .*, got 'conv1'",
    ),
    "nothing to unfuse": (lambda: unfuse_(None), TypeError, "unfuse_: expected a torch.nn.Module, got NoneType"),
    "nothing to ask": (
        lambda: why_not_fused(None),
        TypeError,
        "why_not_fused: expected a torch.nn.Module, got NoneType",
    ),
    "traced": (lambda: fuse_(torch.jit.trace(unit(), maps().float())), TypeError, "before torch.jit.trace"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- what stays ---


def test_a_converted_model_looks_as_before():
    model, plain = pair()
    assert repr(model) == repr(plain)
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(module, type(other))
        assert type(module).__qualname__ == type(other).__qualname__
    assert isinstance(model.layer1[0].conv2, GroupedConv2d)


def test_replaced_children_are_converted_by_another_call():
    """Until then, what they belong to says what has changed."""
    model, plain = pair()
    for each in (model, plain):
        torch.manual_seed(1)
        shortcut = nn.Sequential(nn.Conv2d(64, 32, 1, bias=False), nn.BatchNorm2d(32))
        each.layer1[0] = resnet.Bottleneck(64, 8, downsample=shortcut).double()
        each.layer2[0].relu = nn.SiLU()
    assert why_not_fused(model) == {"layer2.0": "relu is SiLU, not ReLU"}
    torch.testing.assert_close(model(images()), plain(images()))
    report = fuse_(model)
    blocks = [each.name for each in report.fused if each.kind == "block"]
    assert blocks == ["layer1.0", "layer3.0", "layer4.0"]
    assert Skipped("layer2.0", "Bottleneck", "its activation is SiLU, not ReLU") in report.skipped
    assert why_not_fused(model) == {}
    torch.testing.assert_close(model(images()), plain(images()))


def test_unfused_models_are_plain_pytorch():
    model, plain = pair()
    model.eval()(images())
    assert unfuse_(model) is model
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [list(vars(module)) for module in model.modules()] == [list(vars(module)) for module in plain.modules()]
    assert unfuse_(model) is model


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


class OfChains(nn.Module):
    def __init__(self):
        super().__init__()
        self.chain, self.conv, self.bn = Chain(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(self.chain(x))) + x)


def test_parts_may_be_unfused():
    """What a part's conversion adds to its class is nothing that the whole depends on."""
    model = OfChains()
    assert [each.name for each in fuse_(model).fused] == ["", "chain"]
    unfuse_(model.chain)
    assert why_not_fused(model) == {}


class FreezesNorms(nn.Sequential):
    """A common pattern: norms that stay in evaluation."""

    def train(self, mode: bool = True, freezes: bool = False):
        super().train(mode)
        for module in self.modules():
            if freezes and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def chain(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    return kind(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())


def test_arguments_of_train_are_passed_on():
    model = chain(FreezesNorms)
    assert fuse_(model).fused
    assert model.train(freezes=True) is model
    assert model.training
    assert not model[1].training


class Reduced(nn.Sequential):
    def __reduce__(self):
        return made_anew, ()


def made_anew() -> nn.Sequential:
    return chain(Reduced)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_what_reduces_itself_is_copied_converted(copied):
    model = made_anew()
    assert fuse_(model).fused
    other = copied(model)
    assert type(other).__name__ == "Reduced"
    assert why_not_fused(other) == {}
    assert fuse_(other).fused == fuse_(model).fused


class Registered(nn.Module):
    def __init_subclass__(cls, *, name: str):
        super().__init_subclass__()


class RegisteredBlock(Registered, name="block"):
    def __init__(self):
        super().__init__()
        self.chain = chain()
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(self.chain(x))))


def test_a_class_that_has_none_derived_from_it():
    report = fuse_(RegisteredBlock())
    assert [each.name for each in report.fused] == ["chain"]
    (skipped,) = report.skipped
    assert skipped.reason.startswith("its class has none derived from it (")


def test_an_error_leaves_the_model_as_it_was():
    model = network()
    classes = [type(module) for module in model.modules()]

    def stop(module: nn.Module, name: str) -> bool:
        if not name:
            raise KeyError("stop")
        return True

    with pytest.raises(KeyError, match="stop"):
        fuse_(model, stop)
    assert [type(module) for module in model.modules()] == classes
    assert not any("_fused_plans" in vars(module) for module in model.modules())


def test_copies_in_several_threads():
    """Recording patches what all threads share; another thread's modules go on as they are meanwhile."""
    model = network().eval()
    fuse_(model)
    call, instance = nn.Module.__call__, builtins.isinstance
    stop = threading.Event()
    heard: list[int] = []

    def listen() -> None:
        linear = nn.Linear(2, 2)
        linear.register_forward_hook(lambda *_: heard.append(1))
        calls = 0
        while not stop.is_set():
            linear(torch.ones(1, 2))
            calls += 1
        assert len(heard) == calls

    copiers = (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)))
    with ThreadPoolExecutor(4) as pool:
        listening = pool.submit(listen)
        copies = list(pool.map(lambda i: copiers[i % 2](model), range(12)))
        stop.set()
        listening.result()
    assert nn.Module.__call__ is call
    assert builtins.isinstance is instance
    for each in copies:
        assert why_not_fused(each) == {}
        assert fuse_(each).fused == fuse_(model).fused
