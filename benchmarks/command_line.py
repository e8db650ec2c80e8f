"""What the benchmarks' command lines have in common: options, their checks, exit codes, where results go."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import environment
import report
import torch
from timing import keep_freed_memory

from resnext.kernels import BackendError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Item = TypeVar("Item")


class Parser(argparse.ArgumentParser):
    """Bad arguments get one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """End the program."""
        self.exit(2, f"{self.prog}: error: {message}\n")


class Row(report.Printable, Protocol):
    """A line of results."""

    def record(self) -> dict[str, object]:
        """Everything about the row, in seconds and bytes, ready for JSON."""


def add_device_options(parser: Parser) -> None:
    """Add what says where and in what precision to compute."""
    parser.add_argument("--device", help="cpu, cuda or cuda:<index>")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on CUDA")


def add_common_options(parser: Parser, *, quick: str) -> None:
    """Add the options that every benchmark has; ``quick`` says what ``--quick`` does."""
    add_device_options(parser)
    parser.add_argument("--json", metavar="PATH", help="write everything that was measured")
    parser.add_argument("--csv", metavar="PATH", help="write the table")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--verify-only", action="store_true", help="check every result, measure nothing")


def check_device_options(parser: Parser, args: argparse.Namespace) -> None:
    """Make objects of what `add_device_options` has parsed. Bad arguments end the program with code 2."""
    args.device = _device(parser, args.device)
    args.dtype = DTYPES[args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")]


def check_common_options(parser: Parser, args: argparse.Namespace) -> None:
    """Make objects of what `add_common_options` has parsed. Bad arguments end the program with code 2."""
    check_device_options(parser, args)
    for option in ("json", "csv"):
        check_output(parser, option, getattr(args, option))


def check_output(parser: Parser, option: str, path: str | None) -> None:
    """Refuse a file that could not be written at the end."""
    if path is not None and (os.path.isdir(path) or not os.access(Path(path).resolve().parent, os.W_OK)):
        parser.error(f"--{option}: expected a file in a folder that exists and can be written to, got {path}")


def names(text: str | None) -> list[str]:
    """The items of a list separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def chosen(parser: Parser, option: str, text: str | None, known: Sequence[str]) -> list[str]:
    """The items of a list, each one of ``known``, in the order of ``known``."""
    found = names(text)
    for name in found:
        if name not in known:
            parser.error(f"{option}: expected a list of {', '.join(known)}, got {name!r}")
    return [name for name in known if name in found]


def batches(parser: Parser, text: str) -> list[int]:
    """The numbers of images in a list."""
    try:
        found = [int(name) for name in names(text)]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        parser.error(f"--batch: expected numbers of images, each at least 1, got {text!r}")
    return found


def _device(parser: Parser, name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device: expected cpu, cuda or cuda:<index>, got {name!r}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu, cuda or cuda:<index>, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device: {name!r} asked for, but PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def progress(items: Iterable[Item], total: int, unit: str) -> Iterator[Item]:
    """Yield the items and show on standard error how far it is."""
    if importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        yield from tqdm(items, total=total, unit=unit, file=sys.stderr)
        return
    for done, item in enumerate(items, start=1):
        print(f"{unit} {done} of {total}", file=sys.stderr)
        yield item


def add_jobs_option(parser: Parser) -> None:
    """Add the option that says how many processes compile."""
    parser.add_argument("--jobs", type=int, help="processes that compile; default: three quarters of the cores")


def jobs(parser: Parser, number: int | None) -> int:
    """How many processes compile. A bad number ends the program with code 2."""
    number = number or max(1, (os.cpu_count() or 1) * 3 // 4)
    if number < 1:
        parser.error(f"--jobs: expected at least 1, got {number}")
    return number


def prepare(device: torch.device) -> None:
    """Set the process up as those who care for speed do."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.cuda.set_device(device.index or 0)
    else:
        keep_freed_memory()


def exit_code(program: str, run: Callable[[], int]) -> int:
    """What ``run`` returns: 0, or 1 after a wrong result; 2 if a backend cannot serve, 130 if interrupted."""
    try:
        return run()
    except BackendError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def machine(about: Mapping[str, Any]) -> str:
    """The heading of a table: what it was measured on."""
    device = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
    return f"{device}; torch {about['torch']}"


def print_if_busy(about: Mapping[str, Any]) -> None:
    """Warn if the machine had other work before the start."""
    if about["device"] == "cpu" and about["load_average"] > 0.5 * about["cpus"]:
        print(
            f"The machine was busy before the start (load average {about['load_average']} on {about['cpus']} CPUs): "
            "where p20 and p80 lie far apart, the times are those of a thread waiting for a core"
        )


class Task(NamedTuple):
    """One line of the table to be: its name, what says where it is wrong (None: nowhere), and what measures it."""

    name: str
    check: Callable[[], str | None]
    measure: Callable[[], Row]


def run(args: argparse.Namespace, tasks: Iterable[Task], total: int) -> int:
    """Measure what is right, show it, and write the files that were asked for, of an interrupted run too."""
    rows: list[Row] = []
    about = environment.describe(args.device)  # now, while the load average is not yet our own
    wrong, complete = 0, False
    try:
        for task in progress(tasks, total, "line"):
            if message := task.check():
                wrong += 1
                print(f"WRONG: {task.name}: {message}", file=sys.stderr)
            elif not args.verify_only:
                rows.append(task.measure())
        complete = True
    finally:
        if not args.verify_only and (rows or complete):
            _publish(args, rows, about, wrong=wrong, complete=complete)
    if args.verify_only:
        print(f"{total - wrong} of {total} are as accurate as PyTorch's")
    return 1 if wrong else 0


def _publish(
    args: argparse.Namespace, rows: Sequence[Row], about: Mapping[str, Any], *, wrong: int, complete: bool
) -> None:
    print(f"{machine(about)}; {str(args.dtype).removeprefix('torch.')}\n")
    print(report.table(rows), flush=True)
    print_if_busy(about)
    if wrong:
        print(f"{wrong} lines are WRONG and were not measured")
    if args.json is not None:
        result = {
            "complete": complete,
            "wrong": wrong,
            "environment": about,
            "arguments": {name: _text(value) for name, value in vars(args).items()},
            "rows": [row.record() for row in rows],
        }
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if args.csv is not None:
        Path(args.csv).write_text(report.to_csv(rows))


def _text(value: Any) -> str:
    return ",".join(getattr(item, "name", str(item)) for item in value) if isinstance(value, list) else str(value)
