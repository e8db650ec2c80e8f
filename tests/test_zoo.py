"""benchmarks/zoo.py and conversion.py: small networks are compared, wrong ones are found, crashes cost one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path, PurePosixPath

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import conversion  # noqa: E402
import tables  # noqa: E402
import zoo  # noqa: E402
from conversion import Errors, Row, largest_error  # noqa: E402

pytest.importorskip("torchvision")
pytest.importorskip("timm")

# One of each kind of network that is small: what is converted in it.
NETWORKS = {
    "torchvision/resnet18": (8, 1, 0),
    "timm/test_nfnet": (0, 0, 6),
    "timm/regnetx_002": (13, 27, 13),
    "timm/dla46x_c": (12, 10, 12),
}


@pytest.fixture(autouse=True)
def _one_thread(restore_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_stay_the_same(name):
    row = conversion.compare(name)
    assert row.failure is None
    assert row.errors["gradients"]["double"] <= conversion.LIMIT
    assert (row.blocks, row.chains, row.convolutions) == NETWORKS[name]


def test_a_wrong_conversion_is_found(monkeypatch):
    """Running statistics of one norm that follow the batches at another pace."""
    fuse_ = conversion.fuse_

    def fuse_wrongly(model: nn.Module):
        model.bn1.momentum = 0.2
        return fuse_(model)

    monkeypatch.setattr(conversion, "fuse_", fuse_wrongly)
    row = conversion.compare("torchvision/resnet18")
    assert row.failure is not None
    assert row.failure.startswith("statistics: float64 results differ by")


def test_float32_is_judged_by_the_networks_own_rounding_error():
    assert conversion.wrong("logits", Errors(3e-6, 1e-6, 1e-14)) is None
    assert "float32" in conversion.wrong("logits", Errors(5e-6, 1e-6, 1e-14))
    assert conversion.wrong("gradients", Errors(1e-1, 1e-6, 1e-14)) is None
    assert "float64" in conversion.wrong("gradients", Errors(1e-6, 1e-6, 1e-8))
    assert "float64" in conversion.wrong("gradients", Errors(1e-6, 1e-6, float("nan")))
    assert "float32" in conversion.wrong("logits", Errors(float("nan")))


def test_largest_error():
    expected = {"a": torch.tensor([3.0, 4.0]), "zero but for rounding": torch.tensor([1e-9])}
    results = {"a": torch.tensor([3.0, 4.5]), "zero but for rounding": torch.tensor([-1e-9])}
    assert largest_error(results, expected) == pytest.approx(0.1)
    assert largest_error(expected, expected) == 0.0
    results["a"][0] = float("nan")
    assert largest_error(results, expected) != largest_error(results, expected)
    with pytest.raises(ValueError, match="expected tensors a, zero but for rounding, got a"):
        largest_error({"a": results["a"]}, expected)


def test_run_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(2, 3, 4, 4)
    first, second = (conversion.run(model, images, train=True) for _ in range(2))
    assert set(first) == {"logits", "training logits", "gradients", "statistics"}
    assert all(largest_error(second[kind], first[kind]) == 0 for kind in first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_is_at_its_initial_value():
    model, images = conversion.prepare("timm/test_nfnet")
    assert images.shape == (conversion.IMAGES, 3, 64, 64)
    for name, parameter in model.named_parameters():
        assert parameter.abs().max() > 1e-3, name
        assert parameter.numel() == 1 or parameter.flatten().unique().numel() > 1, name


def test_grouped_names():
    assert zoo.is_grouped(nn.Conv2d(8, 8, 3, groups=2))
    assert not zoo.is_grouped(nn.Conv2d(8, 8, 3, groups=8))
    assert not zoo.is_grouped(nn.Conv2d(8, 8, 1, groups=2))
    assert not zoo.is_grouped(nn.Conv2d(8, 8, 3))


def test_command_line(tmp_path, capsys):
    """A run that is cut short by time, then one that resumes."""
    path = tmp_path / "zoo.json"
    names = "timm/test_nfnet,torchvision/resnet18"
    arguments = ["--names", names, "--json", str(path), "--workers", "1"]
    assert zoo.main([*arguments, "--seconds", "0.01"]) == 1
    result = json.loads(path.read_text())
    assert [row["failure"] for row in result["rows"]] == ["not done after 0 s"] * 2
    assert result["wrong"] == 2
    result["rows"] = result["rows"][:1]
    path.write_text(json.dumps(result))
    assert zoo.main([*arguments, "--resume"]) == 1
    result = json.loads(path.read_text())
    assert result["complete"]
    assert [row["failure"] for row in result["rows"]] == ["not done after 0 s", None]
    assert "torchvision/resnet18" in capsys.readouterr().out
    assert "| torchvision/resnet18 | 64 | 8 | 1 | 0 |" in tables.zoo(tables.Run(PurePosixPath("zoo.json"), result))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--names", "timm/alexnot"], "expected library/name of torchvision or timm, got timm/alexnot"),
        (["--resume"], "expected --json with a file of an earlier run, got None"),
        (["--workers", "0"], "--workers: expected at least 1, got 0"),
    ],
    ids=["unknown", "nothing to resume", "no workers"],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        zoo.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_cells():
    errors = {"logits": {"difference": 1e-6, "rounding": 2e-6, "double": 1e-15}}
    row = Row("timm/a", 10, 64, 1, 2, 3, {"because": 4}, 0.5, errors, note="not trained")
    assert list(row.cells().values()) == [
        "timm/a",
        "64",
        "1",
        "2",
        "3",
        "4",
        "1.0e-06 (2.0e-06)",
        "-",
        "0.50",
        "not trained",
    ]
    assert Row(**json.loads(json.dumps(row.record()))) == row
