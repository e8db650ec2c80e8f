"""The compiled extension on the CPU: every instruction set of this machine, in every pass, layout and dtype."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import subprocess
from shutil import which

import pytest
import torch

from resnext.kernels import extension

from . import winograd_numerics
from .cases import CASES, WINOGRAD_CASES, Case, make_tensors
from .numerics import Exact, assert_close, exact

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("fwd", "dgrad", "wgrad")
LAYOUTS = (True, False)

# Shapes that tests/cases.py leaves out: blocks of pixels and channels that only larger images fill.
LARGER = [
    Case("gw1-two-blocks-of-pixels", 1, 24, 24, 4, 17, 24, (1, 2), True),
    Case("gw2-several-vectors", 1, 40, 40, 3, 19, 20, (2, 1)),
    Case("gw8-last-block-moved-back", 1, 48, 48, 5, 31, 6),
    Case("gw16-14-pixels", 1, 32, 32, 4, 14, 2, bias=True),
    Case("gw16-stride2-over-a-block", 1, 32, 32, 5, 33, 2, (2, 2)),
    Case("gw32-two-vectors", 1, 64, 64, 3, 29, 2, (1, 2)),
    Case("gw48-three-vectors", 1, 96, 96, 3, 15, 2),
    Case("wgrad-in-chunks", 3, 16, 16, 31, 33, 4),
    Case("dense-in-parts", 1, 266, 140, 5, 6, 1, bias=True),
    Case("wide-groups-in-parts", 2, 300, 272, 4, 7, 2, (2, 1), True),
    Case("gw3-pairs-across-groups", 3, 30, 30, 6, 9, 10, (1, 2), True),
    Case("gw12-merged-by-two", 2, 60, 60, 5, 8, 5, (2, 1)),
    Case("gw5-to-3-channels", 2, 50, 30, 7, 6, 10),
    Case("narrow-in-several-strips", 2, 32, 32, 21, 57, 8),
    Case("stacked-images", 13, 64, 96, 4, 5, 1, bias=True),
    Case("stacked-images-stride2", 11, 96, 64, 5, 7, 2, (2, 2)),
    Case("stacked-narrow-groups", 17, 128, 128, 3, 3, 32, (1, 1)),
    *WINOGRAD_CASES,
]


def compute(op: str, case: Case, tensors: dict, channels_last: bool) -> torch.Tensor:
    if op == "fwd":
        arguments = (tensors["x"], tensors["weight"], tensors["bias"], case.stride, case.groups, channels_last)
        return extension.fwd(*arguments)
    if op == "dgrad":
        size = case.input_shape[2:]
        return extension.dgrad(tensors["grad"], tensors["weight"], size, case.stride, case.groups, channels_last)
    return extension.wgrad(tensors["grad"], tensors["x"], case.stride, case.groups, channels_last)


@functools.cache
def oracle(op: str, case: Case, dtype: torch.dtype, integers: bool, winograd: bool = False) -> Exact:
    """The expected result, the same for every instruction set, and for every layout unless by Winograd's algorithm."""
    return exact(op, case, make_tensors(case, dtype, integers=integers), winograd)


def check_random_values(op: str, case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    tensors = make_tensors(case, dtype, channels_last=channels_last)
    winograd = winograd_numerics.serves(op, case, channels_last)
    assert_close(compute(op, case, tensors, channels_last), oracle(op, case, dtype, False, winograd))


@pytest.mark.parametrize("case", CASES + LARGER, ids=lambda case: case.id)
def test_small_integers_are_exact_and_rounded_once(capability, case):
    for dtype in DTYPES:
        for channels_last in LAYOUTS:
            tensors = make_tensors(case, dtype, channels_last=channels_last, integers=True)
            for op in OPS:
                wanted = oracle(op, case, dtype, True).value.to(dtype)
                actual = compute(op, case, tensors, channels_last)
                assert torch.equal(actual, wanted), f"{op}, {dtype}, channels_last={channels_last}"


@pytest.mark.parametrize("case", CASES + LARGER, ids=lambda case: case.id)
def test_random_values_are_within_the_derived_bound(capability, case):
    for channels_last in LAYOUTS:
        for op in OPS:
            check_random_values(op, case, torch.float32, channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES[::4] + WINOGRAD_CASES[:2], ids=lambda case: case.id)
def test_random_16_bit_values_are_within_the_derived_bound(capability, case, dtype):
    for channels_last in LAYOUTS:
        for op in OPS:
            check_random_values(op, case, dtype, channels_last)


@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["NHWC", "NCHW"])
def test_output_layout(built, channels_last):
    case = Case("layout", 2, 16, 32, 6, 5, 4)
    tensors = make_tensors(case, channels_last=channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert compute("fwd", case, tensors, channels_last).is_contiguous(memory_format=memory_format)
    assert compute("dgrad", case, tensors, channels_last).is_contiguous(memory_format=memory_format)
    assert compute("wgrad", case, tensors, channels_last).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_is_widened_and_rounded_right(capability, dtype):
    """A 1x1 depthwise image is a product with the middle tap: all 65536 bit patterns, and all kinds of rounding."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(4096, 16, 1, 1)
    weight = torch.zeros(16, 1, 3, 3, dtype=dtype)
    weight[:, 0, 1, 1] = torch.tensor([1.0, -1.0, 1 / 3, 3.0, 1e-3, 700.0, 0.7, 5e-5] * 2).to(dtype)
    y = extension.fwd(x, weight, None, (1, 1), 16, True)
    wanted = (x.float() * weight[:, 0, 1, 1].float().view(1, 16, 1, 1)).to(dtype)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8, 16, 24])
def test_nan_and_inf_stay_in_their_group(capability, width, poison, dtype):
    groups = 5
    case = Case("isolation", 2, groups * width, groups * width, 5, 9, groups, (1, 2))
    dirty = slice(2 * width, 3 * width)
    clean = torch.arange(groups * width).div(width, rounding_mode="floor") != 2
    for channels_last in LAYOUTS:
        tensors = make_tensors(case, dtype, channels_last=channels_last)
        poisoned = {name: None if t is None else t.clone() for name, t in tensors.items()}
        poisoned["x"][:, dirty] = poison
        poisoned["grad"][:, dirty] = poison
        for op in OPS:
            wanted, actual = (compute(op, case, each, channels_last) for each in (tensors, poisoned))
            axis = 0 if op == "wgrad" else 1
            keep = clean.nonzero().flatten()
            assert torch.equal(actual.index_select(axis, keep), wanted.index_select(axis, keep)), op
            assert not actual.narrow(axis, 2 * width, width).isfinite().all(), op


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("columns", [11, 12])
def test_an_infinite_pixel_meets_its_own_taps_only(capability, columns, width, stride, dtype):
    """With an odd number of columns, the last pixel of a row has no neighbour to be multiplied with."""
    case = Case("one-pixel", 1, 32, 32, 4, columns, 32 // width, stride)
    tensors = make_tensors(case, dtype, channels_last=True, integers=True)
    for column in (0, 5, columns - 2, columns - 1):
        tensors["x"][0, :, 1, column] = float("inf")
        tensors["grad"].abs_().add_(1)  # neither zeros, which make NaN, nor two signs
        wanted = exact("wgrad", case, tensors).value
        actual = compute("wgrad", case, tensors, True)
        assert torch.equal(actual.isfinite(), wanted.isfinite()), column
        tensors["x"][0, :, 1, column] = 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("width", [4, 16, 64])
def test_results_do_not_depend_on_threads_or_repetition(capability, restore_threads, width, stride, dtype):
    large = Case("threads", 3, 64, 64, 19, 23, 64 // width, stride)
    small = Case("threads-small", 9, 128, 128, 5, 6, 128 // width, stride)
    for case, channels_last in itertools.product((large, small), LAYOUTS):
        tensors = make_tensors(case, dtype, channels_last=channels_last)
        for op in OPS:
            torch.set_num_threads(1)
            wanted = compute(op, case, tensors, channels_last)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(compute(op, case, tensors, channels_last), wanted), (op, threads)


def test_inputs_that_start_in_the_middle_of_a_vector(capability):
    case = Case("misaligned", 1, 20, 20, 6, 7, 5)
    tensors = make_tensors(case, channels_last=False)

    def shifted(tensor):
        if tensor is None:
            return None
        return torch.cat([torch.zeros(1), tensor.flatten()])[1:].view_as(tensor)

    for op in OPS:
        moved = {name: shifted(tensor) for name, tensor in tensors.items()}
        assert torch.equal(compute(op, case, moved, False), compute(op, case, tensors, False)), op


def test_capability_can_be_forced_and_released(capability):
    assert extension._C.cpu_capability() == capability
    extension.force_cpu_capability("")
    assert extension._C.cpu_capability() in ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable")


def test_unknown_capability_is_refused(built):
    before = extension._C.cpu_capability()
    expected = "expected amx_bf16, avx512_bf16, avx512, avx2, portable or an empty name"
    with pytest.raises(RuntimeError, match=rf"{expected}.*got 'mmx'"):
        extension.force_cpu_capability("mmx")
    assert extension._C.cpu_capability() == before


def _fwd(**changes):
    arguments = {
        "x": torch.zeros(2, 8, 5, 5),
        "weight": torch.zeros(8, 4, 3, 3),
        "bias": None,
        "out": torch.zeros(2, 8, 5, 5),
        "stride_h": 1,
        "stride_w": 1,
        "groups": 2,
        "channels_last": False,
    }
    extension._C.grouped_conv2d_fwd(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(8, 5, 5)}, r"expected input with 4 dimensions .*got shape \(8, 5, 5\)"),
        ({"x": torch.zeros(0, 8, 5, 5)}, r"at least one element per dimension, got shape \(0, 8, 5, 5\)"),
        ({"x": torch.zeros(2, 8, 5, 5).double()}, "expected input of dtype Float, Half or BFloat16, got Double"),
        ({"weight": torch.zeros(8, 4, 3, 3).half()}, "expected weight of the dtype of input, Float, got Half"),
        ({"weight": torch.zeros(8, 4, 5, 5)}, r"expected weight of shape \(8, 4, 3, 3\), got \(8, 4, 5, 5\)"),
        ({"groups": 3}, "expected groups that divide both channel counts, got groups=3 for 8 input and 8 output"),
        ({"groups": 0}, "expected groups that divide both channel counts, got groups=0"),
        ({"groups": 4}, r"expected weight of shape \(8, 2, 3, 3\), got \(8, 4, 3, 3\)"),
        ({"stride_h": 3}, r"expected strides of 1 or 2, got \(3, 1\)"),
        ({"out": torch.zeros(2, 8, 4, 5)}, r"expected output of shape \(2, 8, 5, 5\), got \(2, 8, 4, 5\)"),
        ({"bias": torch.zeros(7)}, r"expected contiguous bias of shape \(8\), got \(7\)"),
        ({"bias": torch.zeros(16)[::2]}, r"expected contiguous bias of shape \(8\)"),
        ({"channels_last": True}, r"expected input dense in channels_last layout, got strides \(200, 25, 5, 1\)"),
        ({"weight": torch.zeros(4, 8, 3, 3).transpose(0, 1)}, "expected weight dense in contiguous layout"),
    ],
)
def test_wrong_arguments_are_refused(built, changes, message):
    with pytest.raises(RuntimeError, match=f"grouped_conv2d: .*{message}"):
        _fwd(**changes)


def test_backward_operators_check_too(built):
    x, grad, weight = torch.zeros(2, 8, 6, 6), torch.zeros(2, 8, 3, 3), torch.zeros(8, 4, 3, 3)
    with pytest.raises(RuntimeError, match=r"expected grad of shape \(2, 8, 6, 6\), got \(2, 8, 3, 3\)"):
        extension._C.grouped_conv2d_dgrad(grad, weight, x, 1, 1, 2, False)
    with pytest.raises(RuntimeError, match=r"expected output of shape \(8, 4, 3, 3\), got \(8, 8, 3, 3\)"):
        extension._C.grouped_conv2d_wgrad(grad, x, torch.zeros(8, 8, 3, 3), 2, 2, 2, False)


def test_an_absent_extension_is_a_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not built" in extension.load.__wrapped__()


@pytest.mark.parametrize("error", [ImportError, AttributeError])  # the latter: PyTorch publishes no DLPack functions
def test_a_broken_extension_is_an_error(built, monkeypatch, error):
    def fail(name):
        raise error("undefined symbol: nothing_of_the_kind")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match=r"resnext\._C: expected an extension that loads .*undefined symbol"):
        extension.load.__wrapped__()


def test_only_the_stable_abi_is_used(built):
    """One binary serves later versions only if nothing of libtorch but its C interface is referenced."""
    if which("nm") is None:
        pytest.skip("needs nm (binutils)")
    path = importlib.util.find_spec("resnext._C").origin
    assert ".abi3." in path
    listing = subprocess.run(["nm", "-D", "--undefined-only", path], check=True, capture_output=True, text=True).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    mangled = [
        s for s in symbols if s.startswith(("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch"))
    ]
    assert mangled == []
