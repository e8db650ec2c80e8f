"""Converted models leave PyTorch: torch.export, AOTInductor, TorchScript, ONNX."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnext import unfuse_
from resnext.kernels import extension

from .block_cases import buffers, forward_and_gradients
from .converted import MODELS, images, pair
from .test_compilers import one_block, operators, small_images

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent

BATCH = torch.export.Dim("batch", min=1, max=64)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_exported_model_infers(make):
    """Saved and loaded again, for another number of images; batch norms are folded."""
    model, plain = (each.eval() for each in pair(make, torch.float32))
    with torch.no_grad():
        program = torch.export.export(model, (images(torch.float32),), dynamic_shapes=({0: BATCH},))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        more = images(torch.float32, 5)
        torch.testing.assert_close(torch.export.load(file).module()(more), plain(more))
    assert {name.split(".")[1] for name in operators(program.graph)} == {
        "_conv_affine",
        "_conv_stats",
        "_bn_affine",
        "_affine_relu_max_pool",
        *(["_laid_out"] if extension.load() is None else []),
    }


def test_exported_model_trains():
    """With parameters of its own, and running statistics that follow."""
    model, _ = pair(dtype=torch.float32)
    program = torch.export.export(copy.deepcopy(model).train(), (images(torch.float32),)).module()
    results = []
    for each in (program, model):
        results.append({**forward_and_gradients(each, images(torch.float32)), **buffers(each)})
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("imports", ["resnext", "torch"])
def test_ahead_of_time_inductor(imports, tmp_path):
    """As it is, the package calls this library's operators and runs where they are imported; unfused, anywhere."""
    torch.compiler.reset()
    model, plain = (each.eval() for each in pair(one_block, torch.float32))
    if imports == "torch":
        unfuse_(model)
    x = small_images()
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.save({"images": x, "logits": plain(x)}, tmp_path / "expected.pt")
    code = (
        f"import sys, torch, {imports}\n"
        "model, expected = torch._inductor.aoti_load_package(sys.argv[1]), torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(model(expected['images']), expected['logits'])\n"
        f"assert ('resnext' in sys.modules) == ({imports!r} == 'resnext')"
    )
    subprocess.run([sys.executable, "-c", code, package, tmp_path / "expected.pt"], cwd=ROOT, check=True, timeout=120)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript():
    """Traced as it is, and scripted once it is plain again."""
    model, plain = (each.eval() for each in pair(dtype=torch.float32))
    x = images(torch.float32)
    with torch.no_grad():
        for scripted in (torch.jit.trace(model, x), torch.jit.script(unfuse_(model))):
            file = io.BytesIO()
            torch.jit.save(torch.jit.freeze(scripted), file)
            file.seek(0)
            torch.testing.assert_close(torch.jit.load(file)(x), plain(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_onnx(make, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    model, plain = (each.eval() for each in pair(make, torch.float32))
    x = images(torch.float32)
    with torch.no_grad():
        torch.onnx.export(unfuse_(model), (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        expected = plain(x)
    evaluator = onnx.reference.ReferenceEvaluator(onnx.load(tmp_path / "model.onnx"))
    (logits,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected)
