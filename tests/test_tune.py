"""benchmarks/tune.py: what it chooses, leaves out, writes and goes on with; and all of it in Triton's interpreter."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import tune  # noqa: E402
from ahead_of_time import Usage  # noqa: E402
from targets import TINY, TINY_POINTWISE, Target, all_targets, pointwise_layers  # noqa: E402
from timing import Timing  # noqa: E402

from resnext.kernels import reference, tuning  # noqa: E402

QUICK = ["--device", "cpu", "--quick"]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
    command = [sys.executable, "benchmarks/tune.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_in_the_interpreter(tmp_path):
    """From the command line to the file, twice; the second run has nothing left to do."""
    arguments = [*QUICK, "--candidates", "2", "--passes", "fwd,wgrad", "--fusions", "plain,stats"]
    for runs in range(2):
        done = run(*arguments, "--out", str(tmp_path), TRITON_INTERPRET="1")
        file = tmp_path / "interpreter.json"
        assert done.stdout.startswith(f"interpreter: {file}\n")
        entries = tuning.read(file, "interpreter")
        assert [(entry.key.kernel_size, entry.key.fusion, entry.key.op) for entry in entries] == [
            (3, "plain", "fwd"),
            (3, "plain", "wgrad"),
            (3, "stats", "fwd"),
            (3, "stats", "wgrad"),
            (1, "stats", "fwd"),
            (1, "stats", "wgrad"),
        ]
        if runs == 0:
            assert "no candidate is left out for its registers, spills or memory" in done.stdout
            assert "16x4x3_s1_gw4 plain fwd, batch 2: 2 of 80 candidates timed (left out: 78 beyond" in done.stdout
            assert "heuristic us" in done.stdout
            for entry in entries:
                assert entry.backend in entry.microseconds.keys() >= {"triton", "torch", "torch_nchw"}
                assert entry.measured.keys() == {"date", "commit", "torch", "triton"}
        else:
            assert "6 of 6 are in the file already" in done.stdout
            assert "candidates timed" not in done.stdout


def test_on_a_gpu(cuda, tmp_path):
    """Compiled by other processes, timed by CUDA graphs, and all of it right."""
    done = run("--device", "cuda", "--quick", "--candidates", "6", "--out", str(tmp_path))
    name = torch.cuda.get_device_name(cuda)
    entries = tuning.read(tmp_path / tuning.file_name(name), name)
    assert len(entries) == 13
    assert not any(word in done.stdout for word in ("WRONG", "does not run", "does not compile"))


# --- in this process: PyTorch plays the Triton kernels ---


class Pretended:
    """Launchers of PyTorch that take settings, and are wrong with some."""

    def __init__(self, wrong=(), broken=()):
        self.wrong, self.broken = wrong, broken

    def fwd(self, *arguments, config=None):
        if config in self.broken:
            raise RuntimeError("out of resources")
        return reference.fwd(*arguments) * (2 if config in self.wrong else 1)


@pytest.fixture
def pretend(monkeypatch):
    """A run without the interpreter; settings and backends take what `seconds` says, 1 by default."""
    seconds: dict = {}
    launchers = Pretended()
    monkeypatch.setattr(tune.triton.knobs.runtime, "interpret", True)
    monkeypatch.setattr(Target, "triton", lambda self: launchers)

    def interleave(calls, device, budget):
        times = {name: seconds.get(call.keywords.get("config", name), 1.0) for name, call in calls.items()}
        return {name: Timing(*[time] * 5, rounds=3) for name, time in times.items()}

    monkeypatch.setattr(tune, "interleave", interleave)
    return SimpleNamespace(seconds=seconds, launchers=launchers)


TARGET = all_targets(TINY, [], ["plain"], ["fwd"], [2], torch.float32, "cpu")[0]
CONFIGS = TARGET.candidates(torch.device("cpu"))
PLAIN = [*QUICK, "--passes", "fwd", "--fusions", "plain", "--candidates", "999"]


def entries_of(folder: Path) -> list[tuning.Entry]:
    return tuning.read(folder / "interpreter.json", "interpreter")


def test_takes_the_fastest_settings(pretend, tmp_path, capsys):
    pretend.seconds |= {CONFIGS[7]: 0.5, CONFIGS[8]: 0.6}
    assert tune.main([*PLAIN, "--out", str(tmp_path)]) == 0
    (entry,) = entries_of(tmp_path)
    assert (entry.backend, entry.config) == ("triton", CONFIGS[7])
    assert entry.microseconds == {"triton": 5e5, "torch": 1e6, "torch_nchw": 1e6}
    assert "500000.0     1000000.0  2.00" in capsys.readouterr().out


def test_rough_times_of_all_candidates(pretend, tmp_path):
    pretend.seconds |= {CONFIGS[7]: 0.5}
    path = tmp_path / "candidates.json"
    tune.main([*PLAIN, "--out", str(tmp_path), "--candidates-to", str(path)])
    records = json.loads(path.read_text())
    assert [record["config"] for record in records] == [dataclasses.asdict(config) for config in CONFIGS]
    assert [record["microseconds"] for record in records] == [5e5 if i == 7 else 1e6 for i in range(len(CONFIGS))]
    assert {(record["op"], record["in_channels"], record["batch"]) for record in records} == {("fwd", 16, 2)}


def test_noise_changes_nothing(pretend, tmp_path):
    """Neither the heuristic's settings nor the order of backends, for less than a percent."""
    pretend.seconds |= {CONFIGS[7]: 0.995, "torch": 0.995}
    tune.main([*PLAIN, "--out", str(tmp_path)])
    (entry,) = entries_of(tmp_path)
    assert (entry.backend, entry.config) == ("triton", CONFIGS[0])


def test_pytorch_serves_where_it_is_faster(pretend, tmp_path):
    """In the layout of the problem; what it takes in the other is for information."""
    pretend.seconds |= {"torch": 0.8, "torch_nchw": 0.1}
    tune.main([*PLAIN, "--out", str(tmp_path)])
    assert entries_of(tmp_path)[0].backend == "torch"
    pretend.seconds["torch"] = 1.2
    tune.main([*PLAIN, "--out", str(tmp_path), "--again"])
    assert entries_of(tmp_path)[0].backend == "triton"


def test_wrong_and_broken_settings_are_left_out_and_named(pretend, tmp_path, capsys):
    pretend.launchers.wrong, pretend.launchers.broken = CONFIGS[:2], CONFIGS[2:5]
    pretend.seconds |= dict.fromkeys(CONFIGS[:5], 0.1)
    assert tune.main([*PLAIN, "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    count = f"{len(CONFIGS) - 5} of {len(CONFIGS)} candidates timed"
    assert f"{count} (left out: 2 WRONG; 3 does not run (RuntimeError))" in shown.out
    assert "2 candidates are WRONG and were not timed" in shown.out
    assert shown.err.count("WRONG: 16x4x3_s1_gw4 plain fwd: ") == 2
    assert entries_of(tmp_path)[0].config not in CONFIGS[:5]


def test_a_file_is_added_to(pretend, tmp_path):
    tune.main([*PLAIN, "--out", str(tmp_path)])
    first = entries_of(tmp_path)
    tune.main([*PLAIN, "--out", str(tmp_path), "--batch", "2,4"])
    both = entries_of(tmp_path)
    assert both[:1] == first
    assert [entry.batch for entry in both] == [2, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["interpreter.json"]


def test_an_interrupted_run_keeps_all_but_one_pass(pretend, tmp_path, monkeypatch, capsys):
    interleave, timed = tune.interleave, []

    def once(calls, device, budget):
        if len(timed) == 2:  # the candidates, then the finalists
            raise KeyboardInterrupt
        timed.append(calls)
        return interleave(calls, device, budget)

    monkeypatch.setattr(tune, "interleave", once)
    assert tune.main([*PLAIN, "--out", str(tmp_path), "--batch", "2,4"]) == 130
    assert [entry.batch for entry in entries_of(tmp_path)] == [2]
    assert "16x4x3_s1_gw4" in capsys.readouterr().out.splitlines()[-1]


def test_starts_nothing_after_its_time(pretend, tmp_path, capsys):
    assert tune.main([*PLAIN, "--out", str(tmp_path), "--seconds", "-1"]) == 0
    assert "out of time: 1 of 1 not started; run again to go on" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_a_damaged_file_is_not_overwritten(pretend, tmp_path, capsys):
    (tmp_path / "interpreter.json").write_text("{")
    assert tune.main([*PLAIN, "--out", str(tmp_path)]) == 2
    assert "interpreter.json: expected measured settings in JSON" in capsys.readouterr().err
    assert (tmp_path / "interpreter.json").read_text() == "{"


def test_what_does_not_fit_the_machine_is_not_run(pretend, tmp_path, monkeypatch, capsys):
    """As on a GPU, where processes compile: each kernel once. The heuristic's choice stays, for comparison."""
    compiled = Counter()

    def resources(target, config, arch):
        compiled[config.num_warps, config.block_m, arch] += 1
        if config.num_warps == 8:
            return "does not compile (CompilationError)"
        return Usage(255, 10**6 if config.block_m == 128 else 100, int(config.num_warps == 1), "-")

    class Tuner(tune.Tuner):
        def __init__(self, args):
            super().__init__(args)
            self.pool, self.limits = concurrent.futures.ThreadPoolExecutor(1), (90, 1000)

    monkeypatch.setattr(tune, "resources", resources)
    monkeypatch.setattr(tune, "Tuner", Tuner)
    assert tune.main([*PLAIN, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "too much shared memory" in shown
    assert "spills" in shown
    assert "does not compile (CompilationError)" in shown
    assert {arch for _, _, arch in compiled} == {90}
    assert sum(compiled.values()) < len(CONFIGS)
    fits = [c for c in CONFIGS if c.num_warps in (2, 4) and c.block_m < 128]
    assert f"{len(fits) + 1} of {len(CONFIGS)} candidates timed" in shown


def test_both_gradients_have_the_settings_of_each(monkeypatch):
    """Under the names that the launchers have for them."""
    for kernel_size, layer, names in (
        (3, TINY[0], {"config", "wgrad_config"}),
        (1, next(iter(TINY_POINTWISE)), {"dgrad_config", "wgrad_config"}),
    ):
        both = Target(layer, kernel_size, "stats", "bwd", 2, torch.float32, "cpu")
        entries = {}
        for op in ("dgrad", "wgrad"):
            one = dataclasses.replace(both, op=op)
            config = one.candidates(torch.device("cpu"))[1]
            entries[one.key, 2] = tuning.Entry(one.key, 2, "triton", config, {"triton": 1.0}, {})
        found = tune.Tuner._settings_of_both(SimpleNamespace(entries=entries), both)
        assert found.keys() == names
        assert both.key.op == "bwd"


def test_compile_ahead(tmp_path):
    """All fusions and passes of a layer; the second time from the cache that they went to."""
    for _ in range(2):
        command = [sys.executable, "benchmarks/compile_ahead.py", "--layers", "1024x7x7_s1_gw32", "--jobs", "1"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith("7 of 7 kernels compiled")
        compiled = sorted(path.name for path in tmp_path.rglob("*.cubin"))
        assert len(compiled) >= 7
    assert compiled == sorted(path.name for path in tmp_path.rglob("*.cubin"))


def test_the_1x1_convolutions_of_a_network():
    layers = pointwise_layers(["resnext50_32x4d", "128x56x56_s1_gw4"])
    names = [Target(layer, 1, "stats", "fwd", 1, torch.float32, "cpu").layer_name for layer in layers]
    prologues = [name.split("_")[0] for name, prologue in zip(names, layers.values(), strict=True) if prologue]
    assert prologues == ["128-256x56x56", "256-512x28x28", "512-1024x14x14", "1024-2048x7x7"]  # last in their blocks
    assert names[:4] == ["64-128x56x56_s1_1x1", "128-256x56x56_s1_1x1", "64-256x56x56_s1_1x1", "256-128x56x56_s1_1x1"]
    assert "256-512x56x56_s2_1x1" in names
    assert len(set(names)) == len(names) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "resnet51"], "--layers: expected layers among"),
        (["--fusions", "all"], "--fusions: expected a list of plain, stats, affine, got 'all'"),
        (["--batch", "0"], "--batch: expected numbers of images"),
        (["--candidates", "-1"], "--candidates: expected at least 1, got -1"),
        (["--jobs", "-2"], "--jobs: expected at least 1, got -2"),
        (["--device", "cpu"], "set TRITON_INTERPRET=1"),
    ],
)
def test_bad_arguments_get_one_line_and_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_interpreters_times_are_for_no_gpu(pretend, capsys):
    with pytest.raises(SystemExit):
        tune.main(QUICK)
    assert "say nothing about a GPU; name a folder with --out" in capsys.readouterr().err


def test_what_it_writes_is_what_the_launchers_look_up(pretend, tmp_path, monkeypatch):
    tune.main([*PLAIN, "--out", str(tmp_path)])
    before = tuning.user_folder()
    tuning.use_folder(tmp_path)
    try:
        entry = tuning.lookup(TARGET.problem, torch.device("cpu"), allow_tf32=tuning.tf32_allowed(TARGET.problem.dtype))
    finally:
        tuning.use_folder(before)
    assert entry is not None
    assert entry.config == CONFIGS[0]
    assert json.loads((tmp_path / "interpreter.json").read_text())["format"] == tuning.FORMAT
