"""Channel attention: its launchers, its operators, and converted modules that have one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resnext import fuse_, unfuse_, why_not_fused
from resnext.kernels import affine_gate, affine_mean, attention, excite, extension, extension_attention, reference

from .attention_models import ATTENTIONS, Attended, WrittenLate
from .attention_numerics import OPTIONS, check_attention
from .fused_numerics import ELEMENTWISE_SHAPES, make, make_affine
from .other_models import SqueezeBlock

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = {**ELEMENTWISE_SHAPES, "several-parts": (3, 20, 11, 63), "several-parts-of-a-plane": (1, 2, 70, 80)}


# --- launchers ---


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_extension(capability, shape):
    for dtype in DTYPES:
        for channels_last in (True, False):
            for options in OPTIONS:
                check_attention(extension_attention, shape, dtype, channels_last=channels_last, **options)


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reference(shape, dtype, channels_last):
    for options in OPTIONS:
        check_attention(reference, shape, dtype, channels_last=channels_last, **options)


@pytest.mark.parametrize("result", ["affine_mean", "affine_gate", "affine_gate_bwd", "gated_affine_bwd"])
def test_bounds_catch_one_wrong_element(result):
    class Wrong:
        def __getattr__(self, name: str) -> Callable:
            launcher = getattr(reference, name)

            def wrong(*args):
                made = launcher(*args)
                if name == result:
                    first = made if isinstance(made, Tensor) else made[0]
                    first.view(-1)[3] += 1e-3 * (1 + first.view(-1)[3].abs())
                return made

            return wrong

    for options in OPTIONS[:1]:
        check_attention(reference, (2, 8, 5, 4), channels_last=False, **options)
        with pytest.raises(AssertionError):
            check_attention(Wrong(), (2, 8, 5, 4), channels_last=False, **options)


def everything(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, dout, residual = (make(shape, dtype, generator, channels_last=channels_last) for _ in range(3))
    gate, added = (make((*shape[:2], 1, 1), torch.float32, generator) for _ in range(2))
    affine, other = (make_affine(shape[1], generator) for _ in range(2))
    place = (channels_last, True)
    out = extension_attention.affine_gate(z, affine, False, gate, residual, other, channels_last)
    return [
        extension_attention.affine_mean(z, affine, True, channels_last),
        out,
        *extension_attention.affine_gate_bwd(dout, out, z, affine, False, residual, other, *place),
        *extension_attention.gated_affine_bwd(z, affine, True, dout, out, gate, added, channels_last),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
def test_results_do_not_depend_on_threads_or_repetition(capability, restore_threads, channels_last, dtype):
    torch.set_num_threads(1)
    wanted = everything((3, 70, 39, 53), dtype, channels_last)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        actual = everything((3, 70, 39, 53), dtype, channels_last)
        assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True)), threads


def test_nan_and_infinity_stay_in_their_channel_and_image(capability):
    generator = torch.Generator().manual_seed(0)
    for channels_last in (True, False):
        z = make((2, 20, 5, 7), torch.float32, generator, channels_last=channels_last)
        z[0, 3, 2, 2], z[1, 5, 0, 0] = float("nan"), float("inf")
        affine = (None, torch.ones(20), torch.zeros(20))
        mean = extension_attention.affine_mean(z, affine, True, channels_last)
        gated = extension_attention.affine_gate(z, affine, True, torch.ones(2, 20, 1, 1), None, None, channels_last)
        assert mean.isfinite().logical_not().nonzero().tolist() == [[0, 3, 0, 0], [1, 5, 0, 0]]
        assert mean[0, 3].isnan()
        assert gated.isfinite().logical_not().nonzero().tolist() == [[0, 3, 2, 2], [1, 5, 0, 0]]
        assert gated[0, 3, 2, 2].isnan()


BAD_LAUNCHES = {
    "gate": (lambda z, g, v: launch_gate(z, g[:1], v), r"affine_gate: expected gate of shape \(2, 8, 1, 1\)"),
    "gate-dtype": (
        lambda z, g, v: launch_gate(z, g.double(), v),
        "affine_gate: expected gate of dtype Float, got Double",
    ),
    "scale": (lambda z, g, v: launch_gate(z, g, v[:3]), r"expected contiguous scale of shape \(8\)"),
    "layout": (
        lambda z, g, v: extension._C.affine_mean(z, None, v, v, True, (2, 8, 1, 1, True), True),
        "affine_mean: expected z dense in channels_last layout",
    ),
    "alone": (
        lambda z, g, v: extension._C.gated_affine_bwd(
            z, None, v, v, True, z, None, None, g, z.shape, None, None, False
        ),
        "gated_affine_bwd: expected all of dout and gate or none",
    ),
    "residual": (
        lambda z, g, v: extension._C.affine_gate_bwd(
            z, None, z, None, v, v, True, z, None, v, (2, 8, 1, 1, True), None, None, None, False
        ),
        "affine_gate_bwd: expected out with residual",
    ),
}


def launch_gate(z: Tensor, gate: Tensor, vector: Tensor) -> Tensor:
    return extension_attention.affine_gate(z, (None, vector, vector), True, gate, None, None, False)


@pytest.mark.parametrize("name", BAD_LAUNCHES)
def test_bad_launches_say_what_was_expected(built, name):
    call, message = BAD_LAUNCHES[name]
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(2, 8, 3, 4), torch.randn(2, 8, 1, 1), torch.randn(8))


# --- operators ---


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("residual", ["none", "plain", "affine"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(affine, relu, residual, channels_last):
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    z, other = (doubles(2, 3, 4, 5).contiguous(memory_format=layout).detach().requires_grad_() for _ in range(2))
    gate, scale, shift, other_scale, other_shift = doubles(2, 3, 1, 1), *(doubles(3) for _ in range(4))
    center = torch.randn(3, dtype=torch.float64)

    def gated(z, gate, scale, shift, other, other_scale, other_shift):
        return affine_gate(
            z,
            gate,
            (center, scale, shift) if affine else None,
            relu,
            None if residual == "none" else other,
            (None, other_scale, other_shift) if residual == "affine" else None,
        )

    arguments = (z, gate, scale, shift, other, other_scale, other_shift)
    assert torch.autograd.gradcheck(gated, arguments)
    assert torch.autograd.gradgradcheck(gated, arguments)

    def mean(z, scale, shift):
        return affine_mean(z, (center, scale, shift) if affine else None, relu)

    assert torch.autograd.gradcheck(mean, (z, scale, shift))
    assert torch.autograd.gradgradcheck(mean, (z, scale, shift))
    assert gated(*arguments).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", ""])
def test_gradients_of_a_layer_of_an_excitation(activation):
    torch.manual_seed(0)
    x, weight, bias = doubles(3, 5, 1, 1), doubles(4, 5, 1, 1), doubles(4)
    y = excite(x, weight, bias, activation)
    plain = torch.nn.functional.conv2d(x, weight, bias)
    torch.testing.assert_close(y, getattr(torch, activation)(plain) if activation else plain)
    grad = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (x, weight, bias), grad)
    wide = attention.excited(x, weight, bias, activation)
    got = attention.excite_gradients(grad, x.detach(), weight.detach(), wide.detach(), activation)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        half = excite(x.detach().bfloat16(), weight.detach().float(), None, activation)
    assert half.dtype == torch.bfloat16


def operators(requires_grad: bool, channels_last: bool):
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    z, residual, dout = (torch.randn(2, 6, 5, 4).contiguous(memory_format=layout) for _ in range(3))
    gate, center, scale, shift = torch.randn(2, 6, 1, 1), *(torch.randn(6) for _ in range(3))
    for each in (z, residual, gate, scale, shift):
        each.requires_grad_(requires_grad)
    affine = (center, scale, shift)
    plain = [each.detach() for each in (z, *affine)]
    end = (*plain, False, gate.detach(), residual.detach(), *plain[1:], channels_last)
    out = attention.GATE(*end)
    return {
        "mean": (attention.MEAN, (z, *affine, True, channels_last)),
        "mean-alone": (attention.MEAN, (z, None, None, None, False, channels_last)),
        "mean_bwd": (attention.MEAN_BWD, (gate.detach(), *plain, True, channels_last)),
        "gate": (attention.GATE, (z, *affine, True, gate, None, None, None, None, channels_last)),
        "gate-end": (attention.GATE, (z, *affine, False, gate, residual, *affine, channels_last)),
        "gate-alone": (attention.GATE, (z, None, None, None, True, gate, residual, None, None, None, channels_last)),
        "gate_bwd": (attention.GATE_BWD, (dout, out, *end, True)),
        "gate_bwd-alone": (
            attention.GATE_BWD,
            (dout, None, plain[0], *(None,) * 3, True, gate.detach(), *(None,) * 4, channels_last, False),
        ),
    }


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", operators(False, False))
def test_opcheck(name, channels_last):
    for requires_grad in (False, True):
        operator, arguments = operators(requires_grad, channels_last)[name]
        result = torch.library.opcheck(operator.overload, arguments)
        assert set(result.values()) == {"SUCCESS"}


def test_transforms_and_forward_mode_go_through_the_formula():
    z, gate, scale, shift = torch.randn(3, 4, 5, 6), torch.rand(3, 4, 1, 1), torch.randn(4), torch.randn(4)

    def attended(z: Tensor) -> Tensor:
        return affine_gate(z, gate * affine_mean(z, (None, scale, shift)), (None, scale, shift), True, z)

    out, tangent = torch.func.jvp(attended, (z,), (torch.ones_like(z),))
    torch.testing.assert_close(out, attended(z))
    a = torch.relu(scale[:, None, None] * z + shift[:, None, None])
    torch.testing.assert_close(out, torch.relu(a * gate * a.mean((2, 3), keepdim=True) + z))
    assert tangent.shape == z.shape
    several = torch.func.vmap(lambda z, gate: affine_gate(z, gate))(z[:, None], gate[:, None])
    torch.testing.assert_close(several[:, 0], affine_gate(z, gate))


BAD_CALLS = {
    "gate": (lambda z, g, v: affine_gate(z, g[:, :3]), r"expected a floating-point gate \(2, 4, 1, 1\) on cpu"),
    "gate-dtype": (lambda z, g, v: affine_gate(z, g.long()), "expected a floating-point gate .* got .* torch.int64"),
    "gate-device": (lambda z, g, v: affine_gate(z, g.to("meta")), "expected a floating-point gate .* on meta"),
    "scale": (lambda z, g, v: affine_mean(z, (None, v[:3], v)), r"expected scale of shape \(4,\)"),
    "residual": (lambda z, g, v: affine_gate(z, g, None, True, z[:, :, 1:]), "residual of a shape that expands to"),
    "residual-affine": (lambda z, g, v: affine_gate(z, g, None, True, None, (None, v, v)), "expected a residual"),
    "dimensions": (lambda z, g, v: affine_mean(z[0]), r"expected an input \(N, C, H, W\)"),
    "empty": (lambda z, g, v: affine_mean(z[:0]), "without empty dimensions"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_was_expected(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 4, 3, 5), torch.randn(2, 4, 1, 1), torch.randn(4))


# --- modules ---


def block(last: bool = True, name: str = "module") -> Attended:
    torch.manual_seed(0)
    return Attended(ATTENTIONS[name], last)


def images(batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 8, 6, 7)


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    y = module(x)
    y.square().sum().backward()
    return {"y": y.detach(), **{n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


LINEAR_CHANGES: dict[str, Callable[[Attended], object]] = {
    "hook": lambda m: m.linear1.register_forward_hook(lambda module, args, output: output + 1),
    "layer": lambda m: setattr(m, "linear1", nn.Sequential(nn.Linear(8, 4), nn.Tanh())),
    "no-bias": lambda m: setattr(m.linear2, "bias", None),
    "weight": lambda m: setattr(m.linear2, "weight", nn.Parameter(m.linear2.weight.detach() * 3)),
    "parametrized": lambda m: nn.utils.parametrizations.weight_norm(m.linear1),
    "flatten": lambda m: setattr(m, "flatten", nn.Sequential(nn.Flatten(), nn.Tanh())),
}
CHANGES: dict[str, Callable[[Attended], object]] = {
    "hook": lambda m: m.fc1.register_forward_hook(lambda module, args, output: output + 1),
    "pre-hook": lambda m: m.pool.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "activation": lambda m: setattr(m, "sigmoid", nn.Tanh()),
    "pool": lambda m: setattr(m, "pool", nn.AdaptiveMaxPool2d(1)),
    "size": lambda m: setattr(m.pool, "output_size", 1),
    "another-size": lambda m: setattr(m, "pool", nn.AdaptiveAvgPool2d(1)),
    "layer": lambda m: setattr(m, "fc1", nn.Conv2d(8, 4, 3, padding=1)),
    "stride": lambda m: setattr(m.fc2, "stride", (2, 2)),
    "frozen": lambda m: m.fc1.weight.requires_grad_(False),
    "no-bias": lambda m: setattr(m.fc2, "bias", None),
    "weight": lambda m: setattr(m.fc2, "weight", nn.Parameter(m.fc2.weight.detach() * 3)),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [("module", change) for change in CHANGES.values()]
    + [("unsqueezed", change) for change in LINEAR_CHANGES.values()],
    ids=[*CHANGES, *(f"linear-{name}" for name in LINEAR_CHANGES)],
)
def test_changes_after_conversion_are_followed(name, change):
    plain, fused = block(name=name), block(name=name)
    fuse_(fused)
    x = images()
    step(fused, x)
    for each in (plain, fused):
        torch.manual_seed(2)
        change(each)
    plain(x)  # so that both have taken a step
    assert_close(step(fused, x), step(plain, x))
    plain.eval()
    fused.eval()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_pool_of_another_size_is_none():
    fused = block()
    fuse_(fused)
    fused.pool.output_size = 2
    assert why_not_fused(fused)[""].startswith("pool is AdaptiveAvgPool2d(output_size=2), not")


LAYERED = ("module", "gate-first", "mean", "torch.mean", "functional", "one-layer", "sizes", "shape")
LAYERED += ("flattened", "unsqueezed", "squeezed", "shaped-before-sigmoid")


@pytest.mark.parametrize("name", ATTENTIONS)
def test_layers_that_are_products_are_part_of_a_blocks_node(name):
    fused = block(name=name)
    fuse_(fused)
    (plan,) = fused._fused_plans.values()
    whole = [each for each in plan.segments.values() if len(each.steps) == len(plan.train.steps)]
    assert bool(whole) == (name in LAYERED)
    if name in LAYERED:
        assert type(fused(images()).grad_fn.next_functions[0][0]).__name__ == "_BlockBackward"


@pytest.mark.parametrize("name", ["module", "sizes"])
def test_packed_weights_follow_an_optimizer(name):
    plain, fused = block(name=name), block(name=name)
    fuse_(fused)
    for each in (plain, fused):
        each.eval()
    x = images()
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
            for each in (plain, fused):
                for layer in (each.fc1, each.linear1):
                    layer.weight.mul_(2)
                    layer.bias.add_(1)


def test_no_images():
    plain, fused = block(), block()
    fuse_(fused)
    for each in (plain, fused):
        each.eval()
        assert each(images()[:0]).shape == (0, 8, 6, 7)
        with torch.no_grad():
            assert each(images()[:0]).shape == (0, 8, 6, 7)


@pytest.mark.parametrize("name", ["module", "sizes", "tanh"])
@pytest.mark.parametrize("last", [True, False])
def test_compiled(last, name):
    torch.compiler.reset()
    fused = block(last, name)
    fuse_(fused)
    x = images()
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    assert_close({n.removeprefix("_orig_mod."): t for n, t in step(compiled, x).items()}, step(fused, x))


def test_exported_with_dynamic_batch():
    fused = block().eval()
    fuse_(fused)
    program = torch.export.export(fused, (images(),), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
    torch.testing.assert_close(program.module()(images(5)), fused(images(5)))


def test_flops_are_those_of_the_plain_module():
    counts = []
    for module in (block(), fuse_block()):
        with FlopCounterMode(display=False) as counter:
            step(module, images())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def fuse_block() -> Attended:
    fused = block()
    fuse_(fused)
    return fused


def test_gates_of_another_dtype_are_multiplied_as_pytorch_does():
    """In autocast a gate may be float32, and so is the product then."""
    plain, fused = (block(name="hard-sigmoid") for _ in range(2))
    for each in (plain, fused):
        each.attend = lambda m, x: x * torch.softmax(m.pool(x), 1)
    fuse_(fused)
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = fused(x), plain(x)
    assert got.dtype == wanted.dtype == torch.float32
    assert float((got - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spelled", ["out + x", "out += x", "x += out"])
@pytest.mark.parametrize("one_number", [True, False])
def test_dtypes_of_sums_in_autocast(spelled, one_number, training):
    """A branch in bfloat16 and a shortcut in float32; in place, the sum has the dtype of what it is written to."""

    class Summed(Attended):
        def forward(self, x: Tensor) -> Tensor:
            out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            gate = torch.sigmoid(self.fc2(self.relu(self.fc1(self.pool(out)))))
            out = out * (gate.mean(1, keepdim=True) if one_number else gate)
            shortcut = x * 1
            if spelled == "out + x":
                out = out + shortcut
            elif spelled == "out += x":
                out += shortcut
            else:
                shortcut += out
                out = shortcut
            return torch.relu(out)

    torch.manual_seed(0)
    plain = Summed(ATTENTIONS["module"], True).train(training)
    fused = copy.deepcopy(plain)
    fuse_(fused)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = fused(images()), plain(images())
    assert got.dtype == wanted.dtype
    assert float((got.float() - wanted.float()).norm() / wanted.float().norm()) < 0.02


def test_a_hook_inside_of_an_attention_leaves_it_as_it_is():
    """The rest is fused, as around anything else that is called."""
    torch.manual_seed(0)
    fused = SqueezeBlock(inside=True)
    calls = []
    fused.se.fc[0].register_forward_hook(lambda module, args, output: calls.append(output))
    fuse_(fused)
    assert not why_not_fused(fused)
    fused(images())
    assert len(calls) == 1


@pytest.mark.parametrize("what", ["mean", "gate"])
def test_writes_behind_their_reading_count_for_nothing(what):
    torch.manual_seed(0)
    plain = WrittenLate(what)
    fused = copy.deepcopy(plain)
    fuse_(fused)
    for training in (True, False):
        with torch.no_grad():
            for got, wanted in zip(fused.train(training)(images()), plain.train(training)(images()), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_saved_tensors_are_raw_outputs_and_vectors():
    """Nothing of an activation's size but the input, three raw outputs and the result, which the next block keeps."""
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    fused = fuse_block()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(images())
    large = {id(tensor) for tensor in saved if tensor.shape == images().shape}
    assert len(large) == 5


def test_conversion_back():
    fused = fuse_block()
    plain = unfuse_(copy.deepcopy(fused))
    assert_close(step(fused, images()), step(plain, images()))
