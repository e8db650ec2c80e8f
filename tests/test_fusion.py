"""When a block runs fused and when its children run one by one; derivatives, tracing and compilers."""

import copy

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

from resnext import GroupedConv2d

from .block_cases import CASES, IDENTITY, PROJECTION, forward_and_gradients, reason_of, train_and_evaluate


def hooked(name: str, register: str):
    """Register a hook that does nothing; backward hooks make the module's autograd graph another one."""
    return lambda block: getattr(block.get_submodule(name), f"register_{register}")(lambda *_: None)


def replaced(name: str, make):
    def change(block: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        torch.manual_seed(4)
        setattr(block.get_submodule(parent), child, make(block.get_submodule(name)))

    return change


def with_forward_of_its_own(block: nn.Module) -> None:
    block.conv1.forward = lambda x: F.conv2d(x, block.conv1.weight * 2)


def changed(name: str, **attributes):
    def change(block: nn.Module) -> None:
        for attribute, value in attributes.items():
            setattr(block.get_submodule(name), attribute, value)

    return change


def pooled(downsample: nn.Sequential) -> nn.Sequential:
    conv = nn.Conv2d(24, 32, 1, bias=False)
    return nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), conv, nn.BatchNorm2d(32))


CHANGES = {
    "group norm": (replaced("bn2", lambda _: nn.GroupNorm(4, 16)), "bn2 is GroupNorm, not BatchNorm2d"),
    "no norm": (replaced("bn1", lambda _: nn.Identity()), "bn1 is Identity, not BatchNorm2d"),
    "another activation": (replaced("relu", lambda _: nn.SiLU()), "relu is SiLU, not ReLU"),
    "dilated": (changed("conv2", dilation=(2, 2), padding=(2, 2)), "conv2: dilation is (2, 2), not 1"),
    "circular padding": (
        replaced("conv2", lambda _: GroupedConv2d(16, 16, 3, 2, 1, groups=4, bias=False, padding_mode="circular")),
        "conv2.padding_mode is circular, not zeros",
    ),
    "pooling shortcut": (
        replaced("downsample", pooled),
        "downsample has 3 children, not 2 as when it was converted",
    ),
    "shortcut of another kind": (
        replaced("downsample", lambda _: nn.Conv2d(24, 32, 1, 2)),
        "downsample is Conv2d, not Sequential",
    ),
    "another child": (
        changed("", drop_path=nn.Identity()),
        "the module has 9 children, not 8 as when it was converted",
    ),
    "an attribute that is read": (
        changed("", drop_path=lambda out: out),
        "drop_path of the module is not what it was when it was converted",
    ),
    "eps 0": (changed("bn3", eps=0.0), "bn3.eps is 0.0, not positive"),
    "one running statistic": (
        changed("bn1", running_mean=None, track_running_stats=False),
        "bn1 has only one of running_mean and running_var",
    ),
    "bias without weight": (changed("bn3", weight=None), "bn3 has a bias without a weight"),
    "forward hook": (hooked("conv2", "forward_hook"), "conv2 has a forward hook"),
    "forward pre-hook": (hooked("bn1", "forward_pre_hook"), "bn1 has a forward pre-hook"),
    "backward hook": (hooked("conv3", "full_backward_hook"), "conv3 has a backward hook"),
    "backward pre-hook": (hooked("downsample.1", "full_backward_pre_hook"), "downsample.1 has a backward pre-hook"),
    "hook on the container": (hooked("downsample", "forward_hook"), "downsample has a forward hook"),
    "pruned": (
        lambda block: prune.l1_unstructured(block.conv3, "weight", 0.5),
        "conv3 has a forward pre-hook",
    ),
    "forward of its own": (with_forward_of_its_own, "conv1 has a forward of its own"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_children_run_one_by_one(change, reason):
    """The same operations in the same order as in torchvision's block, so the same bits in float64."""
    ours, plain = (block.double() for block in PROJECTION.pair())
    for block in (ours, plain):
        change(block)
        block.double()
    if "eps" in reason:  # which PyTorch takes in evaluation only
        ours.bn3.eval()
        plain.bn3.eval()
    x = PROJECTION.images().double()
    assert reason_of(ours) == reason_of(ours, x) == reason
    got, expected = forward_and_gradients(ours, x), forward_and_gradients(plain, x)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def test_attributes_that_are_not_read_do_not_matter():
    ours, _ = PROJECTION.pair()
    ours.stride, ours.epoch, ours.history = 3, 1, [0.5]
    assert reason_of(ours) is None


def test_parametrized():
    ours, _ = IDENTITY.pair()
    parametrizations.weight_norm(ours.conv2)
    assert reason_of(ours) == "conv2 is ParametrizedConv2d, not Conv2d"
    x = IDENTITY.images()
    ours(x).sum().backward()
    assert ours.conv2.parametrizations.weight.original1.grad is not None


def test_hooks_fire_once_and_change_outputs():
    ours, plain = PROJECTION.pair()
    fired = []
    for block in (ours, plain):
        block.conv2.register_forward_hook(lambda _, inputs, output: fired.append(1) or output * 2)
    x = PROJECTION.images()
    torch.testing.assert_close(ours(x), plain(x))
    assert len(fired) == 2


def test_global_hooks_see_the_children():
    ours, _ = PROJECTION.pair()
    names = {id(module): name for name, module in ours.named_modules()}
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(names[id(module)]))
    try:
        assert reason_of(ours) == "a hook is registered for all modules"
        ours(PROJECTION.images())
    finally:
        handle.remove()
    assert set(seen) == set(names.values())
    assert reason_of(ours) is None


INPUTS = {
    "without images": (lambda x: x[:0], "the input has no images"),
    "without a batch": (lambda x: x[0], "the input has shape (24, 7, 6), not (N, C, H, W) with C, H and W at least 1"),
    "another dtype": (lambda x: x.double(), "the input is torch.float64, and conv1 torch.float32"),
    "integers": (
        lambda x: x.int(),
        "the input is torch.int32, not float32, float16, bfloat16 or float64",
    ),
    "another device": (
        lambda x: x.to("meta"),
        "the input is torch.strided on meta, not strided on a CPU or a CUDA GPU",
    ),
}


@pytest.mark.parametrize(("view", "reason"), INPUTS.values(), ids=INPUTS.keys())
def test_inputs_left_to_the_children(view, reason):
    """What PyTorch computes, counts or raises."""
    ours, plain = PROJECTION.pair()
    x = view(PROJECTION.images())
    assert reason_of(ours, x) == reason
    outcomes = []
    for block in (ours, plain):
        try:
            outcomes.append(block(x).shape)
        except (RuntimeError, ValueError) as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
    for got, expected in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_evaluation_without_images():
    ours, plain = (block.eval() for block in PROJECTION.pair())
    x = PROJECTION.images()[:0]
    with torch.no_grad():
        assert ours(x).shape == plain(x).shape
    got, expected = forward_and_gradients(ours, x), forward_and_gradients(plain, x)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


ERRORS = {
    "one value per channel": (lambda block: None, (1, 1, 2), "Expected more than 1 value per channel when training"),
    "eps 0": (changed("bn2", eps=0.0), (2, 4, 4), "eps must be positive"),
}


@pytest.mark.parametrize(("change", "size", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_are_pytorchs(change, size, message):
    ours, plain = PROJECTION.pair()
    x = torch.randn(size[0], 24, *size[1:])
    errors = []
    for block in (ours, plain):
        change(block)
        with pytest.raises(ValueError, match=message) as error:
            block(x)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


# --- who else calls ---


def test_functional_transforms():
    ours, plain = (block.double().eval() for block in PROJECTION.pair())
    x = PROJECTION.images().double()
    for transformed in (
        lambda block: torch.func.grad(lambda x: block(x).square().sum())(x),
        lambda block: torch.func.vmap(lambda x: block(x[None])[0])(x),
        lambda block: torch.func.jvp(block, (x,), (x,))[1],
    ):
        torch.testing.assert_close(transformed(ours), transformed(plain))


def test_functional_call():
    """Other tensors in the modules' place for one call."""
    ours, plain = (block.double().eval() for block in PROJECTION.pair())
    x = PROJECTION.images().double()
    state = {name: value.detach() + 1 for name, value in plain.state_dict().items()}
    with torch.no_grad():
        before = ours(x)
        torch.testing.assert_close(
            torch.func.functional_call(ours, state, x), torch.func.functional_call(plain, state, x)
        )
        assert torch.equal(ours(x), before)


def test_forward_mode_differentiation():
    ours, plain = (block.double().eval() for block in PROJECTION.pair())
    x = PROJECTION.images().double()
    tangents = []
    for block in (ours, plain):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            tangents.append(torch.autograd.forward_ad.unpack_dual(block(dual)).tangent)
    torch.testing.assert_close(*tangents)


def test_double_backward():
    ours, plain = (block.double() for block in PROJECTION.pair())
    x = PROJECTION.images().double()
    results = []
    for block in (ours, plain):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(block(leaf).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [leaf, *block.parameters()]))
    torch.testing.assert_close(*results)


def test_symbolic_tracing_records_the_children():
    ours, _ = PROJECTION.pair()
    traced = fx.symbolic_trace(ours)
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {"conv1", "bn1", "relu", "bn3", "downsample.0", "downsample.1"} <= called
    x = PROJECTION.images()
    torch.testing.assert_close(traced(x), ours(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_tracing():
    ours, _ = PROJECTION.pair()
    x = PROJECTION.images()
    with torch.no_grad():
        traced = torch.jit.trace(ours.eval(), x)
        torch.testing.assert_close(traced(x), ours(x))


# --- compilers ---


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=lambda case: case.id)
def test_compile_fullgraph(case, recompute):
    """Training, evaluation with gradients and inference, without a graph break, the same bits."""
    torch.compiler.reset()
    block, _ = case.pair(lambda channels: nn.BatchNorm2d(channels, momentum=None), recompute=recompute)
    other = copy.deepcopy(block)
    other.compile(fullgraph=True, backend="aot_eager")
    x = case.images()
    expected, got = train_and_evaluate(block, x), train_and_evaluate(other, x)
    # The compiled graph folds batch norm without moving the scale into 1x1 weights.
    for name in ("inference", "inference again"):
        torch.testing.assert_close(got.pop(name), expected.pop(name))
    assert got.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(got[name], value)] == []


@torch._inductor.config.patch(force_disable_caches=True)  # what the cache on disk holds may be of another source
def test_compile_with_inductor():
    torch.compiler.reset()
    block, _ = PROJECTION.pair()
    other = copy.deepcopy(block)
    other.compile(fullgraph=True)
    got, expected = (forward_and_gradients(each, PROJECTION.images()) for each in (other, block))
    torch.testing.assert_close(got, expected)


def test_compile_with_dynamic_batch_compiles_once():
    torch.compiler.reset()
    block, _ = PROJECTION.pair()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 5):
        x = PROJECTION.images(batch)
        torch.testing.assert_close(compiled(x), block(x))
        if batch == 2:
            compiled_before = counter.frame_count  # some more than one, for the numbers that are not symbolic after all
    assert counter.frame_count == compiled_before


def test_export():
    """For inference, without gradients, batch norm is folded into four convolutions."""
    block, _ = PROJECTION.pair()
    block.eval()
    x = PROJECTION.images()
    more = torch.cat([x, x + 1])
    batch = torch.export.Dim("batch", min=1, max=64)
    for no_grad, node in ((True, "conv_affine"), (False, "conv_stats")):
        with torch.set_grad_enabled(not no_grad):
            program = torch.export.export(block, (x,), dynamic_shapes={"x": {0: batch}})
            targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
            assert sum(node in target for target in targets) == 4
            torch.testing.assert_close(program.module()(more), block(more))
