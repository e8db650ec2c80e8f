"""The Triton kernels against the float64 oracle: compiled on a GPU, otherwise in Triton's interpreter.

The interpreter must be chosen before Triton is first imported. Without a GPU, `test_in_the_interpreter` therefore runs
this file in a process of its own, and the tests below are skipped in this one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnext.kernels import config as settings
from resnext.kernels import reference
from resnext.kernels.config import ConvProblem, StripsConfig, TapsConfig

from .cases import CASES, Case, make_tensors
from .interpreter import DEVICE, RUNS_HERE, arithmetic, here, not_here, run_tests
from .numerics import assert_close, exact

pytest.importorskip("triton")

if RUNS_HERE:
    from resnext.kernels import grouped_conv

OPS = ("fwd", "dgrad", "wgrad")
BY_ID = {case.id: case for case in CASES}


@not_here
def test_in_the_interpreter():
    run_tests(__file__, timeout=1200)


def describe(op: str, case: Case, dtype: torch.dtype, channels_last: bool = True) -> ConvProblem:
    sizes = (case.batch, case.in_channels, case.out_channels, case.height, case.width)
    return ConvProblem(op, *sizes, case.stride, case.groups, dtype, DEVICE, channels_last)


def on_device(tensors: dict) -> dict:
    return {name: None if tensor is None else tensor.to(DEVICE) for name, tensor in tensors.items()}


def compute(op, case, tensors, *, channels_last=True, **options):
    """One pass through the Triton launcher; float32 without TF32 unless the options say otherwise."""
    options = {"allow_tf32": False} | options
    t = on_device(tensors)
    if op == "fwd":
        arguments = (t["x"], t["weight"], t["bias"], case.stride, case.groups, channels_last)
    elif op == "dgrad":
        arguments = (t["grad"], t["weight"], case.input_shape[2:], case.stride, case.groups, channels_last)
    else:
        arguments = (t["grad"], t["x"], case.stride, case.groups, channels_last)
    return getattr(grouped_conv, op)(*arguments, **options)


def check(op, case, dtype, **options):
    tensors = make_tensors(case, dtype, channels_last=True)
    # The interpreter stores bfloat16 by cutting digits off, an error of up to one step instead of half a step.
    out_roundings = arithmetic(dtype).out_roundings
    assert_close(compute(op, case, tensors, **options), exact(op, case, tensors), out_roundings=out_roundings)


def forms(op: str, case: Case, dtype: torch.dtype) -> list[StripsConfig | TapsConfig]:
    """The heuristic's settings of every form that serves a case."""
    problem = describe(op, case, dtype)
    taps = settings.taps_config(problem)
    return [settings.strips_config(problem), taps] if settings.fits_strips(problem) else [taps]


@here
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_case_in_every_form(op, case):
    for config in forms(op, case, torch.float32):
        check(op, case, torch.float32, config=config)


@here
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "case", ["gw3-not-a-power-of-two", "gw8-stride2-resnext50-stage2", "gw40-odd-blocks", "gw24-regnet"]
)
def test_half_precision(op, case, dtype):
    for config in forms(op, BY_ID[case], dtype):
        check(op, BY_ID[case], dtype, config=config)


@here
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", ["gw4-resnext50-stage1", "gw16-stride2-odd", "gw56-regnet16"])
def test_tf32(op, case):
    tensors = make_tensors(BY_ID[case], channels_last=True)
    for config in forms(op, BY_ID[case], torch.float32):
        result = compute(op, BY_ID[case], tensors, config=config, allow_tf32=True)
        assert_close(result, exact(op, BY_ID[case], tensors), u_acc=2.0**-11)


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", ["gw1-depthwise", "gw6-padded-lanes", "widens-in-group", "stride-2-1"])
def test_small_integers_are_exact(op, case, dtype):
    """Sums of small integers are exact in float32, and small enough here for the output dtype to hold them."""
    case = BY_ID[case]
    tensors = make_tensors(case, dtype, channels_last=True, integers=True)
    if dtype == torch.bfloat16:  # 8 significant bits: with -1, 0 and 1 no sum passes 256
        tensors = {name: None if t is None else t.sign() for name, t in tensors.items()}
    wanted = exact(op, case, tensors).value
    assert wanted.abs().max() <= {torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8}[dtype]
    for config in forms(op, case, dtype):
        assert torch.equal(compute(op, case, tensors, config=config).cpu().double(), wanted)


def with_wgrads_own(variants: dict, wgrad_variants: dict) -> list:
    """(op, changes) of every pass with `variants`, and of the weight gradient with its own as well."""
    pairs = [(op, name, changes) for op in OPS for name, changes in variants.items()]
    pairs += [("wgrad", name, changes) for name, changes in wgrad_variants.items()]
    return [pytest.param(op, changes, id=f"{op}-{name}") for op, name, changes in pairs]


STRIPS_VARIANTS = {
    "strip-1": {"strip": 1},
    "strip-2": {"strip": 2},
    "strip-4": {"strip": 4},
    "band-1": {"band": 1},
    "band-not-a-divisor": {"band": 5},
    "band-whole-image": {"band": 100},
    "block_m-32-num_warps-2-num_stages-3": {"block_m": 32, "num_warps": 2, "num_stages": 3},
    "merged-1": {"merged": 1},
    "merged-3-ragged-last-tile": {"merged": 3},
}
WGRAD_STRIPS_VARIANTS = {"splits-1": {"splits": 1}, "splits-more-than-work": {"splits": 20}}


@here
@pytest.mark.parametrize(("op", "changes"), with_wgrads_own(STRIPS_VARIANTS, WGRAD_STRIPS_VARIANTS))
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=["stride1", "stride2"])
def test_every_setting_of_the_strips_form(op, stride, changes):
    case = Case("gw4", 1, 16, 16, 9, 7, 4, stride, bias=True)
    config = replace(settings.strips_config(describe(op, case, torch.float32)), **changes)
    check(op, case, torch.float32, config=config)


TAPS_VARIANTS = {
    "block_m-16": {"block_m": 16},
    "block_m-128-num_warps-8-num_stages-1": {"block_m": 128, "num_warps": 8, "num_stages": 1},
    "block_n-16": {"block_n": 16},
    "block_n-32": {"block_n": 32},
    "block_k-16": {"block_k": 16},
    "block_k-32": {"block_k": 32},
}
WGRAD_TAPS_VARIANTS = {"splits-3": {"splits": 3, "block_m": 16}, "splits-more-than-work": {"splits": 4}}


@here
@pytest.mark.parametrize(("op", "changes"), with_wgrads_own(TAPS_VARIANTS, WGRAD_TAPS_VARIANTS))
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)], ids=["stride1", "stride2x1"])
def test_every_setting_of_the_taps_form(op, stride, changes):
    case = Case("gw40", 1, 80, 80, 5, 6, 2, stride)
    config = replace(settings.taps_config(describe(op, case, torch.float32)), **changes)
    check(op, case, torch.float32, config=config)


@here
@pytest.mark.parametrize("merged", [1, 2, 3])
@pytest.mark.parametrize("op", OPS)
def test_taps_with_merged_groups(op, merged):
    case = Case("gw4", 1, 16, 16, 5, 6, 4, (2, 1), bias=True)
    config = replace(settings.taps_config(describe(op, case, torch.float32)), merged=merged)
    check(op, case, torch.float32, config=config)


ISOLATION_CASES = [
    Case("gw4-stride1", 1, 16, 16, 6, 7, 4, bias=True),
    Case("gw2-stride2", 1, 16, 16, 6, 7, 8, (2, 2)),
    Case("gw4-stride-2-1", 1, 16, 16, 6, 7, 4, (2, 1)),
    Case("widens", 1, 8, 16, 5, 5, 4),
]


@here
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize(
    ("op", "operand"),
    [("fwd", "x"), ("fwd", "weight"), ("dgrad", "grad"), ("dgrad", "weight"), ("wgrad", "grad"), ("wgrad", "x")],
)
@pytest.mark.parametrize("case", ISOLATION_CASES, ids=lambda case: case.id)
def test_nan_and_inf_stay_in_their_group(case, op, operand, value):
    """Merged groups share a matrix product; the other groups must not notice, and their own must do as PyTorch does."""
    tensors = make_tensors(case, channels_last=True)
    oracle = exact(op, case, tensors)
    group = 1
    poisoned = tensors[operand].clone()
    group_size = len(poisoned) // case.groups if operand == "weight" else poisoned.shape[1] // case.groups
    if operand == "weight":
        poisoned[group * group_size, 0, 1, 1] = value
    else:
        poisoned[0, group * group_size, 2, 3] = value
    tensors[operand] = poisoned

    axis = 0 if op == "wgrad" else 1
    size = oracle.value.shape[axis] // case.groups
    own = slice(group * size, (group + 1) * size)
    others = torch.tensor([c for c in range(oracle.value.shape[axis]) if not own.start <= c < own.stop])
    clean = replace(
        oracle,
        value=oracle.value.index_select(axis, others),
        magnitude=oracle.magnitude.index_select(axis, others),
    )
    wanted = reference_pass(op, case, tensors).narrow(axis, own.start, size)
    for config in forms(op, case, torch.float32):
        result = compute(op, case, tensors, config=config).cpu()
        assert_close(result.index_select(axis, others), clean)
        result = result.narrow(axis, own.start, size)
        if op == "wgrad":  # a NaN or Inf may reach all nine taps of its channel pair (grouped_conv_wgrad.py)
            assert torch.equal(result.isfinite().flatten(2).all(2), wanted.isfinite().flatten(2).all(2))
        else:
            for what in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(what(result), what(wanted))


def reference_pass(op, case, t):
    if op == "fwd":
        return reference.fwd(t["x"], t["weight"], t["bias"], case.stride, case.groups, False)
    if op == "dgrad":
        return reference.dgrad(t["grad"], t["weight"], case.input_shape[2:], case.stride, case.groups, False)
    return reference.wgrad(t["grad"], t["x"], case.stride, case.groups, False)


@here
@pytest.mark.parametrize("case", ["gw4-resnext50-stage1", "gw48"])
@pytest.mark.parametrize("op", OPS)
def test_repeats_are_bitwise_equal(op, case):
    tensors = make_tensors(BY_ID[case], torch.float16, channels_last=True)
    first, second = (compute(op, BY_ID[case], tensors) for _ in range(2))
    assert torch.equal(first, second)


@here
@pytest.mark.parametrize("case", ["gw4-resnext50-stage1", "gw56-regnet16", "1x1-image", "one-column"])
@pytest.mark.parametrize("op", OPS)
def test_layouts_agree_and_have_exact_strides(op, case):
    case = BY_ID[case]
    nhwc = compute(op, case, make_tensors(case, channels_last=True))
    nchw = compute(op, case, make_tensors(case), channels_last=False)
    assert torch.equal(nhwc, nchw)
    if op != "wgrad":
        assert nhwc.stride() == nhwc.new_empty(nhwc.shape).to(memory_format=torch.channels_last).stride()
    assert nchw.stride() == nchw.new_empty(nchw.shape).stride()


@here
def test_default_settings_follow_pytorchs_tf32_flag(monkeypatch):
    seen = []
    plan = grouped_conv.plan
    monkeypatch.setattr(grouped_conv, "plan", lambda *a, **k: seen.append(k["allow_tf32"]) or plan(*a, **k))
    case, before = BY_ID["gw2"], torch.backends.cudnn.conv.fp32_precision
    tensors = make_tensors(case, channels_last=True)
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = precision
            compute("fwd", case, tensors, allow_tf32=None)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert seen == [False, True]


@here
def test_operands_are_left_alone():
    case = BY_ID["gw8-stride2-resnext50-stage2"]
    tensors = make_tensors(case)
    before = {name: (t.clone(), t.stride()) for name, t in tensors.items()}
    for op in OPS:
        compute(op, case, tensors, channels_last=False)
    for name, (value, strides) in before.items():
        assert torch.equal(tensors[name], value)
        assert tensors[name].stride() == strides


@here
def test_counts_beyond_32_bits_are_refused():
    problem = ConvProblem("wgrad", 1, 64, 64, 2**16, 2**16, (1, 1), 1, torch.float16, "cuda", True)
    config = settings.choose_config(problem)
    with pytest.raises(ValueError, match=r"expected at most \d+ pixels per image.* split the batch"):
        grouped_conv.plan(problem, config, allow_tf32=True)


@here
def test_probe():
    """What dispatch runs once per device to learn whether Triton works there."""
    grouped_conv.probe(torch.device(DEVICE))
