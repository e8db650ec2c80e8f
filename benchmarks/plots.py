"""Pictures of results: a roofline plot of the grouped convolutions' layers, bars of whole networks' contenders.

What is drawn is data first (`roofline`, `bars`); `digest` names it, and every picture records the digest of what it
shows. So a picture's age is told without drawing it again, which no two versions of matplotlib do alike.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"fwd": "o", "dgrad": "s", "wgrad": "^"}
OURS, THEIRS, LINES = "#54aeff", "#d0d7de", "#57606a"
# White behind everything, which is readable on dark pages as well. Text stays text: no outlines of letters, and the
# reader's fonts if DejaVu is not among them. Names of models are no formulas, whatever characters they have.
STYLE: Any = {
    "figure.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "resnext",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 10,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
RECORDED = re.compile(r"<dc:identifier>(\w+)</dc:identifier>")


@dataclass(frozen=True)
class Mark:
    """One pass of one layer."""

    pass_: str
    group_width: int
    flops_per_byte: float
    flops_per_second: float


@dataclass(frozen=True)
class Roofline:
    """The marks of one run of grouped_conv.py and the limits measured in it."""

    copy_bytes_per_second: float
    gemm_flops_per_second: float
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Bar:
    """A contender's median time and its 20th and 80th percentile, in milliseconds; the median where there are none."""

    name: str
    median: float
    p20: float
    p80: float
    ours: bool


@dataclass(frozen=True)
class Panel:
    """One model in one mode with one batch size."""

    title: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class BarChart:
    """One run of model.py."""

    panels: tuple[Panel, ...]


def roofline(result: Mapping[str, Any]) -> Roofline:
    """What a run of grouped_conv.py has to show: for each row, operations per byte and per second of our median."""
    marks = (
        Mark(
            row["pass"],
            row["in_channels"] // row["groups"],
            row["flops"] / row["bytes"],
            row["flops"] / row["seconds"]["ours"]["median"],
        )
        for row in result["rows"]
    )
    return Roofline(**result["roofline"], marks=tuple(marks))


def bars(result: Mapping[str, Any]) -> BarChart:
    """What a run of model.py has to show: a panel per row, a bar per contender."""

    def bar(name: str, seconds: Mapping[str, float]) -> Bar:
        low, middle, high = (1e3 * seconds.get(key, seconds["median"]) for key in ("p20", "median", "p80"))
        return Bar(name, middle, low, high, name.startswith("ours"))

    return BarChart(
        tuple(
            Panel(
                f"{row['model']}\n{row['mode']}, batch {row['batch']}: ratio {row['ratio']:.2f}",
                tuple(bar(name, seconds) for name, seconds in row["seconds"].items()),
            )
            for row in result["rows"]
        )
    )


def digest(plot: Roofline | BarChart) -> str:
    """Of the data and of this file: a picture that records another one is out of date."""
    drawn = repr(plot) + Path(__file__).read_text()
    return hashlib.sha256(drawn.encode()).hexdigest()[:16]


def is_current(path: Path, plot: Roofline | BarChart) -> bool:
    """Whether a file is a picture of ``plot``."""
    recorded = RECORDED.search(path.read_text()) if path.exists() else None
    return recorded is not None and recorded[1] == digest(plot)


def write(path: Path, plot: Roofline | BarChart) -> None:
    """Draw as SVG; the same bytes whenever the same matplotlib draws the same data. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        if isinstance(plot, Roofline):
            _draw_roofline(figure, plot)
        else:
            _draw_bars(figure, plot)
        drawn = io.StringIO()
        about = {"Identifier": digest(plot), "Date": None, "Creator": None}
        figure.savefig(drawn, format="svg", metadata=about)
    path.write_text("".join(f"{line.rstrip()}\n" for line in drawn.getvalue().splitlines()))


def _draw_roofline(figure: Figure, plot: Roofline) -> None:
    import matplotlib
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

    figure.set_size_inches(9, 5)
    axes = figure.subplots()
    widths = sorted({mark.group_width for mark in plot.marks})
    shades = matplotlib.colormaps["plasma"]([0.9 * index / max(1, len(widths) - 1) for index in range(len(widths))])
    colors = dict(zip(widths, shades, strict=True))
    for pass_, marker in MARKERS.items():
        shown = [mark for mark in plot.marks if mark.pass_ == pass_]
        axes.scatter(
            [mark.flops_per_byte for mark in shown],
            [mark.flops_per_second for mark in shown],
            s=28,
            c=[colors[mark.group_width] for mark in shown],
            marker=marker,
            linewidths=0,
            zorder=3,
        )
    ridge = plot.gemm_flops_per_second / plot.copy_bytes_per_second
    intensities = [ridge, *(mark.flops_per_byte for mark in plot.marks)]
    first, last = min(intensities) / 1.3, max(intensities) * 1.3
    limits = [
        *axes.plot(
            [first, ridge],
            [first * plot.copy_bytes_per_second, plot.gemm_flops_per_second],
            color=LINES,
            label=f"copy, {EngFormatter('B/s', places=1)(plot.copy_bytes_per_second)}",
        ),
        *axes.plot(
            [ridge, last],
            [plot.gemm_flops_per_second] * 2,
            color=LINES,
            linestyle="--",
            label=f"matrix product, {EngFormatter('FLOP/s', places=1)(plot.gemm_flops_per_second)}",
        ),
    ]
    axes.set(xscale="log", yscale="log", xlabel="floating-point operations per byte moved", ylabel="FLOP/s")
    for axis, formatter in ((axes.xaxis, StrMethodFormatter("{x:g}")), (axes.yaxis, EngFormatter())):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(formatter)
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)

    def entry(label: str, marker: str = "", color: Any = LINES) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=color, label=label)

    legend = [
        *(entry("limits measured"), *limits),
        *(entry("\npass"), *(entry(pass_, marker) for pass_, marker in MARKERS.items())),
        *(entry("\nchannels per group"), *(entry(str(width), "o", colors[width]) for width in widths)),
    ]
    figure.legend(handles=legend, loc="outside right upper", frameon=False)


def _draw_bars(figure: Figure, plot: BarChart) -> None:
    columns = min(2, len(plot.panels))
    rows = -(-len(plot.panels) // columns)
    most = max(len(panel.bars) for panel in plot.panels)
    figure.set_size_inches(5.5 * columns, rows * (0.7 + 0.3 * most))
    every: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every[len(plot.panels) :]:
        axes.axis("off")
    for axes, panel in zip(every, plot.panels, strict=False):
        medians = [bar.median for bar in panel.bars]
        errors = [
            [bar.median - bar.p20 for bar in panel.bars],
            [bar.p80 - bar.median for bar in panel.bars],
        ]
        drawn = axes.barh(
            [bar.name for bar in panel.bars],
            medians,
            xerr=errors,
            color=[OURS if bar.ours else THEIRS for bar in panel.bars],
            error_kw={"ecolor": LINES, "capsize": 2},
        )
        axes.bar_label(drawn, [f"{time:.1f} ms" if time < 100 else f"{time:.0f} ms" for time in medians], padding=4)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(bar.p80 for bar in panel.bars))
        axes.set_xticks([])
        axes.spines.bottom.set_visible(False)
        axes.set_title(panel.title, fontsize=10, loc="left")
