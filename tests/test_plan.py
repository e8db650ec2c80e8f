"""What `fuse_` finds in a forward, and what it refuses and why."""

from __future__ import annotations

import collections
import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnext import fuse_, why_not_fused
from resnext.steps import Activation, BlockEnd, Call, ConvAffine, ConvStats, Plan, Program

from .block_cases import buffers, forward_and_gradients
from .converted import assert_same

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A residual block, for variations of its forward."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def branch(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        return self.relu(self.branch(x) + x)


def maps(batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def plan_of(module: nn.Module, arguments: int = 1) -> Plan | None:
    """How a module runs fused; None if it does not. Its results are checked on the way."""
    module = module.double()
    plain = copy.deepcopy(module)
    fuse_(module)
    for each in (module, plain):
        each.train()
    for _ in range(2):
        assert_same(*({**forward_and_gradients(each, maps()), **buffers(each)} for each in (module, plain)))
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(maps()), plain.eval()(maps()))
    return getattr(module, "_fused_plans", {}).get(arguments)


def shown(program: Program) -> list[str]:
    """The steps by name; of a convolution that applies the affine and ReLU before it, with "relu" in front."""
    lines = []
    for step, _ in program.steps:
        if isinstance(step, Call):
            lines.append(step.node.target if isinstance(step.node.target, str) else step.node.target.__name__)
        elif isinstance(step, (ConvStats, BlockEnd)):
            end = {ConvStats: "", BlockEnd: ", sum, relu"}[type(step)]
            lines.append(f"{'relu, ' * (step.prologue != -1)}{step.conv}{', norm' * bool(step.norm)}{end}")
        elif isinstance(step, ConvAffine):
            lines.append(f"{step.pair[0]}, norm{', sum' * (step.residual != -1)}{', relu' * step.relu}")
        else:
            lines.append({Activation: "relu"}.get(type(step), type(step).__name__))
    return lines


# --- what is refused ---


class PythonRandom(Block):
    def forward(self, x):
        return self.relu(self.branch(x) * random.choice([1.0]) + x)


class TorchRandom(Block):
    def forward(self, x):
        return self.relu(self.branch(x) + x) if torch.rand(()) < 2 else x


class SetsAttribute(Block):
    def forward(self, x):
        self.features = self.branch(x)
        return self.relu(self.features + x)


class Counts(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class FillsList(Block):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(self.branch(x))
        return self.relu(self.seen[-1] + x)


FEATURES: dict[str, Tensor] = {}


class FillsGlobal(Block):
    def forward(self, x):
        FEATURES["branch"] = self.branch(x)
        return self.relu(FEATURES["branch"] + x)


class FillsQueue(FillsList):
    def __init__(self):
        super().__init__()
        self.seen = collections.deque(maxlen=2)


class BranchesOnData(Block):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


class BranchesOnSize(Block):
    def forward(self, x):
        return super().forward(x) if x.shape[0] > 1 else x


class BranchesOnMode(Block):
    def forward(self, x):
        return self.relu(self.branch(x) + x) if self.training else self.relu(self.branch(x) + 1.0 * x)


class FunctionalDropout(Block):
    def forward(self, x):
        return self.relu(F.dropout(self.branch(x), 0.0, self.training) + x)


class TensorConstant(Block):
    def forward(self, x):
        return self.relu(self.branch(x) * torch.ones(1, dtype=torch.float64) + x)


class TensorAttribute(Block):
    def __init__(self):
        super().__init__()
        self.gain = torch.ones(1, dtype=torch.float64)

    def forward(self, x):
        return self.relu(self.branch(x) * self.gain + x)


class WithoutGradients(Block):
    def forward(self, x):
        with torch.no_grad():
            constant = self.branch(x)
        return self.relu(self.branch(x) + x + constant)


class InFullPrecision(Block):
    """What `torch.autocast` says is so already where it is recorded."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.relu(self.branch(x) + x)


class AsksForGradients(Block):
    def forward(self, x):
        return self.relu(self.branch(x) + x) if torch.is_grad_enabled() else x


class CallsOfItsOwn(nn.Conv2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


class HasCallsOfItsOwn(Block):
    def __init__(self):
        super().__init__()
        self.conv3 = CallsOfItsOwn(8, 8, 1)

    def forward(self, x):
        return self.relu(self.branch(x) + self.conv3(x))


class Checkpoints(Block):
    def forward(self, x):
        return self.relu(checkpoint(self.branch, x, use_reentrant=False) + x)


class AnyArguments(Block):
    def forward(self, *arguments):
        return super().forward(*arguments)


REFUSED = {
    PythonRandom: "its forward draws random numbers outside of modules",
    TorchRandom: "its forward draws random numbers outside of modules",
    SetsAttribute: "its forward sets attributes",
    Counts: "its forward sets attributes",
    FillsList: "its forward sets attributes",
    FillsGlobal: "its forward keeps what it computes",
    FillsQueue: "its forward sets attributes",
    BranchesOnData: "its forward branches on values",
    BranchesOnSize: "its forward branches on values",
    BranchesOnMode: "its forward computes something else in training than in evaluation",
    FunctionalDropout: "its forward computes something else in training than in evaluation",
    TensorConstant: "its forward makes a tensor of its own, or keeps one outside of its buffers",
    TensorAttribute: "its forward makes a tensor of its own, or keeps one outside of its buffers",
    WithoutGradients: "its forward switches gradients or autocast on or off",
    InFullPrecision: "its forward switches gradients or autocast on or off",
    AsksForGradients: "its forward switches gradients or autocast on or off, or asks whether they are on",
    HasCallsOfItsOwn: "its CallsOfItsOwn has a __call__ of its own",
    Checkpoints: "its forward branches on values",
    AnyArguments: "no ReLU follows a batch norm that follows a convolution",
}


@pytest.mark.parametrize(("kind", "reason"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_refused(kind, reason):
    """The block is left as it is and says why; its convolutions are converted all the same."""
    block = kind().double()
    attributes, generator = dict(vars(block)), torch.get_rng_state()
    random_state = random.getstate()
    report = fuse_(block)
    assert type(block) is kind
    assert vars(block) == attributes
    assert torch.equal(torch.get_rng_state(), generator)
    assert random.getstate() == random_state
    assert [each.name for each in report.fused] == ["conv1", "conv2"]
    (skipped,) = report.skipped
    assert (skipped.name, skipped.type) == ("", kind.__name__)
    assert skipped.reason.startswith(reason)
    assert plan_of(block) is None


# --- what is found ---


class AddsInPlace(Block):
    """To a shortcut that nobody else sees."""

    def forward(self, x):
        identity = x * 2.0
        identity += self.branch(x)
        return self.relu(identity)


class WritesBetween(Block):
    """Between the end of the branch and the sum."""

    def forward(self, x):
        identity = x * 1.0
        out = self.branch(x)
        identity.mul_(2.0)
        return self.relu(out + identity)


class ReadTwice(Block):
    """The activation is read by two convolutions."""

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.conv2(out))


class ReadByOthers(Block):
    """The activation is read by a convolution and by the sum."""

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + out)


class RawOutputRead(Block):
    """What is not normalised is read too."""

    def forward(self, x):
        out = self.conv1(x)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(out)))) + out)


class Twice(Block):
    """One convolution and norm, called for the branch and for the shortcut."""

    def forward(self, x):
        return self.relu(self.bn1(self.conv1(self.relu(self.bn1(self.conv1(x))))) + x)


class Dropouts(Block):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        out = self.dropout(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.dropout(self.bn2(self.conv2(out))) + x)


class NoSum(Block):
    def forward(self, x):
        return self.branch(x)


class NoReLU(Block):
    """Linear bottlenecks, and what a block before activations ends with."""

    def forward(self, x):
        return self.branch(x) + x


FOUND = {
    Block: (
        "block",
        ["conv1, norm", "relu, conv2, norm, sum, relu"],
        ["conv1, norm, relu", "conv2, norm, sum, relu"],
    ),
    ReadByOthers: (
        "block",
        ["conv1, norm", "relu", "conv2, norm, sum, relu"],
        ["conv1, norm, relu", "conv2, norm, sum, relu"],
    ),
    ReadTwice: (
        "block",
        ["conv1, norm", "relu, conv2", "relu, conv2, norm, sum, relu"],
        ["conv1, norm, relu", "conv2", "conv2, norm, sum, relu"],
    ),
    RawOutputRead: (
        "block",
        ["conv1", "bn1", "relu", "conv2, norm, sum, relu"],
        ["conv1", "bn1", "relu", "conv2, norm, sum, relu"],
    ),
    Twice: (
        "block",
        ["conv1, norm", "relu, conv1, norm, sum, relu"],
        ["conv1, norm, relu", "conv1, norm, sum, relu"],
    ),
    AddsInPlace: (
        "block",
        ["mul", "conv1, norm", "relu, conv2, norm, sum, relu"],
        ["mul", "conv1, norm, relu", "conv2, norm, sum, relu"],
    ),
    WritesBetween: (
        "chain",
        ["mul", "conv1, norm", "relu, conv2", "bn2", "mul_", "add", "relu"],
        ["mul", "conv1, norm, relu", "conv2, norm", "mul_", "add", "relu"],
    ),
    Dropouts: (
        "chain",
        ["conv1, norm", "relu", "dropout", "conv2", "bn2", "dropout", "add", "relu"],
        ["conv1, norm, relu", "conv2, norm, sum, relu"],
    ),
    NoSum: ("chain", ["conv1, norm", "relu, conv2", "bn2"], ["conv1, norm, relu", "conv2, norm"]),
    NoReLU: ("chain", ["conv1, norm", "relu, conv2", "bn2", "add"], ["conv1, norm, relu", "conv2, norm, sum"]),
}


@pytest.mark.parametrize(("kind", "expected"), FOUND.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_found(kind, expected):
    plan = plan_of(kind())
    assert (plan.kind, shown(plan.train), shown(plan.infer)) == expected


def unit(kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(8), nn.ReLU())


CHAINS = {
    "one unit": (lambda: unit(), {"": "chain"}),
    "a unit within": (lambda: nn.Sequential(unit()), {"0": "chain"}),
    "a convolution reads the unit before it": (
        lambda: nn.Sequential(unit(), unit()),
        {"": "chain", "0": "chain", "1": "chain"},
    ),
    "nothing across": (lambda: nn.Sequential(unit(), nn.AvgPool2d(2), unit()), {"0": "chain", "2": "chain"}),
    "pooling, not of a stem": (lambda: nn.Sequential(unit(), nn.MaxPool2d(2, 2)), {"0": "chain"}),
    "pooling of a stem": (lambda: nn.Sequential(unit(), nn.MaxPool2d(3, 2, 1)), {"": "chain", "0": "chain"}),
    "a block is one step": (lambda: nn.Sequential(Block(), unit(1)), {"0": "block", "1": "chain"}),
}


@pytest.mark.parametrize(("make", "expected"), CHAINS.values(), ids=CHAINS.keys())
def test_a_plan_stands_where_something_is_gained(make, expected):
    report = fuse_(make())
    assert {each.name: each.kind for each in report.fused if each.kind != "convolution"} == expected


class TwoArguments(Block):
    """As in deep layer aggregation: the shortcut may be given."""

    def forward(self, x, shortcut=None):
        return self.relu(self.branch(x) + (x if shortcut is None else shortcut))


def test_a_plan_for_each_number_of_arguments():
    module = TwoArguments().double()
    plain = copy.deepcopy(module)
    assert [each.kind for each in fuse_(module).fused] == ["block", "convolution", "convolution"]
    assert set(module._fused_plans) == {1, 2}
    x = maps()
    calls = (lambda block: block(x), lambda block: block(x, -x), lambda block: block(x, shortcut=-x))
    for call in (*calls, lambda block: block(x, None)):
        torch.testing.assert_close(call(module), call(plain))
    assert not torch.equal(module(x), module(x, -x))


class Outputs(collections.OrderedDict):
    """With attributes, as some libraries have them."""

    @property
    def maps(self):
        return self["maps"]


class Returns(Block):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return self.kind([("maps", self.relu(self.branch(x) + x)), ("more", [x])])


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, Outputs])
def test_dictionaries_stay_what_they_are(kind):
    module = Returns(kind).double()
    plain = copy.deepcopy(module)
    report = fuse_(module)
    results, wanted = module(maps()), plain(maps())
    assert type(results) is kind
    assert list(results) == list(wanted)
    torch.testing.assert_close(results["maps"], wanted["maps"])
    reasons = [each.reason for each in report.skipped]
    assert reasons == (["its forward makes a Outputs, which is more than a dictionary"] if kind is Outputs else [])


class Drop(nn.Module):
    """Stochastic depth in several forms, by names that say so."""

    def __init__(self, p=0.5):
        super().__init__()
        self.p, self.always = p, False

    def forward(self, x):
        return x * torch.bernoulli(torch.tensor(self.p)) if self.training or self.always else x


class ScalesDrop(Drop):
    def forward(self, x):
        return x * torch.bernoulli(torch.tensor(self.p)) if self.training else x * self.p


class AlwaysDrop(Drop):
    def forward(self, x):
        return F.dropout(x, self.p, training=True)


class Dropping(Block):
    def __init__(self, drop):
        super().__init__()
        self.drop = drop

    def forward(self, x):
        return self.relu(self.drop(self.branch(x)) + x)


def in_evaluation(module: nn.Module) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return module(maps())


@pytest.mark.parametrize("drop", [Drop(), ScalesDrop(), AlwaysDrop(), nn.Dropout()], ids=lambda d: type(d).__name__)
def test_dropouts_are_left_out_if_they_pass_on(drop):
    module = Dropping(drop).double().eval()
    plain = copy.deepcopy(module)
    fuse_(module)
    (made,) = module._fused_plans.values()
    assert [shell.name for shell in made.dropouts] == (["drop"] if type(drop) in (Drop, nn.Dropout) else [])
    torch.testing.assert_close(in_evaluation(module), in_evaluation(plain))


class Doubles(nn.Module):
    def forward(self, x):
        return 2 * x


class AskingDrop(Drop):
    """Asks a child that it does not call."""

    def __init__(self):
        super().__init__()
        self.config = nn.Identity()
        self.config.on = False

    def forward(self, x):
        return 2 * x if self.config.on else x


DROPOUT_CHANGES = {
    "childs-attribute": (AskingDrop(), lambda module: setattr(module.drop.config, "on", True)),
    "attribute": (Drop(0.1), lambda module: setattr(module.drop, "always", True)),
    "other": (nn.Dropout(), lambda module: setattr(module, "drop", Doubles())),
    "hook": (nn.Dropout(), lambda module: module.drop.register_forward_hook(lambda *args: 2 * args[-1])),
    "forward": (nn.Dropout(), lambda module: setattr(module.drop, "forward", lambda x: 2 * x)),
}


@pytest.mark.parametrize(("drop", "change"), DROPOUT_CHANGES.values(), ids=DROPOUT_CHANGES)
def test_a_dropout_that_changes_is_called(drop, change):
    module = Dropping(drop).double().eval()
    plain = copy.deepcopy(module)
    fuse_(module)
    before = in_evaluation(module)
    for each in (module, plain):
        change(each)
    after = in_evaluation(module)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, in_evaluation(plain))


class Reads(Block):
    """What a forward may read besides its own attributes."""

    residual = True
    options = {"factor": 1.0}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.act = self.relu
        self.gate = nn.SiLU()
        self.gate.on = True

    def forward(self, x):
        x = self.options["factor"] * x
        gated = self.gate(x)
        branch = (
            gated - gated + self.bn2(F.conv2d(self.act(self.bn1(self.conv1(x))), self.conv2.weight, None, 1, 1, 1, 2))
        )
        branch = branch if self.gate.on else 3 * branch
        return self.relu(branch + x if self.residual else branch + 0 * x)


CHANGES = {
    "class-attribute": lambda module: setattr(module, "residual", False),
    "second-name": lambda module: setattr(module, "act", nn.Sigmoid()),
    "in-place": lambda module: setattr(module.gate, "inplace", True),
    "class-options": lambda module: module.options.update(factor=3.0),
    "attribute-of-a-child": lambda module: setattr(module.gate, "on", False),
    "conv-forward": lambda module: setattr(module.conv1, "_conv_forward", lambda x, weight, bias: x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(change, monkeypatch):
    module = Reads().double()
    plain = copy.deepcopy(module)
    fuse_(module)
    assert why_not_fused(module) == {}
    before = module(maps())
    monkeypatch.setitem(Reads.options, "factor", 1.0)  # which it is, and will be again
    for each in (module, plain):
        change(each)
    assert list(why_not_fused(module)) == [""]
    after = module(maps())
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, plain(maps()))


def test_methods_that_are_replaced_are_noticed(monkeypatch):
    module, other = Block().double(), Block().double()
    for each in (module, other):
        fuse_(each)
    module.branch = lambda x: 2 * x
    assert why_not_fused(module) == {"": "branch of the module is not what it was when it was converted"}
    torch.testing.assert_close(module(maps()), 3 * maps().relu())
    monkeypatch.setattr(Block, "forward", lambda self, x: 2 * x)
    assert why_not_fused(other) == {"": "Block.forward is not what it was when the module was converted"}
    assert torch.equal(other(maps()), 2 * maps())


class Asks(Block):
    """What others do to take lists of tensors, or tensors with a mask."""

    def forward(self, x):
        x = x.tensors if hasattr(x, "tensors") else x
        return self.relu(self.branch(x) + x) if getattr(x, "mask", None) is None else x


def test_tensors_have_no_attributes_but_their_own():
    assert plan_of(Asks()) is not None


class HoldsTensors(Block):
    """In a tuple, whose comparison with another asks whether tensors are true."""

    def __init__(self):
        super().__init__()
        self.scales = (torch.ones(2), torch.zeros(2))

    def forward(self, x):
        return super().forward(x) if self.scales is not None else x


def test_copies_of_attributes_that_are_not_plain():
    module = HoldsTensors().double()
    fuse_(module)
    for each in (module, copy.deepcopy(module)):
        assert why_not_fused(each) == {}
        each.scales = (torch.zeros(2), torch.zeros(2))
        assert list(why_not_fused(each)) == [""]
        torch.testing.assert_close(each(maps()), Block.forward(each, maps()))
