"""Measure launch settings of the Triton kernels and which backend is the fastest, and write what `resnext` reads.

    python benchmarks/tune.py --layers resnext50_32x4d --batch 256 --seconds 600
    TRITON_INTERPRET=1 python benchmarks/tune.py --device cpu --quick --out folder      (a rehearsal without a GPU)

Every candidate (kernels/candidates.py) is compiled ahead of time, and left out if it spills or does not fit; what is
left is checked (verify.py), then timed, the best few once more beside PyTorch and the other backends. The file is
written after each pass of a layer: a run that is stopped, or stops itself after --seconds, goes on where it was.
--candidates-to says what was found about every candidate, for whoever improves the heuristic (kernels/config.py).
`--again --candidates 1` only compares backends anew, with the settings that the file has.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import command_line
import environment
import report
import shapes
import torch
from command_line import Parser
from timing import Budget, Timing, interleave

try:
    import triton
    from ahead_of_time import Usage, describe, exceeds, specialization
    from targets import TINY, TINY_POINTWISE, AnyConfig, Gate, Results, Target, all_targets, pointwise_layers, resources
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    raise SystemExit("tune.py: error: needs Triton, which is not installed") from None

from resnext.kernels import BackendError, tuning

FIRST = Budget(seconds=0.5, min_rounds=3, max_rounds=10)  # of all candidates together
FULL = Budget(seconds=0.4, min_rounds=5, max_rounds=50)  # of the finalists
QUICK = Budget(seconds=0.1, min_rounds=3, max_rounds=10)
FINALISTS = 4
NOISE = 0.99  # What takes so much of another's time is not faster.
Checked = dict[AnyConfig, "Usage | str | None"]


def _parser() -> Parser:
    parser = Parser(
        description=__doc__.partition("\n")[0],
        epilog="Lists are separated by commas. The 1x1 convolutions of resnet18, resnet50 and resnext50_32x4d are "
        "tuned with their networks. Without a GPU: --device cpu, TRITON_INTERPRET=1 and --out; such times say nothing.",
    )
    command_line.add_device_options(parser)
    parser.add_argument("--layers", help="networks and layers, as grouped_conv.py --list names them, or tiny")
    parser.add_argument("--passes", help=f"of {', '.join(shapes.PASSES)}; default: all")
    parser.add_argument("--fusions", help=f"of {', '.join(tuning.FUSIONS)}; default: all")
    parser.add_argument("--batch", help="numbers of images; default: 256 (--quick: 2)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after so long")
    parser.add_argument("--candidates", type=int, metavar="N", help="at most N of each pass, evenly from the list")
    command_line.add_jobs_option(parser)
    parser.add_argument("--again", action="store_true", help="measure what the file has already, too")
    parser.add_argument("--quick", action="store_true", help="tiny layers, four candidates each, few repetitions")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: the user's, which resnext reads")
    parser.add_argument(
        "--candidates-to", type=Path, metavar="PATH", help="write the rough times of all candidates too"
    )
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, complete with defaults and as the objects they name. Bad ones end the program with code 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    command_line.check_device_options(parser, args)
    names = command_line.names(args.layers) or (["tiny"] if args.quick else ["resnext50_32x4d"])
    tiny = "tiny" in names
    names = [name for name in names if name != "tiny"]
    try:
        args.layers = TINY * tiny + (shapes.select_layers(names) if names else [])
    except ValueError as error:
        parser.error(f"--layers: {error}")
    args.pointwise = (TINY_POINTWISE if tiny else {}) | pointwise_layers(names)
    args.passes = command_line.chosen(parser, "--passes", args.passes, shapes.PASSES) or list(shapes.PASSES)
    args.fusions = command_line.chosen(parser, "--fusions", args.fusions, tuning.FUSIONS) or list(tuning.FUSIONS)
    args.batch = command_line.batches(parser, args.batch or ("2" if args.quick else "256"))
    args.candidates = args.candidates or (4 if args.quick else None)
    if args.candidates is not None and args.candidates < 1:
        parser.error(f"--candidates: expected at least 1, got {args.candidates}")
    args.jobs = command_line.jobs(parser, args.jobs)
    if args.device.type == "cpu" and not triton.knobs.runtime.interpret:
        parser.error("--device cpu: the kernels run there in Triton's interpreter only; set TRITON_INTERPRET=1")
    if args.device.type == "cpu" and args.out is None:
        parser.error("--device cpu: times in the interpreter say nothing about a GPU; name a folder with --out")
    args.out = args.out or tuning.user_folder()
    return args


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: what was chosen, against the heuristic's choice and PyTorch.

    Attributes:
        target: What was tuned.
        entry: What the file says.
        heuristic: Microseconds of the heuristic's settings; None if they do not run.
    """

    target: Target
    entry: tuning.Entry
    heuristic: float | None

    def cells(self) -> dict[str, str]:
        """Column -> text."""
        times, config = self.entry.microseconds, self.entry.config
        ours = times.get("triton")
        cells = {
            "layer": self.target.layer_name,
            "pass": f"{self.target.fusion} {self.target.op}",
            "settings": "of dgrad and wgrad" if config is None else _describe(config),
            "batch": str(self.entry.batch),
            "us": "-" if ours is None else f"{ours:.1f}",
            "heuristic us": "-" if self.heuristic is None else f"{self.heuristic:.1f}",
            "gain": "-" if self.heuristic is None or ours is None else f"{self.heuristic / ours:.2f}",
        }
        cells |= {f"{name} us": f"{times[name]:.1f}" for name in ("cuda", "torch", "torch_nchw") if name in times}
        return cells | {"serves": self.entry.backend}


def _describe(config: AnyConfig) -> str:
    text = describe(config)
    for name in ("band", "splits"):
        if getattr(config, name, 1) != 1:
            text += f" {name} {getattr(config, name)}"
    return text


class Tuner:
    """One run: the file's entries, and the processes that compile."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = args.device
        self.start = time.monotonic()
        self.name = tuning.device_name(args.device)
        self.path = args.out / tuning.file_name(self.name)
        self.entries = {(entry.key, entry.batch): entry for entry in tuning.read(self.path, self.name)}
        about = environment.describe(args.device)
        self.measured = {name: str(about[name]) for name in ("date", "commit", "torch", "triton")}
        self.rows: list[Row] = []
        self.candidates: list[dict[str, object]] = []
        self.wrong = 0
        self.pool: concurrent.futures.Executor | None = None
        self.limits = (0, 0)
        if args.device.type == "cuda":
            properties = torch.cuda.get_device_properties(args.device)
            self.limits = (properties.major * 10 + properties.minor, properties.shared_memory_per_block_optin)
            context = multiprocessing.get_context("spawn")
            # Ctrl-C is for the process that writes the file.
            ignore = (signal.SIGINT, signal.SIG_IGN)
            self.pool = concurrent.futures.ProcessPoolExecutor(args.jobs, context, signal.signal, ignore)

    def run(self) -> None:
        """Tune what is left to do, until the time is up."""
        args = self.args
        options = (args.fusions, args.passes, args.batch, args.dtype, args.device.type)
        every = all_targets(args.layers, args.pointwise, *options)
        targets = [t for t in every if args.again or (t.key, t.batch) not in self.entries]
        print(f"{self.name}: {self.path}")
        if len(targets) < len(every):
            print(f"{len(every) - len(targets)} of {len(every)} are in the file already (--again measures them too)")
        if self.pool is None:
            print("Triton's interpreter compiles nothing: no candidate is left out for its registers, spills or memory")
        pending = [(target, *self._submit(target)) for target in targets]
        for index, (target, configs, left_out, futures) in enumerate(pending):
            if time.monotonic() - self.start > args.seconds:
                print(f"out of time: {len(pending) - index} of {len(pending)} not started; run again to go on")
                return
            self._tune(target, configs, left_out, futures)

    def close(self) -> None:
        """End the processes."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, target: Target):
        """The candidates, why others are left out (counted), and what compiles them by specialization."""
        configs = [] if target.op == "bwd" else target.candidates(self.device)
        most = self.args.candidates
        kept = configs
        if most is not None and len(configs) > most:
            kept = [configs[index * len(configs) // most] for index in range(most)]
        known = self.entries.get((target.key, target.batch))
        if configs and known is not None and known.config is not None and known.config not in kept:
            kept = [*kept, known.config]  # --again: what was the best before
        left_out = Counter({f"beyond --candidates {most}": max(0, len(configs) - len(kept))})
        futures = {}
        for config in kept if self.pool is not None else ():
            key = specialization(target.launch(config), target.dtype)
            if key not in futures:
                futures[key] = self.pool.submit(resources, target, config, self.limits[0])
        return kept, left_out, futures

    def _tune(self, target: Target, configs: list[AnyConfig], left_out: Counter[str], futures) -> None:
        fitting = []
        for config in configs:
            if futures:
                used = futures[specialization(target.launch(config), target.dtype)].result()
                if isinstance(used, str):
                    left_out[used] += 1
                    continue
                if config != configs[0] and (reason := exceeds(used, self.limits[1])):
                    left_out["spills" if "spills" in reason else "too much shared memory"] += 1
                    continue
            fitting.append(config)
        tensors = target.operands(self.device)
        calls = self._right(target, fitting, tensors, left_out)
        said = f"{len(calls)} of {sum(left_out.values()) + len(calls)} candidates timed"
        if counts := "; ".join(f"{count} {reason}" for reason, count in left_out.items() if count):
            said += f" (left out: {counts})"
        if target.op == "bwd":
            said = "both gradients at once, timed"
            calls = {None: functools.partial(target.run, target.triton(), tensors, **self._settings_of_both(target))}
        print(f"{target.layer_name} {target.fusion} {target.op}, batch {target.batch}: {said}", flush=True)
        if calls:
            self._measure(target, configs, calls, tensors)
            self._write()

    def _right(self, target: Target, configs: list[AnyConfig], tensors: Results, left_out: Counter[str]):
        """Config -> call of the candidates that run and are right."""
        gate, calls = Gate(target, tensors), {}
        for config in configs:
            call = functools.partial(target.run, target.triton(), tensors, **target.settings(config))
            try:
                message = gate.mismatch(call())
            except (RuntimeError, ValueError, triton.errors.TritonError) as error:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()  # raises again what has left the GPU unusable: then the run ends
                left_out[f"does not run ({type(error).__name__})"] += 1
                continue
            if message is None:
                calls[config] = call
            else:
                self.wrong += 1
                left_out["WRONG"] += 1
                print(f"WRONG: {target.layer_name} {target.fusion} {target.op}: {config}: {message}", file=sys.stderr)
        return calls

    def _settings_of_both(self, target: Target) -> dict[str, AnyConfig]:
        """Launch settings of both gradients, as they were measured."""
        found = {}
        for op in ("dgrad", "wgrad"):
            one = dataclasses.replace(target, op=op)
            entry = self.entries.get((one.key, one.batch))
            if entry is not None and entry.config is not None:
                found |= one.settings(entry.config)
        return found

    def _measure(self, target: Target, configs: list[AnyConfig], calls: dict, tensors: Results) -> None:
        """Choose among right candidates and backends, and keep that."""
        finalists = list(calls)
        if len(finalists) > FINALISTS:
            named = {str(index): calls[config] for index, config in enumerate(finalists)}
            first = interleave(named, self.device, QUICK if self.args.quick else FIRST)
            self._keep(target, {finalists[int(name)]: _microseconds(timing) for name, timing in first.items()})
            fastest = sorted(first, key=lambda name: first[name].median)[:FINALISTS]
            chosen = {configs[0]} | {finalists[int(name)] for name in fastest}
            finalists = [config for config in finalists if config in chosen]
        nchw = {name: tensor.contiguous() for name, tensor in tensors.items()}
        named = {str(index): calls[config] for index, config in enumerate(finalists)}
        for name, (launchers, channels_last) in target.others(self.device).items():
            named[name] = functools.partial(target.run, launchers, tensors if channels_last else nchw, channels_last)
        timings = interleave(named, self.device, QUICK if self.args.quick else FULL)
        times = {name: _microseconds(timing) for name, timing in timings.items()}
        best = _fastest({name: times[name] for name in map(str, range(len(finalists)))})
        heuristic = times["0"] if target.op != "bwd" and finalists[0] == configs[0] else None
        measured = {"triton": times[best]} | {name: time for name, time in times.items() if not name.isdigit()}
        backend = _fastest({name: measured[name] for name in tuning.BACKENDS if name in measured})
        entry = tuning.Entry(target.key, target.batch, backend, finalists[int(best)], measured, self.measured)
        self.entries[entry.key, entry.batch] = entry
        self.rows.append(Row(target, entry, heuristic))

    def _keep(self, target: Target, microseconds: dict[AnyConfig, float]) -> None:
        """Keep the rough times of candidates."""
        about = {**target.key._asdict(), "batch": target.batch}
        self.candidates += [
            {**about, "config": dataclasses.asdict(config), "microseconds": time}
            for config, time in microseconds.items()
        ]

    def _write(self) -> None:
        _replace(self.path, tuning.to_json(self.name, self.entries.values()))
        if self.args.candidates_to is not None:
            lines = ",\n".join(json.dumps(record) for record in self.candidates)
            _replace(self.args.candidates_to, f"[\n{lines}\n]\n")


def _replace(path: Path, text: str) -> None:
    """Replace a file at once, so that whoever reads it meanwhile finds a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _microseconds(timing: Timing) -> float:
    return round(timing.median * 1e6, 3)


def _fastest(times: dict[str, float]) -> str:
    """The first name, unless another is faster by more than noise."""
    first, best = next(iter(times)), min(times, key=lambda name: times[name])
    return best if times[best] < NOISE * times[first] else first


def _run(args: argparse.Namespace) -> int:
    try:
        tuner = Tuner(args)
    except ValueError as error:
        raise BackendError(f"{error}; move it away") from None
    try:
        tuner.run()
    finally:
        tuner.close()
        if tuner.rows:
            print("", report.table(tuner.rows), sep="\n", flush=True)
        if tuner.wrong:
            print(f"{tuner.wrong} candidates are WRONG and were not timed")
    return 1 if tuner.wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 after a wrong result, 2 for bad arguments, 130 if interrupted."""
    args = _parse(argv)
    command_line.prepare(args.device)
    with torch.no_grad():
        return command_line.exit_code("tune.py", lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
