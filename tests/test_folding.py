"""What inference keeps of a block: batch norms folded into the convolutions, as long as nothing changes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from resnext import folding, fusion
from resnext.kernels import extension

from .block_cases import IDENTITY, PROJECTION, forward_and_gradients, reason_of


def replace_parameter(block: nn.Module) -> None:
    block.bn2.weight = nn.Parameter(block.bn2.weight.detach() + 1)


def point_elsewhere(block: nn.Module) -> None:
    block.conv1.weight.data = block.conv1.weight.data + 1


def write_through_data(block: nn.Module) -> None:
    """Leaves no trace in the tensor, but evaluation is preceded by eval()."""
    block.conv3.weight.data.add_(1)
    block.eval()


def step(block: nn.Module) -> None:
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    block.train()(IDENTITY.images()).square().mean().backward()
    optimizer.step()
    block.eval()


def fused_step(block: nn.Module) -> None:
    """In evaluation all along, by an optimizer that does not tell the parameters' versions."""
    optimizer = torch.optim.AdamW(block.parameters(), 0.1, fused=True)
    block(IDENTITY.images()).square().mean().backward()
    optimizer.step()


@torch.no_grad()
def train_without_gradients(block: nn.Module) -> None:
    """With no call of train() or eval(): the batch norm alone changes mode."""
    block.bn1.train()
    block(IDENTITY.images())
    block.bn1.eval()


UPDATES = {
    "a parameter in place": lambda block: nn.init.uniform_(block.bn1.bias),
    "a 1x1 weight in place": lambda block: nn.init.uniform_(block.conv3.weight),
    "a 3x3 weight in place": lambda block: nn.init.uniform_(block.conv2.weight),
    "a buffer in place": lambda block: block.bn2.running_var.mul_(2),
    "a new parameter": replace_parameter,
    "a parameter's data": point_elsewhere,
    "through data": write_through_data,
    "eps": lambda block: setattr(block.bn3, "eps", 0.1),
    "a state dict": lambda block: block.load_state_dict({k: v + 1 for k, v in block.state_dict().items()}),
    "a state dict's tensors": lambda block: block.load_state_dict(
        {k: v + 1 for k, v in block.state_dict().items()}, assign=True
    ),
    "a training step": step,
    "a step of a fused optimizer": fused_step,
    "running statistics": train_without_gradients,
}


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES.keys())
def test_inference_follows_what_changes(update):
    block, _ = IDENTITY.pair()
    x = IDENTITY.images()
    block.eval()
    with torch.no_grad():
        before = block(x)
    update(block)
    with torch.no_grad():
        after = block(x)
        assert torch.equal(after, copy.deepcopy(block)(x))  # which has kept nothing
    assert not torch.allclose(after, before)


def test_inference_keeps_what_does_not_change():
    block, _ = PROJECTION.pair()
    x = PROJECTION.images()
    block.eval()
    with torch.no_grad():
        block(x)
        kept = folding._KEPT[block]
        block(x)
        assert folding._KEPT[block] is kept
    block.train()
    assert block not in folding._KEPT


def test_scales_go_into_the_weights_of_1x1_convolutions_that_a_library_computes():
    """On a CPU those in NCHW, in which what is given NCHW stays where a block has no use for channels_last."""
    block, _ = PROJECTION.pair()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(fusion, "prefers_channels_last", lambda x: False)
        block.eval()(PROJECTION.images())
    scaled = [folded.scale is None for folded in folding._KEPT[block].folded.values()]
    assert scaled == [True, False, True, True]


@pytest.mark.skipif(extension.load() is not None, reason="the C++ extension is not built")
def test_inference_keeps_packed_weights_in_nhwc():
    block, _ = PROJECTION.pair()
    x = PROJECTION.images()
    in_nhwc = x.contiguous(memory_format=torch.channels_last)
    block.eval()
    with torch.no_grad():
        wanted = block(x)
        torch.testing.assert_close(block(in_nhwc), wanted)
        folded = folding._KEPT[block].folded.values()
        assert [f.scale is None for f in folded] == [False] * 4
        assert all(extension.is_kept(f.weight) for f in folded)
        torch.testing.assert_close(block(x), wanted)
        nn.init.zeros_(block.conv3.weight)
        assert not torch.allclose(block(in_nhwc), wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["deepcopy", "pickle"])
def test_copies_leave_behind_what_inference_keeps(copied):
    block, _ = PROJECTION.pair()
    x = PROJECTION.images()
    keys = list(block.eval().state_dict())
    with torch.no_grad():
        expected = block(x)
        other = copied(block)
        assert other not in folding._KEPT
        assert list(other.state_dict()) == list(block.state_dict()) == keys
        assert torch.equal(other(x), expected)
        nn.init.zeros_(other.bn3.bias)
        assert torch.equal(block(x), expected)
    assert vars(other).keys() == vars(block).keys()


def test_biased_convolutions_fold():
    """In inference the bias is part of the shift; with running statistics and gradients too."""
    ours, plain = PROJECTION.pair()
    for block in (ours, plain):
        for name in ("conv1", "conv2", "downsample.0"):
            conv = block.get_submodule(name)
            torch.manual_seed(5)
            conv.bias = nn.Parameter(torch.randn(conv.out_channels))
        block.double().eval()
    x = PROJECTION.images().double()
    assert reason_of(ours, x) is None
    got, expected = forward_and_gradients(ours, x), forward_and_gradients(plain, x)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))


def test_inference_mode_leaves_nothing_unusable_behind():
    block, _ = PROJECTION.pair()
    x = PROJECTION.images()
    with torch.inference_mode():
        first = block.eval()(x)
    frozen = block.requires_grad_(False)(x.clone().requires_grad_())  # the kept vectors' values, with a graph
    torch.testing.assert_close(frozen, first)
    frozen.sum().backward()
    block.requires_grad_(True)
    with torch.no_grad():
        assert torch.equal(block(x), first)
    block.train()(x).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_model_made_in_inference_mode():
    """Its parameters have no version to tell a change by."""
    with torch.inference_mode():
        block, plain = PROJECTION.pair()
        x = PROJECTION.images()
        torch.testing.assert_close(block.eval()(x), plain.eval()(x))
        nn.init.ones_(block.bn1.bias)
        nn.init.ones_(plain.bn1.bias)
        torch.testing.assert_close(block(x), plain(x))


def test_captured_inference_follows_parameters(cuda):
    """A CUDA graph computes the vectors anew in every replay, and holds none that a later call replaces."""
    block, _ = PROJECTION.pair()
    block.to(cuda).eval()
    x = PROJECTION.images().to(cuda)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            block(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = block(x)
        nn.init.uniform_(block.bn1.weight)
        block(x)
        graph.replay()
        assert torch.equal(out, copy.deepcopy(block)(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_inference_does_not_depend_on_defaults(layout):
    block, _ = PROJECTION.pair()
    x = PROJECTION.images().contiguous(memory_format=layout)
    block.eval()
    with torch.no_grad():
        wanted = copy.deepcopy(block)(x)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        try:
            got = block(x)
        finally:
            torch.set_default_dtype(dtype)
            torch.set_default_device(None)
    assert torch.equal(got, wanted)


def test_nothing_is_kept_of_weights_that_other_processes_may_change():
    block, _ = IDENTITY.pair()
    x = IDENTITY.images()
    block.eval()
    with torch.no_grad():
        wanted = block(x)
        assert block in folding._KEPT
        block.share_memory()
        torch.testing.assert_close(block(x), wanted)
        for parameter in block.parameters():
            parameter.numpy()[...] *= 2  # as another process does, past the version
        torch.testing.assert_close(block(x), copy.deepcopy(block)(x))
