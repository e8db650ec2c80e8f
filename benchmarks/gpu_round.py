"""One round on a GPU: build the extension, run the tests, run the benchmarks, leave the results in a folder.

    python benchmarks/gpu_round.py [--out out] [--seconds 560]

Uses the Python that runs it and needs no network. Each step has a time limit, and the round as a whole; a step that
fails or runs out of time does not stop the next ones. Writes eight files at most: summary.json, round.log and tests.log
with everything printed, and the JSON of each benchmark. The exit code is 0 if every step passed, 1 if not, 2 without a
GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import environment
import torch

ROOT = environment.ROOT
GRACE_SECONDS = 10.0
WRITTEN = ("summary.json", "round.log", "tests.log", "copy_rows.json", "grouped_conv_*.json")


@dataclass(frozen=True)
class Step:
    """A command, run in the repository's root.

    Attributes:
        name: What the summary calls it.
        arguments: Of Python.
        seconds: Its time limit.
        log: The file in the output folder that its output is added to.
    """

    name: str
    arguments: Sequence[str]
    seconds: float
    log: str = "round.log"


@dataclass(frozen=True)
class Outcome:
    """How a step ended: ``"passed"``, ``"failed (<exit code>)"``, ``"out of time"`` or ``"not started"``."""

    step: str
    status: str
    seconds: float


def steps(out: Path) -> list[Step]:
    """The round, the most telling benchmarks first."""
    build = Step("build", ["setup.py", "build_ext", "--inplace"], 180)
    tests = Step("tests", ["-m", "pytest", "tests", "-q", "--durations=10"], 180, log="tests.log")
    copy = Step("copy_rows", ["benchmarks/copy_rows.py", "--json", str(out / "copy_rows.json")], 30)
    benchmarks = [
        Step(
            f"{backend} batch {batch}",
            [
                *(
                    "benchmarks/grouped_conv.py",
                    "--device",
                    "cuda",
                    "--dtype",
                    "bfloat16",
                    "--layers",
                    "resnext50_32x4d",
                ),
                *("--backend", backend, "--batch", str(batch), "--baseline", baselines),
                *("--json", str(out / f"grouped_conv_{backend}_{batch}.json")),
            ],
            seconds,
        )
        for batch, backend, baselines, seconds in (
            (256, "triton", "nchw,channels_last,compiled_nchw,compiled_channels_last", 180),
            (256, "cuda", "nchw,channels_last", 60),
            (64, "triton", "nchw,channels_last", 120),
            (64, "cuda", "nchw,channels_last", 60),
        )
    ]
    return [build, copy, *benchmarks[:2], tests, *benchmarks[2:]]


def run(step: Step, out: Path, seconds: float) -> Outcome:
    """Run one step for at most ``seconds``; its whole process group ends with it."""
    if seconds <= 0:
        return Outcome(step.name, "not started", 0.0)
    start = time.monotonic()
    with (out / step.log).open("a") as log:
        log.write(f"\n== {step.name}: python {' '.join(step.arguments)}\n")
        log.flush()
        process = subprocess.Popen(
            [sys.executable, *step.arguments],
            cwd=ROOT,
            env=_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            status = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = "out of time"
            _end(process)
    return Outcome(step.name, status, time.monotonic() - start)


def _environment() -> dict[str, str]:
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    build = {"TORCH_CUDA_ARCH_LIST": capability, "RESNEXT_BUILD_CUDA": "1"}
    return {**os.environ, **build, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGINT)  # a benchmark still writes what it has measured
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default="out", help="folder for logs and results; those of an earlier round are deleted"
    )
    parser.add_argument("--seconds", type=float, default=560.0, help="limit of the whole round (default: 560)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_round.py: error: needs a CUDA GPU, and PyTorch sees none; nothing was run", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for pattern in WRITTEN:
        for stale in out.glob(pattern):
            stale.unlink()
    deadline = time.monotonic() + args.seconds - GRACE_SECONDS
    outcomes: list[Outcome] = []
    for step in steps(out):
        outcomes.append(run(step, out, min(step.seconds, deadline - time.monotonic())))
        print(f"{step.name:<20}{outcomes[-1].status:<16}{outcomes[-1].seconds:>6.1f} s", flush=True)
        described = environment.describe(torch.device("cuda"))
        result = {"environment": described, "steps": [asdict(outcome) for outcome in outcomes]}
        (out / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
    _print_results(out)
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


def _print_results(out: Path) -> None:
    for path in sorted(out.glob("grouped_conv_*.json")):
        result = json.loads(path.read_text())
        means = ", ".join(f"{name} {mean:.2f}" for name, mean in result["geometric_means"].items())
        partly = "" if result["complete"] else ", interrupted"
        print(f"{path.stem}: {len(result['rows'])} passes, {result['wrong_passes']} wrong{partly}; ratios: {means}")
    tests = out / "tests.log"
    if tests.exists():
        print(f"tests: {tests.read_text().rstrip().rpartition(chr(10))[2]}")


if __name__ == "__main__":
    sys.exit(main())
