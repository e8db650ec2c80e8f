"""Tables and counts: torchinfo, torchsummary and FLOP counters see in a fused model what they see in a plain one."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import resnext
from resnext.blocks import BasicBlock, Bottleneck
from resnext.convert import fuse_, unfuse_, why_not_fused
from resnext.kernels import BackendError, extension, serving_backend

torchinfo = pytest.importorskip("torchinfo")
SIZE = (2, 3, 32, 32)


def torchvision(name: str) -> nn.Module:
    return pytest.importorskip("torchvision").models.get_model(name)


def timm(name: str) -> nn.Module:
    return pytest.importorskip("timm").create_model(name)


MODELS = {
    "bottlenecks": resnext.resnext50_32x4d,
    "basic-blocks": resnext.resnet18,
    "torchvision": lambda: torchvision("resnext50_32x4d"),
    "timm": lambda: timm("seresnext26d_32x4d"),
}


@pytest.fixture(params=MODELS, scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A fused model, and a plain copy of it."""
    fused = MODELS[request.param]()
    plain = unfuse_(copy.deepcopy(fused))
    fuse_(fused)
    return fused.eval(), plain.eval()


def small(block: type[nn.Module] = Bottleneck) -> nn.Module:
    """Four blocks; bottlenecks have 8 groups."""
    groups = {"groups": 8, "width_per_group": 4} if block is Bottleneck else {}
    return resnext.ResNet(block, (1, 1, 1, 1), num_classes=10, **groups)


def test_torchinfo_prints_the_plain_table(pair):
    columns = ("kernel_size", "input_size", "output_size", "num_params", "params_percent", "mult_adds", "trainable")
    rows = ("depth", "var_names")
    options = {"col_names": columns, "row_settings": rows, "depth": 9, "verbose": 0}
    fused, plain = (str(torchinfo.summary(model, SIZE, **options)) for model in pair)
    assert fused == plain


def test_torchsummary_prints_the_plain_table(pair):
    torchsummary = pytest.importorskip("torchsummary")
    tables = []
    for model in pair:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            torchsummary.summary(model, SIZE[1:], device="cpu")
        tables.append(printed.getvalue())
    assert tables[0] == tables[1]
    assert "Conv2d-1 " in tables[0]


def test_flop_counter_counts_the_plain_flops_of_every_module(pair):
    counts = []
    for model in pair:
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(SIZE)).sum().backward()
        counts.append({name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()})
    assert counts[0] == counts[1]
    assert counts[0]["Global"] > 0


class OperatorFlops(TorchDispatchMode):
    """FlopCounterMode without its hooks on all modules, which make blocks run their children one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
            self.operators.add(func._opname)
        return out


@pytest.mark.parametrize(
    ("training", "operators"),
    [(True, {"_conv_norm", "_conv_stats_bwd"}), (False, {"_conv_affine"})],
    ids=["training", "inference"],
)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_fused_operators_count_the_plain_flops(block, training, operators):
    counters = []
    for model in (small(block), unfuse_(small(block))):
        model.train(training)
        with OperatorFlops() as counter, torch.set_grad_enabled(training):
            out = model(torch.randn(SIZE))
            if training:
                out.sum().backward()
        counters.append(counter)
    fused, plain = counters
    assert fused.flops == plain.flops > 0
    assert operators <= fused.operators
    assert not operators & plain.operators


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_has_pytorchs_convolutions():
    """Such as fvcore counts."""
    graph = torch.jit.trace(small().eval(), torch.randn(SIZE)).inlined_graph
    kinds = [node.kind() for node in graph.nodes()]
    assert kinds.count("aten::_convolution") == 17
    assert not [kind for kind in kinds if kind.startswith("resnext::")]


def test_summary_is_torchinfos_table_and_more(pair):
    fused, plain = pair
    ours = resnext.summary(fused, SIZE, verbose=False)
    wanted = str(torchinfo.summary(plain, SIZE, verbose=0, col_names=("output_size", "num_params", "mult_adds")))
    lines, plain_lines = ours.table.splitlines(), wanted.splitlines()
    width = lines[1].index("Backend")
    assert [line[:width].rstrip() for line in lines if "FLOPs" not in line] == [
        "=" * width if set(line) == {"="} else line for line in plain_lines
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(torch.randn(SIZE))
    assert ours.flops == counter.get_total_flops()
    assert lines[-2] == f"Forward FLOPs (G): {ours.flops / 1e9:.2f}"
    assert why_not_fused(fused) == {}  # nothing is left behind


@pytest.fixture
def calls(built: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of the weights of the convolutions that the extension computes."""
    found: list[int] = []

    def spy(name: str, position: int) -> None:
        real = getattr(extension, name)

        def called(*args, **kwargs):
            found.append(args[position].data_ptr())
            return real(*args, **kwargs)

        monkeypatch.setattr(extension, name, called)

    for name, position in {"fwd": 1, "conv_affine": 1, "conv_stats_fwd": 2}.items():
        spy(name, position)
    return found


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_backends_are_those_of_an_ordinary_call(calls, training):
    model = small().train(training)
    backends = resnext.summary(model, SIZE, verbose=False).backends
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    calls.clear()
    with torch.set_grad_enabled(training):
        model(torch.randn(SIZE))
    for name, conv in convolutions.items():
        assert backends[name] == ("cpu" if conv.weight.data_ptr() in calls else "torch"), name
    assert len(set(calls)) == 16


def test_column_of_a_small_model(built):
    found = resnext.summary(small(), SIZE, verbose=False)
    first = {name: value for name, value in found.backends.items() if not name.startswith("layer")}
    assert first == {"": "fused chain: torch", "conv1": "torch"}
    assert {name: value for name, value in found.backends.items() if name.startswith("layer3")} == {
        "layer3.0": "fused block: cpu",
        "layer3.0.conv1": "cpu",
        "layer3.0.conv2": "cpu",
        "layer3.0.conv3": "cpu",
        "layer3.0.downsample.0": "cpu",
    }
    _, header, _, *rows = found.table.splitlines()
    column = [row[header.index("Backend") :] for row in rows if "Conv2d: " in row or "Bottleneck: " in row]
    assert column[:5] == ["torch", "fused block: cpu", "cpu", "cpu", "cpu"]


def test_what_is_not_fused_is_told(built):
    model = small()
    model.layer2[0].bn1.register_forward_hook(lambda module, args, output: None)
    found = resnext.summary(model, SIZE, verbose=False)
    assert found.backends["layer2.0"] == "not fused"
    assert found.backends["layer2.0.conv2"] == "cpu"  # by itself
    assert found.not_fused == {"layer2.0": "bn1 has a forward hook"}
    assert found.table.splitlines()[-2] == "Not fused: layer2.0: bn1 has a forward hook"


def test_a_model_that_is_not_converted_is_all_pytorchs():
    found = resnext.summary(unfuse_(small()), SIZE, verbose=False)
    assert len(found.backends) == 17
    assert set(found.backends.values()) == {"torch"}


def test_backend_of_fuse_(built):
    model = unfuse_(small())
    fuse_(model, backend="torch")
    found = resnext.summary(model, SIZE, verbose=False)
    assert found.backends["layer1.0"] == "fused block: torch"
    assert found.backends["layer1.0.conv2"] == "torch"


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = resnext.GroupedConv2d(8, 8, 3, padding=1, groups=4)
        self.reflecting = resnext.GroupedConv2d(8, 8, 3, padding=1, groups=4, padding_mode="reflect")

    def forward(self, x: Tensor, other: Tensor, scale: float = 1.0) -> Tensor:
        return self.conv(input=x) * scale + self.reflecting(other)


def test_several_inputs(built):
    found = resnext.summary(TwoInputs(), [(1, 8, 6, 6), (1, 8, 6, 6)], scale=2.0, verbose=False)
    assert found.backends == {"conv": "cpu", "reflecting": "torch"}
    by_data = resnext.summary(TwoInputs(), input_data=[torch.randn(1, 8, 6, 6)] * 2, verbose=False)
    assert by_data.backends == found.backends


def test_input_has_the_dtype_of_the_model(built):
    found = resnext.summary(small().bfloat16(), SIZE, verbose=False)  # PyTorch refuses mixed dtypes
    assert found.backends["layer1.0.conv2"] == "cpu"


def test_printed_unless_quiet(capsys):
    model = small()
    found = resnext.summary(model, SIZE, depth=1)
    assert capsys.readouterr().out == f"{found}\n" == f"{found.table}\n"
    resnext.summary(model, SIZE, verbose=False)
    assert capsys.readouterr().out == ""


def test_the_model_is_left_as_it_is():
    model = small().train()
    model.layer1.eval()  # frozen
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resnext.summary(model, SIZE, verbose=False)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "given"),
    [({}, "neither"), ({"input_size": SIZE, "input_data": torch.zeros(SIZE)}, "both")],
    ids=["neither", "both"],
)
def test_input_size_or_input_data(arguments, given):
    with pytest.raises(ValueError, match=f"summary: expected input_size or input_data, got {given}; give one of them"):
        resnext.summary(nn.Identity(), **arguments)


def test_torchinfo_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchinfo", None)
    with pytest.raises(ImportError, match=r"summary: expected the package torchinfo, got none; .*resnext\[train\]"):
        resnext.summary(nn.Identity(), SIZE)


# --- which backend serves a convolution ---

X, GROUPED, POINTWISE = torch.zeros(2, 16, 8, 8), torch.zeros(16, 4, 3, 3), torch.zeros(16, 16, 1, 1)
SERVED: dict[str, tuple[Callable[[], str], str]] = {
    "grouped": (lambda: serving_backend(X, GROUPED, groups=4), "cpu"),
    "grouped-unbatched": (lambda: serving_backend(X[0], GROUPED, groups=4), "cpu"),
    "grouped-stride-in-a-block": (lambda: serving_backend(X, GROUPED, 2, groups=4, fused=True), "cpu"),
    "grouped-float64": (lambda: serving_backend(X.double(), GROUPED.double(), groups=4), "torch"),
    "grouped-float64-in-a-block": (
        lambda: serving_backend(X.double(), GROUPED.double(), groups=4, fused=True),
        "torch",
    ),
    "dilated": (lambda: serving_backend(X, GROUPED, padding=2, dilation=2, groups=4), "torch"),
    "dense": (lambda: serving_backend(X, torch.zeros(16, 16, 3, 3)), "torch"),
    "dense-in-a-block": (lambda: serving_backend(X, torch.zeros(16, 16, 3, 3), fused=True), "torch"),
    "pointwise": (lambda: serving_backend(X, POINTWISE, padding=0), "torch"),
    "pointwise-in-a-block": (lambda: serving_backend(X, POINTWISE, padding=0, fused=True), "torch"),
}


@pytest.mark.parametrize("name", SERVED)
def test_serving_backend(built, name):
    call, wanted = SERVED[name]
    assert call() == wanted


def test_serving_backend_under_autocast(built):
    with torch.autocast("cpu", torch.bfloat16):
        assert serving_backend(X, GROUPED.bfloat16(), groups=4) == "cpu"


def test_serving_backend_that_cannot_serve():
    with (
        resnext.use_backend("cuda"),
        pytest.raises(BackendError, match=r"the cuda backend was asked for .* the tensors are on cpu"),
    ):
        serving_backend(X, GROUPED, groups=4)
