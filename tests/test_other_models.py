"""`fuse_` on models that others wrote: the results stay the same, and what can be fused is."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from resnext import GroupedConv2d, fuse_, unfuse_

from . import attention_models, odd_models, other_models
from .other_models import Other

CASES = [*other_models.MODELS, *attention_models.MODELS, *odd_models.MODELS]
every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)

Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread(restore_threads: None) -> None:
    """The models are so small that several threads would only wait for each other."""
    torch.set_num_threads(1)


def build(case: Other, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model, the same in every call, no parameter or running statistic of it at its initial value."""
    torch.manual_seed(0)
    model = case.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer) / 2)
    return model.to(dtype)


def inputs_of(case: Other, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in case.shapes]


def tensors(result: object) -> list[Tensor]:
    """The tensors in what a model returns."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        return [tensor for value in result.values() for tensor in tensors(value)]
    return [tensor for value in result for tensor in tensors(value)] if isinstance(result, (tuple, list)) else []


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def train_and_evaluate(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: list[Tensor]) -> Results:
    """Outputs and gradients of training steps and of evaluation; parameters and buffers at the end."""
    results: Results = {}

    def step(name: str) -> None:
        arguments = [each.clone().requires_grad_() for each in inputs]
        outputs = tensors(model(*arguments))
        optimizer.zero_grad()
        sum(
            (output * torch.linspace(-1, 1, output.numel()).to(output).view_as(output)).sum() for output in outputs
        ).backward()
        results.update({f"{name}: output {i}": output.detach() for i, output in enumerate(outputs)})
        results.update({f"{name}: input {i}": each.grad for i, each in enumerate(arguments) if each.grad is not None})
        results.update({f"{name}: {k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})

    model.train()
    for number in range(2):  # of which random.random() makes 0.84 and 0.13: the two ways of a coin
        seed(number)
        step(f"step {number}")
        optimizer.step()
    model.eval()
    step("evaluation")
    with torch.no_grad():
        for name in ("inference", "inference again"):
            results.update({f"{name} {i}": output for i, output in enumerate(tensors(model(*inputs)))})
    return results | {name: value.clone() for name, value in model.state_dict().items()}


def errors(results: Results, expected: Results) -> dict[str, float]:
    """Relative to the larger of the tensor's norm and one."""
    assert results.keys() == expected.keys()
    return {
        name: float((results[name].double() - value.double()).norm()) / max(1.0, float(value.double().norm()))
        for name, value in expected.items()
    }


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


@functools.cache
def exact(case: Other) -> Results:
    """What the model as it was built gives in float64."""
    model = build(case, torch.float64)
    return train_and_evaluate(model, optimizer_of(model), inputs_of(case, torch.float64))


@every_model
def test_results_stay_the_same(case):
    """In float64, where nothing but the order of additions may differ; an optimizer made before still works."""
    model = build(case, torch.float64)
    optimizer = optimizer_of(model)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    fuse_(model)
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    results = train_and_evaluate(model, optimizer, inputs_of(case, torch.float64))
    wrong = {name: error for name, error in errors(results, exact(case)).items() if not error <= 1e-10}
    assert not wrong


@pytest.mark.parametrize("case", other_models.MODELS, ids=lambda case: case.id)
def test_results_stay_the_same_in_float32(case):
    """Twice the error that the model itself makes in float32 (see block_cases.py)."""
    inputs = inputs_of(case, torch.float32)
    rounding = 0.0
    for layout in (torch.contiguous_format, torch.channels_last):
        plain = build(case).to(memory_format=layout)
        results = train_and_evaluate(plain, optimizer_of(plain), [each.to(memory_format=layout) for each in inputs])
        rounding = max(rounding, *errors(results, exact(case)).values())
    model = build(case)
    fuse_(model)
    results = train_and_evaluate(model, optimizer_of(model), inputs)
    wrong = {name: error for name, error in errors(results, exact(case)).items() if not error <= 2 * rounding}
    assert not wrong, f"allowed {2 * rounding:.3g}"


@every_model
def test_what_is_fused(case):
    model = build(case)
    classes = {name: type(module) for name, module in model.named_modules()}
    report = fuse_(model)
    assert {each.name: each.kind for each in report.fused if each.kind != "convolution"} == case.fused
    converted = {each.name for each in report.fused if each.kind == "convolution"}
    assert converted >= set(case.grouped)
    assert all(isinstance(model.get_submodule(name), GroupedConv2d) for name in converted if classes[name] is nn.Conv2d)
    assert fuse_(model) == report
    assert {name: type(module).__name__ for name, module in model.named_modules()} == {
        name: cls.__name__ for name, cls in classes.items()
    }
    assert unfuse_(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert fuse_(model) == report


@pytest.mark.parametrize("end", other_models.WRITTEN_SUMS.values(), ids=other_models.WRITTEN_SUMS.keys())
def test_what_a_model_writes_to_its_input_is_written(end):
    plain = build(Other("written", lambda: other_models.SumBlock(end)), torch.float64).eval()
    model = build(Other("written", lambda: other_models.SumBlock(end)), torch.float64).eval()
    fuse_(model)
    (x,) = inputs_of(Other("written", lambda: model), torch.float64)
    given = [x.clone(), x.clone()]
    with torch.no_grad():
        torch.testing.assert_close(model(given[0]), plain(given[1]))
    torch.testing.assert_close(*given)
    assert not torch.equal(given[0], x)


def test_lazy_modules():
    """They have no shapes before their first input: nothing to convert, and nothing broken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyConv2d(8, 3, padding=1, groups=4), nn.LazyBatchNorm2d(), nn.ReLU())
    fuse_(model)
    x = torch.randn(2, 8, 5, 5)
    model(x)
    assert {each.name: each.kind for each in fuse_(model).fused} == {"": "chain", "0": "convolution"}
    model.eval()
    torch.testing.assert_close(model(x), torch.relu(model[1](model[0](x))))


# What may happen to a model between its conversion and a call.
CHANGES: dict[str, Callable[[odd_models.Settings], object]] = {
    "attribute": lambda model: setattr(model, "residual", False),
    "in a dictionary": lambda model: model.options.update(residual=False),
    "in a list": lambda model: model.skips.append(0.5),
    "in an object": lambda model: setattr(model.config, "residual", False),
    "activation replaced": lambda model: setattr(model, "relu", nn.SiLU()),
    "norm replaced": lambda model: setattr(model, "bn1", nn.GroupNorm(2, 8).double()),
    "norm removed": lambda model: setattr(model, "bn2", nn.Identity()),
    "convolution replaced": lambda model: setattr(model, "conv1", nn.Conv2d(8, 8, 5, padding=2).double()),
    "eps": lambda model: setattr(model.bn1, "eps", 0.3),
    "dilated": lambda model: (setattr(model.conv1, "dilation", (2, 2)), setattr(model.conv1, "padding", (2, 2))),
    "padding mode": lambda model: (
        setattr(model.conv1, "padding_mode", "reflect"),
        setattr(model.conv1, "_reversed_padding_repeated_twice", [1, 1, 1, 1]),
    ),
    "parameter replaced": lambda model: setattr(model.conv1, "weight", nn.Parameter(model.conv1.weight.detach() * 2)),
    "bias added": lambda model: setattr(model.conv1, "bias", nn.Parameter(torch.ones(8).double())),
    "affine removed": lambda model: (setattr(model.bn1, "weight", None), setattr(model.bn1, "bias", None)),
    "parametrized": lambda model: parametrizations.weight_norm(model.conv1),
    "pruned": lambda model: prune.l1_unstructured(model.conv1, "weight", 0.5),
    "frozen": lambda model: model.bn1.eval().requires_grad_(False),
    "hook": lambda model: model.bn1.register_forward_hook(lambda module, args, output: output * 2),
    "forward of a child": lambda model: setattr(model.bn2, "forward", torch.tanh),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_after_conversion_are_followed(change):
    case = Other("settings", odd_models.Settings)
    plain, model = build(case, torch.float64), build(case, torch.float64)
    assert [each.kind for each in fuse_(model).fused if not each.name] == ["block"]
    (x,) = inputs_of(case, torch.float64)
    for each in (plain, model):
        torch.manual_seed(1)
        change(each)
    expected = train_and_evaluate(plain, optimizer_of(plain), [x])
    results = train_and_evaluate(model, optimizer_of(model), [x])
    wrong = {name: error for name, error in errors(results, expected).items() if not error <= 1e-10}
    assert not wrong
    assert not torch.equal(results["inference 0"], exact(case)["inference 0"])
