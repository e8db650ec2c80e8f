"""`GroupedConv2d`: ``torch.nn.Conv2d`` computed by this library's grouped convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from resnext.kernels import grouped_conv2d

# Symbolic tracing records the convolution as one node instead of tracing into the choice of a backend.
fx.wrap("grouped_conv2d")


class GroupedConv2d(nn.Conv2d):
    """A 2-D convolution with ``torch.nn.Conv2d``'s constructor, parameters, ``state_dict`` and results.

    Only the computation differs: it goes through `resnext.grouped_conv2d`, which serves 3x3 kernels with
    padding 1, dilation 1 and strides of 1 or 2 with kernels of its own, and every other convolution with
    PyTorch's (`resnext.explain` says which one serves a given problem, and why). A ``padding_mode`` other
    than ``"zeros"`` always uses PyTorch's.

    Shapes: input (N, C_in, H, W) or (C_in, H, W), output (N, C_out, H_out, W_out) or (C_out, H_out, W_out),
    as ``torch.nn.Conv2d``; the output is channels_last if the input or the weight is. Any dtype that
    ``torch.nn.Conv2d`` takes. Differentiable, also twice, in the input, the weight and the bias.
    """

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> GroupedConv2d:
        """Make the `GroupedConv2d` that can take the place of ``conv`` in a model.

        The new module holds the very ``Parameter`` objects of ``conv``, not copies: optimizers, tied weights
        and ``requires_grad`` flags stay valid. It is in the same training mode.

        Hooks are refused, not carried: their handles, and often their closures, belong to the old module, so
        a carried hook could no longer be removed. Pruned and weight-normalised convolutions, which work
        through hooks, are refused with them.

        Args:
            conv: A plain ``torch.nn.Conv2d``, with any arguments.

        Returns:
            A new `GroupedConv2d`; ``conv`` is unchanged and still works.

        Raises:
            TypeError: ``conv`` is not exactly a ``torch.nn.Conv2d``. Subclasses (lazy, quantized,
                parametrized) change what the module computes or how it finds its weight.
            ValueError: ``conv`` has hooks, or attributes, parameters, buffers or children of its own (an overridden
                ``forward``, say), which the new module would lose.
        """
        if type(conv) is not nn.Conv2d:
            if isinstance(conv, cls):
                advice = "it is one already, use it as it is"
            else:
                advice = "give one, or undo what changed its class (parametrization, quantization)"
            raise TypeError(
                f"{cls.__name__}.from_conv: expected a torch.nn.Conv2d, got {type(conv).__name__}; {advice}"
            )
        hooks = [name.lstrip("_") for name, value in vars(conv).items() if name.endswith("_hooks") and value]
        if hooks:
            raise ValueError(
                f"{cls.__name__}.from_conv: expected one without hooks, got {', '.join(hooks)}; "
                "remove them first and register them on the new module"
            )
        extra = {*vars(conv)} - {*vars(nn.Conv2d(1, 1, 1, device="meta"))} | {*conv._parameters} - {"weight", "bias"}
        extra |= {*conv._buffers, *conv._modules}
        if extra:
            raise ValueError(
                f"{cls.__name__}.from_conv: expected nothing beyond torch.nn.Conv2d's own attributes, got "
                f"{', '.join(sorted(extra))}; remove what was added to the module first"
            )
        # On the meta device: initial values would be thrown away, and drawing them would advance the random
        # generator.
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]  # torch annotates its 2-tuples as tuple[int, ...]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        new.weight = conv.weight
        new.bias = conv.bias
        return new.train(conv.training)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        return grouped_conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` had before `resnext.fuse_` derived another one from it, or its class."""
    cls = type(module)
    return cls.__dict__.get("_fused_from", cls)


def held(module: nn.Module, name: str) -> Any:
    """The parameter or buffer of that name, or None: ``getattr`` at a fraction of what ``nn.Module`` takes for it."""
    if name in module._parameters:
        return module._parameters[name]
    if name in module._buffers:
        return module._buffers[name]
    return getattr(module, name)


def child(module: nn.Module, name: str) -> Any:
    """The submodule of that dotted name, or None."""
    if "." not in name:
        return module._modules.get(name)
    for part in name.split("."):
        module = module._modules.get(part)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is one of PyTorch's layers; `torch.nn.Sequential` is none."""
    return original_class(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)


def is_plain_conv(module: nn.Module) -> bool:
    """Whether ``module`` computes what ``torch.nn.Conv2d`` computes, and is no subclass that computes more."""
    return original_class(module) in (nn.Conv2d, GroupedConv2d)
