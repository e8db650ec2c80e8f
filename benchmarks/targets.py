"""What is tuned: a pass of a convolution, with any launch settings and on any backend, and the gate before its timing.

Operands are made once per layer. Activations are in channels_last, weights too. What is fused: ``"stats"`` has
statistics, and a prologue where blocks have one, in the forward pass, the gradients of both in the others; ``"affine"``
ends in a ReLU, with a residual where channels grow, as in the last convolution of a bottleneck.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import contenders
import torch
from ahead_of_time import Usage, compile_launch, pointers, usage
from shapes import BLOCKS, Layer
from torch import Tensor
from verify import less_accurate, mismatch, rms

from resnext.kernels import dispatch, extension, grouped_conv, grouped_conv_plan, pointwise_conv, reference, tuning
from resnext.kernels.candidates import candidates, pointwise_candidates
from resnext.kernels.composed import Composed
from resnext.kernels.config import Config, ConvProblem, PointwiseConfig
from resnext.kernels.launch import Launch, architecture, num_sms

AnyConfig = Config | PointwiseConfig
Results = dict[str, Tensor]
# By kernel size, fusion and pass: the kernel's optional pointers.
_POINTERS = {
    (3, "stats", "fwd"): "src_center src_scale src_shift partials",
    (3, "stats", "dgrad"): "src_z src_center src_scale src_shift dst_side dst_center dst_scale dst_shift partials",
    (3, "stats", "wgrad"): "grad_z grad_center grad_scale grad_shift x_center x_scale x_shift",
    (3, "affine", "fwd"): "dst_scale dst_shift",
    (1, "stats", "fwd"): "x_center x_scale x_shift partials",
    (1, "stats", "dgrad"): "z z_center z_scale z_shift x x_center x_scale x_shift partials",
    (1, "stats", "wgrad"): "z z_center z_scale z_shift x_center x_scale x_shift",
    (1, "affine", "fwd"): "y_scale y_shift",
}
_RESIDUAL = {3: "dst_side", 1: "residual"}
# Of 1x1 convolutions, those that a prologue has.
_VECTORS = ("x_center", "x_scale", "x_shift")
_PROLOGUE = {"fwd": _VECTORS, "dgrad": ("x", *_VECTORS, "partials"), "wgrad": _VECTORS}
_WANTED = {"dgrad": (True, False), "wgrad": (False, True), "bwd": (True, True)}
_GRADIENTS = ("dx", "dscale", "dshift", "dw")


@dataclass(frozen=True)
class Target:
    """One entry of the file to be.

    Attributes:
        layer: Its sizes; a 1x1 convolution has one group.
        kernel_size: 3 or 1.
        fusion: One of `tuning.FUSIONS`; 1x1 convolutions are ours with what is fused only.
        op: One of `tuning.OPS`; ``"bwd"``, of ``"stats"`` only, has no settings of its own.
        batch: Images.
        dtype: Of every operand.
        device_type: ``"cuda"``, or ``"cpu"`` for Triton's interpreter.
        prologue: Whether there is one in what ``"stats"`` fuses: not in a block's first convolution and its shortcut.
    """

    layer: Layer
    kernel_size: int
    fusion: str
    op: str
    batch: int
    dtype: torch.dtype
    device_type: str
    prologue: bool = True

    @property
    def layer_name(self) -> str:
        """What the table calls the layer."""
        name = self.layer.name
        return name if self.kernel_size == 3 else name.rpartition("_")[0] + "_1x1"

    @property
    def problem(self) -> ConvProblem:
        """What the launchers take it for."""
        layer = self.layer
        sizes = (self.batch, layer.in_channels, layer.out_channels, layer.height, layer.width)
        op: Any = "dgrad" if self.op == "bwd" else self.op
        return ConvProblem(
            op, *sizes, (layer.stride, layer.stride), layer.groups, self.dtype, self.device_type, channels_last=True
        )

    @property
    def key(self) -> tuning.Key:
        """The key of its entry."""
        return tuning.key_of(
            self.problem, fusion=self.fusion, kernel_size=self.kernel_size, allow_tf32=self.allow_tf32, op=self.op
        )

    @property
    def allow_tf32(self) -> bool:
        """Whether products may be rounded to TF32."""
        return tuning.tf32_allowed(self.dtype)

    @property
    def residual(self) -> bool:
        """Whether a residual is added."""
        return self.fusion == "affine" and self.layer.out_channels > self.layer.in_channels

    def candidates(self, device: torch.device) -> list[AnyConfig]:
        """Settings worth measuring, the heuristic's choice first."""
        options: dict[str, Any] = {"allow_tf32": self.allow_tf32}
        options |= {"num_sms": num_sms(device), "arch": architecture(device)}
        if self.kernel_size == 1:
            return [*pointwise_candidates(self.problem, affine=self.fusion == "affine", **options)]
        return [*candidates(self.problem, fusion=self.fusion, **options)]

    def launch(self, config: Any) -> Launch:
        """The launch with given settings."""
        names = _POINTERS.get((self.kernel_size, self.fusion, self.op), "").split()
        if self.residual:
            names.append(_RESIDUAL[self.kernel_size])
        if not self.prologue:
            names = [name for name in names if name not in _PROLOGUE[self.op]]
        options = {"allow_tf32": self.allow_tf32, "fused": frozenset(f"{name}_ptr" for name in names)}
        options["relu"] = self.fusion == "affine"
        if self.kernel_size == 1:
            return pointwise_conv.plan(self.problem, config, **options)
        taps_outside = self.op != "wgrad" and self.layer.group_width > 1
        return grouped_conv_plan.plan(self.problem, config, taps_outside=taps_outside, **options)

    def settings(self, config: AnyConfig) -> dict[str, AnyConfig]:
        """The keyword of the Triton launcher that takes launch settings."""
        if self.fusion == "stats" and self.op == "wgrad":
            return {"wgrad_config": config}
        return {"dgrad_config" if self.kernel_size == 1 and self.op == "dgrad" else "config": config}

    def triton(self) -> Any:
        """The module of the Triton launchers."""
        return pointwise_conv if self.kernel_size == 1 else grouped_conv

    def others(self, device: torch.device) -> dict[str, tuple[Any, bool]]:
        """Backend -> launchers that can serve it as well, and whether in channels_last."""
        plain = self.fusion == "plain"
        torch_launchers = reference if plain else Composed(dispatch.elementwise(self.dtype, device))
        found: dict[str, tuple[Any, bool]] = {"torch": (torch_launchers, True), "torch_nchw": (torch_launchers, False)}
        if self.kernel_size == 3 and dispatch.unsupported("cuda", self.dtype, device) is None:
            found["cuda"] = (extension, True)
        return found

    def operands(self, device: torch.device) -> Results:
        """Random tensors by name."""
        problem, layer = self.problem, self.layer
        generator = torch.Generator(device).manual_seed(0)
        weight_shape = (layer.out_channels, layer.group_width, self.kernel_size, self.kernel_size)
        shapes = {"x": layer.input_shape(self.batch), "weight": weight_shape}
        shapes |= dict.fromkeys(("grad", "z", "residual"), layer.output_shape(self.batch))
        vectors = dict.fromkeys(("center", "scale", "shift"), layer.in_channels)
        vectors |= dict.fromkeys(("mean", "dmean", "dvar", "y_scale", "y_shift"), layer.out_channels)
        tensors = {}
        for name, shape in shapes.items():
            std = 1 / math.sqrt(math.prod(weight_shape[1:])) if name == "weight" else 1.0
            tensor = torch.randn(shape, generator=generator, device=device).mul_(std).to(problem.dtype)
            tensors[name] = tensor.contiguous(memory_format=torch.channels_last)
        for name, channels in vectors.items():
            tensors[name] = torch.randn(channels, generator=generator, device=device)
        return tensors

    def run(self, launchers: Any, t: Mapping[str, Tensor], channels_last: bool = True, **settings: Any) -> Results:
        """Compute it: results by name."""
        place = (self.problem.stride, self.layer.groups, channels_last)
        if self.fusion == "affine":
            residual = t["residual"] if self.residual else None
            ends = (t["y_scale"], t["y_shift"], residual, True)
            return {"y": launchers.conv_affine(t["x"], t["weight"], *ends, *place, **settings)}
        if self.fusion == "stats":
            prologue = (t["center"], t["scale"], t["shift"]) if self.prologue else None
            if self.op == "fwd":
                found = launchers.conv_stats_fwd(t["x"], prologue, t["weight"], *place, True, **settings)
                return dict(zip(("z", "mean", "var"), found, strict=True))
            grad_prologue = (t["z"], t["mean"], t["dmean"], t["dvar"])
            arguments = (t["grad"], grad_prologue, t["x"], prologue, t["weight"], *place, _WANTED[self.op])
            found = launchers.conv_stats_bwd(*arguments, **settings)
            return {name: tensor for name, tensor in zip(_GRADIENTS, found, strict=True) if tensor is not None}
        if self.op == "fwd":
            return {"y": launchers.fwd(t["x"], t["weight"], None, *place, **settings)}
        if self.op == "dgrad":
            return {"dx": launchers.dgrad(t["grad"], t["weight"], t["x"].shape[2:], *place, **settings)}
        return {"dw": launchers.wgrad(t["grad"], t["x"], *place, **settings)}


def resources(target: Target, config: AnyConfig, arch: int) -> Usage | str:
    """What the kernel uses when compiled for an architecture, or why it does not compile."""
    try:
        launch = target.launch(config)
        return usage(compile_launch(launch, pointers(launch, target.dtype), arch))
    except Exception as error:  # whatever the compiler raises
        return f"does not compile ({type(error).__name__})"


class Gate:
    """What results must be like, by verify.py: near float64 or, with what is fused, no worse than PyTorch's."""

    def __init__(self, target: Target, tensors: Mapping[str, Tensor]):
        self.target = target
        self.tensors = tensors

    def mismatch(self, results: Results) -> str | None:
        """Say where results are wrong, or None."""
        target, t = self.target, self.tensors
        if target.fusion == "plain":
            operands = contenders.Operands(target.layer, t["x"], t["weight"], t["grad"])
            return mismatch(target.op, operands, *results.values())
        exact, plain = self._wanted
        return less_accurate(results, plain, exact, target.dtype, self._sums)

    @functools.cached_property
    def _wanted(self) -> tuple[Results, list[Results]]:
        """Exact results, and PyTorch's in both layouts."""
        torch_launchers, t = Composed(reference), self.tensors
        trials, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # long, in float64
        try:
            exact = self.target.run(torch_launchers, {name: tensor.double() for name, tensor in t.items()})
        finally:
            torch.backends.cudnn.benchmark = trials
        nchw = {name: tensor.contiguous() for name, tensor in t.items()}
        plain = [self.target.run(torch_launchers, t), self.target.run(torch_launchers, nchw, False)]
        return exact, plain

    @functools.cached_property
    def _sums(self) -> dict[str, float]:
        """Of the vectors among the results: terms times their root mean square (a mean has divided by the former)."""
        exact, t = self._wanted[0], self.tensors
        if "mean" in exact:
            size = rms(exact["z"])
            return {"mean": size, "var": 2 * size**2}
        if "dscale" not in exact:
            return {}
        center, scale = (t[name].double()[:, None, None] for name in ("center", "scale"))
        terms = exact["dx"] / scale  # of dshift
        pixels = terms.numel() // terms.shape[1]
        return {"dshift": pixels * rms(terms), "dscale": pixels * rms(terms * (t["x"].double() - center))}


TINY = [Layer(16, 16, 4, 3, 1, 4)]
TINY_POINTWISE = {Layer(16, 32, 4, 3, 1, 1): True}


def pointwise_layers(networks: list[str]) -> dict[Layer, bool]:
    """The 1x1 convolutions of the networks whose blocks are known: whether any is the last of a bottleneck.

    That one has a prologue, since what precedes it is the 3x3 convolution's batch norm; the others read what a block
    has put out.
    """
    found: dict[Layer, bool] = {}
    for name in networks:
        for block in BLOCKS.get(name, {}):
            for place, conv in enumerate(block.convolutions):
                if conv.kernel_size == 1:
                    size = conv.out_size if conv.stride == 1 else (block.height, block.width)
                    layer = Layer(conv.in_channels, conv.out_channels, *size, conv.stride, 1)
                    found[layer] = found.get(layer, False) or (block.bottleneck and place == 2)
    return found


def all_targets(
    layers: list[Layer],
    pointwise: Mapping[Layer, bool],
    fusions: list[str],
    passes: list[str],
    batches: list[int],
    dtype: torch.dtype,
    device_type: str,
) -> list[Target]:
    """Everything to tune, what is not fused first."""
    found = []
    for fusion in fusions:
        ops = [op for op in passes if fusion != "affine" or op == "fwd"]
        if fusion == "stats" and {"dgrad", "wgrad"} <= set(ops):
            ops.append("bwd")  # after the two whose settings it has
        sized = [(layer, 3, True) for layer in layers]
        if fusion != "plain":
            sized += [(layer, 1, prologue) for layer, prologue in pointwise.items()]
        for batch in batches:
            for layer, kernel_size, prologue in sized:
                found += [Target(layer, kernel_size, fusion, op, batch, dtype, device_type, prologue) for op in ops]
    return found
