"""The Triton kernels of batch norm's parts and of the stem's pool: numbers, corner cases, machine code.

The numbers come from a GPU or else from Triton's interpreter, which must be chosen before Triton is first imported:
without a GPU `test_in_the_interpreter` runs this file in a process of its own. The machine code needs no GPU.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from resnext.kernels import reference

from .fused_numerics import (
    ELEMENTWISE_SHAPES,
    assert_statistics,
    assert_within,
    check_affine_add_relu,
    check_pool,
    check_statistics,
    double,
    make,
    make_affine,
)
from .interpreter import DEVICE, arithmetic, compiles, here, not_here, run_tests

triton = pytest.importorskip("triton")

from resnext.kernels import batch_norm, max_pool, statistics  # noqa: E402
from resnext.kernels.config import Norm, Running, elementwise_config  # noqa: E402
from resnext.kernels.launch import Launch  # noqa: E402

U = 2.0**-24

both_layouts = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])


@not_here
def test_in_the_interpreter():
    run_tests(__file__, timeout=600)


def random(shape, dtype=torch.float32, *, channels_last=True, integers=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return make(shape, dtype, generator, channels_last=channels_last, integers=integers, device=DEVICE)


def vectors(channels, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(make((channels,), torch.float32, generator, device=DEVICE) for _ in range(count))


class Both:
    """The launchers of both modules, as the checks want them."""

    def __getattr__(self, name):
        return getattr(batch_norm if hasattr(batch_norm, name) else max_pool, name)


SHAPES = [pytest.param(shape, id=name) for name, shape in ELEMENTWISE_SHAPES.items()]
HALF = [torch.float16, torch.bfloat16]


@here
@both_layouts
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape, channels_last):
    check_statistics(Both(), random(shape, channels_last=channels_last), channels_last)
    for residual in ("none", "affine"):
        check_affine_add_relu(batch_norm, shape, channels_last=channels_last, residual=residual, device=DEVICE)
    affine = make_affine(shape[1], torch.Generator().manual_seed(3), device=DEVICE)
    check_pool(Both(), random(shape, channels_last=channels_last), affine, channels_last)


@here
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision(dtype):
    shape = ELEMENTWISE_SHAPES["odd"]
    check_statistics(Both(), random(shape, dtype), True, arithmetic(dtype))
    for residual in ("none", "plain", "affine"):
        options = {"residual": residual, "centered": False, "arithmetic": arithmetic(dtype), "device": DEVICE}
        check_affine_add_relu(batch_norm, shape, dtype, **options)
    affine = make_affine(shape[1], torch.Generator().manual_seed(3), centered=False, device=DEVICE)
    check_pool(Both(), random(shape, dtype), affine, True, arithmetic(dtype))


@here
@both_layouts
@pytest.mark.parametrize("splits", [1, 3])
def test_programs_that_walk_over_several_blocks(monkeypatch, splits, channels_last):
    """With a whole GPU's programs, tensors of a test's size are one block for each."""
    shape, z = (2, 8, 67, 35), random((2, 8, 67, 35), channels_last=channels_last)
    for module in (batch_norm, max_pool):
        config = module.elementwise_config
        fewer = lambda *args, config=config, **options: replace(config(*args, **options), splits=splits)  # noqa: E731
        monkeypatch.setattr(module, "elementwise_config", fewer)
    for plan in (batch_norm._plan_walk, max_pool._plan):
        plan.cache_clear()
    launch, shares = batch_norm._walk("statistics", z, channels_last)
    assert shares == splits
    assert launch.sizes["share"] > 1
    check_statistics(Both(), z, channels_last)
    check_affine_add_relu(batch_norm, shape, channels_last=channels_last, residual="affine", device=DEVICE)
    check_pool(Both(), z, make_affine(8, torch.Generator().manual_seed(3), device=DEVICE), channels_last)
    for plan in (batch_norm._plan_walk, max_pool._plan):
        plan.cache_clear()


@here
@pytest.mark.parametrize("value", [0.1, -1e3, 0.0])
def test_a_constant_channel_has_no_variance(value):
    z = random((3, 5, 9, 7))
    z[:, 2] = value
    mean, var = batch_norm.statistics(z, True)
    assert mean[2].item() == z[0, 2, 0, 0].item()
    assert var[2].item() == 0
    assert_statistics(z, mean, var)


@here
@both_layouts
def test_a_mean_far_larger_than_the_spread(channels_last):
    """The variance's relative error stays that of sums around the mean: no digits go to mean^2 / var = 1e10."""
    z = random((4, 6, 23, 17), channels_last=channels_last).mul_(1e-2).add_(1e3)
    mean, var = batch_norm.statistics(z, channels_last)
    exact_var, exact_mean = torch.var_mean(double(z), (0, 2, 3), correction=0)
    # z less its first pixel is exact; n terms in any order then are good to n u of their sum, and so is its square.
    count = z.numel() // 6
    around = (double(z) - double(z)[:1, :, :1, :1]).square().mean((0, 2, 3))
    assert_within("var", var, exact_var, (count + 8) * U * around)
    assert_within("mean", mean, exact_mean, U * exact_mean.abs() + (count + 8) * U * around.sqrt())


@here
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_channel(value):
    z, dout = random((2, 6, 5, 7)), random((2, 6, 5, 7), seed=1)
    affine, others = vectors(6, 3), torch.tensor([0, 1, 2, 3, 5], device=DEVICE)
    poisoned = z.clone()
    poisoned[1, 4, 2, 2] = value

    def results(z):
        mean, var = batch_norm.statistics(z, True)
        out = batch_norm.affine_add_relu(z, affine, None, None, True)
        dz, _, dscale, dshift, _ = batch_norm.affine_add_relu_bwd(
            dout, out, z, affine, None, None, True, (True, False, True)
        )
        pooled, taps = max_pool.affine_relu_max_pool(z, affine, True, True)
        _, pool_dscale, pool_dshift = max_pool.affine_relu_max_pool_bwd(pooled, taps, z, affine, True, (True, True))
        per_channel = [mean, var, dscale, dshift, pool_dscale, pool_dshift]
        return [t.movedim(1, 0) for t in (out, dz, pooled)] + per_channel

    for dirty, clean in zip(results(poisoned), results(z), strict=True):
        assert torch.equal(dirty[others], clean[others])
    mean, var = batch_norm.statistics(poisoned, True)
    assert not mean[4].isfinite()
    assert not var[4].isfinite()


@here
def test_relu_at_zero_and_nan():
    """As torch.relu: 0 has no gradient, NaN passes both ways."""
    z = torch.tensor([0.0, -0.0, float("nan"), 2.0, -2.0, float("inf"), -float("inf")], device=DEVICE)[
        None, None, :, None
    ]
    affine = (None, torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE))
    z = z.expand(1, 1, 7, 1).contiguous()
    wanted = z.clone().requires_grad_()
    out = batch_norm.affine_add_relu(z, affine, None, None, False)
    torch.relu(wanted).backward(torch.ones_like(z))
    assert torch.equal(out.nan_to_num(nan=7.5), torch.relu(z).nan_to_num(nan=7.5))
    for saved in (out, None):
        dz = batch_norm.affine_add_relu_bwd(
            torch.ones_like(z), saved, z, affine, None, None, False, (True, False, False)
        )[0]
        assert torch.equal(dz, wanted.grad)


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 24, 300])
def test_batch_norms_vectors(channels, dtype):
    mean, dscale, dshift, gamma, beta = vectors(channels, 5)
    var, (gamma, beta), eps = vectors(channels, 1, seed=1)[0].square(), (gamma.to(dtype), beta.to(dtype)), 1e-5
    u = torch.finfo(dtype).eps / 2
    for weights in ((gamma, beta), (None, None)):
        scale, shift = batch_norm.bn_affine(mean, var, *weights, eps)
        wanted = reference.bn_affine(double(mean), double(var), *double(weights), eps)
        assert_within("scale", scale, wanted[0], 6 * U * wanted[0].abs())  # sum, root, quotient, product, eps itself
        assert torch.equal(double(shift), wanted[1])
        results = batch_norm.bn_affine_bwd(dscale, dshift, var, weights[0], eps)
        wanted = reference.bn_affine_bwd(*double((dscale, dshift, var, weights[0])), eps)
        assert_within("dmean", results[0], wanted[0], 7 * U * wanted[0].abs())
        assert_within("dvar", results[1], wanted[1], 16 * U * wanted[1].abs())
        if weights[0] is None:
            assert results[2:] == wanted[2:] == (None, None)
        else:
            assert results[2].dtype == results[3].dtype == dtype
            assert_within("dgamma", results[2], wanted[2], (6 * U + u) * wanted[2].abs() + 2.0**-25)
            assert_within("dbeta", results[3], wanted[3], u * wanted[3].abs() + 2.0**-25)


@here
@both_layouts
@pytest.mark.parametrize("with_parameters", [True, False])
def test_statistics_with_a_batch_norm(channels_last, with_parameters):
    """In the launch that merges them: vectors as of `bn_affine`, running statistics as PyTorch's."""
    z = random((4, 6, 23, 17), channels_last=channels_last)
    gamma, beta, running_mean, running_var = vectors(6, 4)
    running_var = running_var.square()
    plain = torch.nn.BatchNorm2d(6, momentum=0.3).double()
    plain.running_mean.copy_(running_mean)
    plain.running_var.copy_(running_var)
    plain(double(z))
    batches = torch.zeros((), dtype=torch.int64, device=DEVICE)
    parameters = (gamma.half(), beta.half()) if with_parameters else (None, None)
    norm = Norm(*parameters, 1e-5, Running(running_mean, running_var, batches, 0.3))
    mean, var, scale, shift = batch_norm.statistics(z, channels_last, norm)
    for got, expected in zip((mean, var), batch_norm.statistics(z, channels_last), strict=True):
        assert torch.equal(got, expected)
    for got, expected in zip((scale, shift), batch_norm.bn_affine(mean, var, *parameters, 1e-5), strict=True):
        assert torch.equal(got, expected)
    assert batches.item() == 1
    for got, expected in ((running_mean, plain.running_mean), (running_var, plain.running_var)):
        torch.testing.assert_close(double(got), expected, rtol=1e-5, atol=1e-6)


@here
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rows", [1, 40, 1100])
def test_gradients_of_vectors_from_partial_sums(monkeypatch, rows, count):
    """The same bits as of sums."""
    monkeypatch.setattr(statistics, "_LONGEST_WALK", 600)
    partials = torch.randn(rows, count, 37, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    var, gamma = vectors(37, 2)
    var = var.square()
    sums = statistics.PartialSums.of(partials, scale=count - 1, shift=0)
    assert sums.partials.shape[0] <= 600
    expected = batch_norm.bn_affine_bwd(*sums.summed(), var, gamma, 1e-5)
    for got, wanted in zip(batch_norm.bn_affine_bwd(sums, None, var, gamma, 1e-5), expected, strict=True):
        assert torch.equal(got, wanted)


@here
@both_layouts
def test_gradients_that_are_yet_to_be_scaled(channels_last):
    """One tensor for both operands of a sum, multiplied where it is read: with powers of two the same bits."""
    z, residual, dout, out = (
        random((3, 24, 5, 7), torch.float16, channels_last=channels_last, seed=seed) for seed in range(4)
    )
    scales = 2.0 ** torch.randint(-3, 3, (2, 24), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    center, shift, mean, dmean, dvar = vectors(24, 5)
    affine, other = (center, scales[0], shift), (shift, scales[1], center)
    arguments = (dout, out, z, affine, residual, other, channels_last)
    dz, dresidual, *sums = batch_norm.affine_add_relu_bwd(*arguments, (True, True, True))
    t, none, *same = batch_norm.affine_add_relu_bwd(*arguments, (True, False, True), unscaled=True)
    assert none is None
    assert torch.equal(t * scales[0][:, None, None].half(), dz)
    assert torch.equal(t * scales[1][:, None, None].half(), dresidual)
    assert all(map(torch.equal, same, sums))
    source = (z, mean, dmean, dvar, channels_last)
    assert torch.equal(batch_norm.statistics_bwd(t, *source, scales[0]), batch_norm.statistics_bwd(dz, *source))


@here
@both_layouts
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (2, 1), (1, 6)], ids=str)
def test_the_pools_choice_is_pytorchs(size, channels_last):
    """Among equals the first, among NaN the last; gradients then go where PyTorch sends them."""
    z = random((2, 5, *size), channels_last=channels_last, integers=True)  # -2 ... 2: every window has ties
    z[torch.rand(z.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE) < 0.15] = float("nan")
    ones, zeros = torch.ones(5, device=DEVICE), torch.zeros(5, device=DEVICE)
    affine = (None, ones, zeros)
    leaf = z.cpu().clone().requires_grad_()
    wanted, indices = F.max_pool2d(torch.relu(leaf), 3, 2, 1, return_indices=True)
    dout = random(tuple(wanted.shape), channels_last=channels_last, integers=True)
    wanted.backward(dout.cpu())

    out, taps = max_pool.affine_relu_max_pool(z, affine, channels_last, True)
    assert torch.equal(out.cpu().nan_to_num(nan=7.5), wanted.detach().nan_to_num(nan=7.5))
    row = torch.arange(out.shape[2])[:, None] * 2 - 1 + taps.cpu() // 3
    column = torch.arange(out.shape[3]) * 2 - 1 + taps.cpu() % 3
    assert torch.equal(row * size[1] + column, indices)
    dz, _, dshift = max_pool.affine_relu_max_pool_bwd(dout, taps, z, affine, channels_last, (True, True))
    assert torch.equal(dz.cpu(), leaf.grad)
    assert torch.equal(dshift.cpu(), leaf.grad.sum((0, 2, 3)))  # small integers: exact
    only_dz = max_pool.affine_relu_max_pool_bwd(dout, taps, z, affine, channels_last, (True, False))
    assert torch.equal(only_dz[0], dz)
    assert only_dz[1:] == (None, None)
    only_vectors = max_pool.affine_relu_max_pool_bwd(dout, taps, z, affine, channels_last, (False, True))
    assert only_vectors[0] is None
    assert torch.equal(only_vectors[2], dshift)


# --- launches ---


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("images", "pixels", "channels"),
    [(1, 1, 1), (3, 7, 1), (256, 49, 2048), (256, 3136, 256), (2, 50_000_000, 3), (1, 2**33, 1)],
)
def test_every_block_has_one_program_per_channel_tile(images, pixels, channels, channels_last):
    if channels_last:
        images, pixels = 1, images * pixels
    config = elementwise_config(images, pixels, channels, channels_last)
    blocks = images * -(-pixels // config.block_m)
    assert 1 <= config.splits <= blocks
    assert config.block_m * config.block_c <= 4096  # elements of a step, in registers
    for size in (config.block_m, config.block_c):
        assert size & (size - 1) == 0
    assert blocks < 2**31


# --- machine code ---


@functools.cache
def launches(dtype: torch.dtype, channels_last: bool) -> list[tuple[Launch, dict]]:
    """Every kernel in its fullest form on a layer of ResNet-50, with the tensors it would run on."""
    seen = []
    layout = torch.channels_last if channels_last else torch.contiguous_format
    z = torch.empty((256, 64, 112, 112), dtype=dtype, device="meta", memory_format=layout)
    pooled = torch.empty((256, 64, 56, 56), dtype=dtype, device="meta", memory_format=layout)
    vector = torch.empty(64, device="meta")
    affine = (vector, vector, vector)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", lambda self, **tensors: seen.append((self, tensors)))
        running = Running(vector, vector, torch.empty((), dtype=torch.int64, device="meta"), 0.1)
        batch_norm.statistics(z, channels_last, Norm(vector, vector, 1e-5, running))
        batch_norm.statistics_bwd(z, z, vector, vector, vector, channels_last, vector)
        batch_norm.affine_add_relu(z, affine, z, affine, channels_last)
        batch_norm.affine_add_relu_bwd(z, z, z, affine, z, affine, channels_last, (True, True, True))
        batch_norm.affine_add_relu_bwd(z, z, z, affine, z, affine, channels_last, (True, False, True), unscaled=True)
        batch_norm.affine_add_relu_bwd(z, None, z, affine, None, None, channels_last, (True, False, True))
        batch_norm.bn_affine(vector, vector, vector, vector, 1e-5)
        sums = statistics.PartialSums(torch.empty(523, 3, 64, device="meta"), 2, 0)
        batch_norm.bn_affine_bwd(sums, None, vector, vector, 1e-5)
        _, taps = max_pool.affine_relu_max_pool(z, affine, channels_last, True)
        max_pool.affine_relu_max_pool_bwd(pooled, taps, z, affine, channels_last, (True, True))
    return seen


@compiles
@pytest.mark.parametrize(
    ("dtype", "channels_last", "arch"),
    [
        (torch.bfloat16, True, 80),
        (torch.bfloat16, True, 90),
        (torch.bfloat16, True, 100),
        (torch.float32, True, 90),
        (torch.float16, False, 90),
    ],
    ids=str,
)
def test_kernels_compile_without_spills(dtype, channels_last, arch):
    from . import aot

    for launch, tensors in launches(dtype, channels_last):
        name = launch.kernel.__name__
        aot.assert_no_spills(launch, tensors, arch, wide_loads="affine_add_relu" in name or "statistics" in name)
