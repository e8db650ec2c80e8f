"""Rows of results as a table, CSV, JSON and a chart."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from shapes import NETWORKS, PASSES, Layer
from timing import Timing

OURS = "ours"


class Printable(Protocol):
    """A line of a table."""

    def cells(self) -> dict[str, str]:
        """Column -> text."""


@dataclass(frozen=True)
class Row:
    """One pass of one layer.

    Attributes:
        layer: The layer.
        pass_: ``"fwd"``, ``"dgrad"`` or ``"wgrad"``.
        backend: Which of our backends served.
        flops: Floating-point operations of the pass.
        bytes: Fewest bytes it can move.
        bound: Seconds it takes at least by the roofline measured in the same run.
        timings: ``"ours"`` and the names of the baselines -> times.
        peak_bytes: The same names -> memory one call allocates, result included.
    """

    layer: Layer
    pass_: str
    backend: str
    flops: int
    bytes: int
    bound: float
    timings: Mapping[str, Timing]
    peak_bytes: Mapping[str, int]

    @property
    def seconds(self) -> float:
        """Our median."""
        return self.timings[OURS].median

    @property
    def fastest_baseline(self) -> str:
        """The baseline we are compared with."""
        return min((name for name in self.timings if name != OURS), key=lambda name: self.timings[name].median)

    @property
    def ratio(self) -> float:
        """Time of the fastest baseline over ours: above 1 we are faster."""
        return self.timings[self.fastest_baseline].median / self.seconds

    def cells(self) -> dict[str, str]:
        """Column -> text."""
        ours = self.timings[OURS]
        cells = {
            "layer": self.layer.name,
            "pass": self.pass_,
            "backend": self.backend,
            "ms": f"{ours.median * 1e3:.3f}",
            "p20": f"{ours.p20 * 1e3:.3f}",
            "p80": f"{ours.p80 * 1e3:.3f}",
            "TFLOP/s": f"{self.flops / self.seconds * 1e-12:.3f}",
            "GB/s": f"{self.bytes / self.seconds * 1e-9:.1f}",
            "% roofline": f"{100 * self.bound / self.seconds:.0f}",
            "peak MB": f"{self.peak_bytes[OURS] * 1e-6:.1f}",
        }
        for name, timing in self.timings.items():
            if name != OURS:
                cells[f"{name} ms"] = f"{timing.median * 1e3:.3f}"
        return cells | {"ratio": f"{self.ratio:.2f}"}

    def record(self) -> dict[str, object]:
        """Everything about the row, in seconds and bytes, ready for JSON."""
        return {
            "layer": self.layer.name,
            **asdict(self.layer),
            "pass": self.pass_,
            "backend": self.backend,
            "flops": self.flops,
            "bytes": self.bytes,
            "bound_seconds": self.bound,
            "seconds": {name: asdict(timing) for name, timing in self.timings.items()},
            "peak_bytes": dict(self.peak_bytes),
            "fastest_baseline": self.fastest_baseline,
            "ratio": self.ratio,
        }


def table(rows: Sequence[Printable]) -> str:
    """An aligned table, text to the left and numbers to the right."""
    if not rows:
        return "nothing was timed"
    columns = _columns(rows)
    lines = [columns, *([row.cells().get(column, "-") for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 3 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _columns(rows: Sequence[Printable]) -> list[str]:
    """Every column there is, in the order of the row that has most."""
    cells = sorted((row.cells() for row in rows), key=len, reverse=True)
    return list(dict.fromkeys(column for row in cells for column in row))


def geometric_means(rows: Sequence[Row]) -> dict[str, float]:
    """Pass -> geometric mean of the ratios, and ``"all"``."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(row.pass_, []).append(row.ratio)
        ratios.setdefault("all", []).append(row.ratio)
    return {name: statistics.geometric_mean(ratios[name]) for name in (*PASSES, "all") if name in ratios}


def network_totals(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Network -> pass -> seconds of all its layers, each as often as it occurs; only where every layer was timed.

    ``"pytorch"`` is the sum of each layer's fastest baseline, a mixture of layouts no real model reaches.
    """
    timed = {(row.layer, row.pass_): row for row in rows}
    totals: dict[str, dict[str, dict[str, float]]] = {}
    for network, layers in NETWORKS.items():
        for pass_ in PASSES:
            if all((layer, pass_) in timed for layer in layers):
                found = [(timed[layer, pass_], count) for layer, count in layers.items()]
                ours = sum(count * row.seconds for row, count in found)
                theirs = sum(count * row.ratio * row.seconds for row, count in found)
                totals.setdefault(network, {})[pass_] = {OURS: ours, "pytorch": theirs, "ratio": theirs / ours}
    return totals


def summary(rows: Sequence[Row]) -> str:
    """The means and totals in words."""
    means = ", ".join(f"{name} {mean:.2f}" for name, mean in geometric_means(rows).items())
    lines = [f"ratio = fastest PyTorch / ours, above 1 we are faster; geometric mean: {means}"] if rows else []
    for network, passes in network_totals(rows).items():
        lines += [
            f"{network}, all {sum(NETWORKS[network].values())} grouped 3x3 layers, {pass_}: "
            f"{total[OURS] * 1e3:.2f} ms against {total['pytorch'] * 1e3:.2f} ms, ratio {total['ratio']:.2f}"
            for pass_, total in passes.items()
        ]
    return "\n".join(lines)


def to_json(rows: Sequence[Row], **about: object) -> str:
    """``about`` (environment, arguments, roofline, ...), the rows, the means and the totals."""
    results = {
        **about,
        "rows": [row.record() for row in rows],
        "geometric_means": geometric_means(rows),
        "network_totals": network_totals(rows),
    }
    return json.dumps(results, indent=1) + "\n"


def to_csv(rows: Sequence[Printable]) -> str:
    """The table's columns, a line per row."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, _columns(rows), restval="-", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.cells() for row in rows)
    return text.getvalue()


def plot(rows: Sequence[Row], title: str, path: str) -> None:
    """Bars of the ratio per layer and pass, as PNG. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = list(dict.fromkeys(row.layer for row in rows))
    passes = [pass_ for pass_ in PASSES if any(row.pass_ == pass_ for row in rows)]
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.0 * len(layers)), 5.0), layout="constrained")
    width = 0.8 / max(1, len(passes))
    for index, pass_ in enumerate(passes):
        shown = [row for row in rows if row.pass_ == pass_]
        offsets = [layers.index(row.layer) + (index - (len(passes) - 1) / 2) * width for row in shown]
        axes.bar(offsets, [row.ratio for row in shown], width, label=pass_)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=45, ha="right")
    axes.set_ylabel("fastest PyTorch / ours")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)
