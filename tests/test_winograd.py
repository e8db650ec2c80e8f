"""3x3 convolutions on the CPU by Winograd's algorithm: numerics, what is not finite, packed weights, and who serves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnext import fuse_
from resnext.kernels import (
    conv_affine,
    conv_stats,
    dense_conv,
    extension,
    grouped_conv2d,
    keep_packed,
    serving_backend,
    use_backend,
)

from . import fused_numerics, winograd_numerics
from .cases import WINOGRAD_CASES, Case, make_tensors
from .fused_numerics import FusedCase
from .numerics import rms_of

pytestmark = pytest.mark.skipif(extension.load() is not None, reason="the C++ extension is not built")

FUSED = [
    FusedCase("dense", 2, 48, 64, 14, 15),
    FusedCase("dense-odd-panels-of-images", 4, 44, 40, 9, 9),
    FusedCase("groups", 2, 128, 128, 20, 21, 2),
    FusedCase("odd-panels-within-an-image", 1, 40, 44, 19, 21),
    FusedCase("narrows-across-images", 3, 96, 41, 10, 18),
]
OPS = ("fwd", "dgrad", "wgrad")


def nhwc(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def test_the_cases_are_computed_so():
    for case in WINOGRAD_CASES + FUSED:
        ops = ("wgrad",) if case.id == "winograd-wgrad-in-blocks" else OPS
        assert all(winograd_numerics.serves(op, case, True) for op in ops), case.id


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.id)
def test_what_is_fused(capability, case):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        fused_numerics.check_conv_stats(extension, case, dtype, weight_channels_last=dtype == torch.float32)
        fused_numerics.check_conv_affine(extension, case, dtype)
    fused_numerics.check_conv_stats(extension, case, prologue=False, stats=False)
    fused_numerics.check_conv_affine(extension, case, relu=False, residual=False)


@pytest.mark.parametrize("case", WINOGRAD_CASES, ids=lambda case: case.id)
def test_errors_are_of_the_size_of_plain_sums(capability, case):
    """In root mean square at most twice those of PyTorch's own convolution and one rounding, as of whole blocks."""
    tensors = make_tensors(case, channels_last=True)
    x, weight, grad = (tensors[name].double() for name in ("x", "weight", "grad"))
    place = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], case.groups)

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        operands = (tensor.to(dtype) for tensor in (grad, x, weight))
        return list(torch.ops.aten.convolution_backward(*operands, *place, [True, True, False])[:2])

    def forward(dtype: torch.dtype) -> torch.Tensor:
        return F.conv2d(x.to(dtype), weight.to(dtype), padding=1, groups=case.groups)

    ours = [
        extension.fwd(tensors["x"], tensors["weight"], None, (1, 1), case.groups, True),
        extension.dgrad(tensors["grad"], tensors["weight"], case.input_shape[2:], (1, 1), case.groups, True),
        extension.wgrad(tensors["grad"], tensors["x"], (1, 1), case.groups, True),
    ]
    exact = [forward(torch.float64), *gradients(torch.float64)]
    plain = [forward(torch.float32), *gradients(torch.float32)]
    for op, actual, wanted, other in zip(OPS, ours, exact, plain, strict=True):
        assert rms_of(actual - wanted) <= 2 * rms_of(other - wanted) + 2.0**-24 * rms_of(wanted), op


def test_results_do_not_depend_on_threads_or_repetition(capability, restore_threads):
    case = FusedCase("threads", 3, 96, 96, 29, 33, 2)
    x, weight, dz = nhwc(3, 96, 29, 33), nhwc(96, 48, 3, 3), nhwc(3, 96, 29, 33)
    affine = fused_numerics.make_affine(96, torch.Generator().manual_seed(0))
    assert all(winograd_numerics.serves(op, case, True) for op in OPS)

    def everything() -> list[torch.Tensor]:
        z, mean, var = extension.conv_stats_fwd(x, affine, weight, (1, 1), 2, True, True)
        back = extension.conv_stats_bwd(dz, (z, mean, var, mean), x, affine, weight, (1, 1), 2, True, (True, True))
        return [z, mean, var, *back]

    torch.set_num_threads(1)
    wanted = everything()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(everything(), wanted, strict=True)), threads


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("place", [(0, 5, 0, 0), (1, 63, 19, 20), (1, 90, 6, 7)])
def test_what_is_not_finite_goes_no_further_than_in_plain_sums(capability, value, place):
    case = Case("poisoned", 2, 128, 128, 20, 21, 2, bias=True)
    assert all(winograd_numerics.serves(op, case, True) for op in OPS)
    results = []
    for channels_last in (True, False):  # in NCHW by plain sums
        tensors = make_tensors(case, channels_last=channels_last)
        x, weight, bias, grad = (tensors[name] for name in ("x", "weight", "bias", "grad"))
        x[place] = grad[place] = value
        results.append(
            [
                extension.fwd(x, weight, bias, (1, 1), 2, channels_last),
                extension.dgrad(grad, weight, (20, 21), (1, 1), 2, channels_last),
                extension.wgrad(grad, x, (1, 1), 2, channels_last),
            ]
        )
    for op, actual, wanted in zip(OPS, *results, strict=True):
        assert torch.equal(actual.isfinite(), wanted.isfinite()), op
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_statistics_beside_what_is_not_finite(capability):
    x, weight = nhwc(2, 128, 20, 21), nhwc(128, 64, 3, 3)
    assert extension.winograd_serves("product", x.shape, weight.shape, 2)
    x[1, 70, 3, 3] = float("nan")
    _, mean, var = extension.conv_stats_fwd(x, None, weight, (1, 1), 2, True, True)
    exact = F.conv2d(x.double(), weight.double(), padding=1, groups=2)
    assert mean[64:].isnan().all()
    assert var[64:].isnan().all()
    torch.testing.assert_close(mean[:64].double(), exact.mean((0, 2, 3))[:64], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(var[:64].double(), exact.var((0, 2, 3), correction=0)[:64], rtol=1e-4, atol=0)


def test_a_packed_weight_serves_until_the_weight_changes(capability):
    x, weight, shift = nhwc(1, 160, 8, 8), nhwc(170, 160, 3, 3), torch.randn(170)
    rest = (None, shift, None, True, (1, 1), 1, True)
    # too few pixels to pack for in every call
    assert not extension.winograd_serves("product", x.shape, weight.shape, 1)
    assert extension.winograd_serves("packed_product", x.shape, weight.shape, 1)
    exact = F.relu(F.conv2d(x.double(), weight.double(), shift.double(), padding=1))
    assert keep_packed(weight, x)
    first = dense_conv.conv_affine(x, weight, *rest)
    torch.testing.assert_close(first.double(), exact, rtol=1e-5, atol=1e-4)
    (packed,) = extension._KEPT[weight].packed.values()
    before = packed.clone()
    assert torch.equal(dense_conv.conv_affine(x, weight, *rest), first)
    assert extension._KEPT[weight].packed["winograd", 1] is packed
    assert torch.equal(packed, before)
    weight.zero_()
    assert not extension.is_kept(weight)
    assert torch.equal(dense_conv.conv_affine(x, weight, *rest), shift.relu()[None, :, None, None].expand_as(first))


@pytest.mark.parametrize(("size", "kinds"), [(8, ["filters"]), (40, [])])
def test_winograds_algorithm_keeps_weights_of_dense_convolutions_only(built, size, kinds):
    x, weight = nhwc(1, 96, size, size), nhwc(160, 48, 3, 3)
    extension.keep_packed(weight)
    for _ in range(2):
        y = conv_affine(x, weight, None, None, relu=False, groups=2)
        torch.testing.assert_close(y, F.conv2d(x, weight, padding=1, groups=2), rtol=1e-4, atol=1e-4)
    assert [kind for kind, _ in extension._KEPT[weight].packed] == kinds
    with torch.inference_mode():
        assert not keep_packed(nhwc(80, 48, 3, 3), x)


def test_packed_weights_are_the_same_for_every_instruction_set(built):
    weight = nhwc(70, 42, 3, 3)
    packed = {}
    for capability in ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"):
        try:
            extension.force_cpu_capability(capability)
        except RuntimeError:
            continue
        try:
            packed[capability] = torch.full((3, 16 * 42 * 32), float("nan"))
            extension._C.pack_winograd(weight, packed[capability])
        finally:
            extension.force_cpu_capability("")
    first = packed.pop("portable")
    assert first.isfinite().all()
    for capability, other in packed.items():
        torch.testing.assert_close(other, first, rtol=1e-6, atol=1e-6, msg=capability)


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "other-size": (
            (torch.zeros(8, 8, 3, 3), torch.zeros(1, 16)),
            r"pack_winograd: expected a contiguous float32 packed weight of shape \(1, 4096\), got Float \(1, 16\)",
        ),
        "1x1": (
            (torch.zeros(8, 8, 1, 1), torch.zeros(1, 4096)),
            r"pack_winograd: expected weight of shape \(8, 8, 3, 3\), got \(8, 8, 1, 1\)",
        ),
        "expanded": ((torch.zeros(8, 1, 3, 3).expand(8, 8, 3, 3), torch.zeros(1, 4096)), "pack_winograd: expected"),
    }.values(),
    ids=["other-size", "1x1", "expanded"],
)
def test_wrong_arguments_are_refused(built, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        extension._C.pack_winograd(*arguments)


def test_an_unknown_use_is_refused(built):
    with pytest.raises(RuntimeError, match="expected product, packed_product or gradient, got other"):
        extension.winograd_serves("other", (1, 64, 56, 56), (64, 64, 3, 3), 1)


@pytest.mark.parametrize(
    ("use", "shape", "channels", "groups", "expected"),
    [
        ("product", (8, 64, 56, 56), 64, 1, True),
        ("product", (1, 64, 14, 14), 64, 1, True),
        ("product", (8, 64, 56, 56), 3, 1, False),
        ("product", (1, 512, 14, 14), 512, 1, False),  # packing the weight takes longer than what it saves
        ("packed_product", (1, 512, 14, 14), 512, 1, True),
        ("gradient", (1, 512, 14, 14), 512, 1, True),
        ("product", (8, 512, 7, 7), 512, 1, False),  # a quarter of the tiles is outside the image
        ("product", (64, 512, 7, 7), 512, 1, True),
        ("gradient", (2, 512, 7, 7), 512, 1, True),
        ("gradient", (64, 512, 1, 2), 512, 1, False),
        ("product", (8, 512, 56, 56), 512, 16, False),  # 32 channels per group
        ("product", (8, 192, 28, 28), 192, 4, True),
        ("product", (1, 192, 28, 28), 192, 4, False),
        ("gradient", (1, 192, 28, 28), 192, 4, True),
        ("gradient", (8, 1008, 7, 7), 1008, 21, False),
        ("product", (1, 448, 28, 28), 448, 4, True),
        ("product", (1, 1232, 14, 14), 1232, 11, False),
    ],
)
def test_where_it_serves(built, use, shape, channels, groups, expected):
    assert extension.winograd_serves(use, shape, (channels,), groups) is expected


@pytest.mark.parametrize(
    ("capability", "use", "shape", "channels", "stride", "expected"),
    [
        ("avx512", "product", (8, 64, 56, 56), 64, 1, True),  # by Winograd's algorithm
        ("portable", "product", (8, 64, 56, 56), 64, 1, True),
        ("avx512", "product", (1, 512, 2, 2), 512, 1, True),
        ("avx512_bf16", "product", (8, 512, 14, 14), 512, 2, True),
        ("avx512", "product", (8, 512, 2, 2), 512, 2, False),  # to one pixel
        ("avx512", "packed_product", (8, 512, 2, 2), 512, 2, True),
        ("avx512", "gradient", (8, 512, 1, 1), 512, 1, True),
        ("avx512", "gradient", (8, 3, 224, 224), 32, 2, False),
        ("avx2", "product", (1, 512, 2, 2), 512, 1, False),
        ("avx2", "packed_product", (1, 512, 2, 2), 512, 1, True),
        ("avx2", "packed_product", (128, 512, 1, 1), 512, 1, False),
        ("avx2", "packed_product", (1, 512, 4, 4), 512, 2, False),
        ("avx2", "gradient", (8, 512, 14, 14), 512, 2, True),
        ("portable", "gradient", (8, 512, 14, 14), 512, 2, False),
    ],
)
def test_where_dense_convolutions_are_computed(monkeypatch, built, capability, use, shape, channels, stride, expected):
    monkeypatch.setattr(extension, "cpu_capability", lambda: capability)
    weight_shape = (channels, shape[1], 3, 3)
    assert dense_conv.serves(shape, weight_shape, (stride, stride), use) is expected


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize(
    ("size", "channels", "stride"),
    [(28, 64, 1), (8, 256, 1), (9, 48, 2), (1, 64, 1), (2, 64, 2), (5, 20, 1), (6, 3, 2)],
)
def test_dense_convolutions_by_the_public_operators(monkeypatch, built, name, size, channels, stride):
    """All by the extension, or the weight's gradient alone, or by a library."""
    monkeypatch.setattr(extension, "cpu_capability", lambda: name)
    torch.manual_seed(0)
    x, weight = nhwc(2, channels, size, size), nhwc(channels, channels, 3, 3)
    affine = (torch.randn(channels), torch.rand(channels) + 0.5, torch.randn(channels))
    results = []
    for backend, dtype in (("auto", torch.float32), ("torch", torch.float64)):
        tensors = [t.detach().to(dtype).requires_grad_() for t in (x, weight, affine[2])]
        with use_backend(backend):
            prologue = (affine[0].to(dtype), affine[1].to(dtype), tensors[2])
            z, mean, var = conv_stats(tensors[0], tensors[1], prologue, stride=stride)
            loss = (z * z).sum() + mean.sum() + (var * var).sum()
            results.append([z, mean, var, *torch.autograd.grad(loss, tensors)])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.detach().abs().max().item())


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (2, 2), (4, 1), (6, 2)])
@pytest.mark.parametrize("keeps", [False, True])
def test_dense_convolutions_in_inference(capability, size, stride, keeps):
    x, weight = nhwc(2, 64, size, size), nhwc(96, 64, 3, 3)
    if keeps:
        assert keep_packed(weight, x, stride)
    scale, shift = torch.rand(96) + 0.5, torch.randn(96)
    exact = F.conv2d(x.double(), weight.double(), padding=1, stride=stride)
    exact = F.relu(exact * scale.double()[:, None, None] + shift.double()[:, None, None])
    for _ in range(2):
        y = conv_affine(x, weight, scale, shift, stride=stride)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)


def test_a_library_serves_what_is_too_small(built, monkeypatch):
    monkeypatch.setattr(extension, "conv_affine", None)
    x, weight = nhwc(1, 64, 1, 1), nhwc(64, 64, 3, 3)
    y = conv_affine(x, weight, torch.ones(64), None)
    torch.testing.assert_close(y, F.relu(F.conv2d(x, weight, padding=1)), rtol=1e-4, atol=1e-4)


def test_what_is_said_to_serve_serves(built):
    x, small = nhwc(1, 192, 28, 28), nhwc(1, 192, 1, 1)
    weight = nhwc(192, 192, 3, 3)
    assert serving_backend(x, weight, padding=1, fused=True) == "cpu"
    assert serving_backend(small, weight, padding=1, fused=True) == "torch"


@pytest.mark.parametrize("width", [48, 112])
def test_wide_groups_by_the_public_operator(built, width):
    torch.manual_seed(0)
    x, weight = nhwc(2, 2 * width, 28, 28), nhwc(2 * width, width, 3, 3)
    y = grouped_conv2d(x, weight, groups=2)
    exact = F.conv2d(x.double(), weight.double(), padding=1, groups=2)
    assert rms_of(y - exact) <= 4e-7 * rms_of(exact)


class BasicBlock(nn.Module):
    """As of ResNet-18, with names that `fuse_` does not know by heart."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)


@pytest.mark.parametrize("training", [True, False])
def test_a_basic_block_of_a_resnet(built, training):
    torch.manual_seed(0)
    plain = BasicBlock(64).train(training)
    fused = BasicBlock(64).train(training)
    fused.load_state_dict(plain.state_dict())
    fuse_(fused)
    x = nhwc(2, 64, 16, 16)
    results = []
    for model, dtype in ((fused, torch.float32), (plain.double(), torch.float64)):
        taken = x.to(dtype).requires_grad_(training)
        with torch.set_grad_enabled(training):
            y = model(taken)
        results.append([y])
        if training:
            results[-1] += torch.autograd.grad(y.square().mean(), [taken, *model.parameters()])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.detach().abs().max().item())
