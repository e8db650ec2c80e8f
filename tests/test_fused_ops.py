"""`conv_stats` and its relatives as PyTorch operators: values, layouts, derivatives, compilers, errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from resnext.kernels import (
    affine_add_relu,
    affine_relu_max_pool,
    bn_affine,
    checks,
    composed,
    conv_affine,
    conv_norm,
    conv_stats,
    fused_conv_ops,
    fused_ops,
    onednn,
    reference,
    use_backend,
    why_not_conv_stats,
)

from . import fused_numerics
from .fused_numerics import ELEMENTWISE_SHAPES, GROUPED_CASES, POINTWISE_CASES, make, make_affine

COMPOSED = composed.Composed(reference)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
}


def tensors(dtype=torch.float64, *, requires_grad=True, layout="contiguous", wide=True):
    """A small strided 3x3 grouped problem with its prologue; ``wide``: large enough for statistics to be sound."""
    generator = torch.Generator().manual_seed(0)
    size = (2, 4, 5, 4) if wide else (2, 4, 3, 2)
    vector = checks.vector_dtype(dtype)

    def made(shape, dtype=dtype):
        return make(shape, dtype, generator)

    held = {
        "x": LAYOUTS[layout](made(size)),
        "center": made((4,), vector),
        "scale": made((4,), vector),
        "shift": made((4,), vector),
        "weight": made((6, 2, 3, 3)),
    }
    return {name: t.requires_grad_(requires_grad and name != "center") for name, t in held.items()}


def fused(x, center, scale, shift, weight):
    return conv_stats(x, weight, (center, scale, shift), stride=(2, 1), groups=2)


def plain(x, center, scale, shift, weight):
    a = torch.relu((x - center[:, None, None]) * scale[:, None, None] + shift[:, None, None])
    z = F.conv2d(a, weight, None, (2, 1), 1, 1, 2)
    return z, z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)


# --- values ---


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", [*GROUPED_CASES, *POINTWISE_CASES], ids=lambda case: case.id)
def test_composed_convolutions(case, dtype, channels_last):
    for prologue in (True, False):
        fused_numerics.check_conv_stats(
            COMPOSED, case, dtype, channels_last=channels_last, prologue=prologue, stats=prologue, stores=2
        )
    for relu in (True, False):
        fused_numerics.check_conv_affine(
            COMPOSED, case, dtype, channels_last=channels_last, relu=relu, scaled=relu, residual=relu, stores=2
        )


@pytest.mark.parametrize("case", POINTWISE_CASES, ids=lambda case: case.id)
def test_onednns_convolution(case):
    for choice in ({}, {"relu": False, "residual": False}, {"scaled": False}, {"shifted": False}):
        fused_numerics.check_conv_affine(onednn, case, stores=3, **choice)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", ELEMENTWISE_SHAPES.values(), ids=ELEMENTWISE_SHAPES)
def test_reference_elementwise(shape, dtype, channels_last):
    generator = torch.Generator().manual_seed(3)
    z = make(shape, dtype, generator, channels_last=channels_last)
    fused_numerics.check_statistics(reference, z, channels_last)
    for residual in ("none", "plain", "affine"):
        fused_numerics.check_affine_add_relu(reference, shape, dtype, channels_last=channels_last, residual=residual)
    fused_numerics.check_pool(reference, z, make_affine(shape[1], generator), channels_last)


@pytest.mark.parametrize("result", ["z", "var", "dx", "dw", "dscale"])
def test_bounds_catch_one_wrong_element(result):
    """The smallest fault a kernel can have: a term missing in one element of one result."""

    def conv_stats_fwd(*args):
        z, mean, var = COMPOSED.conv_stats_fwd(*args)
        if result == "z":
            z[0, 0, 0, 0] -= 1e-3
        if result == "var":
            var[0] *= 1 + 1e-3
        return z, mean, var

    def conv_stats_bwd(*args):
        results = dict(zip(("dx", "dscale", "dshift", "dw"), COMPOSED.conv_stats_bwd(*args), strict=True))
        if results.get(result) is not None:
            results[result].view(-1)[0] += 1e-2
        return tuple(results.values())

    broken = SimpleNamespace(conv_stats_fwd=conv_stats_fwd, conv_stats_bwd=conv_stats_bwd)
    with pytest.raises(AssertionError, match=f"{result}: 1 of"):
        fused_numerics.check_conv_stats(broken, GROUPED_CASES[0], channels_last=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_conv_stats_is_plain_pytorch(dtype, layout):
    held = tensors(dtype, layout=layout)
    got, wanted = fused(**held), plain(**{name: t.detach().double() for name, t in held.items()})
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)
    assert got[0].is_contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.preserve_format
    )


def test_mean_far_larger_than_the_spread():
    """E[x^2] - E[x]^2 in float32 has no digit left here, and neither has scale * x + (beta - mean * scale)."""
    generator = torch.Generator().manual_seed(0)
    z = (1e3 + 1e-2 * torch.randn(4, 8, 16, 16, generator=generator)).requires_grad_()
    weight = torch.eye(8)[:, :, None, None]
    z1, mean, var = conv_stats(z, weight)
    exact = z1.detach().double()
    exact_var, exact_mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    fused_numerics.assert_statistics(z1.detach(), mean.detach(), var.detach())
    out = affine_add_relu(z1, bn_affine(mean, var, None, None, 0.0))
    wanted = ((exact - exact_mean[:, None, None]) / exact_var.sqrt()[:, None, None]).relu()
    # The mean is known to half a unit in the last place of 1e3, a spread of 1e-2 away: 3e-3 of the spread.
    assert (out.double() - wanted).abs().max() < 1e3 * 2**-24 / 1e-2


def test_constant_channel_and_inf_in_one_channel():
    z = torch.randn(2, 3, 4, 4)
    z[:, 0] = 0.1
    z[0, 2, 1, 1] = float("inf")
    weight = torch.eye(3)[:, :, None, None]
    with use_backend("torch"):
        mean, var = reference.statistics(z, False)
    assert var[0] <= (16 * 2**-24 * 0.1) ** 2
    assert torch.isfinite(mean[:2]).all()
    assert not torch.isfinite(var[2])
    assert not torch.isfinite(conv_stats(z, weight)[1][2])


# --- derivatives ---


def test_gradcheck_with_statistics():
    held = tuple(tensors().values())
    assert torch.autograd.gradcheck(fused, held)
    small = tuple(tensors(wide=False).values())
    assert torch.autograd.gradgradcheck(fused, small)


def in_two(x, weight, gamma, beta, eps, affine, stride, groups):
    """`conv_norm` by way of the two functions that it is."""
    z, mean, var = conv_stats(x, weight, affine, stride, groups)
    return z, mean.detach(), var.detach(), bn_affine(mean, var, gamma, beta, eps)


@pytest.mark.parametrize("used", ["all", "z", "scale", "shift"])
@pytest.mark.parametrize("parameters", ["both", "gamma", "beta", "neither"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conv_norm_is_both_in_one(dtype, parameters, used):
    """The same bits, forward and backward, whatever depends on them."""
    results = []
    for function in (conv_norm, in_two):
        held = tensors(dtype)
        gamma = torch.linspace(0.5, 2, 6).requires_grad_() if parameters in ("both", "gamma") else None
        beta = torch.linspace(-1, 1, 6).requires_grad_() if parameters in ("both", "beta") else None
        affine = held["center"], held["scale"], held["shift"]
        z, mean, var, (center, scale, shift) = function(held["x"], held["weight"], gamma, beta, 1e-5, affine, (2, 1), 2)
        assert not any(t.requires_grad for t in (mean, var, center))
        parts = {"z": z.float().square().mean((0, 2, 3)), "scale": scale, "shift": shift.exp()}
        total = sum(part.sum() for name, part in parts.items() if used in ("all", name))
        leaves = [t for t in (*held.values(), gamma, beta) if t is not None and t.requires_grad]
        gradients = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else ()
        results.append([z, mean, var, center, scale, shift, *gradients])
    for a, b in zip(*results, strict=True):
        if a is None or b is None:  # nothing depends on it, or with weight nought
            assert all(t is None or not t.any() for t in (a, b))
        else:
            assert torch.equal(a, b)


def test_conv_norm_of_a_frozen_convolution():
    """Where only batch norm is trained, nothing of the convolution is kept, and z has no gradient."""
    held, gamma, shapes = tensors(torch.float32, requires_grad=False), torch.ones(6, requires_grad=True), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t)
    gradients = []
    for function in (conv_norm, in_two):
        with hooks:
            z, _, _, (_, scale, _) = function(held["x"], held["weight"], gamma, gamma, 1e-5, None, (2, 1), 2)
        assert not z.requires_grad
        assert set(shapes) == {(6,)}
        first = torch.autograd.grad(scale.square().sum(), gamma, create_graph=True)
        gradients.append((*first, *torch.autograd.grad(first[0].sum(), gamma)))
    torch.testing.assert_close(*gradients)


def test_gradcheck_of_conv_norm():
    """Of the batch norm that the affine is: the mean's gradient comes by way of the shift."""

    def function(x, center, scale, shift, weight, gamma, beta):
        z, _, _, affine = conv_norm(x, weight, gamma, beta, 1e-5, (center, scale, shift), (2, 1), 2)
        new_center, new_scale, new_shift = (vector[:, None, None] for vector in affine)
        return z, new_scale, new_scale * (z - new_center) + new_shift

    generator = torch.Generator().manual_seed(1)
    parameters = tuple(torch.rand(6, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(function, (*tensors().values(), *parameters))
    assert torch.autograd.gradgradcheck(function, (*tensors(wide=False).values(), *parameters))


def test_conv_norm_in_transforms():
    held = tensors(requires_grad=False)
    affine = held["center"], held["scale"], held["shift"]

    def results(function, x):
        z, mean, var, vectors = function(x, held["weight"], None, None, 1e-5, affine, (2, 1), 2)
        return z, mean, var, *vectors

    for function in (conv_norm, in_two):
        batched = torch.func.vmap(lambda x, function=function: results(function, x))(torch.stack([held["x"]] * 2))
        torch.testing.assert_close([each[1] for each in batched], list(results(in_two, held["x"])))
    _, tangents = torch.func.jvp(lambda x: results(conv_norm, x)[0], (held["x"],), (held["x"],))
    _, wanted = torch.func.jvp(lambda x: results(in_two, x)[0], (held["x"],), (held["x"],))
    torch.testing.assert_close(tangents, wanted)


def test_gradcheck_of_a_whole_chain():
    """Center as a constant, and the mean's gradient by way of the shift, add up to batch norm's."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    def block(x, w1, w2, g1, b1, g2, b2):
        z, mean, var = conv_stats(x, w1)
        affine = bn_affine(mean, var, g1, b1, 1e-5)
        z, mean, var = conv_stats(z, w2, affine, groups=2)
        return affine_add_relu(z, bn_affine(mean, var, g2, b2, 1e-5), x)

    def wanted(x, w1, w2, g1, b1, g2, b2):
        a = F.relu(F.batch_norm(F.conv2d(x, w1), None, None, g1, b1, True))
        return F.relu(F.batch_norm(F.conv2d(a, w2, padding=1, groups=2), None, None, g2, b2, True) + x)

    held = (made(2, 4, 3, 3), made(4, 4, 1, 1), made(4, 2, 3, 3), made(4), made(4), made(4), made(4))
    torch.testing.assert_close(block(*held), wanted(*held))
    grad = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)
    got, want = (torch.autograd.grad(f(*held), held, grad, create_graph=True) for f in (block, wanted))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    got, want = (torch.autograd.grad(sum(g.square().sum() for g in grads), held) for grads in (got, want))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("keeps_result", [True, False], ids=["kept", "computed-again"])
@pytest.mark.parametrize("residual", ["none", "plain", "affine"])
def test_gradcheck_of_affine_add_relu(residual, keeps_result):
    held = tensors()
    other = {name: t.detach().flip(0).requires_grad_(t.requires_grad) for name, t in held.items()}

    def end(z, scale, shift, r, r_scale, r_shift):
        second = (None, r_scale, r_shift) if residual == "affine" else None
        r = None if residual == "none" else r
        return affine_add_relu(z, (held["center"], scale, shift), r, second, keeps_result)

    names = ("x", "scale", "shift")
    arguments = (*(held[n] for n in names), *(other[n] for n in names))
    assert torch.autograd.gradcheck(end, arguments)
    assert torch.autograd.gradgradcheck(end, arguments)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("residual", ["none", "plain", "affine"])
def test_a_result_that_is_computed_again_has_the_same_gradients(residual, dtype):
    """To the bit; and what is kept is the residual, instead of the result."""
    gradients, kept = [], []
    for keeps_result in (True, False):
        held = tensors(dtype)
        center, z, scale, shift = held["center"], held["x"], held["scale"], held["shift"]
        r = z.detach().flip(0).requires_grad_()
        second = (None, scale, shift) if residual == "affine" else None
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, found=found: found.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
        ):
            out = affine_add_relu(z, (center, scale, shift), None if residual == "none" else r, second, keeps_result)
        kept.append([tensor.data_ptr() in found for tensor in (out, r)])
        out.square().sum().backward()
        gradients.append([t.grad for t in (z, scale, shift, r) if t.grad is not None])
    assert kept == [[True, residual == "affine"], [False, residual != "none"]]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradcheck_of_pool_and_conv_affine():
    held = tensors()
    z, center, scale, shift, weight = held.values()
    assert torch.autograd.gradcheck(lambda z, s, b: affine_relu_max_pool(z, (center, s, b)), (z, scale, shift))
    assert torch.autograd.gradgradcheck(lambda z, s, b: affine_relu_max_pool(z, (center, s, b)), (z, scale, shift))
    scale, shift = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for relu in (True, False):
        assert torch.autograd.gradcheck(
            lambda z, w, s, b, relu=relu: conv_affine(z, w, s, b, relu=relu, groups=2), (z, weight, scale, shift)
        )


def test_only_what_is_needed_comes_back():
    held = tensors(requires_grad=False)
    held["scale"].requires_grad_()
    z, _, _ = fused(**held)
    (dscale,) = torch.autograd.grad(z.sum(), held["scale"])
    wanted = {name: t.detach() for name, t in held.items()} | {"scale": held["scale"]}
    torch.testing.assert_close(dscale, torch.autograd.grad(plain(**wanted)[0].sum(), held["scale"])[0])
    z, _, _ = conv_stats(held["x"], held["weight"], None, (2, 1), 2)
    assert not z.requires_grad


def test_gradient_through_one_statistic_alone():
    for index in (1, 2):
        held = tensors()
        wanted = torch.autograd.grad(plain(**held)[index].square().sum(), (held["x"], held["weight"], held["scale"]))
        got = torch.autograd.grad(fused(**held)[index].square().sum(), (held["x"], held["weight"], held["scale"]))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_torch_func_and_forward_mode_go_through_the_formula():
    held = tensors()
    arguments = tuple(t.detach() for t in held.values())
    _, tangent = torch.func.jvp(lambda x: fused(x, *arguments[1:])[2], (arguments[0],), (arguments[0],))
    _, wanted = torch.func.jvp(lambda x: plain(x, *arguments[1:])[2], (arguments[0],), (arguments[0],))
    torch.testing.assert_close(tangent, wanted)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(arguments[0], arguments[0])
        got = torch.autograd.forward_ad.unpack_dual(fused(dual, *arguments[1:])[2]).tangent
    torch.testing.assert_close(got, wanted)
    stacked = torch.stack([arguments[0], arguments[0].flip(0)])
    got = torch.func.vmap(lambda x: fused(x, *arguments[1:])[0])(stacked)
    torch.testing.assert_close(got[1], fused(stacked[1], *arguments[1:])[0])


def test_pool_ties_and_nan_as_pytorch():
    """Small integers tie all over; one window has two NaN."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-2, 3, (2, 3, 7, 6), generator=generator).float()
    z[0, 1, 2, 2] = z[0, 1, 2, 3] = float("nan")
    z.requires_grad_()
    affine = (None, torch.ones(3), torch.zeros(3))
    dout = torch.randint(1, 5, (2, 3, 4, 3), generator=generator).float()
    got = affine_relu_max_pool(z, affine)
    wanted = F.max_pool2d(torch.relu(z), 3, 2, 1)
    assert torch.equal(got.nan_to_num(-1.0), wanted.nan_to_num(-1.0))
    got, wanted = (torch.autograd.grad(out, z, dout)[0] for out in (got, wanted))
    assert torch.equal(got, wanted)


# --- residuals, dtypes, autocast ---


def test_residual_of_other_dtype_layout_and_shape():
    z, affine = torch.randn(2, 4, 3, 3), (None, torch.randn(4), torch.randn(4))
    for residual in (
        torch.randn(2, 4, 3, 3).double(),
        torch.randn(4, 1, 1),
        torch.randn(2, 3, 3, 4).permute(0, 3, 1, 2),
    ):
        got = affine_add_relu(z, affine, residual)
        wanted = torch.relu(z * affine[1][:, None, None] + affine[2][:, None, None] + residual)
        torch.testing.assert_close(got, wanted.float())
        assert got.stride() == z.stride()
    expanded = torch.randn(4, 1, 1, requires_grad=True)
    affine_add_relu(z, affine, expanded).sum().backward()
    assert expanded.grad.shape == (4, 1, 1)


def test_autocast_casts_convolutions_only():
    held = {name: t.float().detach().requires_grad_(t.requires_grad) for name, t in tensors().items()}
    with torch.autocast("cpu", torch.bfloat16):
        z, mean, _ = fused(**held)
        affine = bn_affine(mean, mean.square(), None, None, 1e-5)
        out = affine_add_relu(z, affine)
        y = conv_affine(held["x"], held["weight"], None, None, groups=2)
    assert (z.dtype, mean.dtype, affine[1].dtype, out.dtype, y.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    )
    out.sum().backward()
    assert held["x"].grad.dtype == torch.float32


def test_bn_affine_keeps_the_parameters_dtype():
    mean, var = torch.randn(4), torch.rand(4)
    gamma, beta = (torch.randn(4).half().requires_grad_() for _ in range(2))
    center, scale, shift = bn_affine(mean, var, gamma, beta, 1e-5)
    assert center.dtype == scale.dtype == shift.dtype == torch.float32
    assert not center.requires_grad
    (scale + shift).sum().backward()
    assert gamma.grad.dtype == beta.grad.dtype == torch.float16


# --- the operators under PyTorch's own checks and compilers ---


def operators(requires_grad, channels_last):
    layout = "channels_last" if channels_last else "contiguous"
    x, center, scale, shift, weight = tensors(torch.float32, requires_grad=requires_grad, layout=layout).values()
    z, mean, _ = (t.detach() for t in fused(x, center, scale, shift, weight))
    dims = ((2, 1), 2, channels_last)
    affine = (center, scale, shift)
    dout = torch.randn_like(x)
    dvector = torch.randn(6)
    gamma, beta = (torch.rand(6).requires_grad_(requires_grad) for _ in range(2))
    pooled, taps = fused_ops.POOL(x.detach(), *(t.detach() for t in affine), channels_last, True)
    detached = [t.detach() for t in (x, *affine)]
    out = fused_ops.AFFINE_ADD_RELU(*detached, detached[0], *detached[1:], channels_last, True)
    return {
        "conv_stats": (fused_conv_ops.CONV_STATS, (x, *affine, weight, *dims, True)),
        "conv_stats-plain": (fused_conv_ops.CONV_STATS, (x, None, None, None, weight, *dims, False)),
        "conv_norm": (fused_conv_ops.CONV_NORM, (x, *affine, weight, gamma, beta, 1e-5, *dims)),
        "conv_norm-plain": (fused_conv_ops.CONV_NORM, (x, None, None, None, weight, None, None, 1e-5, *dims)),
        "conv_stats_bwd": (
            fused_conv_ops.CONV_STATS_BWD,
            (z, z, mean, dvector, dvector, *detached, weight.detach(), *dims, (True, True)),
        ),
        "conv_affine": (
            fused_conv_ops.CONV_AFFINE,
            (detached[0], weight.detach(), dvector, dvector, z, True, *dims),
        ),
        "bn_affine": (fused_ops.BN_AFFINE, (center, scale.detach().square(), scale, shift, 1e-5)),
        "bn_affine_bwd": (
            fused_ops.BN_AFFINE_BWD,
            (center, center.flip(0), center.square(), scale.detach(), 1e-5),
        ),
        "affine_add_relu": (fused_ops.AFFINE_ADD_RELU, (x, *affine, dout, center, scale, shift, channels_last, True)),
        "affine_add_relu-alone": (
            fused_ops.AFFINE_ADD_RELU,
            (x, *affine, None, None, None, None, channels_last, False),
        ),
        "affine_add_relu_bwd": (
            fused_ops.AFFINE_ADD_RELU_BWD,
            (dout, out, *detached, *detached, channels_last, (True, True, True)),
        ),
        "pool": (fused_ops.POOL, (x, *affine, channels_last, True)),
        "pool_bwd": (
            fused_ops.POOL_BWD,
            (torch.randn_like(pooled), taps, *detached, channels_last, (True, True)),
        ),
        "laid_out": (fused_ops.LAID_OUT, (x, not channels_last)),
    }


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", operators(False, False))
def test_opcheck(name, channels_last):
    for requires_grad in (False, True):
        operator, arguments = operators(requires_grad, channels_last)[name]
        result = torch.library.opcheck(operator.overload, arguments)
        assert set(result.values()) == {"SUCCESS"}


class Chain(torch.nn.Module):
    """Two convolutions, a pool and the end of a block: every operator once."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w1 = torch.nn.Parameter(torch.randn(8, 4, 1, 1, generator=generator))
        self.w2 = torch.nn.Parameter(torch.randn(8, 2, 3, 3, generator=generator))
        self.gamma, self.beta = (torch.nn.Parameter(torch.randn(8, generator=generator)) for _ in range(2))

    def forward(self, x):
        z, _, _, affine = conv_norm(x, self.w1, self.gamma, self.beta, 1e-5)
        pooled = affine_relu_max_pool(z, affine)
        z, mean, var = conv_stats(z, self.w2, affine, 2, 4)
        return affine_add_relu(z, bn_affine(mean, var, None, None, 1e-5), pooled)


def gradients(module, x):
    y = module(x)
    return y, *torch.autograd.grad(y.square().sum(), tuple(module.parameters()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch._inductor.config.patch(force_disable_caches=True)
def test_compile_fullgraph(backend):
    torch.compiler.reset()
    module, x = Chain(), torch.randn(3, 4, 8, 6).contiguous(memory_format=torch.channels_last)
    wanted = gradients(module, x)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for a, b in zip(gradients(compiled, x), wanted, strict=True):
        torch.testing.assert_close(a, b)
    folded = torch.compile(
        lambda x: conv_affine(x, module.w1.detach(), module.gamma.detach(), module.beta.detach()),
        fullgraph=True,
        backend=backend,
    )
    torch.testing.assert_close(
        folded(x), conv_affine(x, module.w1.detach(), module.gamma.detach(), module.beta.detach())
    )


def test_export_with_dynamic_batch():
    module, x = Chain(), torch.randn(3, 4, 8, 6)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch}})
    other = torch.randn(5, 4, 8, 6)
    torch.testing.assert_close(program.module()(other), module(other))


def test_flops_are_pytorchs():
    counts = []
    for forward in (fused, plain):
        held = tensors(torch.float32)
        with FlopCounterMode(display=False) as counter:
            forward(**held)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_saved_tensors_are_raw_outputs_and_vectors():
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(**tensors(torch.float32))
    assert sorted(saved, key=len) == [(4,), (4,), (4,), (6,), (2, 4, 5, 4), (6, 2, 3, 3), (2, 6, 3, 4)]


# --- errors ---


def test_what_conv_stats_takes():
    assert why_not_conv_stats((8, 2, 3, 3), 2, 1, 1, 4) is None
    assert why_not_conv_stats((8, 8, 1, 1), 2, 0) is None
    assert why_not_conv_stats((64, 3, 7, 7), 2, 3) is None
    assert why_not_conv_stats((8, 8, 2, 2), 1, 0) == "the kernel is 2x2; both sides must be odd"
    assert why_not_conv_stats((8, 8, 3, 3), 1, 2, 2) == "dilation is 2, not 1"
    assert why_not_conv_stats((8, 8, 3, 3), 1, 0) == "padding is 0, not (1, 1)"
    assert why_not_conv_stats((8, 8, 3, 3), 4, 1) == "stride is 4, neither 1 nor 2"


BAD_CALLS = {
    "channels": (lambda x, w, v: conv_stats(x[:, :3], w, None, 1, 2), "expected x with weight.shape.1. . groups"),
    "scale": (lambda x, w, v: conv_stats(x, w, (None, v[:3], v), 1, 2), r"expected scale of shape \(4,\)"),
    "dtype": (lambda x, w, v: conv_stats(x, w, (None, v.half(), v), 1, 2), "expected scale of shape .* got .*float16"),
    "stride": (lambda x, w, v: conv_stats(x, w, None, 3, 2), "stride is 3, neither 1 nor 2; use F.conv2d"),
    "empty": (lambda x, w, v: conv_stats(x[:0], w, None, 1, 2), "without empty dimensions"),
    "even-kernel": (lambda x, w, v: conv_stats(x, w[..., :2, :2], None, 1, 2), "both sides must be odd"),
    "residual": (lambda x, w, v: affine_add_relu(x, (None, v, v), x[:, :, 1:]), "residual of a shape that expands to"),
    "residual-affine": (lambda x, w, v: affine_add_relu(x, (None, v, v), None, (None, v, v)), "expected a residual"),
    "integers": (lambda x, w, v: affine_add_relu(x.long(), (None, v, v)), "expected a floating-point input"),
    "mean": (lambda x, w, v: bn_affine(v, v[:3], None, None, 0.0), "expected mean and var of one shape"),
    "gamma": (lambda x, w, v: bn_affine(v, v, v[:3], None, 0.0), r"expected gamma of shape \(4,\), got \(3,\)"),
    "gamma-device": (lambda x, w, v: bn_affine(v, v, v.to("meta"), None, 0.0), "expected gamma on cpu, got meta"),
    "beta": (lambda x, w, v: conv_norm(x, w, None, v, 0.0, None, 1, 2), r"expected beta of shape \(6,\), got \(4,\)"),
    "pool": (lambda x, w, v: affine_relu_max_pool(x[0], (None, v, v)), r"expected an input \(N, C, H, W\)"),
    "affine-shift": (lambda x, w, v: conv_affine(x, w, None, v, groups=2), r"expected shift of shape \(6,\)"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_was_expected(name):
    call, message = BAD_CALLS[name]
    held = tensors(torch.float32, requires_grad=False)
    with pytest.raises(ValueError, match=message):
        call(held["x"], held["weight"], held["shift"])


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_weights_gradient_has_its_layout(backend, kernel, groups):
    """Else autograd would copy it."""
    for of_x in (torch.contiguous_format, torch.channels_last):
        for of_weight in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 16, 5, 6).contiguous(memory_format=of_x)
            weight = torch.randn(24, 16 // groups, kernel, kernel).contiguous(memory_format=of_weight).requires_grad_()
            with use_backend(backend):
                z, _, _ = conv_stats(x, weight, None, groups=groups)
                (dweight,) = torch.autograd.grad(z.square().sum(), weight)
            assert dweight.is_contiguous(memory_format=of_weight)
