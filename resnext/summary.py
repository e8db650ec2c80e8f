"""`summary`: torchinfo's table of a model, with the backend of each convolution and block, and FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resnext import fusion
from resnext.convert import Converted, FusedModule, forced, why_not_fused
from resnext.effects import modes_kept
from resnext.kernels import serving_backend
from resnext.layers import GroupedConv2d, child
from resnext.steps import Plan, plan_of

if TYPE_CHECKING:
    from torchinfo import ModelStatistics


@dataclass(frozen=True)
class Summary:
    """What `summary` found; prints as the table.

    Attributes:
        table: The table.
        statistics: torchinfo's result.
        backends: By the name of the module in the model. Of a convolution that was called: ``"triton"``, ``"cuda"``,
            ``"cpu"`` or ``"torch"``. Of a converted block or chain: ``"fused block"`` or ``"fused chain"`` with the
            backends of its convolutions, or ``"not fused"``.
        not_fused: Why converted blocks and chains would run their children one by one, by name.
        flops: Floating-point operations of convolutions and matrix products in one forward pass; a multiplication
            and an addition are two.
    """

    table: str
    statistics: ModelStatistics
    backends: dict[str, str]
    not_fused: dict[str, str]
    flops: int

    def __str__(self) -> str:
        return self.table


def summary(
    model: nn.Module,
    input_size: Sequence[Any] | None = None,
    *,
    input_data: Any = None,
    depth: int = 3,
    col_names: Sequence[str] = ("output_size", "num_params", "mult_adds"),
    row_settings: Sequence[str] = ("depth",),
    mode: str = "eval",
    verbose: bool = True,
    **kwargs: Any,
) -> Summary:
    """Summarize a model, ours or anyone's: torchinfo's table, with the backend of each convolution and block.

    Needs the package ``torchinfo`` (``resnext[train]``). Runs one forward pass where the model is, without gradients,
    child by child, so that the table has every row of the plain model's; the backends are those of an ordinary
    forward pass with the same input.

    Args:
        model: The model; left as it is, but for running statistics if ``mode`` is ``"train"``.
        input_size: Shape of the input, (N, C, H, W); for several inputs a list of shapes.
        input_data: The input itself instead of its shape: a tensor, a list of arguments or a dict of keywords.
        depth: How many levels of submodules to show.
        col_names: The columns beside the backend, as torchinfo names them.
        row_settings: What else rows show, as torchinfo names it.
        mode: ``"eval"`` or ``"train"``.
        verbose: Whether to print the table.
        kwargs: Further arguments of the model's forward.

    Returns:
        The table, and what is in it.

    Raises:
        ImportError: torchinfo is not installed.
        ValueError: Neither or both of ``input_size`` and ``input_data`` are given.
    """
    try:
        import torchinfo
    except ImportError as error:
        message = "summary: expected the package torchinfo, got none; install it, or resnext[train]"
        raise ImportError(message) from error
    if (input_size is None) == (input_data is None):
        given = "neither" if input_size is None else "both"
        raise ValueError(f"summary: expected input_size or input_data, got {given}; give one of them")

    not_fused = why_not_fused(model)  # before anything observes the model
    units: dict[str, Any] = {name: unit for name, unit in model.named_modules() if isinstance(unit, FusedModule)}
    fused = {conv: unit for name, unit in units.items() if name not in not_fused for conv in _convolutions(unit)}
    if input_size is not None:  # torchinfo would make float32, and move the model to a GPU if there is one
        input_data = _random(model, input_size)
    with modes_kept(model), _observed(model, fused) as served, FlopCounterMode(display=False) as counter:
        statistics = torchinfo.summary(
            model,
            input_data=input_data,
            col_names=col_names,
            depth=depth,
            mode=mode,
            row_settings=row_settings,
            verbose=0,
            **kwargs,
        )

    column = dict(served)
    for name, unit in units.items():
        column[unit] = "not fused" if name in not_fused else _of_unit(unit, served)
    flops = counter.get_total_flops()
    result = Summary(
        table=_table(statistics, column, flops, not_fused),
        statistics=statistics,
        backends={name: column[module] for name, module in model.named_modules() if module in column},
        not_fused=not_fused,
        flops=flops,
    )
    if verbose:
        print(result)
    return result


def _random(model: nn.Module, input_size: Sequence[Any]) -> list[Tensor]:
    """Inputs of the shape, or shapes, in the dtype and on the device of the model."""
    shapes = [input_size] if isinstance(input_size[0], int) else input_size
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return [torch.rand(*shape, dtype=like.dtype, device=like.device) for shape in shapes]


def _convolutions(unit: Any) -> list[nn.Module]:
    """The convolutions that the plan of a `FusedModule` stands for."""
    return [child(unit, name) for name in cast(Plan, plan_of(unit)).every_conv]


def _of_unit(unit: Any, served: Mapping[nn.Module, str]) -> str:
    backends = sorted({served[conv] for conv in _convolutions(unit) if conv in served})
    return f"fused {cast(Plan, plan_of(unit)).kind}: {', '.join(backends)}"


@contextmanager
def _observed(model: nn.Module, fused: Mapping[nn.Module, nn.Module]) -> Iterator[dict[nn.Module, str]]:
    """Collect the backend that would serve each convolution that is called, if nobody observed it.

    Args:
        model: The model.
        fused: The convolutions that would run as a part of a block or chain.
    """
    served: dict[nn.Module, str] = {}
    turned: dict[nn.Module, bool] = {}

    def enter(unit: Any, args: tuple[Any, ...]) -> None:
        with forced(unit._fused_backend):
            turned[unit] = fusion.works_in_channels_last(unit, cast(Plan, plan_of(unit)), args)

    def observe(conv: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        served[conv] = "torch"
        if (conv in fused or isinstance(conv, (Converted, GroupedConv2d))) and conv.padding_mode == "zeros":
            x = args[0] if args else kwargs["input"]
            unit = fused.get(conv, conv)
            if turned.get(unit):
                x = torch.empty_like(x, memory_format=torch.channels_last)
            with forced(getattr(unit, "_fused_backend", "auto")):
                served[conv] = serving_backend(
                    x, conv.weight, conv.stride, conv.padding, conv.dilation, conv.groups, fused=conv in fused
                )

    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    handles = [conv.register_forward_hook(observe, with_kwargs=True) for conv in convolutions]
    handles += [unit.register_forward_pre_hook(enter) for unit in set(fused.values())]
    try:
        yield served
    finally:
        for handle in handles:
            handle.remove()


def _table(
    statistics: ModelStatistics, column: Mapping[nn.Module, str], flops: int, not_fused: Mapping[str, str]
) -> str:
    """The table of torchinfo with one column more, and what it does not say below."""
    lines = str(statistics).splitlines()
    rows = [layer.module for layer in statistics.summary_list if layer.depth <= statistics.formatting.max_depth]
    width = max(map(len, lines[: len(rows) + 3])) + 1
    values = ["Backend", *(column.get(module, "") for module in rows)]
    divider = "=" * (width + max(map(len, values)))
    # A divider, the header, a divider, the rows, a divider, and so on.
    for index, value in zip((1, *range(3, len(rows) + 3)), values, strict=True):
        lines[index] = f"{lines[index]:<{width}}{value}".rstrip()
    lines.insert(-1, f"Forward FLOPs (G): {flops / 1e9:.2f}")
    lines[-1:-1] = [f"Not fused: {name or 'the model itself'}: {reason}" for name, reason in not_fused.items()]
    return "\n".join(divider if set(line) == {"="} else line for line in lines)
