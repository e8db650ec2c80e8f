"""What only a GPU can show: compiled Triton kernels and CUDA C++ against the oracle, cuDNN, streams, graphs, sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resnext import grouped_conv2d, use_backend
from resnext.kernels import (
    affine_add_relu,
    bn_affine,
    conv_stats,
    dispatch,
    grouped_conv2d_dgrad,
    grouped_conv2d_wgrad,
)

from . import fused_numerics
from .attention_numerics import check_attention
from .cases import CASES, Case, make_tensors
from .fused_numerics import ELEMENTWISE_SHAPES, GROUPED_CASES, FusedCase, make, make_affine
from .numerics import assert_close, exact

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TF32 = 2.0**-10  # what an operand loses at most: the matrix units cut off what TF32 has no bits for
STAGE1 = Case("resnext50-stage1", 4, 128, 128, 56, 56, 32)
LAYERS = [
    STAGE1,
    Case("resnext50-stage2-stride2", 4, 256, 256, 56, 56, 32, (2, 2)),
    Case("resnext50-stage3", 4, 512, 512, 14, 14, 32),
    Case("resnext50-stage4", 4, 1024, 1024, 7, 7, 32),
    Case("resnext101-64x4d-stage1", 4, 256, 256, 56, 56, 64),
    Case("regnety-4gf", 2, 192, 192, 28, 28, 3),
    Case("regnety-16gf-stride2", 2, 448, 448, 28, 28, 4, (2, 2)),
]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if reason := dispatch.unsupported(request.param, torch.float32, torch.device("cuda", 0)):
        pytest.skip(f"{request.param}: {reason}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")


def on_gpu(tensors):
    return {name: None if t is None else t.cuda() for name, t in tensors.items()}


def run_pass(op, case, t):
    if op == "fwd":
        return grouped_conv2d(t["x"], t["weight"], t["bias"], case.stride, groups=case.groups)
    if op == "dgrad":
        return grouped_conv2d_dgrad(t["grad"], t["weight"], case.input_shape[2:], case.stride, case.groups)
    return grouped_conv2d_wgrad(t["grad"], t["x"], case.stride, case.groups)


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_pass(case, dtype, channels_last, backend):
    tensors = make_tensors(case, dtype, channels_last=channels_last)
    for op in ("fwd", "dgrad", "wgrad"):
        assert_close(run_pass(op, case, on_gpu(tensors)), exact(op, case, tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_small_integers_are_exact(case, dtype, backend):
    tensors = make_tensors(case, dtype, channels_last=True, integers=True)
    for op in ("fwd", "dgrad", "wgrad"):
        wanted = exact(op, case, tensors).value
        assert torch.equal(run_pass(op, case, on_gpu(tensors)).cpu(), wanted.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
def test_error_is_no_worse_than_cudnns(case, dtype, backend):
    """At most twice cuDNN's largest error in the same dtype, plus one unit in the last place."""
    tensors = make_tensors(case, dtype, channels_last=True)
    t = on_gpu(tensors)
    for op in ("fwd", "dgrad", "wgrad"):
        oracle = exact(op, case, tensors)
        ours = run_pass(op, case, t)
        assert_close(ours, oracle)
        with use_backend("torch"):
            theirs = run_pass(op, case, t)
        error, baseline = ((y.cpu().double() - oracle.value).abs().max() for y in (ours, theirs))
        assert error <= 2 * baseline + torch.finfo(dtype).eps * oracle.value.abs().max()


def test_tf32_follows_pytorchs_flag(monkeypatch):
    tensors = make_tensors(STAGE1, channels_last=True)
    t = on_gpu(tensors)
    with use_backend("triton"):
        ieee = grouped_conv2d(t["x"], t["weight"], groups=32)
        monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32")
        tf32 = grouped_conv2d(t["x"], t["weight"], groups=32)
    oracle = exact("fwd", STAGE1, tensors)
    assert_close(ieee, oracle)
    # Both operands of a product lose that, however many are summed.
    assert_close(tf32, type(oracle)(oracle.value, oracle.magnitude, 1), u_acc=TF32)
    assert not torch.equal(ieee, tf32)


def test_nan_stays_in_its_group(backend):
    tensors = make_tensors(STAGE1, torch.bfloat16, channels_last=True)
    t = on_gpu(tensors)
    clean = {op: exact(op, STAGE1, tensors) for op in ("fwd", "dgrad", "wgrad")}
    group = slice(4, 8)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = {name: None if v is None else v.clone() for name, v in t.items()}
        bad["x"][1, 5, 3, 4] = value  # group 1 of 32
        bad["grad"][1, 5, 3, 4] = value
        for op in ("fwd", "dgrad", "wgrad"):
            out = run_pass(op, STAGE1, bad)
            # What had to be computed again, apart from the bad group, may be rounded otherwise.
            others, place = out.cpu(), group if op == "wgrad" else (slice(None), group)
            others[place] = clean[op].value[place].to(out.dtype)
            assert_close(others, clean[op])
            with use_backend("torch"):
                wanted = run_pass(op, STAGE1, {k: None if v is None else v.float() for k, v in bad.items()})
            assert torch.equal(out.isfinite(), wanted.isfinite())


def test_repeats_are_bitwise_equal(backend):
    t = on_gpu(make_tensors(STAGE1, torch.bfloat16, channels_last=True))
    for op in ("fwd", "dgrad", "wgrad"):
        first = run_pass(op, STAGE1, t)
        assert all(torch.equal(first, run_pass(op, STAGE1, t)) for _ in range(5))


def test_side_stream(backend):
    t = on_gpu(make_tensors(STAGE1, torch.bfloat16, channels_last=True))
    wanted = run_pass("wgrad", STAGE1, t)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        grad = t["grad"].clone()  # ready only on this stream
        got = run_pass("wgrad", STAGE1, t | {"grad": grad})
    stream.synchronize()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("warm", [True, False])
def test_cuda_graph(backend, warm):
    case = Case("graph", 2, 64, 64, 14, 14, 16 if warm else 8)  # another shape each: the cold one is new to the process
    t = on_gpu(make_tensors(case, torch.float16, channels_last=True))
    x, weight = t["x"].requires_grad_(), t["weight"].requires_grad_()

    def step():
        y = grouped_conv2d(x, weight, groups=case.groups)
        return y, *torch.autograd.grad(y, (x, weight), t["grad"])

    side = torch.cuda.Stream()
    if warm:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.mul_(2)
    graph.replay()
    wanted = step()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


def test_second_gpu(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = make_tensors(CASES[3], torch.float16, channels_last=True)
    t = {name: None if v is None else v.to("cuda:1") for name, v in tensors.items()}
    for op in ("fwd", "dgrad", "wgrad"):
        assert_close(run_pass(op, CASES[3], t), exact(op, CASES[3], tensors))


def test_compile_fullgraph(backend):
    torch.compiler.reset()
    t = on_gpu(make_tensors(STAGE1, torch.float16, channels_last=True))
    x, weight = t["x"].requires_grad_(), t["weight"].requires_grad_()
    call = lambda x, weight: grouped_conv2d(x, weight, groups=32).relu()  # noqa: E731
    for f in (torch.compile(call, fullgraph=True), torch.compile(call, fullgraph=True, mode="reduce-overhead")):
        for _ in range(3):
            y = f(x, weight)
            torch.testing.assert_close(y, call(x, weight))
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
def test_float64_layout_is_pytorchs(channels_last):
    t = on_gpu(make_tensors(CASES[3], torch.float64, channels_last=channels_last))
    y, wanted = grouped_conv2d(t["x"], t["weight"], groups=8), F.conv2d(t["x"], t["weight"], None, 1, 1, 1, 8)
    assert y.stride() == wanted.stride()
    torch.testing.assert_close(y, wanted)


def test_more_than_2_31_elements(backend):
    """First and last images of a tensor past 32-bit offsets, against the same images alone."""
    batch, channels, size = 1 + 2**31 // (128 * 112 * 112), 128, 112
    if torch.cuda.mem_get_info()[0] < 10 * 2**31:
        pytest.skip("needs 20 GB of free GPU memory")
    x = torch.randn(batch, channels, size, size, device="cuda", dtype=torch.float16).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.randn(channels, 4, 3, 3, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    y = grouped_conv2d(x, weight, groups=32)
    dx = grouped_conv2d_dgrad(x, weight, (size, size), 1, 32)
    for part in (slice(0, 2), slice(batch - 2, batch)):
        alone = x[part].clone(memory_format=torch.channels_last)
        assert torch.equal(y[part], grouped_conv2d(alone, weight, groups=32))
        assert torch.equal(dx[part], grouped_conv2d_dgrad(alone, weight, (size, size), 1, 32))
    x[1:-1] = 0
    ends = torch.cat([x[:1], x[-1:]])
    dw = grouped_conv2d_wgrad(x, x, 1, 32)
    # Another order of summation: one rounding to float16 each, and random-walk float32 rounding of sums of |x|^2 < 3.
    terms = 2 * size * size
    torch.testing.assert_close(
        dw, grouped_conv2d_wgrad(ends, ends, 1, 32), rtol=2.0**-10, atol=2 * terms**0.5 * 2.0**-24 * 3 * terms
    )


# --- fused operators ---

FUSED_LAYERS = [
    FusedCase(c.id, 2, c.in_channels, c.out_channels, c.height, c.width, c.groups, stride=c.stride) for c in LAYERS[:4]
]


def fused_launchers(case, dtype):
    shapes = (
        (case.batch, case.in_channels, case.height, case.width),
        (case.out_channels, case.in_channels // case.groups, 3, 3),
    )
    return dispatch.fused_launchers("fwd", *shapes, case.stride, case.groups, dtype, torch.device("cuda", 0), True)


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GROUPED_CASES, ids=lambda case: case.id)
def test_fused_convolutions(case, dtype, channels_last, backend):
    options = {"channels_last": channels_last, "device": "cuda"}
    launchers = fused_launchers(case, dtype)
    fused_numerics.check_conv_stats(launchers, case, dtype, **options)
    fused_numerics.check_conv_stats(launchers, case, dtype, prologue=False, **options)
    fused_numerics.check_conv_stats(launchers, case, dtype, stats=False, centered=False, **options)
    fused_numerics.check_conv_affine(launchers, case, dtype, **options)
    fused_numerics.check_conv_affine(launchers, case, dtype, residual=False, scaled=False, relu=False, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FUSED_LAYERS, ids=lambda case: case.id)
def test_fused_layers(case, dtype, backend):
    """Sizes that give every multiprocessor work: statistics and sums merged over many blocks."""
    fused_numerics.check_conv_stats(fused_launchers(case, dtype), case, dtype, device="cuda")
    fused_numerics.check_conv_affine(fused_launchers(case, dtype), case, dtype, device="cuda")


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*ELEMENTWISE_SHAPES.values(), (2, 64, 112, 112)], ids=str)
def test_elementwise(shape, dtype, channels_last, backend):
    generator = torch.Generator().manual_seed(3)
    z = make(shape, dtype, generator, channels_last=channels_last, device="cuda")
    device = torch.device("cuda", 0)
    launchers = dispatch.elementwise(dtype, device)
    fused_numerics.check_statistics(launchers, z, channels_last)
    for residual in ("none", "plain", "affine"):
        options = {"channels_last": channels_last, "residual": residual, "device": "cuda"}
        fused_numerics.check_affine_add_relu(launchers, shape, dtype, **options)
    for residual in ("none", "plain", "affine"):
        options = {"channels_last": channels_last, "residual": residual, "device": "cuda"}
        check_attention(dispatch.attention(dtype, device), shape, dtype, relu=residual == "none", **options)
    affine = make_affine(shape[1], generator, device="cuda")
    fused_numerics.check_pool(dispatch.pooling(dtype, device), z, affine, channels_last)


def test_fused_step_in_a_cuda_graph(backend):
    """Convolution, batch norm and ReLU with a residual, forward and backward, replayed on other values."""
    t = on_gpu(make_tensors(STAGE1, torch.float16, channels_last=True))
    x, weight = t["x"].requires_grad_(), t["weight"].requires_grad_()
    gamma, beta = (torch.rand(128, device="cuda").requires_grad_() for _ in range(2))

    def step():
        z, mean, var = conv_stats(x, weight, groups=32)
        out = affine_add_relu(z, bn_affine(mean, var, gamma, beta, 1e-5), x)
        return out, *torch.autograd.grad(out, (x, weight, gamma, beta), t["grad"])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.mul_(2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_elementwise_past_2_31_elements(backend):
    """The last image comes out as it does alone; constants have no variance."""
    batch, channels, size = 1 + 2**31 // (64 * 128 * 128), 64, 128
    if torch.cuda.mem_get_info()[0] < 10 * 2**31:
        pytest.skip("needs 20 GB of free GPU memory")
    constants = torch.randn(channels, device="cuda", dtype=torch.float16)
    z = constants[:, None, None].expand(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    assert z.numel() > 2**31
    launchers = dispatch.elementwise(z.dtype, z.device)
    mean, var = launchers.statistics(z, True)
    assert torch.equal(mean, constants.float())
    assert not var.any()
    z[-1].normal_()
    affine = make_affine(channels, torch.Generator().manual_seed(0), device="cuda")
    out = launchers.affine_add_relu(z, affine, None, None, True)
    alone = launchers.affine_add_relu(z[-1:].clone(memory_format=torch.channels_last), affine, None, None, True)
    assert torch.equal(out[-1:], alone)
