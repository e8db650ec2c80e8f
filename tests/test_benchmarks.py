"""benchmarks/: the layer tables, the gate, the statistics and the command line."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import contenders  # noqa: E402
import grouped_conv  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
from contenders import Operands  # noqa: E402
from peak_memory import measure_memory  # noqa: E402
from report import Row  # noqa: E402
from roofline import Roofline  # noqa: E402
from shapes import NETWORKS, PASSES, Layer  # noqa: E402
from timing import Budget, Timing, interleave  # noqa: E402
from verify import mismatch  # noqa: E402

from resnext import models  # noqa: E402
from resnext.kernels import reference  # noqa: E402

CPU = torch.device("cpu")
SMALL = Layer(16, 16, 6, 5, 1, 4)
STRIDED = Layer(12, 24, 7, 6, 2, 3)
ONE_LAYER = ["--device", "cpu", "--layers", "1024x7x7_s1_gw32", "--batch", "1", "--backend", "torch"]


def _model(network: str) -> torch.nn.Module:
    with torch.device("meta"):
        if network == "resnext50_32x2d":
            return models.resnext50_32x2d()
        if network.startswith("resnext"):
            return getattr(pytest.importorskip("torchvision").models, network)()
        return pytest.importorskip("timm").create_model(network)


@pytest.mark.parametrize("network", NETWORKS)
def test_layers_are_those_of_the_model(network):
    model = _model(network).eval()
    found: list[Layer] = []

    def record(conv: torch.nn.Conv2d, inputs: tuple[torch.Tensor], _) -> None:
        assert conv.stride[0] == conv.stride[1]
        height, width = inputs[0].shape[2:]
        found.append(Layer(conv.in_channels, conv.out_channels, height, width, conv.stride[0], conv.groups))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) and module.groups > 1:
            module.register_forward_hook(record)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    assert Counter(found) == NETWORKS[network]


def test_layer_names_are_unique():
    layers = shapes.select_layers(["all"])
    assert len({layer.name for layer in layers}) == len(layers)


def test_select_layers_keeps_the_order_and_drops_repetitions():
    first, second, *_ = NETWORKS["resnext50_32x4d"]
    assert shapes.select_layers([second.name, first.name, second.name]) == [first, second]


@pytest.mark.parametrize("layer", [SMALL, STRIDED])
@pytest.mark.parametrize("pass_", ["fwd", "dgrad"])  # of wgrad, PyTorch's formula forgets the groups
def test_flops_are_those_pytorch_counts(layer, pass_):
    operands = Operands.random(layer, 2, torch.float32, CPU)
    counter = FlopCounterMode(display=False)
    with counter:
        contenders.pytorch(pass_, layer.stride, layer.groups, operands.x, operands.weight, operands.grad)
    assert counter.get_total_flops() == layer.flops(2)


@pytest.mark.parametrize("layer", [SMALL, STRIDED])
def test_bytes_are_those_of_the_tensors(layer):
    operands = Operands.random(layer, 2, torch.bfloat16, CPU)
    result = contenders.ours("fwd", operands)
    assert layer.bytes(2, 2) == operands.x.nbytes + operands.weight.nbytes + result.nbytes


def test_interleave_goes_round_robin_from_a_new_start_each_round():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = interleave(calls, CPU, Budget(seconds=0.0, min_rounds=4, max_rounds=9))
    assert "".join(order) == "abc" + "abc" + "abc" + "bca" + "cab" + "abc"  # warm-up, estimate, four rounds
    assert {timing.rounds for timing in timings.values()} == {4}


def test_roofline_takes_the_slower_of_bytes_and_operations():
    roofline = Roofline(copy_bytes_per_second=10.0, gemm_flops_per_second=100.0)
    assert roofline.bound(50, 100) == 5.0
    assert roofline.bound(10, 900) == 9.0


def test_percentiles_are_ordered():
    timing = interleave({"a": lambda: torch.ones(100)}, CPU, Budget(seconds=0.0, min_rounds=20, max_rounds=20))["a"]
    assert 0 < timing.p20 <= timing.median <= timing.p80 <= timing.p95 <= timing.p99


@pytest.mark.parametrize(("round_seconds", "rounds"), [(1.0, 3), (0.1, 10), (1e-6, 50)])
def test_budget(round_seconds, rounds):
    assert Budget(seconds=1.0, min_rounds=3, max_rounds=50).rounds(round_seconds) == rounds


@pytest.mark.parametrize("elements", [2**10, 2**28], ids=["replayed", "launched"])
def test_cuda_timing(cuda, elements):
    x = torch.randn(elements, device=cuda)
    timing = interleave({"clone": x.clone}, cuda, Budget(seconds=0.1, min_rounds=5, max_rounds=5))["clone"]
    assert timing.replayed == (elements == 2**10)
    assert 0 < timing.p20 <= timing.median <= timing.p80
    assert measure_memory(x.clone, cuda) == (x.nbytes, x.nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [SMALL, STRIDED])
@pytest.mark.parametrize("pass_", PASSES)
def test_gate_passes_right_results(layer, pass_, dtype):
    operands = Operands.random(layer, 3, dtype, CPU).to("channels_last")
    assert mismatch(pass_, operands) is None


def _fwd_without_last_column(x, weight, bias, stride, padding, dilation, groups):
    x = x.clone()
    x[-1, :, -1, -1] = 0
    return reference.fwd(x, weight, bias, (stride, stride), groups, True)


def _dgrad_without_last_column(grad, weight, input_size, stride, groups):
    grad = grad.clone()
    grad[-1, :, -1, -1] = 0
    return reference.dgrad(grad, weight, tuple(input_size), (stride, stride), groups, True)


def _wgrad_without_last_column(grad, x, stride, groups):
    grad = grad.clone()
    grad[-1, :, -1, -1] = 0
    return reference.wgrad(grad, x, (stride, stride), groups, True)


WRONG = {
    "fwd": ("grouped_conv2d", _fwd_without_last_column),
    "dgrad": ("grouped_conv2d_dgrad", _dgrad_without_last_column),
    "wgrad": ("grouped_conv2d_wgrad", _wgrad_without_last_column),
}


@pytest.mark.parametrize("layer", [SMALL, STRIDED])
@pytest.mark.parametrize("pass_", PASSES)
def test_gate_catches_one_wrong_border_pixel(layer, pass_, monkeypatch):
    monkeypatch.setattr(contenders, *WRONG[pass_])
    operands = Operands.random(layer, 3, torch.bfloat16, CPU).to("channels_last")
    assert mismatch(pass_, operands) is not None


@pytest.mark.parametrize("pass_", PASSES)
def test_gate_catches_nan(pass_, monkeypatch):
    name, _ = WRONG[pass_]
    right = getattr(contenders, name)
    monkeypatch.setattr(contenders, name, lambda *args: right(*args) * float("nan"))
    assert mismatch(pass_, Operands.random(SMALL, 2, torch.float32, CPU).to("channels_last")) is not None


def test_gate_catches_a_wrong_dtype(monkeypatch):
    right = contenders.grouped_conv2d
    monkeypatch.setattr(contenders, "grouped_conv2d", lambda *args: right(*args).double())
    message = mismatch("fwd", Operands.random(SMALL, 2, torch.float32, CPU).to("channels_last"))
    assert message == "expected (2, 16, 6, 5) of torch.float32, got (2, 16, 6, 5) of torch.float64"


def _row(layer: Layer, pass_: str, **seconds: float) -> Row:
    timings = {name: Timing(value, value, value, value, value, 5) for name, value in seconds.items()}
    return Row(layer, pass_, "cpu", 10, 20, 1e-3, timings, dict.fromkeys(timings, 4))


def test_ratio_is_against_the_fastest_baseline():
    row = _row(SMALL, "fwd", ours=2.0, nchw=6.0, channels_last=3.0)
    assert (row.fastest_baseline, row.ratio) == ("channels_last", 1.5)


def test_geometric_means():
    rows = [_row(SMALL, "fwd", ours=1.0, nchw=4.0), _row(STRIDED, "fwd", ours=1.0, nchw=1.0)]
    assert report.geometric_means(rows) == pytest.approx({"fwd": 2.0, "all": 2.0})


def test_network_totals_weigh_layers_by_their_count():
    layers = NETWORKS["resnext50_32x4d"]
    rows = [_row(layer, "wgrad", ours=1.0, nchw=2.0) for layer in layers]
    totals = report.network_totals(rows)
    assert totals == {"resnext50_32x4d": {"wgrad": {"ours": 16.0, "pytorch": 32.0, "ratio": 2.0}}}
    assert report.network_totals(rows[1:]) == {}


def test_run_writes_what_it_measured(tmp_path, capsys):
    paths = {name: str(tmp_path / f"out.{name}") for name in ("json", "csv")}
    options = ["--quick", "--baseline", "nchw", "--json", paths["json"], "--csv", paths["csv"]]
    assert grouped_conv.main([*ONE_LAYER, *options]) == 0
    shown = capsys.readouterr().out
    assert "1024x7x7_s1_gw32  fwd    torch" in shown
    assert "geometric mean" in shown

    result = json.loads(Path(paths["json"]).read_text())
    assert result["complete"]
    assert result["wrong_passes"] == 0
    assert result["environment"]["threads"] == torch.get_num_threads()
    assert result["roofline"].keys() == {"copy_bytes_per_second", "gemm_flops_per_second"}
    assert [row["pass"] for row in result["rows"]] == list(PASSES)
    for row in result["rows"]:
        ours, nchw = row["seconds"]["ours"], row["seconds"]["nchw"]
        assert row["ratio"] == nchw["median"] / ours["median"]
        assert ours["rounds"] >= grouped_conv.QUICK.min_rounds

    with open(paths["csv"], newline="") as file:
        assert [line["pass"] for line in csv.DictReader(file)] == list(PASSES)


def test_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    report.plot([_row(SMALL, "fwd", ours=1.0, nchw=2.0)], "title", str(path))
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_compiled_baselines_agree_with_eager():
    operands = Operands.random(SMALL, 1, torch.float32, CPU)
    for name in contenders.COMPILED:
        compiled = contenders.baseline(name, "fwd", operands)()
        torch.testing.assert_close(compiled, contenders.baseline("nchw", "fwd", operands)())


def test_verify_only_times_nothing(monkeypatch, capsys):
    monkeypatch.setattr(grouped_conv, "interleave", None)
    monkeypatch.setattr(grouped_conv, "measure_roofline", None)
    assert grouped_conv.main([*ONE_LAYER, "--verify-only"]) == 0
    assert "3 of 3 passes agree" in capsys.readouterr().out


@pytest.fixture
def known_roofline(monkeypatch):
    """Spares a run the seconds it takes to measure the machine."""
    monkeypatch.setattr(grouped_conv, "measure_roofline", lambda device, dtype: Roofline(1e10, 1e11))


@pytest.mark.usefixtures("known_roofline")
@pytest.mark.parametrize("verify_only", [True, False], ids=["verify-only", "timed"])
def test_wrong_pass_is_named_and_not_timed(verify_only, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(contenders, *WRONG["fwd"])
    path = tmp_path / "out.json"
    options = ["--verify-only"] if verify_only else ["--quick", "--json", str(path)]
    assert grouped_conv.main([*ONE_LAYER, "--passes", "fwd,dgrad", *options]) == 1
    assert "WRONG: 1024x7x7_s1_gw32 fwd: image 0: " in capsys.readouterr().err
    if not verify_only:
        result = json.loads(path.read_text())
        assert result["wrong_passes"] == 1
        assert [row["pass"] for row in result["rows"]] == ["dgrad"]


@pytest.mark.usefixtures("known_roofline")
def test_interrupted_run_keeps_what_it_has(monkeypatch, tmp_path):
    timed: list[object] = []

    def interleave_once(calls, device, budget):
        if timed:
            raise KeyboardInterrupt
        timed.append(calls)
        return {name: Timing(1.0, 1.0, 1.0, 1.0, 1.0, 5) for name in calls}

    monkeypatch.setattr(grouped_conv, "interleave", interleave_once)
    path = tmp_path / "out.json"
    assert grouped_conv.main([*ONE_LAYER, "--json", str(path)]) == 130
    result = json.loads(path.read_text())
    assert not result["complete"]
    assert [row["pass"] for row in result["rows"]] == ["fwd"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "resnet50"], "--layers: expected layers among"),
        (["--passes", "fwd,bwd"], "--passes: expected a list of fwd, dgrad, wgrad, got 'bwd'"),
        (["--baseline", "jax"], "--baseline: expected a list of"),
        (["--dtype", "float64"], "--dtype: invalid choice"),
        (["--backend", "metal"], "--backend: invalid choice"),
        (["--batch", "0"], "--batch: expected at least 1 image, got 0"),
        (["--batch", "many"], "--batch: invalid int value"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:<index>, got 'tpu'"),
        (["--device", "cuda:99"], "--device: 'cuda:99' asked for"),
        (["--json", "no/such/folder/x.json"], "--json: expected a file in a folder that exists"),
        (["--csv", "."], "--csv: expected a file"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments_get_one_line_and_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        grouped_conv.main(arguments)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]


def test_plot_without_matplotlib_is_refused_before_the_run(monkeypatch, capsys):
    find_spec = grouped_conv.importlib.util.find_spec
    missing = {"matplotlib": None}
    monkeypatch.setattr(
        grouped_conv.importlib.util, "find_spec", lambda name: missing[name] if name in missing else find_spec(name)
    )
    with pytest.raises(SystemExit) as stopped:
        grouped_conv.main(["--plot", "out.png"])
    assert stopped.value.code == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_backend_that_cannot_serve_says_why(capsys):
    assert grouped_conv.main(["--device", "cpu", "--backend", "cuda", "--verify-only", "--quick"]) == 2
    assert "the cuda backend was asked for and cannot serve this fwd" in capsys.readouterr().err


def _python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(BENCHMARKS.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=BENCHMARKS.parent
    )


def test_list_from_the_repository_root():
    done = _python("benchmarks/grouped_conv.py", "--list")
    assert done.returncode == 0, done.stderr
    listed = [tuple(line.split()[:3]) for line in done.stdout.splitlines()[1:]]
    assert listed == [
        (network, layer.name, str(count)) for network, layers in NETWORKS.items() for layer, count in layers.items()
    ]


def test_without_resnext_it_says_how_to_install_it(monkeypatch):
    class NotInstalled:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "resnext":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in ("resnext", "resnext.kernels"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled, *sys.meta_path])
    with pytest.raises(SystemExit, match="pip install --no-build-isolation -e"):
        runpy.run_path(str(BENCHMARKS / "contenders.py"))


def test_copy_rows_copies():
    pytest.importorskip("triton")
    script = f"""
        import sys
        sys.path.insert(0, {str(BENCHMARKS)!r})
        import copy_rows, torch
        x = torch.randn(1000, copy_rows.CHANNELS).bfloat16()
        for width in copy_rows.BLOCK_CHANNELS:
            for channels_fastest in (True, False):
                assert torch.equal(copy_rows.copy_rows(x, width, channels_fastest), x), (width, channels_fastest)
    """
    done = _python("-c", textwrap.dedent(script), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
