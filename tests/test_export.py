"""Converted models leave PyTorch: torch.export, AOTInductor, TorchScript, ONNX."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from resnext import fuse_, unfuse_
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


class Drops(BasicBlock):
    """With a dropout before the sum, whose shape is then compared with the shortcut's."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        out = self.drop(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", [BasicBlock, Drops], ids=lambda kind: kind.__name__)
def test_exported_with_gradients_for_any_size(kind, training, strict):
    """Saved and loaded again."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    stem = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    model = nn.Sequential(*stem, kind(8, 16, 2, shortcut), kind(16, 16)).train(training)
    plain = copy.deepcopy(model)
    fuse_(model)
    sizes = {dim: torch.export.Dim(f"size{dim}", min=32, max=512) for dim in (2, 3)}
    shapes = ({0: torch.export.Dim("several", min=2, max=64), **sizes},)
    program = torch.export.export(model, (images(torch.float32),), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    more = torch.randn(3, 3, 41, 50)
    torch.testing.assert_close(loaded(more), plain(more))
    buffers_of_plain = dict(plain.named_buffers())
    for name, buffer in loaded.named_buffers():  # those in use
        torch.testing.assert_close(buffer, buffers_of_plain[name])


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
