"""Launch settings are a pure function of sizes, and valid for every size."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from resnext.kernels.candidates import candidates
from resnext.kernels.config import (
    ConvProblem,
    StripsConfig,
    TapsConfig,
    choose_config,
    fits_strips,
    round_up_to_block,
)

OPS = ("fwd", "dgrad", "wgrad")


def make_problem(op, group_in, *, group_out=None, groups=8, batch=2, size=(9, 9), stride=(1, 1), dtype=torch.float16):
    channels = (group_in * groups, (group_out or group_in) * groups)
    return ConvProblem(op, batch, *channels, *size, stride, groups, dtype, "cuda", True)


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def check(config: StripsConfig | TapsConfig, problem: ConvProblem) -> None:
    assert 1 <= config.merged <= problem.groups
    assert is_power_of_two(config.block_m)
    assert config.block_m >= 16
    assert config.num_warps in (1, 2, 4, 8)
    assert config.num_stages in (1, 2, 3, 4)
    assert 1 <= config.splits < 2**31
    assert config.max_registers in (None, 255)
    if problem.op != "wgrad":
        assert config.splits == 1
    if isinstance(config, StripsConfig):
        assert fits_strips(problem)
        assert config.strip in (1, 2, 4)
        assert config.band >= 1
        return
    group_k, group_n = problem.group_in, problem.group_out
    if problem.op == "dgrad":
        group_k, group_n = group_n, group_k
    assert is_power_of_two(config.block_k)
    assert is_power_of_two(config.block_n)
    assert min(config.block_k, config.block_n) >= 16
    if config.merged > 1:
        assert config.merged * group_k <= config.block_k
        assert config.merged * group_n <= config.block_n


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_valid_for_every_group_width(op, stride):
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for group_in, dtype, allow_tf32, fused in itertools.product(range(1, 129), dtypes, (False, True), (False, True)):
        for group_out, groups in ((group_in, 8), (2 * group_in, 3), (1, 1)):
            problem = make_problem(op, group_in, group_out=group_out, groups=groups, stride=stride, dtype=dtype)
            config = choose_config(problem, fused=fused, allow_tf32=allow_tf32)
            check(config, problem)
            assert config == choose_config(problem, fused=fused, allow_tf32=allow_tf32)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (4096, 4096), (1, 2**20)], ids=str)
@pytest.mark.parametrize("batch", [1, 70_001, 2**24])
@pytest.mark.parametrize("op", OPS)
def test_valid_for_tiny_and_huge_sizes(op, batch, size):
    for group_in, stride in itertools.product((1, 4, 32, 64), ((1, 1), (2, 2))):
        problem = make_problem(op, group_in, batch=batch, size=size, stride=stride)
        for num_sms in (1, 132, 512):
            check(choose_config(problem, num_sms=num_sms), problem)


@pytest.mark.parametrize("fusion", ["plain", "stats", "affine"])
@pytest.mark.parametrize("width", [4, 24, 32, 64, 112])
@pytest.mark.parametrize("op", OPS)
def test_candidates_are_valid_and_distinct(op, width, fusion):
    problem = make_problem(op, width)
    configs = candidates(problem, fusion=fusion)
    assert configs[0] == choose_config(problem, fused=fusion != "plain", crowded=fusion == "stats")
    assert len(configs) == len(set(configs)) > 10
    for config in configs:
        check(config, problem)


def test_narrow_groups_fill_one_matrix_tile():
    for width, merged in ((1, 16), (2, 8), (3, 5), (4, 4), (8, 2), (12, 1), (16, 1), (32, 1)):
        assert choose_config(make_problem("fwd", width, groups=32)).merged == merged


def test_form_follows_width_stride_and_precision():
    assert isinstance(choose_config(make_problem("fwd", 32)), StripsConfig)
    assert isinstance(choose_config(make_problem("fwd", 33)), TapsConfig)
    assert isinstance(choose_config(make_problem("fwd", 4, stride=(2, 1))), TapsConfig)
    single = make_problem("fwd", 4, dtype=torch.float32)
    assert isinstance(choose_config(single), StripsConfig)
    assert isinstance(choose_config(single, allow_tf32=False), TapsConfig)
    assert isinstance(choose_config(make_problem("wgrad", 32)), StripsConfig)
    assert isinstance(choose_config(make_problem("wgrad", 32), fused=True), TapsConfig)


def test_more_multiprocessors_never_get_fewer_programs():
    problem = make_problem("fwd", 4, groups=32, batch=8, size=(56, 56))
    bands = [choose_config(problem, num_sms=num_sms).band for num_sms in (1, 16, 132, 512)]
    assert bands == sorted(bands, reverse=True)
    problem = make_problem("wgrad", 4, groups=32, batch=256, size=(56, 56))
    splits = [choose_config(problem, num_sms=num_sms).splits for num_sms in (1, 16, 132, 512)]
    assert splits == sorted(splits)


@pytest.mark.parametrize(
    ("channels", "block"), [(1, 16), (16, 16), (17, 32), (24, 32), (32, 32), (33, 64), (112, 128), (128, 128)]
)
def test_round_up_to_block(channels, block):
    assert round_up_to_block(channels) == block


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 8), (56, 55)], ids=str)
def test_output_size(size, stride):
    problem = make_problem("fwd", 4, size=size, stride=stride)
    y = torch.nn.functional.conv2d(torch.empty(1, 1, *size), torch.empty(1, 1, 3, 3), stride=stride, padding=1)
    assert (problem.out_height, problem.out_width) == tuple(y.shape[2:])
    assert (problem.group_in, problem.group_out) == (4, 4)


def test_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import resnext.kernels.config"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
