"""benchmarks/block.py, model.py and memory.py: block tables, counted bytes and memory, the gate, the command lines."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import block  # noqa: E402
import memory  # noqa: E402
import model  # noqa: E402
import networks  # noqa: E402
import shapes  # noqa: E402
from networks import CONTENDERS, Pair  # noqa: E402
from peak_memory import measure_memory  # noqa: E402
from shapes import BLOCKS, Block  # noqa: E402
from timing import Timing  # noqa: E402
from traffic import moved_bytes  # noqa: E402

from resnext import ResNet, blocks  # noqa: E402

torchvision = pytest.importorskip("torchvision")

from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402

CPU = torch.device("cpu")
# Pixels enough that the few whose ReLU rounds the other way in 16 bits are not most of a gradient's error.
SMALL = [
    Block(True, 32, 16, 14, 13, 2, groups=2),
    Block(True, 64, 16, 14, 13, 1, groups=2),
    Block(False, 32, 32, 13, 14, 1),
    Block(False, 16, 32, 14, 13, 2),
]
small_blocks = pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)


# --- shapes ---


@pytest.mark.parametrize("network", BLOCKS)
def test_blocks_are_those_of_the_model(network):
    with torch.device("meta"):
        net = getattr(torchvision.models, network)()
    found: list[Block] = []

    def record(module, inputs, _):
        bottleneck = isinstance(module, Bottleneck)
        first, middle = module.conv1, module.conv2
        planes = (module.conv3.out_channels // 4) if bottleneck else middle.out_channels
        groups = {"groups": middle.groups, "base_width": 64 * middle.out_channels // middle.groups // planes}
        settings = groups if bottleneck else {}
        found.append(Block(bottleneck, first.in_channels, planes, *inputs[0].shape[2:], module.stride, **settings))
        assert (module.downsample is not None) == found[-1].projects

    for module in net.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            module.register_forward_hook(record)
    net(torch.empty(1, 3, 224, 224, device="meta"))
    assert Counter(found) == BLOCKS[network]


def test_block_names_are_unique():
    blocks = shapes.select_blocks(["all"])
    assert len({shape.name for shape in blocks}) == len(blocks)


def test_select_blocks_refuses_unknown_names():
    with pytest.raises(ValueError, match=r"expected blocks among all, resnet18, .* got 'vgg'"):
        shapes.select_blocks(["resnet18", "vgg"])


@small_blocks
def test_convolutions_are_those_of_the_block(shape):
    plain = networks.block_pair(shape).plain
    outputs: list[torch.Tensor] = []
    convolutions = [module for module in plain.modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        convolution.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    plain(torch.randn(shape.input_shape(2)))
    assert shape.convolution_bytes(2, 4) == sum(output.nbytes for output in outputs)
    assert len(shape.convolutions) == len(convolutions)


# --- counted bytes ---


def _moved_in_units(call, unit: torch.Tensor) -> float:
    return moved_bytes(call) / unit.nbytes


def test_bytes_of_pytorchs_operators():
    x = torch.randn(4, 8, 6, 6)
    assert _moved_in_units(lambda: x + x, x) == 2  # one operand, though named twice
    assert _moved_in_units(lambda: x + 1, x) == 2
    assert _moved_in_units(lambda: x.clone().relu_(), x) == 4
    assert _moved_in_units(lambda: torch.empty_like(x).copy_(x), x) == 2
    assert _moved_in_units(lambda: torch.add(x, 1, out=torch.empty_like(x)), x) == 2
    assert _moved_in_units(lambda: x.view(-1).detach()[None], x) == 0
    assert _moved_in_units(lambda: x.contiguous(), x) == 0
    assert _moved_in_units(lambda: x.contiguous(memory_format=torch.channels_last), x) == 2
    row = torch.randn(8)
    expanded = row.expand(100, 8)
    assert moved_bytes(lambda: expanded.sum()) == row.nbytes + 4  # memory, not elements


def test_bytes_of_convolution_and_batch_norm():
    x, weight = torch.randn(4, 8, 6, 6, requires_grad=True), torch.randn(8, 8, 1, 1, requires_grad=True)
    y = nn.functional.conv2d(x, weight)
    grad = torch.randn_like(y)
    size = x.nbytes
    assert moved_bytes(lambda: nn.functional.conv2d(x, weight)) == 2 * size + weight.nbytes
    backward = moved_bytes(lambda: torch.autograd.grad(y, [x, weight], grad))
    assert backward == 2 * size + weight.nbytes + 2 * size + weight.nbytes  # dgrad and wgrad both read dy
    norm = nn.BatchNorm2d(8)
    assert 3 * size < moved_bytes(lambda: norm(x)) < 3.2 * size  # statistics, then the result
    out = norm(x)
    assert 5 * size < moved_bytes(lambda: torch.autograd.grad(out, x, grad)) < 5.2 * size
    norm.eval()
    assert 2 * size < moved_bytes(lambda: norm(x)) < 2.2 * size


def test_bytes_of_our_operators_are_those_of_what_they_call():
    from resnext.kernels import conv_stats, use_backend

    x, weight = torch.randn(2, 8, 6, 6), torch.randn(16, 8, 1, 1)
    with use_backend("torch"):
        moved = moved_bytes(lambda: conv_stats(x, weight))
    z = 2 * x.nbytes
    assert moved == x.nbytes + weight.nbytes + z + z + 2 * 16 * 4  # the convolution; statistics that read its result


def test_bytes_of_triton_launches():
    launch = pytest.importorskip("resnext.kernels.launch")

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: None

    run = launch.Launch(Kernel(), 1, {"size": 8}, {"BLOCK": 8}, {})
    x, y = torch.empty(10), torch.empty(6)
    assert moved_bytes(lambda: run(x_ptr=x, y_ptr=y, bias_ptr=None)) == 64


# --- memory ---


def test_memory_on_the_cpu():
    x = torch.randn(1000, 1000)
    scalars = 64  # of the additions
    peak, kept = measure_memory(lambda: (x + 1) + 2, CPU)
    assert 0 <= peak - 2 * x.nbytes <= scalars
    assert 0 <= kept - x.nbytes <= scalars
    assert measure_memory(lambda: (x.clone().mul_(x), None)[1], CPU) == (x.nbytes, 0)


def test_recomputing_keeps_one_tensor_less():
    pair, operands = networks.block_pair(SMALL[1]), block.Operands.random(SMALL[1], 4, torch.float32, CPU)
    kept = {}
    for name in ("ours", "ours_recompute"):
        module = networks.make(name, pair, CPU, torch.float32, training=True)
        forward = block.call(module, operands.to("channels_last"), "forward", torch.float32)
        kept[name] = measure_memory(forward, CPU).kept
    vectors = 8 * 64 * 4  # at most, of the last batch norm
    assert 0 <= kept["ours"] - kept["ours_recompute"] - operands.dout.nbytes <= vectors


# --- contenders and gate ---


def test_contenders_start_from_the_same_parameters():
    pair = networks.model_pair("resnet18")
    ours, plain = pair.ours.state_dict(), pair.plain.state_dict()
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in ours)
    assert plain["layer4.1.bn2.running_var"].ne(1).all()


@pytest.mark.parametrize("name", ["frozen", "compiled_nchw"])
def test_compiled_contenders_agree_with_eager(name):
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    compiled = networks.make(name, Pair(plain, plain), CPU, torch.float32, training=False)
    x_placed = x.contiguous(memory_format=networks.FORMATS[CONTENDERS[name].layout])
    torch.testing.assert_close(networks.inference(compiled, x_placed)(), plain.eval()(x).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@small_blocks
def test_gate_passes_right_blocks(shape, training, dtype):
    operands = block.Operands.random(shape, 4, dtype, CPU)
    assert block.mismatch(networks.block_pair(shape), operands, dtype, training) is None


class OneWrongColumn(nn.Module):
    """A block whose last column is 1% off, in the result or only in the gradient."""

    def __init__(self, block: nn.Module, forward: bool) -> None:
        super().__init__()
        self.block, self.in_forward = block, forward

    def named_parameters(self, *args, **kwargs):
        return self.block.named_parameters(*args, **kwargs)

    def forward(self, x):
        out = self.block(x)
        wrong = out.clone()
        wrong[..., -1] = wrong[..., -1] * 1.01
        return wrong if self.in_forward else wrong + (out - wrong).detach()


@pytest.mark.parametrize(
    ("training", "forward", "what"), [(False, True, "out"), (True, True, "out"), (True, False, "x")]
)
def test_gate_catches_one_wrong_column(training, forward, what):
    pair = networks.block_pair(SMALL[0])
    operands = block.Operands.random(SMALL[0], 3, torch.float32, CPU)
    wrong = Pair(OneWrongColumn(pair.ours, forward), pair.plain)
    assert block.mismatch(wrong, operands, torch.float32, training).startswith(f"{what}: expected an error of at most")


# --- command lines ---


@pytest.fixture
def one_small_block(monkeypatch):
    monkeypatch.setattr(shapes, "BLOCKS", {"tiny": {SMALL[0]: 1}})
    return ["--device", "cpu", "--blocks", "tiny", "--batch", "2"]


def test_block_run_writes_what_it_measured(one_small_block, tmp_path, capsys):
    paths = {name: str(tmp_path / f"out.{name}") for name in ("json", "csv")}
    options = ["--quick", "--contenders", "ours,nchw,ours_recompute", "--json", paths["json"], "--csv", paths["csv"]]
    assert block.main([*one_small_block, *options]) == 0
    assert "bottleneck_32-64x14x13_s2_g2  inference" in capsys.readouterr().out
    result = json.loads(Path(paths["json"]).read_text())
    assert result["complete"]
    assert result["wrong"] == 0
    assert result["arguments"]["blocks"] == SMALL[0].name
    assert [row["pass"] for row in result["rows"]] == list(block.PASSES)
    for row in result["rows"]:
        names = ["ours", "nchw"] if row["pass"] == "inference" else ["ours", "ours_recompute", "nchw"]
        for measured in ("seconds", "memory", "moved_over_convolution_outputs"):
            assert list(row[measured]) == names
            assert all(row[measured].values())
        fastest = min(row["seconds"][name]["median"] for name in names if name != "nchw")
        assert row["ratio"] == row["seconds"]["nchw"]["median"] / fastest
    with open(paths["csv"], newline="") as file:
        assert [line["pass"] for line in csv.DictReader(file)] == list(block.PASSES)


@pytest.fixture
def small_model(monkeypatch):
    """One block per stage; returns the number of bytes of its parameters."""
    plain = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1])
    ours = ResNet(blocks.BasicBlock, [1, 1, 1, 1])
    ours.load_state_dict(plain.state_dict())
    monkeypatch.setattr(networks, "model_pair", lambda name: Pair(ours, plain))
    return sum(parameter.nbytes for parameter in plain.parameters())


@pytest.mark.usefixtures("small_model")
def test_model_run_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    def call_once(calls, device, budget):
        for call in calls.values():
            call()
        return {name: Timing(1.0, 1.0, 1.0, 1.0, 1.0, 5) for name in calls}

    monkeypatch.setattr(model, "interleave", call_once)
    path = tmp_path / "out.json"
    options = [
        "--quick",
        "--device",
        "cpu",
        "--model",
        "resnet18",
        "--size",
        "32",
        "--seconds",
        "0",
        "--json",
        str(path),
    ]
    assert model.main(options) == 0
    assert "ours p50/p95/p99 ms" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [(row["mode"], row["batch"]) for row in rows] == [("training", 2), ("inference", 2)]
    for row in rows:
        assert list(row["seconds"]) == ["ours", "nchw", "channels_last"]
        assert set(row["images_per_second"].values()) == {2.0}


def test_memory_run_writes_what_it_measured(small_model, tmp_path, capsys):
    path = tmp_path / "out.json"
    options = ["--quick", "--device", "cpu", "--model", "resnet18", "--size", "32", "--json", str(path)]
    assert memory.main(options) == 0
    assert "ours_recompute MB" in capsys.readouterr().out
    [row] = json.loads(path.read_text())["rows"]
    peaks = row["peak_bytes"]
    assert list(peaks) == list(memory.EAGER)
    assert min(peaks.values()) > small_model  # all gradients are there at the end
    assert row["ratio"] == min(peaks["nchw"], peaks["channels_last"]) / peaks["ours"]


def test_verify_only_measures_nothing(one_small_block, monkeypatch, capsys):
    monkeypatch.setattr(block, "interleave", None)
    assert block.main([*one_small_block, "--verify-only"]) == 0
    assert "3 of 3 are as accurate as PyTorch's" in capsys.readouterr().out


def test_wrong_block_is_named_and_not_measured(one_small_block, monkeypatch, capsys, tmp_path):
    pair = networks.block_pair(SMALL[0])
    monkeypatch.setattr(networks, "block_pair", lambda _: Pair(OneWrongColumn(pair.ours, True), pair.plain))
    path = tmp_path / "out.json"
    assert block.main([*one_small_block, "--passes", "forward", "--json", str(path)]) == 1
    assert "WRONG: bottleneck_32-64x14x13_s2_g2 forward: out: expected an error" in capsys.readouterr().err
    result = json.loads(path.read_text())
    assert (result["wrong"], result["rows"]) == (1, [])


def test_interrupted_run_keeps_what_it_has(one_small_block, monkeypatch, tmp_path):
    timed: list[object] = []

    def interleave_once(calls, device, budget):
        if timed:
            raise KeyboardInterrupt
        timed.append(calls)
        return dict.fromkeys(calls, Timing(1.0, 1.0, 1.0, 1.0, 1.0, 5))

    monkeypatch.setattr(block, "interleave", interleave_once)
    path = tmp_path / "out.json"
    assert block.main([*one_small_block, "--quick", "--json", str(path)]) == 130
    result = json.loads(path.read_text())
    assert not result["complete"]
    assert [row["pass"] for row in result["rows"]] == ["inference"]


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (block, ["--blocks", "vgg"], "--blocks: expected blocks among"),
        (block, ["--passes", "fwd"], "--passes: expected a list of inference, forward, forward+backward, got 'fwd'"),
        (block, ["--contenders", "nchw"], "--contenders: expected at least one of ours and one of PyTorch's, got nchw"),
        (block, ["--contenders", "graphed"], "--contenders: expected a list of"),
        (block, ["--batch", "0"], "--batch: expected at least 1 image, got 0"),
        (model, ["--model", "vgg"], "--model: expected a list of"),
        (model, ["--batch", "8,no"], "--batch: expected numbers of images, each at least 1, got '8,no'"),
        (model, ["--size", "31"], "--size: expected at least 32 pixels, got 31"),
        (model, ["--device", "cpu", "--contenders", "ours,graphed"], "--contenders: graphed need a CUDA GPU"),
        (memory, ["--contenders", "ours_recompute,nchw"], "--contenders: expected ours among them"),
        (memory, ["--json", "no/such/folder/x.json"], "--json: expected a file in a folder that exists"),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else None,
)
def test_bad_arguments_get_one_line_and_code_2(program, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]
