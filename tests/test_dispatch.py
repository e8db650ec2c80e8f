"""Which backend serves what, how to force one, and what is said about it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from resnext import explain, grouped_conv2d, use_backend
from resnext.kernels import BackendError, composed, dense_conv, dispatch, extension, onednn, reference

X, W = torch.randn(2, 8, 5, 6), torch.randn(8, 2, 3, 3)
CPU = torch.device("cpu")


def problem(**changes):
    fields = {
        "op": "fwd",
        "input_shape": (2, 8, 5, 6),
        "weight_shape": (8, 2, 3, 3),
        "stride": (1, 1),
        "groups": 4,
        "dtype": torch.float32,
        "device": CPU,
        "channels_last": False,
    }
    return dispatch.problem_of(**(fields | changes))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_backward_uses_the_backend_of_forward(built, monkeypatch):
    """Also after the block that forced it, but not against one that is forced then."""
    used, wgrad = [], reference.wgrad
    monkeypatch.setattr(reference, "wgrad", lambda *args: used.append("torch") or wgrad(*args))
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 2, 3, 3, requires_grad=True)
    with use_backend("torch"):
        y = grouped_conv2d(x, weight, groups=4)
    y.sum().backward(retain_graph=True)
    assert used == ["torch"]
    with use_backend("cpu"):
        y.sum().backward()
    grouped_conv2d(x, weight, groups=4).sum().backward()
    assert used == ["torch"]


def test_automatic_choice_takes_the_first_that_fits(monkeypatch):
    dispatch._launchers.cache_clear()
    served = {"triton": "no triton", "cuda": "no cuda", "cpu": None, "torch": None}
    monkeypatch.setattr(dispatch, "unsupported", lambda name, *_: served[name])
    monkeypatch.setattr(dispatch, "not_chosen", lambda *_: None)
    assert dispatch.choose(problem(), CPU) == "cpu"
    dispatch._launchers.cache_clear()
    served["triton"] = None
    assert dispatch.choose(problem(), CPU) == "triton"
    dispatch._launchers.cache_clear()


def test_torch_serves_everything():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert dispatch.unsupported("torch", dtype, CPU) is None


def test_float64_is_left_to_torch():
    for name in ("triton", "cuda", "cpu"):
        assert "float64" in dispatch.unsupported(name, torch.float64, CPU)
    assert dispatch.choose(problem(dtype=torch.float64), CPU) == "torch"


def test_where_pytorch_was_measured_faster_it_serves():
    wide = {"input_shape": (2, 224, 7, 7), "weight_shape": (224, 112, 3, 3), "groups": 2}
    assert "measured" in dispatch.not_chosen("cpu", problem(**wide))
    assert dispatch.choose(problem(**wide), CPU) == "torch"
    for other in (problem(op="dgrad", **wide), problem(dtype=torch.bfloat16, **wide), problem()):
        assert dispatch.not_chosen("cpu", other) is None
    assert dispatch.not_chosen("cuda", problem(**wide)) is None
    strided = {"input_shape": (2, 96, 32, 32), "weight_shape": (96, 48, 3, 3), "groups": 2, "stride": (2, 2)}
    strided["channels_last"] = True
    assert "measured" in dispatch.not_chosen("cpu", problem(**strided))
    assert dispatch.not_chosen("cpu", problem(**strided), fused=True) is None
    others = ({"op": "wgrad"}, {"stride": (1, 1)}, {"channels_last": False})
    sizes = ({"input_shape": (2, 96, size, size)} for size in (14, 28))
    for other in (*others, *sizes):
        assert dispatch.not_chosen("cpu", problem(**(strided | other))) is None
    narrower = strided | {"weight_shape": (96, 24, 3, 3), "groups": 4}
    assert dispatch.not_chosen("cpu", problem(**narrower)) is None
    narrower["input_shape"] = (2, 96, 56, 56)
    assert "measured" in dispatch.not_chosen("cpu", problem(**narrower))
    wider = strided | {"weight_shape": (144, 72, 3, 3)}
    for batch, reason in ((8, True), (2, False)):
        wider["input_shape"] = (batch, 144, 28, 28)
        assert (dispatch.not_chosen("cpu", problem(**wider)) is not None) is reason


def on_cuda(width: int, stride: int = 1, **changes):
    """A problem of ResNeXt-50's kind, in 16 bits and channels_last."""
    sizes = {"input_shape": (2, 32 * width, 28, 28), "weight_shape": (32 * width, width, 3, 3), "groups": 32}
    options = {"dtype": torch.bfloat16, "channels_last": True, "stride": (stride, stride)}
    return dataclasses.replace(problem(**(sizes | options | changes)), device_type="cuda")


@pytest.mark.parametrize(("name", "least", "least_strided"), [("triton", 8, 8), ("cuda", 32, 16)])
def test_where_cudnn_was_measured_faster_it_serves(name: str, least: int, least_strided: int):
    """Weight gradients and strided forward passes, in 16 bits and channels_last, alone, unless measured otherwise."""
    others = ["triton", "torch"] if name == "triton" else ["cuda", "torch"]
    for width in (4, 8, 16, 32, 64):
        for op, stride, slower in (
            ("wgrad", 1, width >= least),
            ("wgrad", 2, width >= least_strided),
            ("fwd", 2, width >= least_strided),
            *(("fwd", 1, False), ("dgrad", 1, False), ("dgrad", 2, False)),
        ):
            reason = dispatch.not_chosen(name, on_cuda(width, stride, op=op), fitting=others)
            assert ("cuDNN" in reason) if slower else (reason is None), (width, op, stride)
            assert dispatch.not_chosen(name, on_cuda(width, stride, op=op), fused=True, fitting=others) is None
    for other in ({"dtype": torch.float32}, {"channels_last": False}):
        assert dispatch.not_chosen(name, on_cuda(32, op="wgrad", **other), fitting=others) is None
    # What the measured kernels of csrc/cuda are not for.
    for other in (on_cuda(24, op="wgrad"), on_cuda(12, op="wgrad"), on_cuda(12, 2, op="fwd")):
        assert "cuDNN" in dispatch.not_chosen(name, other, fitting=others)
    widens = {"weight_shape": (512, 8, 3, 3)}
    for other in (on_cuda(8, op="wgrad", **widens), on_cuda(16, op="wgrad", stride=(2, 1))):
        assert "cuDNN" in dispatch.not_chosen(name, other, fitting=others)
    entry = SimpleNamespace(backend=name, microseconds={name: 1.0})
    assert dispatch.not_chosen(name, on_cuda(32, op="wgrad"), entry=entry, fitting=others) is None


def test_where_cuda_was_measured_faster_than_triton_it_serves():
    """Gradients, where it can serve; with what is fused those of the input too."""
    both = ["triton", "cuda", "torch"]
    for width, op, fused, faster in (
        *((4, "wgrad", False, True), (32, "wgrad", True, True), (16, "dgrad", True, True)),
        *(
            (16, "dgrad", False, False),
            (16, "fwd", True, False),
            (64, "wgrad", True, False),
            (24, "dgrad", True, False),
        ),
    ):
        for stride in (1, 2):
            asked = on_cuda(width, stride, op=op)
            reason = dispatch.not_chosen("triton", asked, fused, fitting=both)
            assert ("CUDA C++" in reason) if faster else (reason is None), (width, op, fused)
            assert dispatch.not_chosen("cuda", asked, True, fitting=both) is None
            if fused:
                assert dispatch.not_chosen("triton", asked, fused, fitting=["triton", "torch"]) is None
    others = ({"dtype": torch.float32}, {"channels_last": False}, {"stride": (2, 1)})
    few = {"input_shape": (2, 8, 28, 28), "weight_shape": (8, 4, 3, 3), "groups": 2}
    wider = {"weight_shape": (256, 4, 3, 3)}
    dense = {"input_shape": (2, 32, 28, 28), "weight_shape": (32, 32, 1, 1), "groups": 1}
    for other in (*others, few, wider, dense):
        assert dispatch.not_chosen("triton", on_cuda(4, op="wgrad", **other), True, fitting=both) is None
    entry = SimpleNamespace(backend="triton", microseconds={"triton": 1.0})
    assert dispatch.not_chosen("triton", on_cuda(4, op="wgrad"), True, entry, both) is None


def test_forced_backend_is_used_and_restored(monkeypatch):
    from resnext.kernels import reference

    calls = []
    original = reference.fwd
    monkeypatch.setattr(reference, "fwd", lambda *a: (calls.append(1), original(*a))[1])
    with use_backend("torch"):
        assert dispatch.forced_backend() == "torch"
        grouped_conv2d(X, W, groups=4)
    assert calls == [1]
    assert dispatch.forced_backend() == (None if (f := os.environ.get("RESNEXT_BACKEND", "auto")) == "auto" else f)


def test_forced_backend_is_restored_after_an_error():
    before = dispatch.forced_backend()
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert dispatch.forced_backend() == before


def test_forced_backend_that_does_not_fit_raises_with_its_reason():
    with use_backend("cuda"), pytest.raises(BackendError, match=r"the cuda backend .* fwd: the tensors are on cpu;"):
        grouped_conv2d(X, W, groups=4)
    with use_backend("cpu"), pytest.raises(BackendError, match=r"cannot serve this call: dilation is \(2, 2\), not 1"):
        grouped_conv2d(X, W, groups=4, dilation=2)
    with use_backend("cpu"), pytest.raises(BackendError, match=r"the dtype is torch\.float64"):
        grouped_conv2d(X.double(), W.double(), groups=4)


def test_forced_backend_reaches_backward():
    x = X.clone().requires_grad_()
    y = grouped_conv2d(x, W, groups=4)
    with use_backend("cuda"), pytest.raises(BackendError, match="cannot serve this dgrad"):
        y.sum().backward()


def test_forced_torch_takes_what_is_not_ours_too():
    with use_backend("torch"):
        assert grouped_conv2d(X, W, groups=4, dilation=2).shape == (2, 8, 3, 4)


def test_blocks_of_two_threads_may_overlap():
    before = dispatch.forced_backend()
    first, second = use_backend("torch"), use_backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.forced_backend() == "cpu"
    second.__exit__(None, None, None)
    assert dispatch.forced_backend() == before


def test_old_gpus_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    dispatch._no_triton.cache_clear()
    device = torch.device("cuda", 7)
    try:
        for name in ("triton", "cuda"):
            if name == "cuda" and extension.load():
                continue
            reason = dispatch.unsupported(name, torch.float32, device)
            assert "compute capability 7.5" in reason or "not installed" in reason or "interpreter" in reason
        assert dispatch.choose(problem(device=device), device) == "torch"
    finally:
        dispatch._no_triton.cache_clear()


def test_unknown_backend():
    with pytest.raises(ValueError, match="use_backend: expected one of auto, triton, cuda, cpu, torch, got 'cudnn'"):
        use_backend("cudnn").__enter__()


def test_environment_forces_a_backend():
    code = "import torch, resnext; print(resnext.explain(torch.ones(1, 4, 3, 3), torch.ones(4, 2, 3, 3), groups=2))"
    result = run_python(code, RESNEXT_BACKEND="torch")
    assert result.returncode == 0, result.stderr
    assert "fwd: torch" in result.stdout
    assert "not cpu: torch is forced" in result.stdout


def test_wrong_environment_is_an_error_with_the_names():
    code = "import torch, resnext; resnext.grouped_conv2d(torch.ones(1, 4, 3, 3), torch.ones(4, 2, 3, 3), groups=2)"
    result = run_python(code, RESNEXT_BACKEND="quick")
    assert result.returncode != 0
    assert "RESNEXT_BACKEND: expected one of auto, triton, cuda, cpu, torch, got 'quick'" in result.stderr


def test_environment_forces_the_instruction_set(built):
    code = (
        "import torch; from resnext import grouped_conv2d; from resnext.kernels import extension\n"
        "y = grouped_conv2d(torch.ones(1, 8, 3, 3), torch.ones(8, 2, 3, 3), groups=4)\n"
        "print(extension._C.cpu_capability(), y[0, 0, 1, 1].item())"
    )
    assert run_python(code, RESNEXT_CPU_CAPABILITY="portable").stdout == "portable 18.0\n"
    result = run_python(code, RESNEXT_CPU_CAPABILITY="mmx")
    assert result.returncode == 1
    expected = "amx_bf16, avx512_bf16, avx512, avx2 or portable, and a machine that has it"
    assert f"RESNEXT_CPU_CAPABILITY: expected {expected}, got 'mmx'" in result.stderr


def test_works_without_triton_and_without_the_extension(monkeypatch):
    """What a machine with neither a compiler nor a GPU has: plain PyTorch, and no warning."""
    monkeypatch.setattr(extension, "load", lambda: "the extension is not built")
    monkeypatch.setattr(dispatch, "_no_triton", lambda device: "Triton is not installed")
    dispatch._launchers.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = X.clone().requires_grad_()
        grouped_conv2d(x, W, groups=4).sum().backward()
        text = explain(X, W, groups=4)
    dispatch._launchers.cache_clear()
    assert text.count(": torch") == 3
    assert "not triton: Triton is not installed" in text
    assert "not cpu: the extension is not built" in text


def test_without_triton_installed():
    """Triton hidden from the import system: the package imports, computes, and says so."""
    code = """
import sys, importlib.abc
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name="triton")
sys.meta_path.insert(0, Hide())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch, resnext
x, w = torch.ones(1, 4, 3, 3), torch.ones(4, 2, 3, 3)
resnext.grouped_conv2d(x, w, groups=2)
assert "triton" not in sys.modules
print(resnext.explain(x, w, groups=2))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "not triton: Triton is not installed" in result.stdout


def test_explain_names_what_is_left_to_pytorch():
    text = explain(X, W, groups=4, dilation=2)
    assert "every pass: plain PyTorch (F.conv2d): dilation is (2, 2), not 1" in text
    assert "the kernel is 1x1, not 3x3" in explain(X, torch.randn(8, 8, 1, 1), padding=0)
    assert "padding is 'valid', not 1" in explain(X, W, padding="valid", groups=4)
    assert "stride is (3, 3)" in explain(X, W, stride=3, groups=4)
    assert "nothing to compute" in explain(X[:0], W, groups=4)
    assert "not floating-point" in explain(X.long(), W.long(), groups=4)


def test_dense_convolutions_are_ours_only_by_name():
    weight = torch.randn(8, 8, 3, 3)
    assert "every pass: plain PyTorch (F.conv2d): a dense convolution" in explain(X, weight)
    with use_backend("torch"):
        assert "fwd: torch" in explain(X, weight)


def test_explain_reports_each_pass_and_every_reason():
    text = explain(X, W, groups=4)
    assert [line.split(":")[0].strip() for line in text.splitlines() if line.startswith("  ") and line[2] != " "] == [
        "fwd",
        "dgrad",
        "wgrad",
    ]
    assert "not triton:" in text
    assert "not cuda: the tensors are on cpu" in text
    with use_backend("cuda"):
        assert "fwd: an error" in explain(X, W, groups=4)


def test_explain_sees_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in explain(X, W, groups=4)


def test_explain_takes_unbatched_input():
    assert "fwd:" in explain(X[0], W, groups=4)


def test_explain_refuses_an_invalid_call():
    with pytest.raises(ValueError, match="explain: expected groups to divide C_out"):
        explain(X, W, groups=3)


def test_triton_that_does_not_start_is_a_reason_and_one_warning(monkeypatch):
    """A GPU machine without a C compiler: the next backend serves, and the user hears of it once."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    from resnext.kernels import grouped_conv

    def broken(device):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(grouped_conv, "probe", broken)
    dispatch._no_triton.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="Triton does not start .*Failed to find C compiler") as caught:
            reasons = [dispatch._no_triton(torch.device("cuda", 0)) for _ in range(2)]
        assert len(caught) == 1
        assert all("Failed to find C compiler" in reason for reason in reasons)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "compute capability 7.5" in dispatch._no_triton(torch.device("cuda", 1))
    finally:
        dispatch._no_triton.cache_clear()


# --- the fused operators ---


def fused_problem(weight_shape, groups=1, dtype=torch.float32, size=56, channels_last=True, op="fwd", stride=(1, 1)):
    shape = (8, weight_shape[1] * groups, size, size)
    return op, shape, weight_shape, stride, groups, dtype, CPU, channels_last


@pytest.mark.skipif(extension.load() is not None, reason="the C++ extension is not built")
def test_who_serves_the_fused_operators_on_the_cpu():
    grouped, dense, pointwise = (64, 4, 3, 3), (64, 64, 3, 3), (256, 64, 1, 1)
    composed_of_cpp = composed.Composed(extension)
    assert dispatch.fused_launchers(*fused_problem(grouped, 16)) is extension
    assert dispatch.fused_launchers(*fused_problem(dense)) is dense_conv
    assert dispatch.fused_launchers(*fused_problem(dense, stride=(2, 2))) is dense_conv
    assert dispatch.fused_launchers(*fused_problem(dense, channels_last=False)) == composed_of_cpp
    assert dispatch.fused_launchers(*fused_problem(pointwise)) is extension
    assert dispatch.fused_launchers(*fused_problem((2048, 1024, 1, 1))) is extension
    assert dispatch.fused_launchers(*fused_problem(pointwise, channels_last=False)) == composed_of_cpp
    assert dispatch.fused_launchers(*fused_problem((256, 32, 1, 1), groups=2)) == composed_of_cpp
    wide = (224, 112, 3, 3)  # where PyTorch's convolution was measured to be faster, unless Winograd's algorithm serves
    assert dispatch.fused_launchers(*fused_problem(wide, 2, channels_last=False)) == composed_of_cpp
    assert dispatch.fused_launchers(*fused_problem(wide, 2)) is extension
    assert dispatch.fused_launchers(*fused_problem(grouped, 16, torch.float64)) == composed.Composed(reference)
    assert dispatch.affine_launchers(*fused_problem(grouped, 16)) is extension
    assert dispatch.affine_launchers(*fused_problem(pointwise)) is extension
    assert dispatch.affine_launchers(*fused_problem(pointwise, channels_last=False)) is onednn
    assert dispatch.affine_launchers(*fused_problem(dense)) is dense_conv
    assert dispatch.affine_launchers(*fused_problem(dense, channels_last=False)) is onednn
    with use_backend("cpu"):
        assert dispatch.fused_launchers(*fused_problem(dense)) is extension
        assert dispatch.fused_launchers(*fused_problem(pointwise, dtype=torch.float16)) is extension


@pytest.mark.skipif(extension.load() is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize(
    ("dtype", "library", "pairs", "ours"),
    [
        (torch.bfloat16, True, True, True),
        (torch.bfloat16, True, False, False),
        (torch.bfloat16, False, False, True),
        (torch.float16, True, True, False),
        (torch.float16, False, True, True),
    ],
)
def test_who_serves_16_bit_convolutions_on_the_cpu(monkeypatch, dtype, library, pairs, ours):
    monkeypatch.setattr(dispatch, "onednn_takes", lambda dtype: library)
    monkeypatch.setattr(extension, "multiplies_pairs", lambda dtype: pairs and dtype == torch.bfloat16)

    def served_by(*weight_shape):
        return dispatch._fused_launchers.__wrapped__(None, False, "stats", *fused_problem(weight_shape, dtype=dtype))

    composed_of_cpp = composed.Composed(extension)
    assert served_by(256, 64, 1, 1) == (extension if ours else composed_of_cpp)
    assert served_by(64, 64, 3, 3) == (extension if ours else composed_of_cpp)
    assert served_by(512, 512, 3, 3) == (extension if ours else composed_of_cpp)
    assert served_by(64, 33, 3, 3) == (composed_of_cpp if library else extension)


def test_forced_backends_serve_the_fused_operators_or_say_why_not():
    pointwise = fused_problem((256, 64, 1, 1))
    with use_backend("torch"):
        assert dispatch.affine_launchers(*pointwise) == composed.Composed(reference)
        assert dispatch.elementwise(torch.float32, CPU) is reference
        assert dispatch.pooling(torch.float32, CPU) is reference
    with use_backend("cuda"):
        with pytest.raises(dispatch.BackendError, match=r"cuda backend was asked for .* the tensors are on cpu"):
            dispatch.fused_launchers(*pointwise)
        with pytest.raises(dispatch.BackendError, match=r"batch norm: the cuda backend .* the tensors are on cpu"):
            dispatch.elementwise(torch.float32, CPU)
