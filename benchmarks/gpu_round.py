"""One round on a GPU: build the extension, run the tests, run the benchmarks, leave the results in a folder.

    python benchmarks/gpu_round.py [convolutions | networks | tuning] [--out out] [--seconds 560]

There are three rounds: of the grouped convolution alone, of the fused blocks and whole networks, and of tuning launch
settings, with compute-sanitizer where it is installed. Uses the Python that runs it and needs no network. Each step has
a time limit, and the round as a whole; a step that fails or runs out of time does not stop the next ones. Writes eight
files at most: summary.json, round.log and tests.log with everything printed, and the JSON of each benchmark. The exit
code is 0 if no step failed, 1 if not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import environment
import torch
from sanitize import SKIPPED

ROOT = environment.ROOT
GRACE_SECONDS = 10.0
BENCHMARKS = ("copy_rows", "grouped_conv_*", "block", "model_*", "memory", "kernel_times", "nvidia_*")
WRITTEN = ("summary.json", "round.log", "tests.log", *(f"{name}.json" for name in BENCHMARKS))


@dataclass(frozen=True)
class Step:
    """A command, run in the repository's root.

    Attributes:
        name: What the summary calls it.
        arguments: Of Python.
        seconds: Its time limit.
        log: The file in the output folder that its output is added to.
        shards: Processes side by side, each with ``--shard K/N`` behind its arguments where there are several.
    """

    name: str
    arguments: Sequence[str]
    seconds: float
    log: str = "round.log"
    shards: int = 1

    def commands(self) -> list[list[str]]:
        """The arguments of each process."""
        if self.shards == 1:
            return [list(self.arguments)]
        return [[*self.arguments, "--shard", f"{k}/{self.shards}"] for k in range(self.shards)]


@dataclass(frozen=True)
class Outcome:
    """How a step ended: ``"passed"``, ``"skipped"``, ``"failed (<code>)"``, ``"out of time"`` or ``"not started"``."""

    step: str
    status: str
    seconds: float


def _build() -> Step:
    return Step("build", ["setup.py", "build_ext", "--inplace"], 180)


def _compile() -> Step:
    """The kernels of convolutions, side by side, that benchmarks would compile one after the other."""
    return Step("compile", ["benchmarks/compile_ahead.py", "--batch", "8,64,256"], 60)


def _tests(*names: str) -> Step:
    """What a GPU changes; compiling kernels takes most of the time, on one core per process."""
    shards = max(1, (os.cpu_count() or 1) * 3 // 4)
    files = [f"tests/test_{name}.py" for name in names]
    return Step("tests", ["-m", "pytest", *files, "-q"], 240, log="tests.log", shards=shards)


def convolutions(out: Path) -> list[Step]:
    """The grouped convolution, pass by pass, the most telling benchmarks first."""
    copy = Step("copy_rows", ["benchmarks/copy_rows.py", "--json", str(out / "copy_rows.json")], 30)
    common = ["--device", "cuda", "--dtype", "bfloat16", "--layers", "resnext50_32x4d"]
    benchmarks = [
        Step(
            f"{backend} batch {batch}",
            [
                *("benchmarks/grouped_conv.py", *common, "--backend", backend, "--batch", str(batch)),
                *("--baseline", baselines, "--json", str(out / f"grouped_conv_{backend}_{batch}.json")),
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
    return [_build(), _compile(), copy, _tests("gpu", "triton_numerics", "ops", "models"), *benchmarks]


def networks(out: Path) -> list[Step]:
    """The fused blocks and whole networks, the most telling benchmarks first."""
    common = ["--device", "cuda", "--dtype", "bfloat16"]
    graphed = "ours,ours_graphed,nchw,channels_last,graphed"

    def benchmark(name: str, seconds: float, *arguments: str, file: str) -> Step:
        path = str(out / f"{file}.json")
        return Step(file, [f"benchmarks/{name}.py", *common, *arguments, "--json", path], seconds)

    return [
        _build(),
        _compile(),
        benchmark("model", 240, "--batch", "256", "--seconds", "8", "--contenders", graphed, file="model_256"),
        benchmark(
            *("block", 150, "--blocks", "resnext50_32x4d", "--batch", "256"),
            *("--contenders", "ours,ours_recompute,nchw,channels_last"),
            file="block",
        ),
        benchmark("kernel_times", 60, "--batch", "256", file="kernel_times"),
        benchmark("memory", 60, "--batch", "256", "--contenders", "ours,ours_recompute,channels_last", file="memory"),
        _tests("triton_fused", "pointwise_conv", "batch_norm", "fused_ops", "blocks"),
        benchmark(
            *("model", 180, "--batch", "1,256", "--seconds", "8"),
            *("--contenders", "ours_compiled,compiled_channels_last,max_autotune"),
            file="model_compiled",
        ),
    ]


def tuning(out: Path) -> list[Step]:
    """Launch settings of plain convolutions, whether kernels stay in bounds, then launch settings of what is fused."""

    def tune(fusions: str, seconds: float) -> Step:
        # It ends itself, between two passes; the file, named after the GPU, goes to the output folder.
        arguments = ["--device", "cuda", "--dtype", "bfloat16", "--layers", "resnext50_32x4d", "--batch", "256"]
        arguments += ["--fusions", fusions, "--seconds", str(seconds - 20), "--out", str(out)]
        return Step(f"tune {fusions}", ["benchmarks/tune.py", *arguments], seconds)

    def sanitize(tool: str, seconds: float) -> Step:
        return Step(tool, ["benchmarks/sanitize.py", "--tool", tool], seconds)

    return [
        _build(),
        tune("plain", 170),
        _tests("tuning", "tune", "candidates"),
        sanitize("memcheck", 90),
        sanitize("racecheck", 90),
        tune("stats,affine", 200),
    ]


ROUNDS = {"convolutions": convolutions, "networks": networks, "tuning": tuning}


def run(step: Step, out: Path, seconds: float) -> Outcome:
    """Run one step for at most ``seconds``; its whole process group ends with it."""
    if seconds <= 0:
        return Outcome(step.name, "not started", 0.0)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in step.commands()]
        processes = [
            subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=_environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for command, output in zip(step.commands(), outputs, strict=True)
        ]
        status = "passed"
        for process in processes:
            try:
                if code := process.wait(max(0.0, start + seconds - time.monotonic())):
                    status = "skipped" if code == SKIPPED else f"failed ({code})"
            except subprocess.TimeoutExpired:
                status = "out of time"
                _end(process)
        with (out / step.log).open("a") as log:
            for command, output in zip(step.commands(), outputs, strict=True):
                output.seek(0)
                log.write(f"\n== {step.name}: python {' '.join(command)}\n{output.read()}")
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
    parser.add_argument("round", nargs="?", choices=ROUNDS, default="convolutions", help="default: convolutions")
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
    for step in ROUNDS[args.round](out):
        outcomes.append(run(step, out, min(step.seconds, deadline - time.monotonic())))
        print(f"{step.name:<20}{outcomes[-1].status:<16}{outcomes[-1].seconds:>6.1f} s", flush=True)
        described = environment.describe(torch.device("cuda"))
        result = {"environment": described, "steps": [asdict(outcome) for outcome in outcomes]}
        (out / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
    _print_results(out)
    return 0 if all(outcome.status in ("passed", "skipped") for outcome in outcomes) else 1


def _print_results(out: Path) -> None:
    for path in sorted(out.glob("grouped_conv_*.json")):
        result = json.loads(path.read_text())
        means = ", ".join(f"{name} {mean:.2f}" for name, mean in result["geometric_means"].items())
        partly = "" if result["complete"] else ", interrupted"
        print(f"{path.stem}: {len(result['rows'])} passes, {result['wrong_passes']} wrong{partly}; ratios: {means}")
    for path in sorted(path for name in ("block", "model_*", "memory") for path in out.glob(f"{name}.json")):
        result = json.loads(path.read_text())
        partly = "" if result["complete"] else ", interrupted"
        ratios = ", ".join(f"{row['ratio']:.2f}" for row in result["rows"])
        print(f"{path.stem}: {len(result['rows'])} lines, {result['wrong']} wrong{partly}; ratios: {ratios}")
    for path in sorted(out.glob("nvidia_*.json")):
        served = [entry["backend"] for entry in json.loads(path.read_text())["entries"]]
        counts = ", ".join(f"{name} {served.count(name)}" for name in sorted(set(served)))
        print(f"{path.stem}: {len(served)} settings; served by {counts}")
    tests = out / "tests.log"
    if tests.exists():
        closing = [
            line for line in tests.read_text().splitlines() if re.search(r"(passed|failed|error).* in [0-9.]+s", line)
        ]
        print("tests, each process:", *closing, sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
