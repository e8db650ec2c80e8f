"""The fused launchers of the compiled extension on the CPU, in every instruction set, layout and dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resnext.kernels import extension

from . import fused_numerics
from .fused_numerics import ELEMENTWISE_SHAPES, GROUPED_CASES, POINTWISE_CASES, FusedCase, make, make_affine

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (True, False)

# Shapes that fused_numerics.py leaves out: several parts of an image, blocks that only larger images fill, and channels
# that fill no vector.
LARGER = [
    FusedCase("gw2-several-parts", 2, 40, 40, 11, 61, 20, stride=(2, 1)),
    FusedCase("gw8-last-block-moved-back", 1, 48, 48, 5, 31, 6),
    FusedCase("gw12-padded-lanes", 1, 24, 24, 6, 5, 2, stride=(1, 2)),
    FusedCase("gw40-three-vectors", 1, 80, 80, 4, 17, 2),
    FusedCase("narrows-in-group", 1, 32, 8, 5, 6, 4, stride=(2, 2)),
    FusedCase("2x2-image-stride2", 1, 16, 16, 2, 2, 4, stride=(2, 2)),
    FusedCase("wgrad-in-chunks", 3, 16, 16, 31, 33, 4),
    FusedCase("dense-in-parts", 2, 150, 136, 9, 10),
    FusedCase("dense-in-parts-stride2", 1, 136, 266, 6, 5, stride=(2, 2)),
    FusedCase("stacked-images", 9, 64, 96, 4, 5),
    FusedCase("stacked-images-stride2", 7, 96, 128, 5, 4, 4, stride=(2, 2)),
]
LARGER_POINTWISE = [
    FusedCase("several-panels", 3, 48, 40, 23, 19, kernel=1),
    FusedCase("panels-of-different-sizes", 1, 1040, 72, 9, 11, kernel=1),
    FusedCase("stride2-several-panels", 2, 36, 34, 27, 33, kernel=1, stride=(2, 2)),
    FusedCase("wgrad-in-chunks", 2, 24, 280, 31, 33, kernel=1),
]
SHAPES = {**ELEMENTWISE_SHAPES, "several-parts": (3, 20, 11, 63), "several-parts-of-a-plane": (1, 2, 70, 80)}


# Every dtype and layout, and both layouts of float32, whose paths differ most.
COMBINATIONS = ((torch.float32, True), (torch.float32, False), (torch.float16, False), (torch.bfloat16, True))


@pytest.mark.parametrize("case", [*GROUPED_CASES, *LARGER], ids=lambda case: case.id)
def test_convolutions(capability, case):
    for dtype, channels_last in COMBINATIONS:
        layout = {"channels_last": channels_last}
        fused_numerics.check_conv_stats(extension, case, dtype, **layout, weight_channels_last=channels_last)
        fused_numerics.check_conv_affine(extension, case, dtype, **layout)


@pytest.mark.parametrize("case", [*POINTWISE_CASES, *LARGER_POINTWISE], ids=lambda case: case.id)
def test_pointwise_convolutions(capability, case):
    for dtype in DTYPES:
        fused_numerics.check_conv_stats(extension, case, dtype, channels_last=True)
        fused_numerics.check_conv_affine(extension, case, dtype, channels_last=True)


@pytest.mark.parametrize(
    "case", [GROUPED_CASES[0], LARGER[2], POINTWISE_CASES[1], LARGER_POINTWISE[2]], ids=lambda case: case.id
)
def test_convolutions_without_their_options(capability, case):
    for channels_last in LAYOUTS if case.kernel == 3 else (True,):
        layout = {"channels_last": channels_last}
        fused_numerics.check_conv_stats(extension, case, **layout, centered=False)
        fused_numerics.check_conv_stats(extension, case, **layout, prologue=False)
        fused_numerics.check_conv_stats(extension, case, **layout, stats=False)
        fused_numerics.check_conv_affine(extension, case, **layout, relu=False)
        fused_numerics.check_conv_affine(extension, case, **layout, scaled=False, residual=False)
        fused_numerics.check_conv_affine(extension, case, **layout, shifted=False, residual=False, relu=False)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_elementwise(capability, shape):
    for dtype in DTYPES:
        for channels_last in LAYOUTS:
            generator = torch.Generator().manual_seed(3)
            z = make(shape, dtype, generator, channels_last=channels_last)
            fused_numerics.check_statistics(extension, z, channels_last)
            for residual in ("none", "plain", "affine"):
                options = {"channels_last": channels_last, "residual": residual, "centered": residual != "plain"}
                fused_numerics.check_affine_add_relu(extension, shape, dtype, **options)
            fused_numerics.check_pool(extension, z, make_affine(shape[1], generator), channels_last)


def everything(case: FusedCase, tensors: dict, channels_last: bool) -> list[torch.Tensor | None]:
    """What every launcher makes of a case, of equally many input and output channels."""
    x, weight, dz, affine = (tensors[name] for name in ("x", "weight", "dz", "affine"))
    place = (case.stride, case.groups, channels_last)
    z, mean, var = extension.conv_stats_fwd(x, affine, weight, *place, True)
    results = [z, mean, var, *extension.statistics(z, channels_last)]
    results += extension.conv_stats_bwd(dz, (z, mean, var, mean), x, affine, weight, *place, (True, True))
    results.append(extension.conv_affine(x, weight, affine[1], affine[2], z, True, *place))
    out = extension.affine_add_relu(z, affine, dz, affine, channels_last)
    wanted = (channels_last, (True, True, True))
    results += [out, *extension.affine_add_relu_bwd(dz, out, z, affine, dz, affine, *wanted)]
    results.append(extension.statistics_bwd(dz, z, mean, var, mean, channels_last))
    pooled, taps = extension.affine_relu_max_pool(z, affine, channels_last, True)
    results += [pooled, taps, *extension.affine_relu_max_pool_bwd(pooled, taps, z, affine, channels_last, (True, True))]
    return results


def make_tensors(case: FusedCase, channels_last: bool, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (case.batch, case.in_channels, case.height, case.width),
        "weight": (case.out_channels, case.in_channels // case.groups, case.kernel, case.kernel),
        "dz": case.output_shape,
    }
    tensors = {name: make(shape, dtype, generator, channels_last=channels_last) for name, shape in shapes.items()}
    return {**tensors, "affine": make_affine(case.in_channels, generator)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize(("channels", "width"), [(64, 4), (64, 16), (144, 144)])
@pytest.mark.parametrize("images", [(3, 39, 53), (9, 5, 6)], ids=str)
def test_results_do_not_depend_on_threads_or_repetition(
    capability, restore_threads, images, channels, width, stride, dtype
):
    batch, height, image_width = images
    case = FusedCase("threads", batch, channels, channels, height, image_width, channels // width, stride=stride)
    for channels_last in LAYOUTS:
        tensors = make_tensors(case, channels_last, dtype)
        torch.set_num_threads(1)
        wanted = everything(case, tensors, channels_last)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            actual = everything(case, tensors, channels_last)
            assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True)), threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
def test_pointwise_results_do_not_depend_on_threads_or_repetition(capability, restore_threads, stride, dtype):
    case = FusedCase("threads", 3, 96, 96, 39, 53, kernel=1, stride=stride)
    tensors = make_tensors(case, channels_last=True, dtype=dtype)
    torch.set_num_threads(1)
    wanted = everything(case, tensors, channels_last=True)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        actual = everything(case, tensors, channels_last=True)
        assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True)), threads


WIDER = [*GROUPED_CASES[::3], LARGER[2], LARGER[-1], *POINTWISE_CASES[:4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WIDER, ids=lambda case: case.id)
def test_a_float32_weight_is_rounded_and_its_gradient_is_not(capability, case, dtype):
    for channels_last in LAYOUTS if case.kernel == 3 else (True,):
        for weight_channels_last in LAYOUTS:
            tensors = make_tensors(case, channels_last, dtype)
            x, dz, affine = (tensors[name] for name in ("x", "dz", "affine"))
            layout = torch.channels_last if weight_channels_last else torch.contiguous_format
            weight = torch.randn(tensors["weight"].shape).contiguous(memory_format=layout)
            assert extension.takes_weight(weight, x)
            place = (case.stride, case.groups, channels_last)

            def results(weight, x=x, dz=dz, affine=affine, place=place):
                z, mean, var = extension.conv_stats_fwd(x, affine, weight, *place, True)
                gradients = extension.conv_stats_bwd(dz, (z, mean, var, mean), x, affine, weight, *place, (True, True))
                return [z, mean, var, *gradients]

            *wanted, rounded = results(weight.to(dtype))
            *actual, dw = results(weight)
            assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))
            assert dw.dtype == torch.float32
            assert dw.stride() == rounded.stride()
            assert torch.equal(dw.to(dtype), rounded)
            assert not torch.equal(dw, rounded.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_weight_serves_until_the_weight_changes(capability, dtype):
    case = FusedCase("packed", 2, 24, 40, 5, 7, kernel=1)
    tensors = make_tensors(case, channels_last=True, dtype=dtype)
    x, weight = tensors["x"], tensors.pop("weight")
    rest = (None, None, None, False, (1, 1), 1, True)
    wanted = extension.conv_affine(x, weight, *rest)
    extension.keep_packed(weight)
    assert torch.equal(extension.conv_affine(x, weight, *rest), wanted)
    packed = extension._KEPT[weight].packed["pointwise", 1]
    first = packed[0, :24, 0] if packed.dim() == 3 else packed[0, :12, 0].flatten()  # two inputs beside each other
    assert torch.equal(first.float(), weight[0, :, 0, 0].float())
    assert torch.equal(extension.conv_affine(x, weight, *rest), wanted)
    weight.zero_()
    assert not extension.is_kept(weight)
    assert not extension.conv_affine(x, weight, *rest).any()
    kept = len(extension._KEPT)
    del weight
    assert len(extension._KEPT) == kept - 1


@pytest.mark.parametrize("case", [*GROUPED_CASES, *LARGER], ids=lambda case: case.id)
def test_packed_3x3_weights_give_the_same_bits(capability, case):
    for dtype, channels_last in COMBINATIONS:
        tensors = make_tensors(case, channels_last, dtype)
        x, weight = tensors["x"], tensors["weight"]
        if case.groups == 1 and channels_last and extension.winograd_serves("packed_product", x.shape, weight.shape, 1):
            continue  # other sums; tests/test_winograd.py has them
        rest = (torch.randn(case.out_channels), None, tensors["dz"], True, case.stride, case.groups, channels_last)
        wanted = extension.conv_affine(x, weight, *rest)
        extension.keep_packed(weight)
        for _ in range(2):
            assert torch.equal(extension.conv_affine(x, weight, *rest), wanted)
        assert list(extension._KEPT[weight].packed) == [("filters", case.groups)]
        weight.neg_()
        actual = extension.conv_affine(x, weight, *rest)
        weight.neg_()
        assert not torch.equal(actual, wanted)


def test_a_weight_that_was_packed_is_packed_again_for_another_instruction_set(capability):
    case = FusedCase("capability", 1, 64, 64, 5, 5, 2)
    tensors = make_tensors(case, channels_last=True)
    x, weight = tensors["x"], tensors["weight"]
    extension.keep_packed(weight)
    rest = (None, None, None, False, case.stride, case.groups, True)
    here = extension.conv_affine(x, weight, *rest)
    extension.force_cpu_capability("portable")
    torch.testing.assert_close(extension.conv_affine(x, weight, *rest), here, rtol=1e-4, atol=1e-4)


def test_a_float32_weight_is_not_packed_for_other_images(capability):
    x, weight = torch.randn(1, 32, 6, 6).half(), torch.randn(32, 8, 3, 3)
    rest = (None, None, None, False, (1, 1), 4, False)
    wanted = extension.conv_affine(x, weight, *rest)
    extension.keep_packed(weight)
    assert torch.equal(extension.conv_affine(x, weight, *rest), wanted)


def test_a_packed_weight_of_another_size_is_refused(built):
    weight = torch.zeros(8, 4, 3, 3)
    packed = extension._pack_filters(weight, 2)
    arguments = (IMAGE, weight, packed[:-1], *[None] * 3, True, IMAGE, 1, 1, 2, False)
    with pytest.raises(RuntimeError, match=r"conv_affine: expected a contiguous float32 packed weight of shape"):
        extension._C.conv_affine(*arguments)
    with pytest.raises(RuntimeError, match=r"pack_filters: expected groups that divide 8 output channels, got 3"):
        extension._C.pack_filters(weight, packed, 3)
    with pytest.raises(RuntimeError, match=r"pack_filters: expected weight of shape \(8, 4, 3, 3\), got"):
        extension._C.pack_filters(weight[..., :1, :1].contiguous(), packed, 2)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("width", [1, 3, 4, 16, 24])
def test_nan_and_inf_stay_in_their_group(capability, width, poison):
    channels = 5 * width
    case = FusedCase("isolation", 2, channels, channels, 5, 9, 5)
    dirty = torch.arange(channels).div(width, rounding_mode="floor") == 2
    for channels_last in LAYOUTS:
        tensors = make_tensors(case, channels_last)
        wanted = everything(case, tensors, channels_last)
        for name in ("x", "dz"):
            tensors[name][:, dirty] = poison
        for clean, actual in zip(wanted, everything(case, tensors, channels_last), strict=True):
            axis = 1 if actual.shape[0] == case.batch else 0
            keep = (~dirty).nonzero().flatten()
            assert torch.equal(actual.index_select(axis, keep), clean.index_select(axis, keep))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_activation_is_rounded_and_masked_right(capability, dtype):
    """A 1x1 depthwise image is a product with the middle tap, 1 here: z is the rounded activation itself."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(4096, 16, 1, 1)
    weight = torch.zeros(16, 1, 3, 3, dtype=dtype)
    weight[:, 0, 1, 1] = 1
    scale = torch.tensor([1.0, -1.0, 1 / 3, 3.0, 1e-3, 0.4, 0.7, 5e-5] * 2)
    prologue = (None, scale, torch.zeros(16))
    place = (weight, (1, 1), 16, True)
    a = torch.relu(x.float() * scale.view(1, 16, 1, 1)).to(dtype)
    z, _, _ = extension.conv_stats_fwd(x, prologue, *place, False)
    torch.testing.assert_close(z, a, rtol=0, atol=0, equal_nan=True)
    dx, _, _, _ = extension.conv_stats_bwd(torch.ones_like(x), None, x, prologue, *place, (True, False))
    assert torch.equal(dx, scale.to(dtype).view(1, 16, 1, 1).where(~(a <= 0), 0))


@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (1, 20, 9, 9), (1, 1, 1, 1), (2, 17, 2, 5)], ids=str)
def test_pool_picks_what_pytorch_picks(capability, shape):
    """Few distinct values make many ties; the last of several NaN wins, and a NaN wins over Inf."""
    generator = torch.Generator().manual_seed(0)
    identity = (None, torch.ones(shape[1]), torch.zeros(shape[1]))
    for dtype in DTYPES:
        for special in (float("nan"), float("inf")):
            z = torch.randint(-1, 3, shape, generator=generator).to(dtype)
            z[torch.rand(shape, generator=generator) < 0.1] = special
            z[torch.rand(shape, generator=generator) < 0.02] = float("nan")
            wanted, indices = F.max_pool2d(torch.relu(z), 3, 2, 1, return_indices=True)
            for channels_last in LAYOUTS:
                image = z.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
                out, taps = extension.affine_relu_max_pool(image, identity, channels_last, True)
                torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
                row = torch.arange(out.shape[2])[:, None] * 2 - 1 + taps // 3
                column = torch.arange(out.shape[3]) * 2 - 1 + taps % 3
                assert torch.equal(row * shape[3] + column, indices)


def test_statistics_of_a_mean_far_larger_than_the_spread(capability):
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 20, 33, 31), (64, 20, 3, 1)):
        z = 1e3 + 1e-2 * torch.randn(shape, generator=generator)
        z[:, 1] = 0.1
        var, mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
        weight = torch.zeros(20, 1, 3, 3)
        weight[:, :, 1, 1] = 1
        for channels_last in LAYOUTS:
            image = z.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            through = extension.conv_stats_fwd(image, None, weight, (1, 1), 20, channels_last, True)
            assert torch.equal(through[0], image)
            for got_mean, got_var in (extension.statistics(image, channels_last), through[1:]):
                # Values are taken relative to one of them, which is exact here: only the spread is rounded.
                assert torch.equal(got_mean, mean.float())
                torch.testing.assert_close(got_var.double(), var, rtol=1e-5, atol=0)
                assert got_var[1] == 0


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
def test_a_gradient_is_added_to_another(capability, stride, kernel):
    """Of whole numbers, which no dtype rounds. Where the operator cannot, the other stays as it was."""
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(0)

        def numbers(*shape, dtype=dtype, generator=generator):
            drawn = torch.randint(-2, 3, shape, generator=generator).to(dtype)
            return drawn.to(memory_format=torch.channels_last)

        x, other, weight = numbers(2, 20, 5, 7), numbers(2, 20, 5, 7), numbers(36, 20, kernel, kernel)
        dz = numbers(2, 36, *(-(-size // step) for size, step in zip((5, 7), stride, strict=True)))
        arguments = (dz, None, x, None, weight, stride, 1, True, (True, False))
        alone, onto = extension.conv_stats_bwd(*arguments)[0], other.clone()
        result = extension.conv_stats_bwd(*arguments, onto=onto)[0]
        assert (result is onto) == (kernel == 1)
        assert torch.equal(result, alone + other if kernel == 1 else alone)
        assert kernel == 1 or torch.equal(onto, other)


def test_wanted_masks(built):
    case = FusedCase("wanted", 2, 16, 16, 6, 5, 4)
    tensors = make_tensors(case, True)
    x, dz, affine = tensors["x"], tensors["dz"], tensors["affine"]
    out = extension.affine_add_relu(x, affine, dz, affine, True)
    full = extension.affine_add_relu_bwd(dz, out, x, affine, dz, affine, True, (True, True, True))
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        part = extension.affine_add_relu_bwd(dz, out, x, affine, dz, affine, True, wanted)
        for result, reference, here in zip(part, full, wanted[:2] + wanted[2:] * 3, strict=True):
            assert torch.equal(result, reference) if here else result is None
    pooled, taps = extension.affine_relu_max_pool(x, affine, True, True)
    full = extension.affine_relu_max_pool_bwd(pooled, taps, x, affine, True, (True, True))
    for wanted in ((True, False), (False, True)):
        part = extension.affine_relu_max_pool_bwd(pooled, taps, x, affine, True, wanted)
        for result, reference, here in zip(part, full, (wanted[0], wanted[1], wanted[1]), strict=True):
            assert torch.equal(result, reference) if here else result is None


IMAGE, VECTOR = torch.zeros(2, 8, 5, 5), torch.zeros(8)
NHWC_IMAGE = IMAGE.to(memory_format=torch.channels_last)
WRONG = {
    "prologue-in-half": (
        "conv_stats_fwd",
        (IMAGE, None, VECTOR, None, torch.zeros(8, 4, 3, 3), IMAGE, None, None, 1, 1, 2, False),
        "conv_stats: expected all of scale and shift or none, got 1",
    ),
    "center-alone": (
        "conv_stats_fwd",
        (IMAGE, VECTOR, None, None, torch.zeros(8, 4, 3, 3), IMAGE, None, None, 1, 1, 2, False),
        "conv_stats: expected scale with center, got none",
    ),
    "mean-alone": (
        "conv_stats_fwd",
        (IMAGE, None, None, None, torch.zeros(8, 4, 3, 3), IMAGE, VECTOR, None, 1, 1, 2, False),
        "conv_stats: expected all of mean and var or none, got 1",
    ),
    "no-input-for-the-mask": (
        "conv_stats_dgrad",
        (
            *(IMAGE, *[None] * 4, torch.zeros(8, 4, 3, 3), None, None, VECTOR, VECTOR),
            *(IMAGE, VECTOR, VECTOR, None, 1, 1, 2, False),
        ),
        "conv_stats: expected all of input, scale, shift, dscale and dshift or none, got 4",
    ),
    "gradient-of-other-size": (
        "conv_stats_wgrad",
        (IMAGE, IMAGE[:1], *[VECTOR] * 3, IMAGE, None, None, None, torch.zeros(8, 4, 3, 3), 1, 1, 2, False),
        r"conv_stats: expected z of shape \(2, 8, 5, 5\), got \(1, 8, 5, 5\)",
    ),
    "3x3-onto-another": (
        "conv_stats_dgrad",
        (IMAGE, *[None] * 4, torch.zeros(8, 4, 3, 3), *[None] * 4, IMAGE, None, None, IMAGE, 1, 1, 2, False),
        "conv_stats: expected onto with a 1x1 convolution on the CPU",
    ),
    "residual-of-other-dtype": (
        "conv_affine",
        (IMAGE, torch.zeros(8, 4, 3, 3), None, None, None, IMAGE.half(), True, IMAGE, 1, 1, 2, False),
        "conv_affine: expected residual of the dtype of input, Float, got Half",
    ),
    "1x1-in-groups": (
        "conv_affine",
        (NHWC_IMAGE, torch.zeros(8, 4, 1, 1), *[None] * 4, True, NHWC_IMAGE, 1, 1, 2, True),
        r"conv_affine: expected weight of shape \(8, 4, 3, 3\), got \(8, 4, 1, 1\)",
    ),
    "1x1-in-nchw": (
        "conv_affine",
        (IMAGE, torch.zeros(8, 8, 1, 1), *[None] * 4, True, IMAGE, 1, 1, 1, False),
        r"conv_affine: expected weight of shape \(8, 8, 3, 3\), got \(8, 8, 1, 1\)",
    ),
    "packed-weight-of-a-3x3": (
        "conv_affine",
        (IMAGE, torch.zeros(8, 4, 3, 3), torch.zeros(1, 16, 32), *[None] * 3, True, IMAGE, 1, 1, 2, False),
        r"conv_affine: expected a contiguous float32 packed weight of shape \(1, 4096\), got Float \(1, 16, 32\)",
    ),
    "packed-weight-of-other-size": (
        "conv_affine",
        (NHWC_IMAGE, torch.zeros(8, 8, 1, 1), torch.zeros(1, 8, 32), *[None] * 3, True, NHWC_IMAGE, 1, 1, 1, True),
        r"conv_affine: expected a contiguous float32 packed weight of shape \(1, 16, 32\), got Float \(1, 8, 32\)",
    ),
    "packed-into-16-bit": (
        "pack_pointwise",
        (torch.zeros(8, 8, 1, 1), torch.zeros(1, 16, 32).half()),
        r"pack_pointwise: expected a contiguous float32 packed weight of shape \(1, 16, 32\), got Half",
    ),
    "3x3-to-pack": (
        "pack_pointwise",
        (torch.zeros(8, 8, 3, 3), torch.zeros(1, 16, 32)),
        r"pack_pointwise: expected weight of shape \(8, 8, 1, 1\), got \(8, 8, 3, 3\)",
    ),
    "vector-of-other-length": (
        "statistics",
        (IMAGE, VECTOR[:7], VECTOR, False),
        r"statistics: expected contiguous mean of shape \(8\), got \(7\)",
    ),
    "vector-of-other-dtype": (
        "statistics_bwd",
        (IMAGE, IMAGE, VECTOR, VECTOR.double(), VECTOR, IMAGE, False),
        "statistics_bwd: expected dmean of dtype Float, got Double",
    ),
    "other-layout": (
        "affine_add_relu",
        (IMAGE, None, VECTOR, VECTOR, *[None] * 4, IMAGE, True),
        "affine_add_relu: expected z dense in channels_last layout",
    ),
    "residual-without-output": (
        "affine_add_relu_bwd",
        (IMAGE, None, IMAGE, None, VECTOR, VECTOR, IMAGE, None, VECTOR, IMAGE, *[None] * 4, False),
        "affine_add_relu_bwd: expected out with residual, got none",
    ),
    "pooled-size": (
        "affine_relu_max_pool",
        (IMAGE, None, VECTOR, VECTOR, torch.zeros(2, 8, 2, 2), None, False),
        r"affine_relu_max_pool: expected output of shape \(2, 8, 3, 3\), got \(2, 8, 2, 2\)",
    ),
    "taps-of-other-dtype": (
        "affine_relu_max_pool_bwd",
        (*[torch.zeros(2, 8, 3, 3)] * 2, IMAGE, None, VECTOR, VECTOR, IMAGE, None, None, False),
        "affine_relu_max_pool_bwd: expected taps of dtype Byte, got Float",
    ),
}


@pytest.mark.parametrize(("op", "arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(built, op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(extension._C, op)(*arguments)
