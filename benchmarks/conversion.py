"""A network before and after `resnext.fuse_`: what is converted, and how far apart the results are.

The network gets random parameters and running statistics, and a batch of small random images. It runs in evaluation
and one step of training, in float32 and in float64, before and after its conversion, each time with the same
parameters, images, gradient of the result and random numbers. In float64 nothing but the order of additions may differ,
so that any error of structure shows. In float32 the measure is the error that the network itself makes. Gradients are
shown in float32 and not judged: a ReLU whose input is zero up to rounding sends a pixel's gradient on or not, and so
does pooling's maximum. In maps of 2x2 pixels one pixel is a good part of a gradient, and whether it happens in one run
and not in the other is chance.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from resnext import fuse_

IMAGES = 4
SIZES = (64, 128, 224, 256)  # pixels; attention in windows and with positions needs those of its own
TRAINED = 100_000_000  # parameters up to which a network is trained, and up to which
DOUBLED = 700_000_000  # it is run in float64: one with more does not fit in 16 GB
# Float64: far above its rounding errors, far below any other error.
LIMIT = 1e-9
# Float32, in units of the network's own rounding error: two errors of one size differ by twice as much, and twice that
# because what is compared with is a sample too.
FACTOR = 4.0

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Errors:
    """Relative errors in the Euclidean norm, each the largest of its tensors.

    Attributes:
        difference: Converted from unconverted, both in float32.
        rounding: Unconverted in float32, in the worse of two layouts, from unconverted in float64; None: not run in
            float64.
        double: Converted from unconverted, both in float64.
    """

    difference: float
    rounding: float | None = None
    double: float | None = None


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        name: Library and name.
        parameters: How many numbers they are.
        size: Pixels of an image's side.
        blocks: Residual blocks that run fused.
        chains: Convolutions fused with what follows them, outside such blocks.
        convolutions: Grouped convolutions converted by themselves.
        skipped: Reason -> number of modules.
        seconds: Time of the conversion.
        errors: Of "logits" in evaluation, "training logits", "gradients" of parameters and images, "statistics" after a
            step.
        note: What was left out, and why.
        failure: What is wrong; None: nothing.
    """

    name: str
    parameters: int = 0
    size: int = 0
    blocks: int = 0
    chains: int = 0
    convolutions: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    errors: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    note: str = ""
    failure: str | None = None

    def cells(self) -> dict[str, str]:
        """Column -> text."""
        return {
            "network": self.name,
            "pixels": str(self.size),
            "blocks": str(self.blocks),
            "chains": str(self.chains),
            "convolutions": str(self.convolutions),
            "skipped": str(sum(self.skipped.values())),
            "logits": self.error("logits"),
            "gradients": self.error("gradients"),
            "s": f"{self.seconds:.2f}",
            "note": self.failure or self.note or "-",
        }

    def error(self, kind: str) -> str:
        """Converted from unconverted in float32, and in parentheses the unconverted's own rounding error."""
        if kind not in self.errors:
            return "-"
        errors = self.errors[kind]
        own = "-" if errors["rounding"] is None else f"{errors['rounding']:.1e}"
        return f"{errors['difference']:.1e} ({own})"

    def record(self) -> dict[str, object]:
        """Everything about the row, ready for JSON."""
        return asdict(self)


def build(name: str) -> nn.Module:
    """A network by library and name, its parameters at random."""
    library, _, model = name.partition("/")
    if library == "timm":
        import timm

        return timm.create_model(model, pretrained=False)
    from torchvision import models

    builder = models.get_model_builder(model)
    settings = {"weights": None, "weights_backbone": None, "init_weights": False, "aux_logits": False}
    accepted = inspect.signature(builder).parameters
    return builder(**{key: value for key, value in settings.items() if key in accepted})


def prepare(name: str) -> tuple[nn.Module, Tensor]:
    """A network and a batch that it takes, the same in every run; nothing in it at its initial value."""
    torch.manual_seed(0)
    model = build(name)
    _randomise(model)
    images = torch.randn(IMAGES, 3, SIZES[-1], SIZES[-1])
    for size in SIZES[:-1]:
        try:
            return model, _settle(model, images[..., :size, :size].contiguous())
        except (AssertionError, RuntimeError):  # what networks of a fixed size raise
            continue
    return model, _settle(model, images)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Move parameters that are constant: factors and shifts of norms, gains of branches, biases.

    Those that start at or near zero would else hide their branch.
    """
    for parameter in model.parameters():
        value = parameter.flatten()[0]
        if bool((parameter == value).all()):
            if abs(float(value)) < 1e-2:
                nn.init.normal_(parameter, std=0.2)
            else:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))


@torch.no_grad()
def _settle(model: nn.Module, images: Tensor) -> Tensor:
    """Give batch norms running statistics near those of ``images``: far from them activations would grow or vanish."""
    norms = [module for module in model.modules() if _has_statistics(module)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_mean.add_(0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25))
    return images


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None


def _statistics(norm: nn.Module) -> Tensor:
    """Mean and standard deviation in one tensor: a mean near zero is as accurate as the values are spread."""
    return torch.stack([norm.running_mean, norm.running_var.sqrt()])


def run(model: nn.Module, images: Tensor, *, train: bool) -> dict[str, Tensors]:
    """What is compared, by kind; the model stays as it was."""
    before = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        results = {"logits": {"logits": model.eval()(images)}}
    if train:
        torch.manual_seed(1)  # dropout, stochastic depth
        images = images.clone().requires_grad_()
        logits = model.train()(images)
        gradient = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        logits.backward(gradient.to(logits.dtype))
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results["training logits"] = {"logits": logits.detach()}
        results["gradients"] = {**gradients, "images": images.grad}
        if running := {name: _statistics(norm) for name, norm in model.named_modules() if _has_statistics(norm)}:
            results["statistics"] = running
        model.zero_grad()
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    return results


def largest_error(results: Tensors, expected: Tensors) -> float:
    """The largest relative error of the tensors.

    One that is zero but for rounding, as is the gradient of a bias that batch norm takes away, is measured by all.
    """
    if results.keys() != expected.keys():
        raise ValueError(f"expected tensors {', '.join(expected)}, got {', '.join(results)}")
    norms = {name: float(value.double().norm()) for name, value in expected.items()}
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    errors = []
    for name, value in expected.items():
        norm = norms[name] if norms[name] > 1e-5 * whole else whole
        errors.append(float((results[name].double() - value.double()).norm()) / (norm or 1.0))
    return max(errors) if all(error == error for error in errors) else float("nan")


def compare(name: str) -> Row:
    """Convert a network and compare it with itself before."""
    model, images = prepare(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    notes = []
    if not (train := parameters <= TRAINED):
        notes.append(f"not trained: {parameters / 1e6:.0f} M parameters")
    if not (double := parameters <= DOUBLED):
        notes.append("no float64")
    keys = list(model.state_dict())

    plain = run(model, images, train=train)
    nhwc = images.contiguous(memory_format=torch.channels_last)
    other = run(model.to(memory_format=torch.channels_last), nhwc, train=train) if double else {}
    model.to(memory_format=torch.contiguous_format)
    exact = run(model.double(), images.double(), train=train) if double else {}
    model.float()
    start = time.perf_counter()
    converted = fuse_(model)
    seconds = time.perf_counter() - start
    ours = run(model, images, train=train)
    ours_double = run(model.double(), images.double(), train=train) if double else {}

    errors = {}
    for kind in plain:
        difference = largest_error(ours[kind], plain[kind])
        errors[kind] = Errors(difference)
        if double:
            rounding = max(largest_error(each[kind], exact[kind]) for each in (plain, other))
            errors[kind] = Errors(difference, rounding, largest_error(ours_double[kind], exact[kind]))
    failures = [f"{kind}: {message}" for kind, error in errors.items() if (message := wrong(kind, error))]
    if list(model.state_dict()) != keys:
        failures.append("state_dict has other keys")
    kinds = Counter(fused.kind for fused in converted.fused)
    return Row(
        name,
        parameters,
        images.shape[-1],
        *(kinds[kind] for kind in ("block", "chain", "convolution")),
        dict(Counter(skipped.reason for skipped in converted.skipped)),
        seconds,
        {kind: asdict(error) for kind, error in errors.items()},
        "; ".join(notes),
        "; ".join(failures) or None,
    )


def wrong(kind: str, errors: Errors) -> str | None:
    """What is wrong about the errors of one kind."""
    if errors.double is not None and not errors.double <= LIMIT:
        return f"float64 results differ by {errors.double:.1e}"
    allowed = 1.0 if errors.rounding is None or kind == "gradients" else FACTOR * errors.rounding
    if not errors.difference <= allowed:
        return f"float32 results differ by {errors.difference:.1e}, more than {allowed:.1e}"
    return None
