"""Measured settings: their files, looking them up, dispatch by measurement, launchers that use them.

The launchers run on a GPU or else in Triton's interpreter, in a process of its own, as in test_triton_numerics.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import resnext
from resnext.kernels import dispatch, tuning
from resnext.kernels.config import ConvProblem, PointwiseConfig, StripsConfig, TapsConfig
from resnext.kernels.tuning import Entry, Key

from .cases import Case, make_tensors
from .interpreter import DEVICE, here, not_here, run_tests
from .numerics import assert_close, exact

GPU = "NVIDIA H200"
CUDA = torch.device("cuda", 0)
STRIPS = StripsConfig(merged=4, strip=1, band=3, block_m=32, num_warps=2, num_stages=1)
TAPS = TapsConfig(merged=4, block_m=128, block_n=16, block_k=16, num_warps=8, num_stages=2)
POINTWISE = PointwiseConfig(block_m=32, block_n=64, block_k=32, num_warps=4, num_stages=2)
DESCRIBED = dataclasses.replace(POINTWISE, tensor_descriptors=True)


def make_problem(**changes) -> ConvProblem:
    fields = {"op": "fwd", "batch": 64, "in_channels": 128, "out_channels": 128, "height": 56, "width": 56}
    fields |= {"stride": (1, 1), "groups": 32, "dtype": torch.bfloat16, "device_type": "cuda", "channels_last": True}
    return ConvProblem(**(fields | changes))


def make_entry(config=STRIPS, *, backend="triton", fusion="plain", kernel_size=3, op=None, times=None, **changes):
    problem = make_problem(**changes)
    tf32 = tuning.tf32_allowed(problem.dtype)
    key = tuning.key_of(problem, fusion=fusion, kernel_size=kernel_size, allow_tf32=tf32, op=op)
    times = times or {"triton": 50.0, "cuda": 90.0, "torch": 70.5, "torch_nchw": 80.0}
    return Entry(key, problem.batch, backend, config, times, {"date": "today"})


def write(folder: Path, *entries: Entry, name: str = GPU) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / tuning.file_name(name)
    path.write_text(tuning.to_json(name, entries))
    return path


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders for shipped files and the user's, both empty, on a pretended GPU."""
    before = tuning.user_folder()
    monkeypatch.setattr(tuning, "device_name", lambda device: GPU if device.type == "cuda" else "interpreter")
    monkeypatch.setattr(tuning, "_SHIPPED", tmp_path / "shipped")
    tuning.use_folder(tmp_path / "user")
    yield tmp_path / "shipped", tmp_path / "user"
    tuning.use_folder(before)


def config_of(problem: ConvProblem, **options):
    found = tuning.lookup(problem, CUDA, allow_tf32=True, **options)
    return found and found.config


# --- files ---


@pytest.mark.parametrize(
    ("name", "file"),
    [("NVIDIA H200", "nvidia_h200.json"), ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb.json"), ("!", ".json")],
)
def test_file_names(name, file):
    assert tuning.file_name(name) == file


def test_what_is_written_is_read(tmp_path):
    entries = [
        make_entry(),
        make_entry(TAPS, dtype=torch.float32, stride=(2, 1)),
        make_entry(POINTWISE, fusion="stats", kernel_size=1, groups=1),
        make_entry(dataclasses.replace(STRIPS, max_registers=255, source_in_registers=True), batch=128),
        make_entry(DESCRIBED, fusion="affine", kernel_size=1, groups=1),
        make_entry(None, backend="torch", fusion="stats", op="bwd"),
        make_entry(None, backend="torch"),
    ]
    assert tuning.read(write(tmp_path, *entries), GPU) == entries
    assert tuning.read(tmp_path / "none.json", GPU) == []
    assert tuning.read(tmp_path / "none" / "none.json", GPU) == []


def test_shipped_files_are_sound():
    """There is none until one is measured."""
    for path in tuning._SHIPPED.glob("*.json"):
        name = json.loads(path.read_text())["device"]
        assert path.name == tuning.file_name(name)
        assert tuning.read(path, name)


def change(**changes):
    return lambda content: content["entries"][0].update(changes)


def configure(**changes):
    return lambda content: content["entries"][0]["config"].update(changes)


WRONG = {
    "newer": (
        lambda c: c.update(format=99),
        rf"expected format {tuning.FORMAT}, got 99; measure again, or update resnext",
    ),
    "format-missing": (lambda c: c.pop("format"), "expected an object with a format"),
    "other-gpu": (
        lambda c: c.update(device="NVIDIA A100"),
        "expected settings of 'NVIDIA H200', got those of 'NVIDIA A100'",
    ),
    "no-entries": (lambda c: c.pop("entries"), "expected a list of entries, got NoneType"),
    "entry-no-object": (lambda c: c.update(entries=[3]), "entry 0: expected entry to be an object, got int"),
    "unknown-field": (change(dilation=2), "entry 0: expected the fields of this version, .* where dilation differ"),
    "missing-field": (lambda c: c["entries"][0].pop("batch"), "where batch differ"),
    "unknown-setting": (configure(num_ctas=2), "settings of form strips where num_ctas differ"),
    "unknown-form": (configure(form="rows"), "of a form among strips, taps, pointwise, got 'rows'"),
    "form-no-text": (configure(form=[]), r"of a form among .* got \[\]"),
    "config-no-object": (change(config=[1]), "of a form among"),
    "unknown-backend": (change(backend="cpu"), "expected a backend of triton, cuda, torch, got 'cpu'"),
    "unknown-op": (change(op="forward"), "expected a op of fwd"),
    "batch": (change(batch=0), "expected batch to be a whole number from 1 on, got 0"),
    "groups": (change(groups=3), "expected groups to divide the channels, got 3"),
    "stride": (change(stride=[3, 1]), "expected a stride of two numbers, each 1 or 2"),
    "tf32": (change(tf32="no"), "expected tf32 to be true or false, got 'no'"),
    "times": (change(microseconds={"triton": -1.0}), "expected times in microseconds, of triton"),
    "not-timed": (change(microseconds={"torch": 1.0}), "expected times in microseconds, of triton"),
    "no-config": (change(config=None), "expected settings of the Triton kernel, got none"),
    "block": (configure(block_m=48), "expected block_m to be a power of two, got 48"),
    "warps": (configure(num_warps=True), "expected num_warps to be a whole number"),
    "null": (configure(splits=None), "expected splits to be a whole number from 1 on, got None"),
    "no-registers": (configure(max_registers=0), "expected max_registers to be a whole number from 1 on, got 0"),
    "registers": (configure(max_registers=256), "expected max_registers to be at most 255, got 256"),
    "in-registers": (configure(source_in_registers=1), "expected source_in_registers to be true or false, got 1"),
    "wrong-form": (change(kernel_size=1, groups=1), "expected settings of a 1x1 convolution, got form strips"),
    "strips-do-not-serve": (change(stride=[2, 1]), "expected a form that serves the problem, got strips"),
}


@pytest.mark.parametrize("name", WRONG)
def test_unsound_files_are_refused(name, tmp_path):
    damage, message = WRONG[name]
    path = write(tmp_path, make_entry())
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        tuning.read(path, GPU)


def test_narrow_blocks_of_merged_groups_are_refused(tmp_path):
    """Such settings would compute wrong results."""
    narrow = make_entry(dataclasses.replace(TAPS, merged=8))
    with pytest.raises(ValueError, match="expected blocks that hold 8 merged groups"):
        tuning.read(write(tmp_path, narrow), GPU)


REFUSED = [{"stride": (2, 2)}, {"in_channels": 100}, {"op": "wgrad", "stride": (2, 2)}]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_tensor_descriptors_that_do_not_serve_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match="expected tensor descriptors where they serve the problem"):
        tuning.read(write(tmp_path, make_entry(DESCRIBED, fusion="stats", kernel_size=1, groups=1, **changes)), GPU)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000], ids=range(6))
def test_damaged_files_are_one_warning(content, folders):
    """The heuristic serves, and the user hears of it once; what is shipped is used all the same."""
    shipped, user = folders
    write(shipped, make_entry())
    write(user).write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"nvidia_h200.json: expected .*; it is not used") as caught:
        found = [config_of(make_problem()) for _ in range(3)]
    assert found == [STRIPS] * 3
    assert len(caught) == 1


# --- looking up ---


def test_nothing_is_known_without_files(folders):
    assert tuning.lookup(make_problem(), CUDA, allow_tf32=True) is None


def test_the_users_settings_come_first(folders):
    shipped, user = folders
    write(shipped, make_entry(), make_entry(op="dgrad"))
    write(user, make_entry(TAPS))
    assert config_of(make_problem()) == TAPS
    assert config_of(make_problem(op="dgrad")) == STRIPS


@pytest.mark.parametrize(
    "changes",
    [
        {"op": "wgrad"},
        {"height": 28},
        {"in_channels": 256},
        {"groups": 64},
        {"stride": (2, 2)},
        {"dtype": torch.float16},
        {"channels_last": False},
        {"batch": 32},
    ],
    ids=str,
)
def test_whatever_changes_the_best_settings_is_in_the_key(changes, folders):
    write(folders[1], make_entry(batch=128))
    assert config_of(make_problem()) == STRIPS
    assert config_of(make_problem(**changes)) is None
    assert config_of(make_problem(), fusion="stats") is None
    assert config_of(make_problem(), kernel_size=1) is None


def test_tf32_is_in_the_key_of_float32_alone(folders):
    write(folders[1], make_entry(), make_entry(TAPS, dtype=torch.float32))
    single = make_problem(dtype=torch.float32)
    assert tuning.tf32_allowed(torch.float32)
    assert tuning.lookup(single, CUDA, allow_tf32=True).config == TAPS
    assert tuning.lookup(single, CUDA, allow_tf32=False) is None
    assert tuning.lookup(make_problem(), CUDA, allow_tf32=False).config == STRIPS


@pytest.mark.parametrize(
    ("batch", "known"), [(31, None), (32, 64), (64, 64), (100, 64), (200, 256), (512, 256), (513, None)]
)
def test_a_batch_serves_those_from_half_to_twice_as_large(batch, known, folders):
    write(folders[1], *(make_entry(batch=known) for known in (64, 256)))
    found = tuning.lookup(make_problem(batch=batch), CUDA, allow_tf32=True)
    assert (found and found.batch) == known


def test_every_field_of_the_key_is_filled():
    key = tuning.key_of(make_problem(), fusion="plain", kernel_size=3, allow_tf32=True)
    assert key == Key(3, "fwd", "plain", "bfloat16", False, True, 128, 128, 32, 56, 56, (1, 1))


def test_the_users_folder_follows_the_environment():
    code = "from resnext.kernels import tuning; print(tuning.user_folder())"
    for variables, folder in (
        ({"XDG_CACHE_HOME": "/somewhere"}, "/somewhere/resnext/tuned"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/someone"}, "/home/someone/.cache/resnext/tuned"),
    ):
        env = os.environ | variables
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == folder, done.stderr


# --- dispatch by measurement, on a pretended GPU ---


@pytest.fixture
def gpu(folders, monkeypatch):
    """Every backend can serve; returns the folder of the user's settings."""
    served = {"triton": None, "cuda": None, "cpu": "the tensors are on cuda", "torch": None}
    monkeypatch.setattr(dispatch, "unsupported", lambda name, *_: served[name])
    caches = (dispatch._launchers, dispatch._fused_launchers, dispatch._affine_launchers)
    for cache in caches:
        cache.cache_clear()
    yield folders[1], served
    for cache in caches:
        cache.cache_clear()


def test_without_measurements_triton_serves(gpu):
    assert dispatch.choose(make_problem(), CUDA) == "triton"
    assert dispatch.measured(make_problem(), CUDA) is None


@pytest.mark.parametrize("backend", tuning.BACKENDS)
def test_what_was_measured_fastest_serves(backend, gpu):
    write(gpu[0], make_entry(backend=backend))
    assert dispatch.choose(make_problem(), CUDA) == backend
    assert dispatch.choose(make_problem(op="dgrad"), CUDA) == "triton"
    assert dispatch.choose(make_problem(), CUDA, "stats") == "triton"
    with resnext.use_backend("triton"):
        assert dispatch.choose(make_problem(), CUDA) == "triton"


def test_the_reason_is_a_sentence_with_both_times(gpu):
    entry = make_entry(backend="torch", times={"triton": 81.26, "torch": 70.0})
    reasons = {name: dispatch.not_chosen(name, make_problem(), entry=entry) for name in dispatch.BACKENDS}
    assert reasons["triton"] == "PyTorch was measured to be faster on this GPU: 70.0 us against 81.3 us"
    assert reasons["cuda"] == "PyTorch was measured to be faster on this GPU: 70.0 us; cuda was not measured"
    assert reasons["torch"] is None
    entry = make_entry(backend="cuda", times={"triton": 81.26, "cuda": 60.0, "torch": 70.0})
    assert dispatch.not_chosen("triton", make_problem(), entry=entry).startswith("cuda was measured to be faster")
    assert dispatch.not_chosen("cuda", make_problem(), entry=entry) is None


def test_a_fastest_backend_that_cannot_serve_decides_nothing(gpu):
    write(gpu[0], make_entry(backend="cuda"))
    gpu[1]["cuda"] = "the extension was built without CUDA"
    assert dispatch.choose(make_problem(), CUDA) == "triton"


def test_explain_gives_the_measurement(gpu, monkeypatch):
    """`explain` of a tensor without data that says it is on a GPU."""
    write(gpu[0], make_entry(backend="torch", batch=2, channels_last=False, dtype=torch.float32))
    problem_of, measured = dispatch.problem_of, dispatch.measured
    monkeypatch.setattr(dispatch, "problem_of", lambda *args: problem_of(*args[:6], CUDA, args[7]))
    monkeypatch.setattr(dispatch, "measured", lambda problem, device, *rest: measured(problem, CUDA, *rest))
    x, weight = torch.empty(2, 128, 56, 56, device="meta"), torch.empty(128, 4, 3, 3, device="meta")
    lines = resnext.explain(x, weight, groups=32).splitlines()
    assert lines[1] == "  fwd: torch"
    assert "    not triton: PyTorch was measured to be faster on this GPU: 70.5 us against 50.0 us" in lines
    assert "  dgrad: triton" in lines


def launchers(fusion, weight_shape, op="fwd", groups=1):
    shape = (64, weight_shape[1] * groups, 56, 56)
    find = dispatch.affine_launchers if fusion == "affine" else dispatch.fused_launchers
    found = find(op, shape, weight_shape, (1, 1), groups, torch.bfloat16, CUDA, True)
    return "composed" if isinstance(found, dispatch.composed.Composed) else found.__name__.rpartition(".")[2]


def test_measurements_of_what_is_fused(gpu, monkeypatch):
    """1x1 convolutions where the heuristic says no, 3x3 where it says yes; both gradients together."""
    monkeypatch.setattr(dispatch, "pointwise_by_triton", lambda problem, affine: False)
    served = []
    monkeypatch.setattr(dispatch, "_module", lambda name: served.append(name) or sys)
    pointwise = {"kernel_size": 1, "in_channels": 1024, "out_channels": 2048, "groups": 1}
    write(
        gpu[0],
        make_entry(POINTWISE, fusion="stats", **pointwise),
        make_entry(None, fusion="stats", op="bwd", backend="torch"),
        make_entry(fusion="affine", backend="torch"),
    )
    assert launchers("stats", (2048, 1024, 1, 1)) == "sys"
    assert served.pop() == "pointwise_conv"
    assert launchers("affine", (2048, 1024, 1, 1)) == "composed"
    served.clear()
    grouped = (128, 4, 3, 3)
    assert launchers("stats", grouped, groups=32) == "sys"
    assert served.pop() == "grouped_conv"
    assert launchers("stats", grouped, op="dgrad", groups=32) == "composed"
    assert launchers("affine", grouped, groups=32) == "composed"


def test_float32_decisions_follow_the_tf32_flag(gpu, monkeypatch):
    """Also those that are remembered."""
    write(gpu[0], make_entry(backend="torch", dtype=torch.float32))
    served = []
    monkeypatch.setattr(dispatch, "_module", lambda name: served.append(name))
    call = ("fwd", (64, 128, 56, 56), (128, 4, 3, 3), (1, 1), 32, torch.float32, CUDA, True)
    for allowed in (True, False, True):
        monkeypatch.setattr(tuning, "tf32_allowed", lambda dtype, allowed=allowed: allowed)
        dispatch.launchers(*call)
    assert served == ["reference", "grouped_conv"]  # the third is known


def test_importing_and_looking_up_touch_no_gpu():
    code = (
        "import torch, resnext\nfrom resnext.kernels import dispatch\n"
        "x, w = torch.ones(1, 4, 3, 3), torch.ones(4, 2, 3, 3)\n"
        "resnext.grouped_conv2d(x, w, groups=2)\nassert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- launchers ---


@not_here
def test_in_the_interpreter():
    pytest.importorskip("triton")
    run_tests(__file__, timeout=300)


@pytest.fixture
def here_folders(folders, monkeypatch):
    """Settings of the device that tests run on; returns where to write them."""
    from resnext.kernels import grouped_conv, pointwise_conv

    monkeypatch.setattr(tuning, "device_name", lambda device: GPU)
    for module in (grouped_conv, pointwise_conv):
        module._prepare.cache_clear()
    yield folders[1]
    for module in (grouped_conv, pointwise_conv):
        module._prepare.cache_clear()


CASE = Case("gw4", 2, 16, 16, 5, 6, 4)
SIZES = {
    "batch": 2,
    "in_channels": 16,
    "out_channels": 16,
    "height": 5,
    "width": 6,
    "groups": 4,
    "dtype": torch.float16,
}


@here
@pytest.mark.parametrize("config", [STRIPS, TAPS, None], ids=["strips", "taps", "heuristic"])
@pytest.mark.parametrize("op", ["fwd", "dgrad", "wgrad"])
def test_grouped_launchers_use_measured_settings(op, config, here_folders, monkeypatch):
    from resnext.kernels import grouped_conv

    if config is not None:
        write(here_folders, make_entry(config, op=op, **SIZES))
    used = []
    plan = grouped_conv.plan
    monkeypatch.setattr(grouped_conv, "plan", lambda p, c, **options: used.append(c) or plan(p, c, **options))
    tensors = make_tensors(CASE, torch.float16, channels_last=True)
    t = {name: tensor if tensor is None else tensor.to(DEVICE) for name, tensor in tensors.items()}
    place = (CASE.stride, CASE.groups, True)
    arguments = {
        "fwd": (t["x"], t["weight"], None),
        "dgrad": (t["grad"], t["weight"], (5, 6)),
        "wgrad": (t["grad"], t["x"]),
    }
    result = getattr(grouped_conv, op)(*arguments[op], *place)
    assert_close(result, exact(op, CASE, tensors))
    assert len(used) == 1
    assert (used[0] == config) == (config is not None)


@here
@pytest.mark.parametrize("fusion", ["stats", "affine"])
def test_settings_of_what_is_fused_are_its_own(fusion, here_folders, monkeypatch):
    from resnext.kernels import grouped_conv, pointwise_conv

    grouped = make_entry(STRIPS, fusion=fusion, **SIZES)
    pointwise = make_entry(POINTWISE, fusion=fusion, kernel_size=1, **(SIZES | {"groups": 1}))
    write(here_folders, grouped, pointwise)
    used = []
    for module in (grouped_conv, pointwise_conv):
        plan = module.plan
        monkeypatch.setattr(module, "plan", lambda p, c, plan=plan, **options: used.append(c) or plan(p, c, **options))
    x = torch.randn(2, 16, 5, 6, dtype=torch.float16, device=DEVICE).contiguous(memory_format=torch.channels_last)
    vector = torch.ones(16, device=DEVICE)
    for module, weight_shape, groups in ((grouped_conv, (16, 4, 3, 3), 4), (pointwise_conv, (16, 16, 1, 1), 1)):
        weight = torch.randn(weight_shape, dtype=torch.float16, device=DEVICE)
        place = ((1, 1), groups, True)
        for other in (False, True):
            if (fusion == "stats") != other:
                module.conv_stats_fwd(x, None, weight, *place, True)
            else:
                module.conv_affine(x, weight, vector, vector, None, True, *place)
    assert used[0] == STRIPS != used[1]
    assert used[2] == POINTWISE != used[3]


def test_warnings_are_errors_nowhere_else(folders):
    """Looking up what is not there warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_of(make_problem()) is None
