"""The blocks, fused, beside torchvision's: outputs, gradients, running statistics, settings of batch norm."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from resnext import fusion
from resnext.kernels import conv_norm

from .block_cases import (
    CASES,
    IDENTITY,
    LAYOUTS,
    PROJECTION,
    Results,
    assert_same_results,
    buffers,
    forward_and_gradients,
    reason_of,
    relative_errors,
    train_and_evaluate,
)

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_torchvisions_block(case, dtype, layout, recompute):
    ours, plain = case.pair()
    ours.recompute = recompute
    assert reason_of(ours) is None
    assert_same_results(ours, plain, case.images(), dtype, layout, train_and_evaluate)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_torchvisions_block_on_gpu(cuda, case, layout):
    ours, plain = (block.to(cuda) for block in case.pair())
    assert_same_results(ours, plain, case.images().to(cuda), torch.float32, layout, train_and_evaluate)


@pytest.mark.parametrize("strides", [(2, 1), (1, 2)], ids=["in the 1x1", "in the 3x3"])
def test_strides_elsewhere(strides):
    """In the first convolution, as in the paper's own networks, and of one axis only."""
    ours, plain = PROJECTION.pair()
    for block in (ours, plain):
        block.conv1.stride, block.conv2.stride = (strides[0], 1), (strides[1], 1)
        block.downsample[0].stride = (2, 1)
    assert reason_of(ours) is None
    assert_same_results(ours, plain, PROJECTION.images(), torch.float64, protocol=train_and_evaluate)


# --- batch norm ---


def changed(**attributes):
    """A batch norm whose attributes are set after its construction."""

    def norm(channels: int) -> nn.BatchNorm2d:
        bn = nn.BatchNorm2d(channels)
        for name, value in attributes.items():
            setattr(bn, name, value)
        return bn

    return norm


def with_arguments(**arguments):
    return lambda channels: nn.BatchNorm2d(channels, **arguments)


NORMS = {
    "momentum 0": with_arguments(momentum=0.0),
    "momentum 1": with_arguments(momentum=1.0),
    "cumulative average": with_arguments(momentum=None),
    "cumulative average without counter": changed(momentum=None, num_batches_tracked=None),
    "no running statistics": with_arguments(track_running_stats=False),
    "tracking switched off later": changed(track_running_stats=False),
    "no counter": changed(num_batches_tracked=None),
    "not affine": with_arguments(affine=False),
    "no bias": changed(bias=None),
    "large eps": with_arguments(eps=0.5),
    "frozen": lambda channels: nn.BatchNorm2d(channels).requires_grad_(False),
    "synchronised, alone": nn.SyncBatchNorm,
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
@pytest.mark.parametrize("case", [IDENTITY, PROJECTION], ids=lambda case: case.id)
def test_settings_of_batch_norm(case, norm):
    ours, plain = case.pair(norm)
    assert reason_of(ours) is None
    assert_same_results(ours, plain, case.images(), torch.float64, protocol=train_and_evaluate)


@pytest.mark.parametrize("names", [["bn1", "bn2", "bn3", "downsample.1"], ["bn2"], ["bn3"]], ids=",".join)
def test_evaluating_batch_norm_in_a_training_block(names):
    """Fine-tuning: some batch norms, or all, keep their running statistics, which are then constants."""

    def protocol(block: nn.Module, x: Tensor) -> Results:
        forward_and_gradients(block.train(), x)
        for name in names:
            block.get_submodule(name).eval()
        return {**forward_and_gradients(block, x), **buffers(block)}

    ours, plain = PROJECTION.pair()
    assert_same_results(ours, plain, PROJECTION.images(), torch.float64, protocol=protocol)


def test_gradients_of_what_is_frozen_are_not_computed():
    ours, plain = PROJECTION.pair()
    for block in (ours, plain):
        for name in ("conv1.weight", "bn2.weight", "bn3.bias", "downsample.0.weight"):
            block.get_parameter(name).requires_grad_(False)
    assert_same_results(ours, plain, PROJECTION.images(), torch.float64)
    x = PROJECTION.images().double()
    ours(x).sum().backward()  # not even the input's
    assert x.grad is None


def test_running_statistics_without_gradients():
    """Calibration: training mode under no_grad still follows the batches."""

    @torch.no_grad()
    def protocol(block: nn.Module, x: Tensor) -> Results:
        return {"out": block.train()(x), **buffers(block)}

    ours, plain = IDENTITY.pair()
    assert_same_results(ours, plain, IDENTITY.images(), torch.float64, protocol=protocol)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_accumulate_over_steps(recompute):
    """Two backward passes after two forward passes: four updates would be two too many."""

    def protocol(block: nn.Module, x: Tensor) -> Results:
        losses = [block(images).square().sum() for images in (x, x + 1)]
        for loss in losses:
            loss.backward()
        return {**{name: p.grad for name, p in block.named_parameters()}, **buffers(block)}

    ours, plain = PROJECTION.pair()
    ours.recompute = recompute
    assert_same_results(ours, plain, PROJECTION.images(), torch.float64, protocol=protocol)
    assert ours.bn3.num_batches_tracked == 2


def test_checkpoint_without_counter():
    """State dicts of the time before ``num_batches_tracked``."""
    ours, plain = IDENTITY.pair()
    for block in (ours, plain):
        state = {name: value for name, value in block.state_dict().items() if "num_batches" not in name}
        block.load_state_dict(state)
    assert_same_results(ours, plain, IDENTITY.images(), torch.float64, protocol=train_and_evaluate)


def test_norms_that_share_their_statistics():
    """Buffers that two norms update, one after the other."""
    ours, plain = IDENTITY.pair()
    for block in (ours, plain):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(block.bn2, name, getattr(block.bn1, name))
        block.train()(IDENTITY.images())
    assert ours.bn1.num_batches_tracked == plain.bn1.num_batches_tracked == 2
    torch.testing.assert_close(ours.bn1.running_mean, plain.bn1.running_mean)
    torch.testing.assert_close(ours.bn1.running_var, plain.bn1.running_var)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_running_statistics_within_a_checkpoint(recompute):
    """Both runs of the block update them; the second one ends where backward has what it needs."""
    ours, plain = IDENTITY.pair(recompute=recompute)
    x = IDENTITY.images().requires_grad_()
    for block in (ours, plain):
        checkpoint(block, x, use_reentrant=False).sum().backward()
    assert ours.bn1.num_batches_tracked == plain.bn1.num_batches_tracked == 2
    assert ours.bn2.num_batches_tracked == plain.bn2.num_batches_tracked == 2
    torch.testing.assert_close(ours.bn2.running_var, plain.bn2.running_var)


# --- dtypes ---


def halves(block: nn.Module) -> nn.Module:
    return block


def float32_norms(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return block


@pytest.mark.parametrize("prepared", [halves, float32_norms], ids=["all 16-bit", "float32 batch norms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit(dtype, prepared):
    """Twice the error of PyTorch's block, whose intermediate results are rounded as often."""
    ours, plain = (prepared(block.to(dtype)) for block in PROJECTION.pair())
    x = PROJECTION.images().to(dtype)
    exact = train_and_evaluate(copy.deepcopy(plain).double(), x.double())
    allowed = 2 * max(relative_errors(train_and_evaluate(plain, x), exact).values())
    results = train_and_evaluate(ours, x)
    assert reason_of(ours, x) is None
    assert results["first: out"].dtype == results["inference"].dtype == dtype
    wrong = {name: error for name, error in relative_errors(results, exact).items() if not error <= allowed}
    assert not wrong, f"allowed {allowed:.3g}"


@pytest.mark.parametrize("case", [IDENTITY, PROJECTION], ids=lambda case: case.id)
def test_autocast(case):
    ours, plain = case.pair()
    x = case.images()

    def protocol(block: nn.Module, x: Tensor) -> Results:
        with torch.autocast("cpu", torch.bfloat16):
            return train_and_evaluate(block, x)

    exact = protocol(copy.deepcopy(plain).double(), x.double())  # autocast leaves float64 alone
    expected, results = protocol(plain, x), protocol(ours, x)
    assert {name: value.dtype for name, value in results.items()} == {n: v.dtype for n, v in expected.items()}
    allowed = 2 * max(relative_errors(expected, exact).values())
    wrong = {name: error for name, error in relative_errors(results, exact).items() if not error <= allowed}
    assert not wrong, f"allowed {allowed:.3g}"


# --- values ---


def test_mean_far_larger_than_the_spread():
    """Mean 1e3, standard deviation 1e-2: half of float32's digits are gone in the input, and no more may go."""
    ours, plain = IDENTITY.pair()
    x = 1e3 + 1e-2 * IDENTITY.images()
    assert_same_results(ours, plain, x, torch.float32)


def test_constant_channels():
    ours, plain = IDENTITY.pair()
    x = IDENTITY.images()[:1, :, :1, :1].expand(4, -1, 5, 5)
    for block in (ours, plain):
        block.bn1.bias.data.fill_(0.5)
    got, exact = (forward_and_gradients(block.double(), x.double())["out"] for block in (ours, plain))
    # Of variance 0 to float64's rounding in bn1; behind it only padding makes pixels differ.
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)


def test_overflow_in_one_channel_stays_there():
    """Running statistics of the other channels are what they are without it."""
    ours, plain = IDENTITY.pair()
    x = IDENTITY.images()
    for block in (ours, plain):
        with torch.no_grad():
            block.conv1.weight[5] = 3e38
    for block in (ours, plain):
        block(x)
    for name, expected in plain.bn1.named_buffers():
        got = ours.bn1.get_buffer(name)
        assert torch.equal(got.isfinite(), expected.isfinite())
        assert not (expected.dim() and expected.isfinite().all())
    # conv2 has four channels per group: one group of bn2's is not finite.
    assert ours.bn2.running_mean.isfinite().tolist() == plain.bn2.running_mean.isfinite().tolist()
    assert ours.bn2.running_mean.isfinite().sum() == 12


def test_nan_passes_relu():
    ours, plain = PROJECTION.pair()
    x = PROJECTION.images()
    x[0, 3, 2, 2] = float("nan")
    for mode in (True, False):
        got, expected = (forward_and_gradients(block.train(mode), x) for block in (ours, plain))
        assert got["out"].isnan().any()
        for name, value in expected.items():
            assert torch.equal(got[name].isnan(), value.isnan()), name


INPUTS = {
    "sliced": lambda x: torch.cat([x, x], 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand_as(x),
    "channels_last slice": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
    "one pixel": lambda x: x[..., :1, :1],
    "one row": lambda x: x[..., :1, :],
    "batch of one": lambda x: x[:1],
}


@pytest.mark.parametrize("view", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("case", [IDENTITY, PROJECTION], ids=lambda case: case.id)
def test_inputs_of_any_kind(case, view):
    """Views of larger tensors, which the shortcut adds as they are; the caller's tensor is not touched."""
    ours, plain = (block.double() for block in case.pair())
    x = view(case.images().double())
    before, strides = x.clone(), x.stride()
    got, expected = forward_and_gradients(ours, x), forward_and_gradients(plain, x)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
    assert got["out"].stride() == expected["out"].stride()
    assert torch.equal(x, before)
    assert x.stride() == strides


# --- memory ---


def saved_activations(block: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes of what is kept for backward, parameters and vectors aside, each memory once."""
    kept: dict[int, tuple[int, ...]] = {}
    parameters = {p.data_ptr() for p in block.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tuple(tensor.shape)
        else:
            assert tensor.data_ptr() in parameters or tensor.numel() <= 64
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    assert kept.pop(out.data_ptr()) == out.shape  # the next block's input
    return sorted(kept.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_saved_for_backward(case):
    """The input and raw convolution outputs, nothing else of an activation's size."""
    block, plain = case.pair()
    x = case.images().contiguous(memory_format=torch.channels_last).requires_grad_()
    shapes = [tuple(x.shape)]
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    plain(x)
    assert saved_activations(block, x) == sorted(shapes)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_recompute_does_not_keep_the_last_output(case, monkeypatch):
    outputs = []

    def recorded(*args, **kwargs):
        results = conv_norm(*args, **kwargs)
        outputs.append(StorageWeakRef(results[0].untyped_storage()))
        return results

    monkeypatch.setattr(fusion, "conv_norm", recorded)
    block, plain = case.pair(recompute=True)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in plain.modules())
    out = block(case.images())
    assert [output.expired() for output in outputs] == [False] * (convolutions - 1) + [True]
    out.sum().backward()
    assert len(outputs) == convolutions + 1
