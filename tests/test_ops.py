"""`grouped_conv2d` as a PyTorch operator: values, layouts, derivatives, compilers, errors; automatic backend."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from resnext import grouped_conv2d
from resnext.kernels import checks, dispatch, grouped_conv2d_dgrad, grouped_conv2d_wgrad, use_backend

from .cases import CASES, Case, make_tensors
from .numerics import assert_close, exact

SMALL = Case("small", 2, 8, 8, 5, 6, 4, (2, 1), True)
TINY = Case("tiny", 1, 2, 4, 3, 2, 2, (2, 1), True)  # finite differences cost a call per element
PLAIN = Case("plain", 2, 8, 8, 5, 6, 4)
OPS = torch.ops.resnext


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


# How a caller may hold a tensor: name -> a function that gives the same values in another memory layout.
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": channels_last,
    "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    "sliced-channels_last": lambda t: channels_last(torch.cat([t, t], 2))[:, :, : t.shape[2]],
    "permuted": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
}


def layouts(**extra):
    return pytest.mark.parametrize("layout", [pytest.param(f, id=name) for name, f in (LAYOUTS | extra).items()])


def assert_right(op: str, case: Case, tensors: dict[str, torch.Tensor | None], actual: torch.Tensor) -> None:
    """Within the derived bound. A 16-bit convolution that F.conv2d itself serves may sum in 16 bits."""
    plain = case.groups == 1 and dispatch.forced_backend() is None
    u_acc = torch.finfo(actual.dtype).eps / 2 if plain else 2.0**-24
    assert_close(actual, exact(op, case, tensors), u_acc=u_acc)


def small_conv(x, weight, bias=None):
    return grouped_conv2d(x, weight, bias, stride=SMALL.stride, groups=SMALL.groups)


# --- values and layouts ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values_of_all_passes(case, dtype):
    tensors = make_tensors(case, dtype, channels_last=True)
    x, weight = (tensors[name].clone().requires_grad_() for name in ("x", "weight"))
    bias = None if tensors["bias"] is None else tensors["bias"].clone().requires_grad_()
    y = grouped_conv2d(x, weight, bias, case.stride, groups=case.groups)
    y.backward(tensors["grad"])
    assert_right("fwd", case, tensors, y.detach())
    assert_right("dgrad", case, tensors, x.grad)
    assert_right("wgrad", case, tensors, weight.grad)
    if bias is not None:
        wanted = tensors["grad"].double().sum((0, 2, 3))
        torch.testing.assert_close(bias.grad.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-4)


@layouts(expanded=lambda t: t[:1].expand_as(t))
def test_any_input_layout(layout):
    tensors = make_tensors(PLAIN)
    x = layout(tensors["x"])
    before, strides = x.clone(), x.stride()
    y = grouped_conv2d(x, tensors["weight"], groups=4)
    wanted = F.conv2d(x, tensors["weight"], None, 1, 1, 1, 4)
    assert y.stride() == wanted.stride()
    assert_close(y, exact("fwd", PLAIN, tensors | {"x": x, "bias": None}))
    assert torch.equal(x, before)
    assert x.stride() == strides


@layouts(expanded=lambda t: t[:1].expand_as(t))
def test_any_weight_layout(layout):
    tensors = make_tensors(PLAIN)
    weight = layout(tensors["weight"])
    y = grouped_conv2d(tensors["x"], weight, groups=4)
    assert y.stride() == F.conv2d(tensors["x"], weight, None, 1, 1, 1, 4).stride()
    assert_close(y, exact("fwd", PLAIN, tensors | {"weight": weight, "bias": None}))


@layouts(expanded=lambda t: t[:1].expand_as(t))
def test_any_gradient_layout(layout):
    tensors = make_tensors(PLAIN)
    grad = layout(tensors["grad"])
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    dx, dw = torch.autograd.grad(grouped_conv2d(x, weight, groups=4), (x, weight), grad)
    assert_close(dx, exact("dgrad", PLAIN, tensors | {"grad": grad}))
    assert_close(dw, exact("wgrad", PLAIN, tensors | {"grad": grad}))


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 1, 5, 4), 1), ((2, 4, 1, 1), 2), ((1, 1, 1, 1), 1), ((1, 4, 1, 6), 2), ((1, 4, 6, 1), 4), ((3, 1, 1, 7), 1)],
    ids=["C1", "1x1", "all-1", "one-row", "one-column", "C1-one-row"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ambiguous_shapes_keep_pytorchs_strides(shape, groups, dtype):
    for make in (lambda t: t, channels_last):
        x = make(torch.randn(shape, dtype=dtype))
        weight = torch.randn(4, shape[1] // groups, 3, 3, dtype=dtype)
        y, wanted = grouped_conv2d(x, weight, groups=groups), F.conv2d(x, weight, None, 1, 1, 1, groups)
        assert y.stride() == wanted.stride()
        torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("to_channels_last", [False, True])
def test_unbatched(to_channels_last):
    tensors = make_tensors(PLAIN, channels_last=to_channels_last)
    y = grouped_conv2d(tensors["x"][0], tensors["weight"], groups=4)
    assert torch.equal(y, grouped_conv2d(tensors["x"][:1], tensors["weight"], groups=4)[0])
    assert y.stride() == F.conv2d(tensors["x"][0], tensors["weight"], None, 1, 1, 1, 4).stride()


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "arguments"),
    [
        ((2, 8, 7, 7), (8, 2, 3, 3), {"groups": 4, "dilation": 2, "padding": 2}),
        ((2, 8, 7, 7), (8, 2, 3, 3), {"groups": 4, "padding": "same"}),
        ((2, 8, 7, 7), (8, 2, 3, 3), {"groups": 4, "padding": "valid"}),
        ((2, 8, 7, 7), (8, 2, 3, 3), {"groups": 4, "padding": 0, "stride": 3}),
        ((2, 8, 7, 7), (8, 2, 5, 1), {"groups": 4, "padding": (2, 0)}),
        ((2, 8, 7, 7), (8, 8, 1, 1), {"padding": 0}),
        ((0, 8, 7, 7), (8, 2, 3, 3), {"groups": 4}),
        ((8, 7, 7), (8, 2, 3, 3), {"groups": 4, "stride": (2,)}),
        ((2, 8, 7, 7), (8, 2, 3, 3), {"groups": 4, "stride": [2, 1], "padding": [1, 1]}),
    ],
    ids=["dilated", "same", "valid", "stride3", "5x1", "1x1", "empty-batch", "stride-of-one", "lists"],
)
def test_every_other_convolution_is_pytorchs(x_shape, weight_shape, arguments):
    x, weight = torch.randn(x_shape, requires_grad=True), torch.randn(weight_shape, requires_grad=True)
    y, wanted = (f(x, weight, None, **{"padding": 1} | arguments) for f in (grouped_conv2d, F.conv2d))
    torch.testing.assert_close(y, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), (x, weight)), torch.autograd.grad(wanted.sum(), (x, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_integers_and_complex_go_to_pytorch():
    for dtype in (torch.int64, torch.complex64):
        x, weight = torch.ones(1, 4, 3, 3, dtype=dtype), torch.ones(4, 2, 3, 3, dtype=dtype)
        assert torch.equal(grouped_conv2d(x, weight, groups=2), F.conv2d(x, weight, None, 1, 1, 1, 2))


def test_repeats_are_bitwise_equal():
    tensors = make_tensors(CASES[3])
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    runs = []
    for _ in range(3):
        y = grouped_conv2d(x, weight, groups=8)
        runs.append((y, *torch.autograd.grad(y, (x, weight), tensors["grad"])))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_two_threads():
    tensors = make_tensors(CASES[3])
    wanted = grouped_conv2d(tensors["x"], tensors["weight"], groups=8)
    results = [None, None]

    def work(i):
        for _ in range(20):
            results[i] = grouped_conv2d(tensors["x"], tensors["weight"], groups=8)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, wanted) for result in results)


# --- derivatives ---


def tiny_double(*names):
    tensors = make_tensors(TINY)
    return [tensors[name].double().requires_grad_() for name in names]


def tiny_conv(x, weight, bias=None):
    return grouped_conv2d(x, weight, bias, stride=TINY.stride, groups=TINY.groups)


def test_gradcheck_reverse_and_forward():
    assert torch.autograd.gradcheck(tiny_conv, tiny_double("x", "weight", "bias"), check_forward_ad=True)
    bias_only = lambda bias: tiny_conv(*(t.detach() for t in tiny_double("x", "weight")), bias)  # noqa: E731
    assert torch.autograd.gradcheck(bias_only, tiny_double("bias"), check_forward_ad=True)


def test_gradgradcheck():
    assert torch.autograd.gradgradcheck(tiny_conv, tiny_double("x", "weight", "bias"), check_fwd_over_rev=True)


def test_gradcheck_of_the_backward_functions():
    dgrad = lambda grad, weight: grouped_conv2d_dgrad(grad, weight, TINY.input_shape[2:], TINY.stride, 2)  # noqa: E731
    wgrad = lambda grad, x: grouped_conv2d_wgrad(grad, x, TINY.stride, 2)  # noqa: E731
    for function, names in ((dgrad, ("grad", "weight")), (wgrad, ("grad", "x"))):
        assert torch.autograd.gradcheck(function, tiny_double(*names), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, tiny_double(*names))


def test_backward_functions_where_pytorch_serves():
    """Nothing to compute, and torch.func transforms."""
    tensors = make_tensors(PLAIN)
    grad, weight, x = (tensors[name] for name in ("grad", "weight", "x"))
    assert grouped_conv2d_dgrad(grad[:0], weight, (5, 6), 1, 4).shape == (0, 8, 5, 6)
    assert torch.equal(grouped_conv2d_wgrad(grad[:0], x[:0], 1, 4), torch.zeros_like(weight))
    energy = lambda grad: grouped_conv2d_dgrad(grad, weight, (5, 6), 1, 4).square().sum()  # noqa: E731
    wanted = torch.autograd.grad(energy(grad.requires_grad_()), grad)[0]
    torch.testing.assert_close(torch.func.grad(energy)(grad.detach()), wanted)


def test_third_derivative():
    x, weight = tiny_double("x", "weight")
    ours, theirs = (
        f(x, weight).pow(3).sum()
        for f in (tiny_conv, lambda x, w: F.conv2d(x, w, None, TINY.stride, 1, 1, TINY.groups))
    )
    for _ in range(2):
        ours, theirs = (torch.autograd.grad(y, x, create_graph=True)[0].pow(2).sum() for y in (ours, theirs))
    a, b = (torch.autograd.grad(y, weight)[0] for y in (ours, theirs))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_wanted_gradients_are_computed(wanted, monkeypatch):
    """A frozen weight, an input without gradient: their passes never run."""
    from resnext.kernels import reference

    ran = []
    for name in ("dgrad", "wgrad"):
        original = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, name=name, f=original: (ran.append(name), f(*a))[1])
    tensors = make_tensors(SMALL)
    tensors[wanted].requires_grad_()
    with use_backend("torch"):
        small_conv(tensors["x"], tensors["weight"], tensors["bias"]).sum().backward()
    assert ran == {"x": ["dgrad"], "weight": ["wgrad"], "bias": []}[wanted]
    assert [name for name in ("x", "weight", "bias") if tensors[name].grad is not None] == [wanted]


def test_input_is_not_kept_for_a_frozen_weight():
    tensors = make_tensors(SMALL)
    x = tensors["x"].requires_grad_() * 2
    kept = weakref.ref(x)
    y = small_conv(x, tensors["weight"])
    del x
    gc.collect()
    assert kept() is None
    y.sum().backward()


def test_backward_twice():
    x, weight = (t.requires_grad_() for t in (make_tensors(SMALL)[n] for n in ("x", "weight")))
    y = small_conv(x, weight)
    y.sum().backward(retain_graph=True)
    once = x.grad.clone()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_changing_a_saved_tensor_in_place_is_an_error():
    x, weight = (t.requires_grad_() for t in (make_tensors(SMALL)[n] for n in ("x", "weight")))
    h = x * 1
    y = small_conv(h, weight)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_torch_func_transforms_go_through_pytorch():
    x, weight = (t.detach() for t in tiny_double("x", "weight"))
    plain = lambda x, weight: F.conv2d(x, weight, None, TINY.stride, 1, 1, TINY.groups)  # noqa: E731
    batch = torch.stack([x, 2 * x, -x])
    torch.testing.assert_close(
        torch.func.vmap(tiny_conv, (0, None))(batch, weight), torch.func.vmap(plain, (0, None))(batch, weight)
    )
    per_sample = [
        torch.func.vmap(torch.func.grad(lambda w, x, f=f: f(x, w).square().sum()), (None, 0))(weight, batch)
        for f in (tiny_conv, plain)
    ]
    torch.testing.assert_close(*per_sample)


# --- autocast ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_conv2d_does(dtype):
    tensors = make_tensors(SMALL)
    x, weight, bias = (tensors[name].requires_grad_() for name in ("x", "weight", "bias"))
    with torch.autocast("cpu", dtype):
        y = small_conv(x, weight, bias)
        wanted = F.conv2d(x, weight, bias, SMALL.stride, 1, 1, SMALL.groups)
        assert small_conv(x.double(), weight.double()).dtype == torch.float64
    assert y.dtype == wanted.dtype == dtype
    y.backward(tensors["grad"].to(dtype))
    rounded = {k: t.detach().to(dtype) for k, t in tensors.items()}
    assert_right("fwd", SMALL, rounded, y.detach())
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    assert_right("dgrad", SMALL, rounded, x.grad.to(dtype))


# --- compilers ---


def operators(tensors):
    dims = (SMALL.stride, SMALL.groups)
    x, weight, bias, grad = (tensors[name] for name in ("x", "weight", "bias", "grad"))
    return {
        "fwd": (OPS._grouped_conv2d_fwd, lambda cl: (x, weight, bias, *dims, cl)),
        "dgrad": (OPS._grouped_conv2d_dgrad, lambda cl: (grad, weight, SMALL.input_shape[2:], *dims, cl)),
        "wgrad": (OPS._grouped_conv2d_wgrad, lambda cl: (grad, x, *dims, cl)),
    }


@pytest.mark.parametrize("op", ["fwd", "dgrad", "wgrad"])
@layouts()
def test_opcheck(op, layout):
    tensors = {name: t if t.dim() == 1 else layout(t) for name, t in make_tensors(SMALL).items()}
    for to_channels_last, requires_grad in ((False, True), (True, False)):
        held = {name: t.detach().requires_grad_(requires_grad) for name, t in tensors.items()}
        operator, arguments = operators(held)[op]
        result = torch.library.opcheck(operator.default, arguments(to_channels_last))
        assert set(result.values()) == {"SUCCESS"}


class Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        tensors = make_tensors(SMALL)
        self.weight, self.bias = (torch.nn.Parameter(tensors[name]) for name in ("weight", "bias"))

    def forward(self, x):
        return small_conv(x, self.weight, self.bias).relu()


def run(module, x):
    x = x.detach().requires_grad_()
    y = module(x)
    return y, *torch.autograd.grad(y.square().sum(), (x, *module.parameters()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@torch._inductor.config.patch(force_disable_caches=True)  # what the cache on disk holds may be of another source
def test_compile_fullgraph(backend, layout):
    torch.compiler.reset()
    module, x = Conv(), LAYOUTS[layout](make_tensors(SMALL)["x"])
    wanted = run(module, x)
    got = run(torch.compile(module, fullgraph=True, backend=backend), x)
    assert got[0].stride() == wanted[0].stride()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_under_autocast_and_vmap():
    torch.compiler.reset()
    module, x = Conv(), make_tensors(SMALL)["x"]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), module(x))
    vmapped = torch.compile(lambda x: torch.func.vmap(module)(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(vmapped(x[None]), module(x)[None])


def test_compile_makes_one_node_per_pass():
    torch.compiler.reset()
    graphs = []

    def record(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if "resnext" in str(node.target)])
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    run(torch.compile(Conv(), fullgraph=True, backend=aot_autograd(fw_compiler=record)), make_tensors(SMALL)["x"])
    assert graphs == [
        ["resnext._grouped_conv2d_fwd.default"],
        ["resnext._grouped_conv2d_dgrad.default", "resnext._grouped_conv2d_wgrad.default"],
    ]


def test_compile_with_dynamic_batch_compiles_once():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = Conv()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 7):
        x = torch.randn(batch, *SMALL.input_shape[1:])
        torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch(strict):
    module, x = Conv(), make_tensors(SMALL)["x"]
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    other = torch.randn(5, *SMALL.input_shape[1:])
    torch.testing.assert_close(program.module()(other), module(other))
    program.module()(other).sum().backward()  # an exported program can still be trained


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_jit_trace():
    module, x = Conv(), make_tensors(SMALL)["x"]
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


def test_meta_tensors():
    for op, shape in (("fwd", SMALL.output_shape), ("dgrad", SMALL.input_shape), ("wgrad", SMALL.weight_shape)):
        held = {name: t.to("meta") for name, t in make_tensors(SMALL).items()}
        operator, arguments = operators(held)[op]
        assert operator(*arguments(False)).shape == shape


def test_flops_are_pytorchs():
    counts = []
    for conv in (grouped_conv2d, F.conv2d):
        tensors = make_tensors(SMALL)
        x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
        with FlopCounterMode(display=False) as counter:
            conv(x, weight, None, SMALL.stride, 1, 1, SMALL.groups).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# --- errors ---


X, W = (2, 8, 5, 6), (8, 2, 3, 3)
BAD_CALLS = {
    "channels": ((X, (8, 1, 3, 3)), {}, "expected x with weight.shape.1. . groups = 1 . 4 = 4 channels, got 8"),
    "groups-not-a-divisor": ((X, W), {"groups": 3}, "expected groups to divide C_out, got C_out=8"),
    "groups-zero": ((X, W), {"groups": 0}, "expected groups to be an integer >= 1, got 0"),
    "groups-float": ((X, W), {"groups": 4.0}, "expected groups to be an integer >= 1, got 4.0"),
    "stride-float": ((X, W), {"stride": 2.0}, "expected stride to be one or two integers >= 1, got 2.0"),
    "stride-none": ((X, W), {"stride": None}, "expected stride to be one or two integers >= 1, got None"),
    "stride-bool": ((X, W), {"stride": True}, "expected stride to be one or two integers >= 1, got True"),
    "padding-float": ((X, W), {"padding": (1.0, 1.0)}, "expected padding to be one or two integers >= 0"),
    "stride-tensor": ((X, W), {"stride": torch.tensor([2, 1])}, "expected stride to be one or two integers >= 1"),
    "bias": ((X, W, (3,)), {}, r"expected bias of shape \(8,\), one value per output channel, got \(3,\)"),
    "x-2d": (((5, 6), W), {}, r"expected x of shape \(N, C, H, W\) or \(C, H, W\), got \(5, 6\)"),
    "weight-3d": ((X, (2, 3, 3)), {}, "expected weight of shape"),
    "stride-zero": ((X, W), {"stride": 0}, "expected stride to be one or two integers >= 1, got 0"),
    "stride-three": ((X, W), {"stride": (1, 1, 1)}, "expected stride to be one or two integers"),
    "padding-negative": ((X, W), {"padding": -1}, "expected padding to be one or two integers >= 0, got -1"),
    "padding-name": ((X, W), {"padding": "full"}, "expected padding to be integers or same or valid, got 'full'"),
    "padding-same-strided": ((X, W), {"padding": "same", "stride": 2}, "expected stride 1 with padding 'same'"),
    "dilation-zero": ((X, W), {"dilation": 0}, "expected dilation to be one or two integers >= 1, got 0"),
    "smaller-than-kernel": (((1, 8, 2, 2), W), {"padding": 0}, "Kernel size can't be greater than actual input size"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_raises_pytorchs_class_with_our_words(name):
    shapes, keywords, message = BAD_CALLS[name]
    tensors = [torch.randn(shape) for shape in shapes]
    keywords = {"groups": 4, "padding": 1} | keywords
    with pytest.raises(Exception) as theirs:  # noqa: PT011  PyTorch's class is what the test finds out
        F.conv2d(*tensors, **keywords)
    with pytest.raises(theirs.type, match=message) as ours:
        grouped_conv2d(*tensors, **keywords)
    if theirs.type is not TypeError:  # those repeat the call's signature, which differs
        assert str(theirs.value) in str(ours.value)


def test_mixed_dtypes():
    x, weight = torch.randn(X), torch.randn(W).double()
    with pytest.raises(RuntimeError, match=r"expected weight to have x's dtype torch.float32, got torch.float64"):
        grouped_conv2d(x, weight, groups=4)
    with pytest.raises(RuntimeError, match="expected bias to have x's dtype"):
        grouped_conv2d(x, weight.float(), torch.randn(8).half(), groups=4)


def test_mixed_devices():
    message = checks.invalid_conv2d(torch.randn(X), torch.randn(W, device="meta"), None, 1, 1, 1, 4)
    assert message == "expected weight on x's device cpu, got meta; move one of them with .to(device)"
    if torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="expected weight on x's device cpu, got cuda"):
            grouped_conv2d(torch.randn(X), torch.randn(W, device="cuda"), groups=4)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="expected x to be a Tensor, got list"):
        grouped_conv2d([1.0], torch.randn(W), groups=4)


def test_backward_functions_refuse_what_does_not_fit():
    grad, x, weight = torch.randn(X), torch.randn(X), torch.randn(W)
    for call, message in (
        (lambda: grouped_conv2d_dgrad(grad, weight, (9, 9), 1, 4), r"expected grad of .* \(2, 8, 9, 9\), got"),
        (lambda: grouped_conv2d_dgrad(grad, weight, (5, 6), 3, 4), "expected stride 1 or 2 per axis, got 3"),
        (lambda: grouped_conv2d_dgrad(grad[0], weight, (5, 6), 1, 4), "expected grad and weight of 4 dimensions"),
        (lambda: grouped_conv2d_dgrad(grad, weight[..., :1], (5, 6), 1, 4), "expected a weight of shape"),
        (lambda: grouped_conv2d_dgrad(grad, weight.double(), (5, 6), 1, 4), "dtype"),
        (lambda: grouped_conv2d_wgrad(grad, x[:1], 1, 4), "expected grad of .* got"),
        (lambda: grouped_conv2d_wgrad(grad, x.double(), 1, 4), "expected grad and x of one dtype"),
        (lambda: grouped_conv2d_wgrad(grad[0], x, 1, 4), "expected grad and x of 4 dimensions"),
        (lambda: grouped_conv2d_wgrad(grad, x, 1, 3), "expected groups to divide"),
        (lambda: grouped_conv2d_wgrad(grad, x, 1, 0), "expected groups to be an integer >= 1, got 0"),
        (lambda: grouped_conv2d_wgrad(grad, x.to("meta"), 1, 4), "expected grad and x on one device"),
        (lambda: grouped_conv2d_wgrad(grad.long(), x.long(), 1, 4), "expected a floating-point dtype"),
        (lambda: grouped_conv2d_dgrad(grad, weight, (-1, 6), 1, 4), "expected input_size"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
