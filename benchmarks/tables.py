"""Committed results as Markdown tables."""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from shapes import NETWORKS, PASSES, Layer

CLEARLY_SLOWER = 0.95  # ratios below are listed, those from here to 1 counted


@dataclass(frozen=True)
class Run:
    """A file of results.

    Attributes:
        path: From the page that links it; the folder is the device.
        result: Its content.
    """

    path: PurePosixPath
    result: Mapping[str, Any]

    @property
    def device(self) -> str:
        """Its folder's name."""
        return self.path.parent.name

    @property
    def dtype(self) -> str:
        """As in ``float32``."""
        return self.result["arguments"]["dtype"].removeprefix("torch.")

    @property
    def batches(self) -> list[int]:
        """Images of a call; networks are measured with several."""
        return [int(number) for number in str(self.result["arguments"]["batch"]).split(",")]

    @property
    def title(self) -> str:
        """What tells the runs of one program apart: dtype, batch and image sizes, the backend where one was forced."""
        arguments = self.result["arguments"]
        parts = [self.dtype, f"batch {' and '.join(map(str, self.batches))}"]
        if "size" in arguments:
            parts.append(f"{arguments['size']} pixels")
        if arguments.get("backend", "auto") != "auto":
            parts.append(arguments["backend"])
        return ", ".join(parts)

    @property
    def machine(self) -> str:
        """Processor, version of PyTorch, commit; as Markdown."""
        about = self.result["environment"]
        processor = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"
        commit, dirty, _ = (about.get("commit") or "unknown").partition("-dirty")
        return escaped(f"{processor}; torch {about['torch']}; commit {commit[:10]}{dirty}")

    @property
    def source(self) -> str:
        """Title, file and machine, as a line of a page."""
        return f"[{escaped(self.title)}]({self.path}): {self.machine}"


@dataclass(frozen=True)
class Comparison:
    """A ratio and what it is of.

    Attributes:
        name: A layer, block or network.
        pass_: Of a layer or block; a network's mode.
        run: Where it was measured.
        batch: Images of a call.
        ratio: Time of PyTorch's fastest over ours.
        ours: The backend that served; of blocks and networks our fastest contender.
    """

    name: str
    pass_: str
    run: Run
    batch: int
    ratio: float
    ours: str


def escaped(text: str) -> str:
    """Text as Markdown that shows just that, in one line: no HTML, table cell, link or emphasis begins in it."""
    return re.sub(r"([\\|\[\]*`])", r"\\\1", " ".join(html.escape(text, quote=False).split()))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of Markdown; the cells are Markdown already."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def means(runs: Sequence[Run]) -> str:
    """Runs of grouped_conv.py: a column for each, a line per network, the geometric means of its layers' ratios."""

    def cell(run: Run, names: set[str]) -> str:
        found = []
        for pass_ in PASSES:
            ratios = {row["layer"]: row["ratio"] for row in run.result["rows"] if row["pass"] == pass_}
            timed = [ratio for layer, ratio in ratios.items() if layer in names]
            found.append(f"{statistics.geometric_mean(timed):.2f}" if len(timed) == len(names) else "-")
        return "-" if set(found) == {"-"} else " / ".join(found)

    def every(run: Run) -> str:
        means = run.result["geometric_means"]
        return " / ".join(f"**{means[pass_]:.2f}**" if pass_ in means else "-" for pass_ in PASSES)

    rows = [
        [network, *(cell(run, {layer.name for layer in layers}) for run in runs)]
        for network, layers in NETWORKS.items()
    ]
    shown = [row for row in rows if set(row[1:]) != {"-"}]
    return table(["network", *(escaped(run.title) for run in runs)], [*shown, ["all layers", *map(every, runs)]])


def convolutions(run: Run) -> str:
    """One run of grouped_conv.py: a line per layer, the means."""
    cells: dict[str, dict[str, str]] = {}
    for row in run.result["rows"]:
        ours, theirs = (row["seconds"][name]["median"] * 1e3 for name in ("ours", row["fastest_baseline"]))
        cells.setdefault(row["layer"], {})[row["pass"]] = f"{ours:.2f} / {theirs:.2f} / **{row['ratio']:.2f}**"
    rows = [[escaped(layer), *(passes.get(name, "-") for name in PASSES)] for layer, passes in cells.items()]
    return table(["layer", *PASSES], rows)


def networks(run: Run) -> str:
    """One run of model.py: a line per model, mode and batch size, a column per contender."""
    names = list(dict.fromkeys(name for row in run.result["rows"] for name in row["seconds"]))
    rows = []
    for row in run.result["rows"]:
        times = [f"{row['seconds'][name]['median'] * 1e3:.0f}" if name in row["seconds"] else "-" for name in names]
        rows.append([escaped(row["model"]), row["mode"], str(row["batch"]), *times, f"**{row['ratio']:.2f}**"])
    return table(["model", "mode", "batch", *map(escaped, names), "ratio"], rows)


def memory(run: Run) -> str:
    """One run of memory.py: a line per model and batch size, a column per contender."""
    names = list(dict.fromkeys(name for row in run.result["rows"] for name in row["peak_bytes"]))
    rows = []
    for row in run.result["rows"]:
        peaks = [f"{row['peak_bytes'][name] / 1e6:.0f}" if name in row["peak_bytes"] else "-" for name in names]
        rows.append([escaped(row["model"]), str(row["batch"]), *peaks, f"**{row['ratio']:.2f}**"])
    return table(["model", "batch", *map(escaped, names), "ratio"], rows)


def kernel_times(run: Run) -> str:
    """One run of kernel_times.py: a line per mode and contender, in milliseconds."""
    rows = []
    for row in run.result["rows"]:
        times = [row[f"{name}_seconds"] * 1e3 for name in ("step", "kernel", "small_step")]
        rows.append([escaped(row["model"]), row["mode"], escaped(row["contender"]), *(f"{time:.1f}" for time in times)])
    return table(["model", "mode", "", "a step", "its kernels", "a step of two images"], rows)


# What `settings` shows of an entry of tuning.py: column -> (fusion, op).
_MEASURED = {
    "forward": ("plain", "fwd"),
    "input gradient": ("plain", "dgrad"),
    "weight gradient": ("plain", "wgrad"),
    "training, forward": ("stats", "fwd"),
    "training, gradients": ("stats", "bwd"),
    "inference": ("affine", "fwd"),
}


def settings(measured: Mapping[str, Any]) -> str:
    """A file of kernels/tuned: a line per grouped 3x3 layer, in microseconds: ours / PyTorch's, ratio, who serves.

    PyTorch's: the faster layout, of what is fused by its convolution and separate passes of ours.
    """
    lines: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for entry in measured["entries"]:
        if entry["kernel_size"] != 3:
            continue
        times = entry["microseconds"]
        theirs = min(time for name, time in times.items() if name.startswith("torch"))
        ours = min(time for name, time in times.items() if not name.startswith("torch"))
        sizes = (entry[name] for name in ("in_channels", "out_channels", "height", "width"))
        layer = Layer(*sizes, stride=entry["stride"][0], groups=entry["groups"])
        line = (layer.name, str(entry["batch"]), entry["dtype"])
        cell = f"{ours:.0f} / {theirs:.0f} / **{theirs / ours:.2f}** {escaped(entry['backend'])}"
        lines.setdefault(line, {})[entry["fusion"], entry["op"]] = cell
    rows = [[*map(escaped, line), *(cells.get(of, "-") for of in _MEASURED.values())] for line, cells in lines.items()]
    return table(["layer", "batch", "dtype", *_MEASURED], rows)


def zoo(run: Run) -> str:
    """One run of zoo.py: a line per network."""

    def error(row: Mapping[str, Any], kind: str) -> str:
        if kind not in row["errors"]:
            return "-"
        difference, rounding = (row["errors"][kind][name] for name in ("difference", "rounding"))
        return f"{difference:.0e}" if rounding is None else f"{difference:.0e} ({rounding:.0e})"

    rows = [
        [
            *(escaped(row["name"]), *(str(row[name]) for name in ("size", "blocks", "chains", "convolutions"))),
            str(sum(row["skipped"].values())),
            *(error(row, kind) for kind in ("logits", "gradients")),
            f"{row['seconds']:.2f}",
            escaped(row["failure"] or row["note"]),
        ]
        for row in run.result["rows"]
    ]
    header = ["network", "pixels", "blocks", "chains", "convolutions", "skipped", "logits", "gradients", "s", ""]
    return table(header, rows)


def comparisons(run: Run) -> Iterator[Comparison]:
    """Every ratio of times in a run of grouped_conv.py, block.py or model.py, network totals included."""
    rows = run.result["rows"]
    for row in rows:
        name = next(row[kind] for kind in ("layer", "block", "model") if kind in row)
        if "size" in row:
            name += f", {row['size']} pixels"
        ours = row["backend"] if "backend" in row else row["fastest_of_ours"]
        batch = row["batch"] if "batch" in row else run.batches[0]
        yield Comparison(name, row.get("pass") or row["mode"], run, batch, row["ratio"], ours)
    for network, totals in run.result.get("network_totals", {}).items():
        layers = {layer.name for layer in NETWORKS.get(network, ())}
        for pass_, total in totals.items():
            served = sorted({row["backend"] for row in rows if row["pass"] == pass_ and row["layer"] in layers})
            name = f"{network}, its 3x3 layers"
            yield Comparison(name, pass_, run, run.batches[0], total["ratio"], ", ".join(served))


def not_faster(runs: Sequence[Run]) -> list[str]:
    """Paragraphs: how many of all ratios are below 1, and those clearly below, the smallest first."""
    every = [comparison for run in runs for comparison in comparisons(run)]
    slower = sorted((one for one in every if one.ratio < 1), key=lambda one: one.ratio)
    if not slower:
        return [f"Nothing: none of the {len(every)} ratios of times is below 1."]
    clearly = [one for one in slower if one.ratio < CLEARLY_SLOWER]
    counted = (
        f"Of {len(every)} ratios of times {len(slower)} are below 1: {len(slower) - len(clearly)} from "
        f"{CLEARLY_SLOWER} to 1, {len(clearly)} below {CLEARLY_SLOWER}"
    )
    if not clearly:
        return [f"{counted}."]
    rows = [
        [
            *(escaped(one.name), escaped(one.pass_), str(one.batch), one.run.dtype),
            *(f"[{escaped(one.run.device)}]({one.run.path})", escaped(one.ours), f"**{one.ratio:.2f}**"),
        ]
        for one in clearly
    ]
    header = ["layer, block or network", "pass", "batch", "dtype", "device", "served by", "ratio"]
    return [f"{counted} (of blocks and networks *served by* names our fastest contender):", table(header, rows)]
