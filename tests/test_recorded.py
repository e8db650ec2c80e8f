"""Training of a block as one node of autograd's graph: when, and that it is what its operators compute one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnext import ResNet50Fused, fuse_, recorded, unfuse_, use_backend
from resnext.kernels import dispatch
from resnext.kernels.block_steps import Scaled, add, own

from .block_cases import CASES, IDENTITY, LAYOUTS, PROJECTION, BlockCase, Results, buffers, forward_and_gradients


def is_one_node(out: Tensor) -> bool:
    """Whether a block made ``out`` as one node; a layout may have been changed after it."""
    node = out.grad_fn
    if type(node).__name__ == "_LaidOutBackward":
        ((node, _),) = node.next_functions
    return type(node).__name__ == "_BlockBackward"


def pair(case: BlockCase, **arguments) -> tuple[nn.Module, nn.Module]:
    block, _ = case.pair(**arguments)
    return block, copy.deepcopy(block)


@pytest.fixture
def one_by_one(monkeypatch) -> Callable[..., object]:
    """Calls a function with operators recorded one by one."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(recorded, "run", lambda *args, **kwargs: None)
            return function(*args)

    return call


def assert_equal(got: Results, expected: Results) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
        assert got[name].stride() == value.stride(), name


def step(block: nn.Module, x: Tensor) -> Results:
    return {**forward_and_gradients(block, x), **buffers(block)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_same_bits_as_one_by_one(case, layout, one_by_one):
    block, other = pair(case)
    x = case.images().contiguous(memory_format=layout)
    assert_equal(step(block, x), one_by_one(step, other, x))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_same_bits_in_autocast(case, layout, one_by_one):
    """But for what a block rounds once less: gradients of convolutions' weights; its input's, where a kernel adds it.

    Those of the input may differ by a rounding of both summands, whose norms are about that of the sum.
    """
    block, other = pair(case)

    def cast(block: nn.Module, x: Tensor) -> Results:
        with torch.autocast("cpu", torch.bfloat16):
            return step(block, x.bfloat16().contiguous(memory_format=layout))

    results, expected = cast(block, case.images()), one_by_one(cast, other, case.images())
    for name, parameter in block.named_parameters():
        if parameter.dim() == 4:
            gradient = results[f"d {name}"]
            assert gradient.dtype == torch.float32
            results[f"d {name}"] = gradient.bfloat16().float()
    if case.id.startswith("bottleneck"):
        dx, summed = results.pop("dx"), expected.pop("dx")
        assert dx.stride() == summed.stride()
        assert float((dx - summed).float().norm()) <= 2**-8 * float(summed.float().norm())
    assert_equal(results, expected)


def nodes(out: Tensor) -> dict[str, int]:
    """How many nodes of each kind are behind ``out``."""
    counts = {"_BlockBackward": 0}
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = type(node).__name__
        counts[name] = counts.get(name, 0) + 1
        waiting += [each for each, _ in node.next_functions]
    return counts


@pytest.mark.parametrize("autocast", [False, True])
def test_stem_and_blocks_of_a_network_are_nodes(autocast):
    """Its stem too, whose input needs no gradient, and is of another dtype in autocast."""
    model = ResNet50Fused(num_classes=3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(torch.randn(2, 3, 32, 32))
    counts = nodes(out)
    assert counts["_BlockBackward"] == 17
    assert not [name for name in counts if "ConvNorm" in name or "AffineAddRelu" in name]


@pytest.mark.parametrize("wanted", ["x", "conv1.weight", "conv2.weight", "bn3.bias", "downsample.1.weight"])
def test_some_gradients_only(wanted, one_by_one):
    block, other = pair(PROJECTION)

    def gradient(block: nn.Module) -> Tensor:
        x = PROJECTION.images().requires_grad_()
        out = block(x)
        of = x if wanted == "x" else block.get_parameter(wanted)
        return torch.autograd.grad(out.square().sum(), of)[0]

    assert torch.equal(gradient(block), one_by_one(gradient, other))


def test_an_input_without_gradient(one_by_one):
    block, other = pair(PROJECTION)

    def gradients(block: nn.Module) -> Results:
        block(PROJECTION.images()).square().sum().backward()
        return {name: parameter.grad for name, parameter in block.named_parameters()}

    assert_equal(gradients(block), one_by_one(gradients, other))


@pytest.mark.parametrize("case", [IDENTITY, PROJECTION], ids=lambda case: case.id)
def test_gradients_of_gradients(case, one_by_one):
    block, other = (each.double() for each in pair(case))
    before = buffers(block)

    def penalty(block: nn.Module) -> Results:
        x = case.images().double().requires_grad_()
        out = block(x)
        assert is_one_node(out) == (block is not other)
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        after = buffers(block)
        dx.square().sum().backward()
        assert_equal(buffers(block), after)  # computing again is no step of training
        return {"x": x.grad, **{name: parameter.grad for name, parameter in block.named_parameters()}}

    got, expected = penalty(block), one_by_one(penalty, other)
    assert not torch.equal(before["bn1.running_mean"], block.bn1.running_mean)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


class Shortened(nn.Module):
    """A block whose shortcut is made of its input, or of what it is given."""

    def __init__(self, shortcut: Callable[[Tensor], Tensor], gated: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.fc, self.shortcut = nn.Conv2d(8, 8, 1) if gated else None, shortcut
        fuse_(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.fc is not None:
            out = out * torch.sigmoid(self.fc(out.mean((2, 3), keepdim=True)))
        return torch.relu(out + self.shortcut(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "shortcut",
    [lambda x: F.avg_pool2d(x, 2, ceil_mode=True), lambda x: torch.exp(-x)[:, :, ::2, ::2]],
    ids=["pool", "exp"],
)
def test_gradients_that_can_be_differentiated_of_what_depends_on_each_other(shortcut, gated, training):
    """Each way to a tensor counts once: an operand may be made of another."""
    torch.manual_seed(0)
    block = Shortened(shortcut, gated).double().train(training)
    plain = unfuse_(copy.deepcopy(block))
    x = torch.randn(3, 8, 6, 4, dtype=torch.float64, requires_grad=True)

    def gradients(block: nn.Module) -> list[Tensor]:
        inputs = (x, *block.parameters())
        first = torch.autograd.grad(block(x * 1).square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), inputs)
        return [*first, *second]

    for got, wanted in zip(gradients(block), gradients(plain), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant, one_by_one):
    block, other = pair(PROJECTION)

    def checkpointed(block: nn.Module) -> Results:
        x = PROJECTION.images().requires_grad_()
        checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
        return {"x": x.grad, **gradients, **buffers(block)}

    assert_equal(checkpointed(block), one_by_one(checkpointed, other))


def test_batches_of_gradients():
    block, plain = IDENTITY.pair()
    x = IDENTITY.images()
    found = []
    for each in (block, plain.double()):
        each.train()
        images = x.to(next(each.parameters()).dtype).requires_grad_()
        y = each(images)
        several = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        found.append(torch.autograd.grad(y, [images, *each.parameters()], several, is_grads_batched=True))
        assert not any(gradient.requires_grad for gradient in found[-1])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3)


def test_a_parameter_changed_before_backward_is_an_error():
    block, _ = IDENTITY.pair()
    out = block(IDENTITY.images())
    with torch.no_grad():
        block.conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_twice_needs_the_graph_kept():
    block, _ = IDENTITY.pair()
    loss = block(IDENTITY.images()).sum()
    loss.backward(retain_graph=True)
    first = block.conv1.weight.grad.clone()
    loss.backward()
    assert torch.equal(block.conv1.weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_backward_uses_the_backend_of_forward(monkeypatch):
    block, _ = IDENTITY.pair()
    with use_backend("torch"):
        out = block(IDENTITY.images())
    forced = []
    original = dispatch.fused_launchers
    monkeypatch.setattr(
        dispatch, "fused_launchers", lambda *args: forced.append(dispatch.forced_backend()) or original(*args)
    )
    out.sum().backward()
    assert forced == ["torch"] * 3


# --- when not ---


def frozen(block: nn.Module) -> None:
    block.conv2.weight.requires_grad_(False)


def frozen_norm(block: nn.Module) -> None:
    block.bn2.eval()


def with_bias(block: nn.Module) -> None:
    block.conv2.bias = nn.Parameter(torch.ones(block.conv2.out_channels))


def recomputed(block: nn.Module) -> None:
    block.recompute = True


def cumulative(block: nn.Module) -> None:
    block.bn1.momentum = None


@pytest.mark.parametrize("change", [frozen, frozen_norm, with_bias, recomputed])
def test_otherwise_one_by_one(change):
    block, _ = IDENTITY.pair()
    assert is_one_node(block(IDENTITY.images()))
    change(block)
    out = block(IDENTITY.images())
    assert out.requires_grad
    assert not is_one_node(out)


def test_other_calls_are_recorded_one_by_one():
    block, _ = IDENTITY.pair()
    x = IDENTITY.images()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_one_node(block(x))  # the sum is of bfloat16 and float32
        assert is_one_node(block(x.bfloat16()))
    assert not is_one_node(block(x[:0]))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert not is_one_node(block(x))
    with torch.no_grad():
        assert block(x).grad_fn is None


def test_one_value_per_channel_is_an_error():
    block, _ = IDENTITY.pair()
    before = buffers(block)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        block(IDENTITY.images(1, 1, 1))
    assert_equal(buffers(block), before)


def test_cumulative_averages_are_updated_as_one_by_one(one_by_one):
    block, other = pair(IDENTITY)
    cumulative(block)
    cumulative(other)
    assert is_one_node(block(IDENTITY.images()))
    one_by_one(other, IDENTITY.images())
    assert_equal(buffers(block), buffers(other))


class Broadcast(nn.Module):
    """A shortcut of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8)
        fuse_(self)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) + shortcut)


def test_a_whole_network_is_not_one_node():
    """Recorded as one module, it would keep all activations until its last gradient."""
    model = torch.fx.symbolic_trace(unfuse_(ResNet50Fused(num_classes=3)))
    fuse_(model)
    out = model(torch.randn(2, 3, 32, 32))
    assert nodes(out)["_BlockBackward"] == 17


class Attended(nn.Module):
    """A block with an attention, behind the second convolution as in RegNet or the third as in SE-ResNeXt."""

    def __init__(self, last: bool, projects: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.shortcut = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)) if projects else None
        self.last = last
        fuse_(self)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        if not self.last:
            out = out * self.attention(out)
        out = self.bn3(self.conv3(out))
        if self.last:
            out = out * self.attention(out)
        return torch.relu(out + (x if self.shortcut is None else self.shortcut(x)))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_blocks_with_an_attention_are_nodes(last, projects, autocast, one_by_one):
    """Their gradients are rounded less often than those of their operators: errors are compared, of norms."""
    block = Attended(last, projects)
    other = copy.deepcopy(block)
    exact = unfuse_(copy.deepcopy(block)).double()
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    x = x.bfloat16() if autocast else x

    def results(block: nn.Module) -> Results:
        dtype = torch.float64 if block is exact else x.dtype
        y = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and block is not exact):
            out = block(y)
        assert nodes(out)["_BlockBackward"] == (0 if block is not got_of else 1 if last else 2)
        out.to(torch.promote_types(dtype, torch.float32)).square().sum().backward()
        return {"out": out.detach(), "x": y.grad, **{n: p.grad for n, p in block.named_parameters()}, **buffers(block)}

    got_of = block
    got, expected, right = results(block), one_by_one(results, other), results(exact)
    assert got.keys() == expected.keys() == right.keys()

    def error(value: Tensor, name: str) -> float:
        return float((value.double() - right[name].double()).norm()) / max(1.0, float(right[name].double().norm()))

    rounding = max(error(value, name) for name, value in expected.items())
    assert max(error(value, name) for name, value in got.items()) <= 2 * rounding  # see block_cases.py


def test_a_branch_that_nothing_depends_on_has_no_gradient(one_by_one):
    class Forgotten(Attended):
        def forward(self, x: Tensor) -> Tensor:
            out = torch.relu(self.bn1(self.conv1(x)))
            torch.relu(self.bn3(self.conv3(out)))
            return torch.relu(self.bn2(self.conv2(out)))

    block = Forgotten(False, False)
    other = copy.deepcopy(block)

    def gradients(block: nn.Module) -> Results:
        block(torch.ones(2, 16, 4, 4)).square().sum().backward()
        return {name: p.grad for name, p in block.named_parameters() if p.grad is not None}

    assert_equal(gradients(block), one_by_one(gradients, other))


def test_a_value_that_is_needed_twice_ends_no_segment():
    """The raw output and the affine of a norm go to a sum behind a module that is called."""

    class Pooled(Attended):
        def forward(self, x: Tensor) -> Tensor:
            out = torch.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            shortcut = self.attention[0](x)
            return torch.relu(out + self.shortcut(shortcut).expand_as(out))

    block = Pooled(False, True)
    other = copy.deepcopy(block)
    unfuse_(other)
    x = torch.randn(2, 16, 6, 6)
    torch.testing.assert_close(block(x), other(x))


def test_shortcuts_of_other_shapes(one_by_one):
    block = Broadcast()
    other = copy.deepcopy(block)
    x = torch.randn(2, 8, 5, 5)

    def gradients(block: nn.Module, shape: tuple[int, ...]) -> Results:
        shortcut = torch.ones(shape).requires_grad_()
        out = block(x, shortcut)
        assert is_one_node(out) == (shape == x.shape and block is not other)
        out.square().sum().backward()
        return {"shortcut": shortcut.grad, **buffers(block)}

    for shape in [(2, 8, 5, 5), (2, 8, 1, 1), (1, 8, 5, 5)]:
        assert_equal(gradients(block, shape), one_by_one(gradients, other, shape))


@pytest.mark.parametrize("stride", [2, (2,), [2, 2]], ids=str)
def test_strides_in_other_forms(stride):
    """As `torch.nn.functional.conv2d` takes them; ``torch.nn.Conv2d`` makes two integers of them."""
    block, plain = PROJECTION.pair()
    for each in (block, plain):
        each.conv2.stride = each.downsample[0].stride = stride
    x = PROJECTION.images()
    torch.testing.assert_close(block(x), plain(x))


def test_one_weight_in_two_convolutions(one_by_one):
    block, other = pair(IDENTITY)
    for each in (block, other):
        each.bn2.weight = each.bn1.weight
        each.bn2.bias = each.bn1.bias
    x = IDENTITY.images()
    assert_equal(step(block, x), one_by_one(step, other, x))


def test_gradients_that_two_steps_share():
    """One tensor, to be multiplied for one of them: nobody adds to it before."""
    shared, scale = torch.randn(2, 3, 4, 4), torch.tensor([1.0, 2.0, 3.0])
    before, scaled = shared.clone(), shared * scale[:, None, None]
    gradients = [Scaled(shared, scale), shared, None]
    assert torch.equal(own(gradients, 0), scaled)
    assert torch.equal(own(gradients, 1), shared)
    add(gradients, 1, Scaled(shared, scale))
    assert torch.equal(gradients[1], shared + scaled)
    add(gradients, 2, shared)
    assert gradients[2] is shared
    add(gradients, 0, shared)
    assert torch.equal(gradients[0], scaled + shared)
    assert torch.equal(shared, before)
    held = gradients[2]
    add(gradients, 2, shared.clone())
    assert gradients[2] is held  # nothing else refers to it by now
