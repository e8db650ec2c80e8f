"""Blocks that are given NCHW on the CPU compute in channels_last; the caller must not notice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from resnext import create_model, fuse_, fusion, unfuse_
from resnext.blocks import Bottleneck
from resnext.kernels import dispatch, extension, laid_out, use_backend

NEEDS_EXTENSION = pytest.mark.skipif(extension.load() is not None, reason="the C++ extension is not built")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CHANNELS_LAST = torch.channels_last


@pytest.fixture
def turned(monkeypatch) -> list[bool]:
    """The layouts that were asked for."""
    found = []
    monkeypatch.setattr(fusion, "laid_out", lambda x, layout: found.append(layout) or laid_out(x, layout))
    return found


def pair(stride: int = 1) -> tuple[nn.Module, nn.Module]:
    """A block with random statistics, and the same without fusing, in float64."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(32, 32, 1, stride, bias=False), nn.BatchNorm2d(32)) if stride > 1 else None
    block = Bottleneck(32, 8, stride, shortcut, groups=4)
    for bn in block.modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.uniform_(bn.running_mean)
            nn.init.uniform_(bn.running_var, 0.5, 2)
            nn.init.uniform_(bn.weight)
    return block, unfuse_(copy.deepcopy(block)).double()


def images(*size: int) -> torch.Tensor:
    return torch.randn(*(size or (2, 32, 9, 7)), generator=torch.Generator().manual_seed(1))


class Views(nn.Module):
    """Asks for memory in NCHW in the middle and at the end: by itself, in a module and in a converted one."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)
        self.middle = middle

    def forward(self, x):
        x = self.middle(torch.relu(self.bn1(self.conv1(x))))
        x = torch.relu(self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(x))))))
        return x.view(-1, 64 * 9 * 7), torch.as_strided(x, (2, 3), (5, 1))


class Flat(nn.Module):
    def forward(self, x):
        return (x.view(x.size(0), -1) * 2).view(x.size(0), 64, 9, 7)


class FlatDropout(nn.Module):
    """By its name a dropout."""

    def forward(self, x):
        return x.view(x.size(0), -1).view(x.size(0), 64, 9, 7) if self.training else x


class FlatChain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.flat = nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), Flat()

    def forward(self, x):
        return self.flat(torch.relu(self.bn(self.conv(x))))


@NEEDS_EXTENSION
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("middle", [nn.Identity, Flat, FlatDropout, FlatChain], ids=lambda kind: kind.__name__)
def test_what_asks_for_memory_gets_nchw(turned, middle, training):
    torch.manual_seed(0)
    model = Views(middle()).train(training)
    plain = copy.deepcopy(model)
    fuse_(model)
    x = images()
    with torch.set_grad_enabled(training):
        results, wanted = model(x), plain(x)
    assert turned[:1] == [True]
    for got, expected in zip(results, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@NEEDS_EXTENSION
def test_what_takes_a_modules_place_gets_nchw():
    torch.manual_seed(0)
    model = Views(nn.Hardtanh()).eval()
    fuse_(model)
    model.middle = Flat()
    plain = unfuse_(copy.deepcopy(model))
    with torch.no_grad():
        for got, expected in zip(model(images()), plain(images()), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@NEEDS_EXTENSION
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("stride", [1, 2])
def test_nchw_goes_in_and_comes_out(turned, stride, training):
    block, plain = (each.train(training) for each in pair(stride))
    x = images().requires_grad_(training)
    y = block(x)
    assert turned == [True, False]
    other = images().double().requires_grad_(training)
    wanted = plain(other)
    assert y.stride() == wanted.stride()
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
    if not training:
        return
    y.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(x.grad.double(), other.grad, rtol=1e-3, atol=1e-3)
    assert x.grad.is_contiguous() == other.grad.is_contiguous()
    for (name, mine), theirs in zip(block.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3, msg=name)
        assert mine.grad.is_contiguous(), name


@NEEDS_EXTENSION
def test_what_is_kept_for_backward():
    """As in channels_last: nothing twice."""
    block, _ = pair()
    block.train()
    kept = []
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        found = {}
        x = images().contiguous(memory_format=layout).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, found=found: found.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
        ):
            out = block(x)
        found.pop(out.data_ptr(), None)  # the next block's input
        kept.append(sorted(tensor.numel() for tensor in found.values()))
    assert kept[0] == kept[1]


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    ("model", "x", "backend"),
    [
        (lambda block: block, images().contiguous(memory_format=CHANNELS_LAST), "auto"),
        (lambda block: block, images(2, 32, 1, 1), "auto"),
        (lambda block: block, images(0, 32, 5, 5), "auto"),
        (lambda block: block.double(), images().double(), "auto"),
        (lambda block: block.to(memory_format=CHANNELS_LAST), images(), "auto"),
        (lambda block: block, images(), "torch"),
    ],
    ids=["channels_last", "one-pixel", "empty", "float64", "weights", "torch"],
)
def test_what_is_computed_as_it_comes(turned, model, x, backend):
    block, plain = (model(each).eval().to(x.dtype) for each in pair())
    with torch.no_grad(), use_backend(backend):
        y, wanted = block(x), plain(x)
    assert turned == []
    assert y.stride() == wanted.stride()
    assert y.dtype == wanted.dtype


@pytest.fixture
def products(monkeypatch) -> Iterator[Callable[[bool], None]]:
    """Sets whether the CPU's products in 16 bits are ours."""

    def set_(ours: bool) -> None:
        monkeypatch.setattr(dispatch, "_products_by_cpu", lambda dtype: ours)
        dispatch._fused_launchers.cache_clear()

    yield set_
    dispatch._fused_launchers.cache_clear()


@NEEDS_EXTENSION
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_blocks_are_turned_where_their_products_are_ours(turned, products, autocast, ours, dtype):
    products(ours)
    block, _ = pair()
    given = torch.float32 if autocast else dtype
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        y = block.eval().to(given)(images().to(given))
    assert (y.dtype, y.is_contiguous()) == (dtype, True)
    assert turned == ([True, False] if ours else [])


@NEEDS_EXTENSION
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_network_is_turned_once(turned, training):
    model = create_model("resnet18", num_classes=5).train(training)
    plain = unfuse_(copy.deepcopy(model)).double()
    x = images(4, 3, 64, 64)
    with torch.set_grad_enabled(training):
        y, wanted = model(x), plain(x.double())
    assert turned == [True]
    torch.testing.assert_close(y.double(), wanted, rtol=1e-3, atol=1e-3)
    if training:
        y.square().sum().backward()
        wanted.square().sum().backward()
        for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert float((mine.grad.double() - theirs.grad).norm()) <= 1e-3 * float(theirs.grad.norm()) + 1e-5, name
            assert mine.grad.is_contiguous(), name


class Pyramid(nn.Module):
    """Returns what its blocks do."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.block, self.middle = pair()[0], nn.Sequential(nn.Hardtanh(), nn.Dropout(0.5))
        self.last = pair(2)[0]

    def forward(self, x):
        first = self.block(torch.relu(self.bn(self.conv(x))))
        second = self.middle(first)
        return {"first": first, "second": second}, self.last(second)


def see(model: nn.Module, *names: str) -> list[bool]:
    """Notes whether what modules are given, and what they return, is in NCHW."""
    seen: list[bool] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out: seen.extend(each.is_contiguous() for each in (*args, out))
        )
    return seen


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    "names", [(), ("block",), ("block.conv2",), ("middle",), ("middle.0",), ("block", "middle.1", "last.bn2")], ids=str
)
def test_what_listens_within_a_network_hears_nchw(turned, names):
    model = Pyramid().eval()
    plain = unfuse_(copy.deepcopy(model))
    fuse_(model)
    seen, x = see(model, *names), images()
    with torch.no_grad():
        results, wanted = model(x), plain(x)
    assert turned[:1] == [True]
    assert seen == [True, True] * len(names)
    for got, expected in zip((*results[0].values(), results[1]), (*wanted[0].values(), wanted[1]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert got.stride() == expected.stride()


@NEEDS_EXTENSION
@pytest.mark.parametrize("inner", [True, False])
def test_a_replaced_block_gets_nchw(inner):
    model = Pyramid().eval()
    fuse_(model)
    if inner:
        model.block.relu = Flat()  # views, at one place
        model.block.relu.forward = lambda x: torch.relu(x.view(-1)).view(x.shape)
    else:
        model.block = nn.Sequential(Flat(), nn.Identity())
        model.block[0].forward = lambda x: torch.relu(x.view(-1)).view(x.shape)
    plain = unfuse_(copy.deepcopy(model))
    with torch.no_grad():
        results, wanted = model(images()), plain(images())
    torch.testing.assert_close(results[1], wanted[1], rtol=1e-4, atol=1e-4)


@NEEDS_EXTENSION
def test_a_network_with_a_weight_in_channels_last_is_not_turned(turned):
    model = Pyramid().eval()
    model.block.conv2.to(memory_format=CHANNELS_LAST)
    plain = unfuse_(copy.deepcopy(model))
    fuse_(model)
    with torch.no_grad():
        assert model(images())[1].stride() == plain(images())[1].stride()
    assert turned == []


class WritesToItsInput(nn.Module):
    """Pre-activation, in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(32, 32, 1, bias=False), nn.Conv2d(32, 32, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(32), nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(x)
        out = torch.relu(self.norm1(self.first(x)))
        return torch.relu(self.norm2(self.second(out)) + x)


@NEEDS_EXTENSION
def test_an_input_that_is_written_to_is_not_copied(turned):
    plain = WritesToItsInput().eval()
    module = copy.deepcopy(plain)
    assert fuse_(module).fused
    x, other = images(), images()
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain(other))
    assert turned == []
    assert torch.equal(x, other)


@NEEDS_EXTENSION
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_compiler_does_the_same(dynamic):
    torch.compiler.reset()
    block, _ = pair(2)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 32, 9, 7)
        y = compiled(x)
        assert torch.equal(y, block(x))
        assert y.is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "size", [(2, 3, 5, 7), (1, 100, 4, 3), (3, 64, 1, 33), (2, 16, 33, 1), (1, 2, 1, 300)], ids=str
)
def test_laid_out_copies(capability, dtype, size):
    x = images(*size).to(dtype)
    for channels_last, layout in ((True, CHANNELS_LAST), (False, torch.contiguous_format)):
        for given in (x, x.contiguous(memory_format=CHANNELS_LAST), torch.cat([x, x], 3)[..., : size[3]]):
            y = laid_out(given, channels_last)
            assert torch.equal(y, x)
            assert y.is_contiguous(memory_format=layout)
            assert (y is given) == given.is_contiguous(memory_format=layout)


def test_laid_out_passes_gradients_on():
    x = images(2, 3, 4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: laid_out(x, True) ** 2, x)
    assert torch.autograd.gradgradcheck(lambda x: laid_out(x, True) ** 2, x)


def test_laid_out_of_other_tensors():
    assert laid_out(torch.ones(0, 3, 4, 5), True).shape == (0, 3, 4, 5)
    assert laid_out(torch.ones(2, 3, 4, 5, dtype=torch.int64), True).is_contiguous(memory_format=CHANNELS_LAST)
    with pytest.raises(ValueError, match=r"laid_out: expected x \(N, C, H, W\), got \(3, 4\)"):
        laid_out(torch.ones(3, 4), True)


class Spread(nn.Module):
    """Five dimensions in the middle."""

    def __init__(self, spread: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64)
        self.spread = spread

    def forward(self, x):
        x = self.spread(torch.relu(self.bn1(self.conv1(x)))).sum(1)
        return torch.relu(self.bn2(self.conv2(x)))


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    ("spread", "stays"),
    [
        (lambda x: x.view(x.size(0), 2, 32, x.size(2), x.size(3)), True),
        (lambda x: x.reshape((x.size(0), 2, 32, x.size(2), x.size(3))), True),
        (lambda x: torch.stack(x.chunk(2, 1), 1), True),
        (lambda x: torch.unflatten(x, 1, (2, 32)), True),
        (lambda x: x[:, None, :32], False),
        (lambda x: x.unsqueeze(1)[:, :, :32], False),
    ],
    ids=["view", "reshape", "stack", "unflatten", "index", "unsqueeze"],
)
def test_five_dimensions_stay_in_nchw(turned, spread, stays):
    torch.manual_seed(0)
    model = Spread(spread).eval()
    plain = copy.deepcopy(model)
    assert fuse_(model).fused
    with torch.no_grad():
        torch.testing.assert_close(model(images()), plain(images()), rtol=1e-4, atol=1e-4)
    assert (turned == []) == stays
