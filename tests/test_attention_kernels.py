"""Channel attention in Triton: compiled on a GPU, else interpreted (in a process of its own: test_triton_fused.py)."""

from __future__ import annotations

import functools

import pytest
import torch

from .attention_numerics import check_attention
from .fused_numerics import ELEMENTWISE_SHAPES
from .interpreter import DEVICE, RUNS_HERE, arithmetic, compiles, here, not_here, run_tests

pytest.importorskip("triton")

if RUNS_HERE:
    from resnext.kernels import attention_kernels


@not_here
def test_in_the_interpreter():
    run_tests(__file__, timeout=900)


@here
@pytest.mark.parametrize(
    ("dtype", "channels_last", "options"),
    [
        (torch.float32, True, {"residual": "affine", "relu": False}),
        (torch.float16, True, {"residual": "plain", "relu": False, "centered": False}),
        (torch.bfloat16, True, {}),
        (torch.float32, False, {"residual": "affine"}),
        (torch.bfloat16, False, {"affine": False, "residual": "plain"}),
        (torch.float32, True, {"affine": False, "relu": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", ELEMENTWISE_SHAPES.values(), ids=ELEMENTWISE_SHAPES)
def test_launchers(shape, dtype, channels_last, options):
    place = {"channels_last": channels_last, "arithmetic": arithmetic(dtype), "device": DEVICE}
    check_attention(attention_kernels, shape, dtype, **place, **options)


@here
@pytest.mark.parametrize("num_sms", [1, 400])
def test_shares_of_an_image(monkeypatch, num_sms):
    """One share of each image, and one for each block."""
    monkeypatch.setattr(attention_kernels, "num_sms", lambda device: num_sms)
    for channels_last in (True, False):
        check_attention(
            attention_kernels, (2, 12, 43, 27), channels_last=channels_last, residual="affine", device=DEVICE
        )


@functools.cache
def launches(dtype: torch.dtype, channels_last: bool) -> list[tuple[object, dict]]:
    """Every kernel in its fullest and its barest form, with the tensors it would run on."""
    from resnext.kernels import attention_kernels
    from resnext.kernels.launch import Launch

    seen = []
    layout = torch.channels_last if channels_last else torch.contiguous_format
    z = torch.empty((256, 64, 56, 56), dtype=dtype, device="meta", memory_format=layout)
    gate, vector = torch.empty((256, 64, 1, 1), device="meta"), torch.empty(64, device="meta")
    affine = (vector, vector, vector)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", lambda self, **tensors: seen.append((self, tensors)))
        attention_kernels.affine_mean(z, affine, True, channels_last)
        attention_kernels.affine_gate(z, affine, True, gate, z, affine, channels_last)
        attention_kernels.affine_gate(z, None, False, gate, z, None, channels_last)
        attention_kernels.affine_gate_bwd(z, z, z, affine, True, z, affine, channels_last, True)
        attention_kernels.affine_gate_bwd(z, None, z, affine, True, None, None, channels_last, False)
        attention_kernels.gated_affine_bwd(z, affine, True, z, z, gate, gate, channels_last)
        attention_kernels.gated_affine_bwd(z, affine, False, None, None, None, gate, channels_last)
    return seen


@compiles
@pytest.mark.parametrize(
    ("dtype", "channels_last", "arch"),
    [
        (torch.bfloat16, True, 80),
        (torch.bfloat16, True, 90),
        (torch.bfloat16, True, 100),
        (torch.float32, True, 90),
        (torch.float16, False, 90),
    ],
    ids=str,
)
def test_kernels_compile_without_spills(dtype, channels_last, arch):
    from . import aot

    for launch, tensors in launches(dtype, channels_last):
        name = launch.kernel.__name__
        aot.assert_no_spills(launch, tensors, arch, wide_loads="sum_partials" not in name)
