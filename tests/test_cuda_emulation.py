"""The CUDA kernels without a GPU: csrc/cuda as it is, on the emulated device of tests/cuda_emulation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnext.kernels import composed, extension, extension_attention, reference

from . import fused_numerics
from .attention_numerics import OPTIONS as ATTENTION_OPTIONS
from .attention_numerics import check_attention
from .cases import CASES, Case, make_tensors
from .emulation import ADA_SHARED, DTYPES, HOPPER_SHARED, TURING_SHARED, Emulator, build
from .fused_numerics import ELEMENTWISE_SHAPES, GROUPED_CASES, FusedCase, assert_statistics, make, make_affine
from .numerics import assert_close, exact

OPS = ["fwd", "dgrad", "wgrad"]
HALF = [torch.float16, torch.bfloat16]
COMPOSED = composed.Composed(reference)

# Problems that reach parts of the tensor-core kernels that the shared list does not.
TENSOR_CORE_CASES = [
    Case("packed-two-slabs", 1, 80, 80, 5, 6, 20, bias=True),
    Case("packed-gw1-slab", 2, 64, 64, 4, 5, 64),
    Case("packed-two-slabs-stride2", 1, 80, 80, 6, 5, 20, (2, 2)),
    Case("more-images-than-a-strip", 6, 16, 16, 5, 7, 4),
    Case("more-images-than-a-strip-stride2", 5, 16, 16, 7, 9, 4, (2, 2)),
    Case("two-column-strips-stride2", 1, 16, 16, 4, 70, 4, (2, 2)),
    Case("gw32-two-column-strips", 1, 32, 32, 4, 40, 1, bias=True),
    Case("gw32-two-groups-stride2", 3, 64, 64, 7, 7, 2, (2, 2)),
    Case("gw48-two-groups", 1, 96, 96, 3, 5, 2),
    Case("several-units-per-split", 50, 64, 64, 5, 6, 16),
    Case("bands", 1, 16, 16, 41, 5, 2),
    Case("bands-stride2", 1, 16, 16, 42, 6, 2, (2, 2)),
]
FUSED_CASES = [
    *GROUPED_CASES,
    FusedCase("gw80-threads-left-over", 1, 80, 80, 3, 14, 1),
    *(
        FusedCase(c.id, c.batch, c.in_channels, c.out_channels, c.height, c.width, c.groups, stride=c.stride)
        for c in TENSOR_CORE_CASES
    ),
]
# Several planes of one channel, which are more than the threads of a block.
SHAPES = {**ELEMENTWISE_SHAPES, "several-planes": (3, 4, 33, 20)}


@pytest.fixture(autouse=True)
def one_thread():
    """The oracle's problems are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory):
    return build(tmp_path_factory.mktemp("cuda_emulation"))


@pytest.fixture
def emulator(library, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """The emulated operators, under the launchers of kernels/extension.py for the length of a test."""
    emulator = Emulator(library)
    monkeypatch.setattr(extension, "_C", emulator)
    return emulator


def run(op: str, case: Case, t: dict[str, Tensor | None]) -> Tensor:
    if op == "fwd":
        return extension.fwd(t["x"], t["weight"], t["bias"], case.stride, case.groups, True)
    if op == "dgrad":
        return extension.dgrad(t["grad"], t["weight"], case.input_shape[2:], case.stride, case.groups, True)
    return extension.wgrad(t["grad"], t["x"], case.stride, case.groups, True)


# --- the plain convolution ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *TENSOR_CORE_CASES], ids=lambda case: case.id)
def test_plain_kernels_match_the_oracle(emulator: Emulator, case: Case, dtype: torch.dtype):
    """Small integers exactly (in descending order), random values within the derived bound."""
    integers = make_tensors(case, dtype, channels_last=True, integers=True)
    values = make_tensors(case, dtype, channels_last=True)
    for op in OPS:
        with emulator.on(descending=True):
            got = run(op, case, integers)
        torch.testing.assert_close(got, exact(op, case, integers).value.to(dtype), rtol=0, atol=0)
        assert_close(run(op, case, values), exact(op, case, values))


@pytest.mark.parametrize("shared_memory", [HOPPER_SHARED, ADA_SHARED], ids=["hopper", "ada"])
@pytest.mark.parametrize("groups", [1, 2], ids=["gw128", "gw64"])
def test_wide_groups_fit_the_shared_memory_they_get(emulator: Emulator, groups: int, shared_memory: int):
    """Fewer output tiles per block, down to the direct kernel, must not change the result."""
    case = Case("wide", 1, 128, 128, 3, 34, groups, bias=True)
    tensors = make_tensors(case, torch.bfloat16, channels_last=True, integers=True)
    with emulator.on(shared_memory=shared_memory):
        for op in OPS:
            wanted = exact(op, case, tensors).value.bfloat16()
            torch.testing.assert_close(run(op, case, tensors), wanted, rtol=0, atol=0)
        fused = FusedCase("wide", 1, 128, 128, 3, 34, groups)
        fused_numerics.check_conv_stats(extension, fused, torch.bfloat16)
        fused_numerics.check_conv_affine(extension, fused, torch.bfloat16)


def test_without_tensor_cores_or_alignment_the_direct_kernels_serve(emulator: Emulator):
    case = Case("fallback", 1, 16, 16, 4, 5, 4)
    tensors = make_tensors(case, torch.float16, channels_last=True, integers=True)
    shifted = tensors | {name: misaligned(tensors[name]) for name in ("x", "grad")}
    for op in OPS:
        expected = exact(op, case, tensors).value.half()
        with emulator.on(shared_memory=TURING_SHARED, tensor_cores=False):
            torch.testing.assert_close(run(op, case, tensors), expected, rtol=0, atol=0)
        torch.testing.assert_close(run(op, case, shifted), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", [*CASES, *TENSOR_CORE_CASES], ids=lambda case: case.id)
def test_weights_in_either_order(emulator: Emulator, case: Case):
    """Of weights in OIHW order the same bits as of those in OHWI order, which are the other tests'."""
    tensors = make_tensors(case, torch.bfloat16, channels_last=True)
    outside = tensors | {"weight": tensors["weight"].contiguous()}
    for op in ("fwd", "dgrad"):
        assert torch.equal(run(op, case, tensors), run(op, case, outside))
    dw = torch.empty(case.weight_shape, dtype=torch.bfloat16)
    emulator.grouped_conv2d_wgrad(tensors["grad"], tensors["x"], dw, *case.stride, case.groups, True)
    assert torch.equal(dw, run("wgrad", case, tensors))


@pytest.mark.parametrize("case", TENSOR_CORE_CASES, ids=lambda case: case.id)
def test_little_shared_memory(emulator: Emulator, case: Case):
    """Copies then run one group of rows ahead instead of two, or nothing is left of the tensor cores."""
    sizes = (case.batch, case.in_channels, case.out_channels, case.height, case.width, case.groups)
    fused = FusedCase("little", *sizes, stride=case.stride)
    for shared_memory in (16 * 1024, 20 * 1024, 28 * 1024):
        with emulator.on(shared_memory=shared_memory, descending=shared_memory == 20 * 1024):
            fused_numerics.check_conv_stats(extension, fused, torch.bfloat16)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, one element off a 16-byte boundary."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    shifted = torch.as_strided(storage, tensor.shape, tensor.stride(), 1).copy_(tensor)
    assert shifted.data_ptr() % 16 != 0
    return shifted


def test_tensor_cores_serve_the_shapes_they_are_for(emulator: Emulator):
    """Otherwise the tests above would pass on the direct kernels alone."""
    for width, channels in [(1, 64), (2, 64), (4, 128), (8, 256), (16, 512), (32, 1024), (64, 256), (112, 448)]:
        case = Case("served", 1, channels, channels, 7, 7, channels // width)
        assert emulator.serves_tensor_cores(case, torch.float16), case
        assert emulator.serves_tensor_cores(case, torch.bfloat16), case
        assert not emulator.serves_tensor_cores(case, torch.float32), case


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=["stride1", "stride2"])
@pytest.mark.parametrize("width", [1, 4, 8], ids=lambda width: f"gw{width}")
def test_nan_and_inf_stay_in_their_group(emulator: Emulator, width: int, stride: tuple[int, int], bad: float):
    """Groups share a matrix tile; a bad value must reach exactly the results of its own group that read it."""
    case = Case("bad-value", 1, 16, 16, 5, 6, 16 // width, stride, True)
    for name, op, channel in [("x", "fwd", 3), ("grad", "dgrad", 9), ("weight", "fwd", 5), ("x", "wgrad", 3)]:
        for row, col in [(1, 1), (-1, -1)]:
            tensors = make_tensors(case, torch.float16, channels_last=True)
            position = (channel, 0, row, col) if name == "weight" else (0, channel, row, col)
            tensors[name][position] = 0.0
            clean = exact(op, case, tensors)
            tensors[name][position] = bad
            expected = exact(op, case, tensors).value
            got = run(op, case, tensors)
            finite = expected.isfinite()
            assert not finite.all()
            torch.testing.assert_close(got[~finite].double(), expected[~finite], rtol=0, atol=0, equal_nan=True)
            assert_close(torch.where(finite, got, clean.value.half()), clean)


def test_same_call_same_bits(emulator: Emulator):
    case = Case("repeat", 3, 32, 32, 9, 7, 8)
    tensors = make_tensors(case, torch.float16, channels_last=True)
    for op in OPS:
        first = run(op, case, tensors)
        with emulator.on(descending=True):
            second = run(op, case, tensors)
        assert torch.equal(first.view(torch.int16), second.view(torch.int16))


# --- the convolution between batch norms ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FUSED_CASES, ids=lambda case: case.id)
def test_fused_convolutions_match_the_oracle(emulator: Emulator, case: FusedCase, dtype: torch.dtype):
    fused_numerics.check_conv_stats(extension, case, dtype)
    fused_numerics.check_conv_affine(extension, case, dtype)
    with emulator.on(descending=True):
        fused_numerics.check_conv_stats(extension, case, dtype, weight_channels_last=True)
        fused_numerics.check_conv_affine(extension, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [GROUPED_CASES[0], GROUPED_CASES[1], GROUPED_CASES[3]], ids=lambda case: case.id)
def test_fused_convolutions_without_their_options(emulator: Emulator, case: FusedCase, dtype: torch.dtype):
    for options in ({"centered": False}, {"prologue": False}, {"stats": False}, {"prologue": False, "stats": False}):
        fused_numerics.check_conv_stats(extension, case, dtype, **options)
    fused_numerics.check_conv_affine(extension, case, dtype, relu=False)
    fused_numerics.check_conv_affine(extension, case, dtype, scaled=False, residual=False)
    fused_numerics.check_conv_affine(extension, case, dtype, shifted=False, residual=False, relu=False)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=["stride1", "stride2"])
@pytest.mark.parametrize("width", [4, 32], ids=["packed", "wide"])
def test_tensor_cores_fuse_everything(emulator: Emulator, width: int, stride: tuple[int, int]):
    """One convolution and the second stages of its sums are launched, and nothing else."""
    t = fused_tensors(FusedCase("fused", 2, 64, 64, 6, 7, 64 // width, stride=stride), torch.bfloat16)
    wanted = {"conv_stats_fwd": 2, "conv_stats_dgrad": 2, "conv_stats_wgrad": 2, "conv_affine": 1}
    assert launches(emulator, t) == wanted
    with emulator.on(tensor_cores=False):
        composed = launches(emulator, t)
    assert all(composed[op] > wanted[op] for op in wanted if op != "conv_affine")


def fused_tensors(case: FusedCase, dtype: torch.dtype) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(5)
    weight_shape = (case.out_channels, case.in_channels // case.groups, 3, 3)
    return SimpleNamespace(
        x=make((case.batch, case.in_channels, case.height, case.width), dtype, generator, channels_last=True),
        prologue=make_affine(case.in_channels, generator),
        weight=make(weight_shape, dtype, generator),
        dz=make(case.output_shape, dtype, generator, channels_last=True),
        z=make(case.output_shape, dtype, generator, channels_last=True),
        vectors=tuple(make((case.out_channels,), torch.float32, generator) for _ in range(3)),
        place=(case.stride, case.groups, True),
    )


def launches(emulator: Emulator, t: SimpleNamespace) -> dict[str, int]:
    counts = {}
    extension.conv_stats_fwd(t.x, t.prologue, t.weight, *t.place, True)
    counts["conv_stats_fwd"] = emulator.launches
    for name, wanted in (("conv_stats_dgrad", (True, False)), ("conv_stats_wgrad", (False, True))):
        extension.conv_stats_bwd(t.dz, (t.z, *t.vectors), t.x, t.prologue, t.weight, *t.place, wanted)
        counts[name] = emulator.launches
    extension.conv_affine(t.x, t.weight, *t.vectors[:2], t.z, True, *t.place)
    counts["conv_affine"] = emulator.launches
    return counts


class Misaligned:
    """Launchers that see every image and weight one element off a 16-byte boundary."""

    def __getattr__(self, name: str):
        def shift(value):
            if isinstance(value, tuple):
                return tuple(shift(v) for v in value)
            return misaligned(value) if isinstance(value, Tensor) and value.dim() == 4 else value

        return lambda *arguments: getattr(extension, name)(*map(shift, arguments))


def test_what_tensor_cores_do_not_get_is_composed(emulator: Emulator):
    case = FusedCase("fallback", 1, 16, 16, 4, 5, 4)
    fused_numerics.check_conv_stats(Misaligned(), case, torch.float16)
    fused_numerics.check_conv_affine(Misaligned(), case, torch.float16)
    with emulator.on(tensor_cores=False):
        fused_numerics.check_conv_stats(extension, case, torch.float16)
        fused_numerics.check_conv_affine(extension, case, torch.float16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("stride", [1, 2], ids=["stride1", "stride2"])
@pytest.mark.parametrize("width", [1, 4], ids=["gw1", "gw4"])
def test_what_is_not_finite_stays_in_its_group_fused(emulator: Emulator, width: int, stride: int, bad: float):
    """Small integers all the way (16 results per channel), so that every finite result is exact."""
    generator = torch.Generator().manual_seed(6)
    size, place = 4 * stride, ((stride, stride), 16 // width, True)
    options = {"channels_last": True, "integers": True}
    x = make((1, 16, size, size), torch.float16, generator, **options)
    weight = make((16, width, 3, 3), torch.float16, generator, integers=True)
    dz, z = (make((1, 16, 4, 4), torch.float16, generator, **options) for _ in range(2))
    center, scale, shift, mean, dmean, dvar = (make((16,), torch.float32, generator, integers=True) for _ in range(6))
    scale[5] = 1  # lets what is bad through
    grad_prologue = (z, mean, 16 * dmean, 8 * dvar)
    bad_x, bad_dz = x.clone(), dz.clone()
    bad_x[0, 5, 1, 1] = bad_dz[0, 9, 1, 2] = bad
    affine = (center, scale, shift)
    for values, grads in ((bad_x, dz), (x, bad_dz)):
        got = extension.conv_stats_fwd(values, affine, weight, *place, True)
        wanted = COMPOSED.conv_stats_fwd(values, affine, weight, *place, True)
        torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=0, equal_nan=True)
        finite = wanted[0].isfinite().all(0).flatten(1).all(1)
        assert finite.all() == (values is x)
        assert_statistics(got[0][:, finite], got[1][finite], got[2][finite])
        assert not got[2][~finite].isfinite().any()
        arguments = (grads, grad_prologue, values, affine, weight, *place, (True, True))
        for first, second in zip(
            extension.conv_stats_bwd(*arguments), COMPOSED.conv_stats_bwd(*arguments), strict=True
        ):
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stride", [1, 2], ids=["stride1", "stride2"])
def test_statistics_beside_a_bad_group_are_as_good(emulator: Emulator, stride: int):
    """Also where the first results of all had to be computed again, and far from zero."""
    x = make((4, 16, 9, 11), torch.float32, torch.Generator().manual_seed(7), channels_last=True).add_(1e3)
    x[:, 2] = 1000.5
    x[:, 9] = float("nan")
    x = x.to(torch.float16)
    weight = torch.zeros(16, 1, 3, 3, dtype=torch.float16)
    weight[:, :, 1, 1] = 1
    z, mean, var = extension.conv_stats_fwd(x, None, weight, (stride, stride), 16, True, True)
    others = [channel for channel in range(16) if channel != 9]
    assert_statistics(z[:, others], mean[others], var[others])
    assert var[2] == 0
    assert var[9].isnan()


# --- the elementwise passes ---


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_elementwise(emulator: Emulator, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool):
    generator = torch.Generator().manual_seed(3)
    z = make(shape, dtype, generator, channels_last=channels_last)
    with emulator.on(multiprocessors=4, descending=channels_last):  # several splits per channel where there is room
        fused_numerics.check_statistics(extension, z, channels_last)
        for residual in ("none", "plain", "affine"):
            options = {"channels_last": channels_last, "residual": residual, "centered": residual != "plain"}
            fused_numerics.check_affine_add_relu(extension, shape, dtype, **options)
        fused_numerics.check_pool(extension, z, make_affine(shape[1], generator), channels_last)


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention(emulator: Emulator, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool):
    for multiprocessors, descending in ((1, False), (8, True)):  # one split of an image, and several
        with emulator.on(multiprocessors=multiprocessors, descending=descending):
            for options in ATTENTION_OPTIONS:
                check_attention(extension_attention, shape, dtype, channels_last=channels_last, **options)


def test_elementwise_on_tensors_that_no_vector_fits(emulator: Emulator):
    launchers = Misaligned()
    shape = ELEMENTWISE_SHAPES["whole-blocks"]
    for channels_last in (True, False):
        generator = torch.Generator().manual_seed(3)
        z = make(shape, torch.float16, generator, channels_last=channels_last)
        fused_numerics.check_statistics(launchers, z, channels_last)
        fused_numerics.check_affine_add_relu(launchers, shape, torch.float16, channels_last=channels_last)
        fused_numerics.check_pool(launchers, z, make_affine(shape[1], generator), channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_of_constant_channels_and_far_means(emulator: Emulator, dtype: torch.dtype):
    """A constant has no variance; a mean of 1e3 costs a spread of 1e-2 no digits but those it has lost already."""
    z = make((4, 8, 23, 17), torch.float32, torch.Generator().manual_seed(7), channels_last=True)
    z = z.mul_(1e-2).add_(1e3).to(dtype)
    z[:, 2] = 0.1
    z[:, 3] = -1e30
    z[0, 5, 1, 1] = float("inf")
    others = [0, 1, 2, 4, 6, 7]
    for channels_last in (True, False):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        mean, var = extension.statistics(z.contiguous(memory_format=layout), channels_last)
        assert_statistics(z[:, others], mean[others], var[others])
        assert var[2] == var[3] == 0
        assert torch.equal(mean[2:4], z[0, 2:4, 0, 0].float())
        assert not mean[5].isfinite()
        assert not var[5].isfinite()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_statistics_of_a_convolution_are_as_good(emulator: Emulator, dtype: torch.dtype):
    """Each channel copies its input: constants stay constant to the last bit, far means stay far."""
    x = make((4, 16, 9, 11), torch.float32, torch.Generator().manual_seed(7), channels_last=True)
    x = x.mul_(4).add_(1e3).to(dtype)
    x[:, 2] = 0.1
    weight = torch.zeros(16, 1, 3, 3, dtype=dtype)
    weight[:, :, 1, 1] = 1
    with emulator.on(multiprocessors=4):
        z, mean, var = extension.conv_stats_fwd(x, None, weight, (1, 1), 16, True, True)
    assert torch.equal(z, x)
    assert_statistics(z, mean, var)
    assert var[2] == 0
    assert mean[2] == x[0, 2, 0, 0]


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (2, 1), (2, 2), (1, 6)], ids=str)
def test_the_pools_choice_is_pytorchs(emulator: Emulator, size: tuple[int, int], channels_last: bool):
    """Among equals the first, among NaN the last; gradients then go where PyTorch sends them."""
    generator = torch.Generator().manual_seed(4)
    z = make((2, 8, *size), torch.float32, generator, channels_last=channels_last, integers=True)
    z[torch.rand(z.shape, generator=generator) < 0.15] = float("nan")
    affine = (None, torch.ones(8), torch.zeros(8))
    leaf = z.clone().requires_grad_()
    wanted, indices = F.max_pool2d(torch.relu(leaf), 3, 2, 1, return_indices=True)
    dout = make(tuple(wanted.shape), torch.float32, generator, channels_last=channels_last, integers=True)
    wanted.backward(dout)

    out, taps = extension.affine_relu_max_pool(z, affine, channels_last, True)
    torch.testing.assert_close(out, wanted.detach(), rtol=0, atol=0, equal_nan=True)
    row = torch.arange(out.shape[2])[:, None] * 2 - 1 + taps // 3
    column = torch.arange(out.shape[3]) * 2 - 1 + taps % 3
    assert torch.equal(row * size[1] + column, indices)
    dz, _, dshift = extension.affine_relu_max_pool_bwd(dout, taps, z, affine, channels_last, (True, True))
    assert torch.equal(dz, leaf.grad)
    assert torch.equal(dshift, leaf.grad.sum((0, 2, 3)))  # small integers: exact
    for wanted_results, kept in (((True, False), (dz, None, None)), ((False, True), (None, dshift))):
        results = extension.affine_relu_max_pool_bwd(dout, taps, z, affine, channels_last, wanted_results)
        assert [r is None for r in results] == [not wanted_results[0], not wanted_results[1], not wanted_results[1]]
        assert all(torch.equal(r, k) for r, k in ((results[0], kept[0]), (results[2], kept[-1])) if k is not None)
