"""Converted models through PyTorch's compilers and exporters."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from torch import Tensor, nn

from resnext import fuse_, unfuse_

from .converted import MODELS, images, pair, resnet, train_and_infer

pytestmark = pytest.mark.usefixtures("one_thread")


def one_block() -> nn.Module:
    """All that there is in a network, once: compiling to C++ takes seconds for each layer."""
    block = resnet.Bottleneck(16, 4, groups=4, base_width=64)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), block)


def small_images(batch: int = 3) -> Tensor:
    return images(torch.float32, batch)[..., :12, :8]


def operators(graph: torch.fx.Graph) -> list[str]:
    """This library's, in an exported graph."""
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [target for target in targets if target.startswith("resnext")]


# --- torch.compile ---


@pytest.mark.parametrize(
    ("make", "backend"), [(MODELS["torchvision"], "aot_eager"), (MODELS["timm"], "eager")], ids=MODELS.keys()
)
def test_whole_model_without_graph_breaks(make, backend):
    """Its backward pass, which takes longest, for one of the two."""
    torch.compiler.reset()
    model, _ = pair(make, torch.float32)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    results = train_and_infer(compiled, images(torch.float32))
    expected = train_and_infer(model, images(torch.float32))
    torch.testing.assert_close({name.replace("_orig_mod.", ""): value for name, value in results.items()}, expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_dynamic_batch_compiles_once(training):
    torch.compiler.reset()
    model, _ = pair(dtype=torch.float32)
    model.train(training)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend=counter)
    with torch.set_grad_enabled(training):
        for batch in (2, 3, 5):
            x = images(torch.float32, batch)
            torch.testing.assert_close(compiled(x), model(x))
            if batch == 2:
                compiled_before = counter.frame_count  # may be 2, for numbers that are not symbolic after all
    assert counter.frame_count == compiled_before


def test_converting_after_compiling():
    """A compiled model is compiled again once it has been converted."""
    torch.compiler.reset()
    _, plain = pair(dtype=torch.float32)
    plain.eval()
    graphs = []

    def record(graph: torch.fx.GraphModule, _):
        graphs.append(operators(graph.graph))
        return graph

    model = copy.deepcopy(plain)
    compiled = torch.compile(model, fullgraph=True, backend=record)
    x = images(torch.float32)
    with torch.no_grad():
        expected = compiled(x)
        report = fuse_(compiled)
        torch.testing.assert_close(compiled(x), expected)
        unfuse_(compiled)
        torch.testing.assert_close(compiled(x), expected)
    assert {each.kind for each in report.fused} == {"block", "chain", "convolution"}
    # Converted back, it is what it was, and its first graph is used again.
    assert [sum("_conv_affine" in each for each in graph) for graph in graphs] == [0, 16]


@torch._inductor.config.patch(force_disable_caches=True)  # what the cache on disk holds may be of another source
def test_reduce_overhead():
    """Which means CUDA graphs, and on a CPU no more than the default; `test_fusion` trains through Inductor."""
    torch.compiler.reset()
    model, _ = (each.eval() for each in pair(one_block, torch.float32))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        torch.testing.assert_close(compiled(small_images()), model(small_images()))
