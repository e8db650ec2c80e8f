"""benchmarks/gpu_round.py on a pretended GPU: limits, failures, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import block  # noqa: E402
import gpu_round  # noqa: E402
import grouped_conv  # noqa: E402
import memory  # noqa: E402
import model  # noqa: E402

pytest.importorskip("triton")  # which tune.py needs

import kernel_times  # noqa: E402
import sanitize  # noqa: E402
import tune  # noqa: E402

every_round = pytest.mark.parametrize("steps", gpu_round.ROUNDS.values(), ids=gpu_round.ROUNDS)


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_round.py", "--out", str(tmp_path / "out")])
    assert gpu_round.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def short_round(monkeypatch, tmp_path):
    """A round of five commands on a pretended GPU; returns its exit code, summary and output folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_round.environment, "describe", lambda device: {"device": device.type})
    monkeypatch.setattr(gpu_round, "GRACE_SECONDS", 2.0)
    steps = [
        gpu_round.Step("broken", ["-c", "raise SystemExit(3)"], 30),
        gpu_round.Step("slow", ["-c", "import time; time.sleep(60)"], 1),
        gpu_round.Step("builds", ["-c", "import os; print(os.environ['TORCH_CUDA_ARCH_LIST'])"], 30),
        gpu_round.Step("tool missing", ["-c", f"raise SystemExit({sanitize.SKIPPED})"], 30),
        gpu_round.Step("late", ["-c", "print('never')"], 0),
    ]
    monkeypatch.setitem(gpu_round.ROUNDS, "networks", lambda out: steps)
    monkeypatch.setattr(sys, "argv", ["gpu_round.py", "networks", "--out", str(tmp_path)])
    (tmp_path / "summary.json").write_text("of an earlier round")
    (tmp_path / "notes.json").write_text("someone else's")
    code = gpu_round.main()
    return code, json.loads((tmp_path / "summary.json").read_text()), tmp_path


def test_goes_on_after_a_failure(short_round):
    code, summary, out = short_round
    assert code == 1
    statuses = {step["step"]: step["status"] for step in summary["steps"]}
    assert statuses == {
        "broken": "failed (3)",
        "slow": "out of time",
        "builds": "passed",
        "tool missing": "skipped",
        "late": "not started",
    }
    assert "\n9.0\n" in (out / "round.log").read_text()
    assert (out / "notes.json").exists()


@every_round
def test_writes_eight_files_at_most(steps, tmp_path):
    files = {"summary.json"} | {step.log for step in steps(tmp_path)}
    arguments = [argument for step in steps(tmp_path) for argument in step.arguments]
    # tune.py is given the folder: its file is named after the GPU.
    paths = [argument for argument in arguments if argument.startswith(str(tmp_path))]
    files |= {"nvidia_h200.json" if path == str(tmp_path) else Path(path).name for path in paths}
    assert len(files) <= 8
    assert all(any(Path(name).match(pattern) for pattern in gpu_round.WRITTEN) for name in files)


@every_round
def test_gives_the_benchmarks_arguments_they_take(steps, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    programs = {module.__name__: module for module in (block, grouped_conv, kernel_times, memory, model, tune)}
    parsed = 0
    for step in steps(tmp_path):
        if program := programs.get(Path(step.arguments[0]).stem):
            program._parse(step.arguments[1:])
            parsed += 1
    assert parsed >= 2


@every_round
def test_names_tests_that_exist(steps, tmp_path):
    files = [argument for step in steps(tmp_path) for argument in step.arguments if argument.startswith("tests/")]
    assert files
    assert all((gpu_round.ROOT / file).exists() for file in files)


@every_round
def test_lasts_less_than_ten_minutes(steps, tmp_path):
    """A round ends itself; what matters comes before its time is up."""
    seconds = [step.seconds for step in steps(tmp_path)]
    assert sum(seconds[:3]) < 600
    assert max(seconds) < 300


def test_tuning_ends_itself_before_it_is_ended(tmp_path):
    limits = [
        (step.seconds, float(step.arguments[step.arguments.index("--seconds") + 1]))
        for step in gpu_round.tuning(tmp_path)
        if step.name.startswith("tune")
    ]
    assert len(limits) == 2
    assert all(limit - own >= 20 for limit, own in limits)


def test_sanitized_tests_exist():
    """Each is one that pytest collects: three shapes of every family."""
    assert all(len(tests) % 3 == 0 for tests in sanitize.SELECTED.values())
    tests = [test for family in sanitize.SELECTED.values() for test in family]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *tests]
    done = subprocess.run(command, cwd=gpu_round.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
    assert set(tests) <= set(done.stdout.splitlines())


def test_sanitizer_that_is_missing_is_said_so(monkeypatch, capsys):
    monkeypatch.setattr(sanitize.shutil, "which", lambda *_, **__: None)
    assert sanitize.main([]) == sanitize.SKIPPED
    assert "skipped: needs compute-sanitizer on the PATH" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "result"), [(0, 0), (1, 1), (-6, 1)])
def test_sanitizer_runs_the_tests(code, result, monkeypatch):
    ran = []
    monkeypatch.setattr(sanitize.shutil, "which", lambda *_, **__: "/bin/compute-sanitizer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        sanitize.subprocess,
        "run",
        lambda command, **_: ran.append(command) or subprocess.CompletedProcess(command, code),
    )
    assert sanitize.main(["--tool", "racecheck"]) == result
    assert ran[0][:3] == ["/bin/compute-sanitizer", "--tool", "racecheck"]
    assert "tests/test_pointwise_conv.py::test_every_case[stride2]" in ran[0]
