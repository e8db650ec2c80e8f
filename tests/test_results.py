"""benchmarks/readme.py, tables.py, plots.py: pages and pictures of results that are made up here."""

from __future__ import annotations

import copy
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path, PurePosixPath

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import plots  # noqa: E402
import readme  # noqa: E402
import tables  # noqa: E402
from shapes import NETWORKS, PASSES  # noqa: E402
from tables import Run  # noqa: E402

ENVIRONMENT = {"cpu": "Abacus | <9> [MHz]", "threads": 3, "torch": "2.99", "commit": "0123456789abcdef-dirty"}


def _times(*milliseconds: float) -> dict[str, float]:
    """The median, or p20, median and p80."""
    names = ("median",) if len(milliseconds) == 1 else ("p20", "median", "p80")
    return {name: value / 1e3 for name, value in zip(names, milliseconds, strict=True)}


def _convolutions(ratio: float = 2.0, batch: int = 8) -> dict[str, object]:
    """Every layer of one network, two milliseconds each, all of one ratio."""
    layers = NETWORKS["resnext50_32x4d"]
    rows = [
        {
            "layer": layer.name,
            "in_channels": layer.in_channels,
            "groups": layer.groups,
            "pass": pass_,
            "backend": "cpu",
            "flops": layer.flops(batch),
            "bytes": layer.bytes(batch, 4),
            "seconds": {"ours": _times(2.0), "nchw": _times(2.0 * ratio)},
            "fastest_baseline": "nchw",
            "ratio": ratio,
        }
        for layer in layers
        for pass_ in PASSES
    ]
    return {
        "environment": ENVIRONMENT,
        "arguments": {"dtype": "torch.float32", "batch": str(batch), "backend": "auto"},
        "roofline": {"copy_bytes_per_second": 1e10, "gemm_flops_per_second": 1e11},
        "rows": rows,
        "geometric_means": dict.fromkeys(PASSES, ratio),
        "network_totals": {"resnext50_32x4d": {pass_: {"ratio": ratio} for pass_ in PASSES}},
    }


def _networks(ratio: float = 1.5) -> dict[str, object]:
    """One model with one time that has percentiles and one that has not."""
    row = {
        "model": "resnet|$<b>",
        "mode": "inference",
        "batch": 4,
        "size": 64,
        "seconds": {"ours_compiled": _times(9.0, 10.0, 12.0), "nchw": _times(10.0 * ratio)},
        "fastest_of_ours": "ours_compiled",
        "fastest_baseline": "nchw",
        "ratio": ratio,
    }
    arguments = {"dtype": "torch.bfloat16", "batch": "4", "size": "64", "backend": "triton"}
    return {"environment": ENVIRONMENT | {"gpu": "GPU 1"}, "arguments": arguments, "rows": [row]}


def _memory() -> dict[str, object]:
    row = {"model": "resnet", "batch": 4, "size": 64, "peak_bytes": {"ours": 2e6, "nchw": 3e6}, "ratio": 1.5}
    return {**_networks(), "rows": [row]}


def _run(result: dict[str, object], name: str = "grouped_conv.json") -> Run:
    return Run(PurePosixPath("benchmarks/results/toy", name), result)


@pytest.fixture
def root(tmp_path):
    """A repository with pages whose sections are empty, and results of a CPU."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "benchmarks/results/desk"
    folder.mkdir(parents=True)
    empty = "before\n\n<!-- results: {} -->\n<!-- end of results -->\n\nafter\n"
    (tmp_path / "README.md").write_text(empty.format("performance"))
    (tmp_path / "benchmarks/RESULTS.md").write_text(empty.format("rows"))
    (tmp_path / "benchmarks/ZOO.md").write_text(empty.format("zoo"))
    (folder / "grouped_conv_small.json").write_text(json.dumps(_convolutions(batch=1)))
    (folder / "grouped_conv.json").write_text(json.dumps(_convolutions()))
    return tmp_path


def _change(path: Path, ratio: float) -> None:
    """Of the first row."""
    result = json.loads(path.read_text())
    result["rows"][0]["ratio"] = ratio
    path.write_text(json.dumps(result))


# --- pages ---


def test_rewritten_pages_and_pictures_are_current(root):
    assert readme.main(["--check"], root) == 1
    assert readme.main([], root) == 0
    assert readme.main(["--check"], root) == 0
    page = (root / "README.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "### DESK\n" in page
    assert "### GPU\n\nNot yet measured.\n" in page
    assert "| network | float32, batch 8 | float32, batch 1 |\n" in page
    assert "| resnext50_32x4d | 2.00 / 2.00 / 2.00 | 2.00 / 2.00 / 2.00 |\n" in page
    assert "resnext50_32x2d" not in page
    assert page.count("_roofline.svg)") == 1
    assert "](benchmarks/results/desk/grouped_conv_roofline.svg)" in page


def test_every_row_is_on_the_page_of_rows(root):
    readme.main([], root)
    page = (root / "benchmarks/RESULTS.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert headings == ["## DESK: grouped 3x3 convolutions", "### float32, batch 8", "### float32, batch 1"]
    for layer in NETWORKS["resnext50_32x4d"]:
        assert page.count(f"\n| {layer.name} | 2.00 / 4.00 / **2.00** | 2.00 / 4.00 / **2.00** |") == 2
        assert layer.name not in (root / "README.md").read_text()
    for name in ("grouped_conv.json", "grouped_conv_roofline.svg", "grouped_conv_small_roofline.svg"):
        assert f"](results/desk/{name})" in page
        assert (root / "benchmarks/results/desk" / name).exists()


def test_check_changes_nothing(root):
    readme.main(["--check"], root)
    assert "resnext" not in (root / "README.md").read_text()
    assert not list(root.rglob("*.svg"))


def test_check_names_what_is_out_of_date(root, capsys):
    readme.main([], root)
    path = root / "benchmarks/results/desk/grouped_conv.json"
    result = json.loads(path.read_text())
    result["rows"][0]["flops"] *= 2  # in no table
    path.write_text(json.dumps(result))
    assert readme.main(["--check"], root) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("benchmarks/results/desk/grouped_conv_roofline.svg: differs")
    readme.main([], root)
    _change(path, 0.5)
    assert readme.main(["--check"], root) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["README.md", "benchmarks/RESULTS.md"]


def test_current_pictures_are_left_alone(root):
    """Another matplotlib would draw the same data in other bytes."""
    readme.main([], root)
    picture = root / "benchmarks/results/desk/grouped_conv_roofline.svg"
    drawn_elsewhere = picture.read_text() + "<!-- by another version -->\n"
    picture.write_text(drawn_elsewhere)
    assert readme.main(["--check"], root) == 0
    readme.main([], root)
    assert picture.read_text() == drawn_elsewhere


def test_new_folder_is_a_new_device(root):
    gpu = root / "benchmarks/results/gpu1"
    gpu.mkdir()
    (gpu / "model_4.json").write_text(json.dumps(_networks(ratio=0.5)))
    (gpu / "memory.json").write_text(json.dumps(_memory()))
    (gpu / "summary.json").write_text("[]")  # of another program
    assert readme.main([], root) == 0
    page = (root / "README.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert headings == ["### DESK", "### GPU1", "### What is not faster"]
    assert "](benchmarks/results/gpu1/model_4.svg)" in page
    assert "[bfloat16, batch 4, 64 pixels, triton](benchmarks/results/gpu1/memory.json): GPU 1; torch 2.99" in page
    assert "| resnet | 4 | 2 | 3 | **1.50** |" in page
    assert page.index("model_4.svg") < page.index("memory.json") < page.index("What is not faster")
    every_row = (root / "benchmarks/RESULTS.md").read_text()
    assert "## GPU1: networks\n" in every_row
    assert "| resnet\\|$&lt;b&gt; | inference | 4 | 10 | 5 | **0.50** |" in every_row
    assert "[gpu1](benchmarks/results/gpu1/model_4.json) | ours_compiled | **0.50** |" in page


def test_what_is_slower_is_collapsed(root):
    """GitHub renders Markdown in HTML only between empty lines."""
    _change(root / "benchmarks/results/desk/grouped_conv.json", 0.5)
    readme.main([], root)
    page = (root / "README.md").read_text()
    before, block = page.split("\n<summary>Those below 0.95</summary>\n\n")
    assert before.endswith("\n\n<details>")
    block, end, _ = block.partition("\n\n</details>\n")
    assert end
    layer = next(iter(NETWORKS["resnext50_32x4d"])).name
    assert (
        f"\n| {layer} | fwd | 8 | float32 | [desk](benchmarks/results/desk/grouped_conv.json) | cpu | **0.50** |"
        in block
    )


def test_kernels_of_a_step_in_milliseconds(root):
    times = {"step_seconds": 0.02, "kernel_seconds": 0.015, "small_step_seconds": 0.01}
    result = {**_networks(), "rows": [{"model": "net|1", "mode": "training", "contender": "ours", **times}]}
    (root / "benchmarks/results/desk/kernel_times.json").write_text(json.dumps(result))
    (root / "benchmarks/results/desk/kernel_times_old.json").write_text(json.dumps({"steps": {}}))  # has no rows
    readme.main([], root)
    page = (root / "README.md").read_text()
    assert "| net\\|1 | training | ours | 20.0 | 15.0 | 10.0 |" in page
    assert "kernel_times_old" not in page


def test_settings_are_those_of_the_tuned_files(root):
    def entry(fusion, op, backend, kernel_size=3, **microseconds):
        about = {"fusion": fusion, "op": op, "kernel_size": kernel_size, "batch": 256, "dtype": "bfloat16"}
        channels = {"in_channels": 128, "out_channels": 128, "groups": 32}
        layer = {**channels, "height": 56, "width": 56, "stride": [1, 1]}
        return {**about, **layer, "backend": backend, "microseconds": microseconds, "measured": {"commit": "c" * 40}}

    folder = root / "kernels/tuned"
    folder.mkdir(parents=True)
    entries = [
        entry("plain", "fwd", "triton", triton=10.0, cuda=12.0, torch=30.0, torch_nchw=25.0),
        entry("stats", "bwd", "torch", triton=40.0, torch=30.0),
        entry("stats", "fwd", "triton", kernel_size=1, triton=1.0, torch=2.0),
    ]
    (folder / "gpu_1.json").write_text(json.dumps({"device": "GPU 1", "entries": entries}))
    (folder / "gpu_2.json").write_text(json.dumps({"device": "GPU 2", "entries": entries[2:]}))
    readme.main([], root)
    page = (root / "README.md").read_text()
    assert "([gpu_1.json](kernels/tuned/gpu_1.json), GPU 1, commits cccccccccc)" in page
    cells = ["10 / 25 / **2.50** triton", "-", "-", "-", "40 / 30 / **0.75** torch", "-"]
    assert f"| 128x56x56_s1_gw4 | 256 | bfloat16 | {' | '.join(cells)} |" in page
    assert "gpu_2.json" not in page


def test_zoo_links_nothing_from_its_other_folder(root):
    row = {
        "name": "lib/<net>",
        **{"size": 64, "blocks": 8, "chains": 1, "convolutions": 0, "skipped": {"why": 2}, "seconds": 0.5},
        "errors": {"logits": {"difference": 1e-6, "rounding": 2e-6}},
        **{"failure": None, "note": "a|b"},
    }
    result = {**_convolutions(), "rows": [row]}
    (root / "benchmarks/results/desk/zoo.json").write_text(json.dumps(result))
    readme.main([], root)
    page = (root / "benchmarks/ZOO.md").read_text()
    assert "| lib/&lt;net&gt; | 64 | 8 | 1 | 0 | 2 | 1e-06 (2e-06) | - | 0.50 | a\\|b |" in page
    assert "](" not in page


# --- tables ---


def test_text_is_escaped():
    assert tables.escaped("a|b [c](d)\n<e> & `f` *g*\\") == "a\\|b \\[c\\](d) &lt;e&gt; &amp; \\`f\\` \\*g\\*\\\\"
    assert _run(_convolutions()).machine == (
        "Abacus \\| &lt;9&gt; \\[MHz\\], 3 threads; torch 2.99; commit 0123456789-dirty"
    )
    assert "| resnet\\|$&lt;b&gt; | inference | 4 | 10 | 15 | **1.50** |" in tables.networks(_run(_networks()))


def test_means_are_of_networks_all_of_whose_layers_were_timed():
    result = _convolutions(ratio=1.0)
    for row in result["rows"]:
        if row["pass"] == "fwd":
            row["ratio"] = 3.0
    result["rows"][0]["ratio"] = 3.0 * 2.0**7  # of seven layers: the mean doubles
    result["rows"] = [row for row in result["rows"] if row["layer"] != "512x14x14_s1_gw16" or row["pass"] != "wgrad"]
    assert "| resnext50_32x4d | 6.00 / 1.00 / - |" in tables.means([_run(result)])


def test_not_faster_lists_what_is_clearly_slower():
    result = _convolutions(ratio=1.0)
    first, second, third, *_ = result["rows"]
    first |= {"ratio": 0.94, "backend": "torch"}
    second["ratio"] = 0.95
    third["ratio"] = 0.9999
    result["network_totals"]["resnext50_32x4d"]["fwd"]["ratio"] = 0.5
    text, table = tables.not_faster([_run(result), _run(_networks(ratio=0.75), "model.json")])
    assert text.startswith("Of 25 ratios of times 5 are below 1: 2 from 0.95 to 1, 3 below 0.95 (")
    link = "[toy](benchmarks/results/toy/grouped_conv.json)"
    assert table.splitlines()[2:] == [
        f"| resnext50_32x4d, its 3x3 layers | fwd | 8 | float32 | {link} | cpu, torch | **0.50** |",
        "| resnet\\|$&lt;b&gt;, 64 pixels | inference | 4 | bfloat16 | [toy](benchmarks/results/toy/model.json) "
        "| ours_compiled | **0.75** |",
        f"| {first['layer']} | fwd | 8 | float32 | {link} | torch | **0.94** |",
    ]


def test_not_faster_says_so_if_nothing_is():
    assert tables.not_faster([_run(_convolutions(1.0))]) == ["Nothing: none of the 24 ratios of times is below 1."]
    result = _convolutions(ratio=1.0)
    result["rows"][0]["ratio"] = 0.97
    assert tables.not_faster([_run(result)]) == ["Of 24 ratios of times 1 are below 1: 1 from 0.95 to 1, 0 below 0.95."]


# --- pictures ---


def test_roofline_has_a_mark_per_layer_and_pass():
    plot = plots.roofline(_convolutions())
    assert (plot.copy_bytes_per_second, plot.gemm_flops_per_second) == (1e10, 1e11)
    marks = iter(plot.marks)
    for layer in NETWORKS["resnext50_32x4d"]:
        for pass_ in PASSES:
            mark = next(marks)
            assert (mark.pass_, mark.group_width) == (pass_, layer.group_width)
            assert mark.flops_per_byte == layer.flops(8) / layer.bytes(8, 4)
            assert mark.flops_per_second == pytest.approx(layer.flops(8) / 2e-3)
    assert next(marks, None) is None


def test_bars_reach_from_percentile_to_percentile():
    (panel,) = plots.bars(_networks()).panels
    assert panel.title == "resnet|$<b>\ninference, batch 4: ratio 1.50"
    ours, theirs = panel.bars
    assert (ours.name, ours.ours, theirs.name, theirs.ours) == ("ours_compiled", True, "nchw", False)
    assert (ours.p20, ours.median, ours.p80) == pytest.approx((9.0, 10.0, 12.0))
    assert (theirs.p20, theirs.median, theirs.p80) == pytest.approx((15.0, 15.0, 15.0))


@pytest.mark.parametrize("plot", [plots.roofline(_convolutions()), plots.bars(_networks())], ids=["roofline", "bars"])
def test_picture_is_small_and_the_same_each_time(plot, tmp_path):
    pytest.importorskip("matplotlib")
    path, again = tmp_path / "a.svg", tmp_path / "b.svg"
    for file in (path, again):
        plots.write(file, plot)
    assert path.read_bytes() == again.read_bytes()
    assert path.stat().st_size < 60_000
    text = "".join(ET.parse(path).getroot().itertext())  # names with & and < in them did not break it
    assert ("matrix product, 100.0 GFLOP/s" if isinstance(plot, plots.Roofline) else "resnet|$<b>") in text
    assert "<dc:date>" not in path.read_text()


def test_picture_tells_what_it_shows(tmp_path):
    pytest.importorskip("matplotlib")
    path, result = tmp_path / "a.svg", _networks()
    plot = plots.bars(result)
    assert not plots.is_current(path, plot)
    plots.write(path, plot)
    assert plots.is_current(path, plots.bars(copy.deepcopy(result)))
    result["rows"][0]["seconds"]["nchw"]["median"] *= 1.001
    assert not plots.is_current(path, plots.bars(result))
    path.write_text("<svg/>")
    assert not plots.is_current(path, plot)
