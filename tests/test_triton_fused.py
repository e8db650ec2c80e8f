"""The fused grouped convolution in Triton (prologues, statistics, epilogues): compiled on a GPU, else interpreted.

The interpreter must be chosen before Triton is first imported. Without a GPU, `test_in_the_interpreter` therefore runs
this file in a process of its own, and the tests below are skipped in this one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from resnext.kernels import config as settings
from resnext.kernels import reference
from resnext.kernels.composed import Composed
from resnext.kernels.config import Config, ConvProblem

from .fused_numerics import (
    GROUPED_CASES,
    FusedCase,
    assert_statistics,
    check_conv_affine,
    check_conv_stats,
    double,
    make,
)
from .interpreter import DEVICE, RUNS_HERE, arithmetic, here, not_here, run_tests

pytest.importorskip("triton")

if RUNS_HERE:
    from resnext.kernels import grouped_conv, statistics

BY_ID = {case.id: case for case in GROUPED_CASES}
ORACLE = Composed(reference)


@not_here
def test_in_the_interpreter():
    run_tests(__file__, timeout=1200)


@dataclass(frozen=True)
class Launchers:
    """The launchers in one form, float32 without TF32, with ``changes`` to the heuristic's settings."""

    form: str
    changes: dict[str, int] = field(default_factory=dict)

    def config(self, op: str, x: Tensor, weight: Tensor, stride: tuple[int, int], groups: int) -> Config:
        channels = (x.shape[1], len(weight))
        problem = ConvProblem(op, len(x), *channels, *x.shape[2:], stride, groups, x.dtype, DEVICE, True)
        if self.form == "strips":
            return replace(settings.strips_config(problem, fused=True), **self.changes)
        return replace(settings.taps_config(problem, allow_tf32=False), **self.changes)

    def conv_stats_fwd(self, x, prologue, weight, stride, groups, *rest):
        config = self.config("fwd", x, weight, stride, groups)
        arguments = (x, prologue, weight, stride, groups, *rest)
        return grouped_conv.conv_stats_fwd(*arguments, config=config, allow_tf32=False)

    def conv_stats_bwd(self, dz, grad_prologue, x, prologue, weight, stride, groups, *rest):
        configs = [self.config(op, x, weight, stride, groups) for op in ("dgrad", "wgrad")]
        options = dict(zip(("config", "wgrad_config"), configs, strict=True), allow_tf32=False)
        arguments = (dz, grad_prologue, x, prologue, weight, stride, groups, *rest)
        return grouped_conv.conv_stats_bwd(*arguments, **options)

    def conv_affine(self, x, weight, scale, shift, residual, relu, stride, groups, channels_last):
        config = self.config("fwd", x, weight, stride, groups)
        arguments = (x, weight, scale, shift, residual, relu, stride, groups, channels_last)
        return grouped_conv.conv_affine(*arguments, config=config, allow_tf32=False)


@here
@pytest.mark.parametrize(
    ("form", "case", "dtype", "options"),
    [
        ("strips", "gw4-resnext50-stage1", torch.float32, {}),
        ("strips", "gw8-stride2", torch.float16, {"centered": False}),
        ("strips", "gw16-stride2-odd", torch.bfloat16, {"weight_channels_last": True}),
        ("strips", "gw32-7x7", torch.bfloat16, {}),
        ("strips", "gw3-not-a-power-of-two", torch.float32, {"prologue": False, "channels_last": False}),
        ("strips", "widens-in-group", torch.float32, {"stats": False}),
        ("strips", "1x1-image", torch.float32, {}),
        ("taps", "gw64", torch.float16, {}),
        ("taps", "stride-2-1", torch.float32, {"centered": False}),
        ("taps", "gw24-regnet", torch.bfloat16, {"channels_last": False}),
        ("taps", "gw3-not-a-power-of-two", torch.float32, {}),
        ("taps", "gw8-stride2", torch.float32, {"prologue": False, "stats": False}),
    ],
    ids=str,
)
def test_conv_stats(form, case, dtype, options):
    check_conv_stats(Launchers(form), BY_ID[case], dtype, arithmetic=arithmetic(dtype), device=DEVICE, **options)


@here
@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("strips", {"band": 2, "strip": 1}),
        ("strips", {"band": 40, "strip": 4, "splits": 1}),
        ("strips", {"merged": 3, "block_m": 32, "num_warps": 2}),
        ("taps", {"merged": 1, "block_m": 16}),
    ],
    ids=str,
)
def test_settings(form, changes):
    """Several programs per channel, whose statistics and sums are merged, and groups that do not fill a tile."""
    case = FusedCase("three-bands", 1, 16, 16, 11, 5, 4, stride=(2, 2))
    check_conv_stats(Launchers(form, changes), case, device=DEVICE)


@here
@pytest.mark.parametrize(
    ("form", "case", "dtype", "options"),
    [
        ("strips", "gw4-resnext50-stage1", torch.bfloat16, {}),
        ("strips", "gw8-stride2", torch.float32, {"residual": False}),
        ("strips", "gw16-stride2-odd", torch.float16, {"scaled": False, "channels_last": False}),
        ("taps", "stride-2-1", torch.float16, {"shifted": False, "relu": False}),
        ("taps", "gw24-regnet", torch.float32, {}),
    ],
    ids=str,
)
def test_conv_affine(form, case, dtype, options):
    check_conv_affine(Launchers(form), BY_ID[case], dtype, arithmetic=arithmetic(dtype), device=DEVICE, **options)


def digits(shape: tuple[int, ...], seed: int) -> Tensor:
    """-1, 0 and 1: sums of their products are exact in float32."""
    return make(shape, torch.float32, torch.Generator().manual_seed(seed), integers=True).sign()


POISONED = [
    ("strips", FusedCase("stride1", 1, 16, 16, 4, 4, 4)),
    ("strips", FusedCase("stride2", 1, 16, 16, 4, 8, 4, stride=(2, 2))),
    ("taps", FusedCase("stride-2-1", 1, 16, 16, 4, 4, 4, stride=(2, 1))),
]


@here
@pytest.mark.parametrize(
    ("operand", "value"), [("x", float("nan")), ("x", float("inf")), ("dz", float("inf")), ("weight", float("nan"))]
)
@pytest.mark.parametrize(("form", "case"), POISONED, ids=[case.id for _, case in POISONED])
def test_nan_and_inf_stay_in_their_group(form, case, operand, value):
    """Merged groups share a matrix product: others must stay exact, statistics too, and their own do as PyTorch does.

    Everything is a small multiple of 1 / 64, so that what the repair of a tile computes is exact as well.
    """
    clean = {"x": digits((1, 16, case.height, case.width), 0), "weight": digits((16, 4, 3, 3), 1)}
    clean["dz"] = digits(case.output_shape, 2)
    affine = tuple(digits((16,), seed) for seed in (3, 4, 5))
    affine = (affine[0], affine[1] + (affine[1] == 0), affine[2])
    dmean, dvar = (64 * digits((16,), seed) for seed in (6, 7))
    poisoned = {name: tensor.clone() for name, tensor in clean.items()}
    if operand == "weight":
        poisoned["weight"][5, 0, 1, 1] = value
    else:
        channel = 4 + int((affine[1] > 0)[4:8].byte().argmax())  # Inf must be Inf, and not 0, behind the ReLU
        poisoned[operand][0, channel, 1, 2] = value
    own, others = slice(4, 8), [*range(4), *range(8, 16)]
    place = (case.stride, case.groups, True)
    launchers = Launchers(form)

    def forward(module, tensors):
        return module.conv_stats_fwd(tensors["x"], affine, tensors["weight"], *place, True)

    def backward(module, tensors, z, mean):
        arguments = (tensors["dz"], (z, mean, dmean, dvar), tensors["x"], affine, tensors["weight"], *place)
        return module.conv_stats_bwd(*arguments, (True, False))

    def moved(value, target):
        return tuple(t.to(target) for t in value)

    z, mean, _ = forward(ORACLE, clean)
    expected = (z, *backward(ORACLE, clean, z, mean)[:3])
    wanted = (forward(ORACLE, poisoned)[0], *backward(ORACLE, poisoned, z, mean)[:3])
    on_device = {name: tensor.to(DEVICE) for name, tensor in poisoned.items()}
    affine, (dmean, dvar) = moved(affine, DEVICE), moved((dmean, dvar), DEVICE)
    poisoned_z, *poisoned_statistics = moved(forward(launchers, on_device), "cpu")
    results = (poisoned_z, *moved(backward(launchers, on_device, *moved((z, mean), DEVICE))[:3], "cpu"))
    for name, result, right, pattern in zip(("z", "dx", "dscale", "dshift"), results, expected, wanted, strict=True):
        axis = 0 if result.dim() == 1 else 1
        index = torch.tensor(others)
        assert torch.equal(result.index_select(axis, index), right.index_select(axis, index)), name
        assert torch.equal(result.narrow(axis, 4, 4).isnan(), pattern.narrow(axis, 4, 4).isnan()), name
        assert torch.equal(result.narrow(axis, 4, 4).isinf(), pattern.narrow(axis, 4, 4).isinf()), name
    assert_statistics(poisoned_z[:, others], *(t[others] for t in poisoned_statistics))
    finite = poisoned_z[:, own].isfinite().all(3).all(2).all(0)
    for vector in poisoned_statistics:
        assert torch.equal(vector[own].isfinite(), finite)


@here
@pytest.mark.parametrize("form", ["strips", "taps"])
def test_statistics_of_hard_data(form):
    """A mean far above the spread, constant channels, and one Inf, through a convolution that copies its input."""
    x = make((2, 16, 9, 7), torch.float32, torch.Generator().manual_seed(0), channels_last=True, device=DEVICE)
    x[:, :4] = 1e3 + 1e-2 * x[:, :4]
    x[:, 4] = 1e3 + 0.7
    x[:, 5] = -0.1
    x[1, 6, 3, 3] = float("inf")
    weight = torch.zeros(16, 1, 3, 3, device=DEVICE)
    weight[:, :, 1, 1] = 1
    z, mean, var = Launchers(form).conv_stats_fwd(x, None, weight, (1, 1), 16, True, True)
    finite = [channel for channel in range(16) if channel != 6]
    assert torch.equal(z[:, finite], x[:, finite])
    assert_statistics(z[:, finite], mean[finite], var[finite])
    assert torch.equal(var[4:6], torch.zeros(2, device=DEVICE))
    assert not mean[6].isfinite()
    assert not var[6].isfinite()


LAUNCHES = pytest.mark.parametrize("longest", [2**13, 2**9], ids=["one-launch", "two-launches"])


@here
@LAUNCHES
def test_merged_partials_are_the_statistics_of_the_whole(monkeypatch, longest):
    """More rows than a step of the kernel, of unequal counts, some of them empty."""
    monkeypatch.setattr(statistics, "_LONGEST_WALK", longest)
    generator = torch.Generator().manual_seed(0)
    values = 1e3 + 1e-2 * torch.randn(2, 11, 700, 1, generator=generator)
    parts = values.transpose(0, 1).reshape(11, -1).split([1, 2, 0] * 466 + [2], dim=1)
    rows = []
    for part in parts:
        exact = double(part)
        mean = exact.mean(1) if part.shape[1] else torch.zeros(11, dtype=torch.float64)
        m2 = (exact - mean[:, None]).square().sum(1)
        rows.append(torch.stack([torch.full_like(mean, part.shape[1]), mean, m2]))
    mean, var = statistics.merge_partials(torch.stack(rows).float().to(DEVICE))
    assert_statistics(values, mean.cpu(), var.cpu())


@here
@LAUNCHES
@pytest.mark.parametrize("count", [2, 3])
def test_summed_partials(monkeypatch, longest, count):
    """Integers: exact in any order."""
    monkeypatch.setattr(statistics, "_LONGEST_WALK", longest)
    partials = make((1100, count, 37), torch.float32, torch.Generator().manual_seed(0), integers=True, device=DEVICE)
    for i, result in enumerate(statistics.sum_partials(partials)):
        assert torch.equal(result, partials[:, i].sum(0))
    places = (0, 1) if count == 2 else (2, 0)
    for got, place in zip(statistics.PartialSums.of(partials, *places).summed(), places, strict=True):
        assert torch.equal(got, partials[:, place].sum(0))
