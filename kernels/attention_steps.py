"""A block's steps (block_steps.py) of channel attention (attention.py): its mean, what makes a gate of it, the gate.

Backward meets them from the last to the first. The gate leaves its part of the raw output's gradient undone; the mean,
whose own part is known then, makes both in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from . import checks
from .attention import (
    GATE,
    MEAN,
    activation_gradients,
    affine_gate,
    affine_mean,
    excite,
    excite_gradients,
    excited,
    gate_gradients,
)
from .block_steps import Gated, Saved, Values, add, add_norm, affine_at, at


class Mean(NamedTuple):
    """out = `resnext.kernels.affine_mean` of z, in z's dtype."""

    z: int
    norm: int
    relu: bool
    out: int

    @property
    def result(self) -> int:
        """As of `ConvNorm`."""
        return self.out

    def forward(self, values: Values) -> tuple[bool, Saved]:
        """As of `ConvNorm`."""
        z, affine = values[self.z], affine_at(values, self.norm)
        channels_last = checks.is_channels_last(z)
        values[self.out] = MEAN.kernel(z, *affine, self.relu, channels_last).to(z.dtype)
        return channels_last, (z, *affine)

    def backward(self, channels_last: bool, saved: Saved, gradients: Values, wanted: Sequence[bool]) -> None:
        """As of `ConvNorm`."""
        z, *affine = saved
        dmean, gradients[self.out] = gradients[self.out], None
        added = dmean.to(affine[1].dtype) / (z.shape[2] * z.shape[3])
        gated, gradients[self.z] = gradients[self.z], None
        if not isinstance(gated, Gated):  # of a mean of several, and the last one has taken it
            gated, gradients[self.z] = Gated(None, None, None), gated
        dz, dscale, dshift = activation_gradients(z, affine, self.relu, *gated, added, channels_last)
        add(gradients, self.z, dz)
        add_norm(gradients, self.norm, dscale, dshift)

    def again(self, values: Values) -> None:
        """As of `ConvNorm`."""
        z = values[self.z]
        values[self.out] = affine_mean(z, values[self.norm][:3], self.relu).to(z.dtype)


class Excite(NamedTuple):
    """out = `resnext.kernels.excite` of x; ``bias`` may be None."""

    x: int
    weight: int
    bias: int | None
    activation: str
    out: int

    @property
    def result(self) -> int:
        """As of `ConvNorm`."""
        return self.out

    def forward(self, values: Values) -> tuple[bool, Saved]:
        """As of `ConvNorm`."""
        x, weight = values[self.x], values[self.weight]
        y = excited(x, weight, at(values, self.bias), self.activation)
        values[self.out] = y.to(x.dtype)[:, :, None, None]
        return False, (x, weight, y)

    def backward(self, channels_last: bool, saved: Saved, gradients: Values, wanted: Sequence[bool]) -> None:
        """As of `ConvNorm`."""
        dy, gradients[self.out] = gradients[self.out], None
        x, weight, y = saved
        dx, gradients[self.weight], dbias = excite_gradients(dy, x, weight, y, self.activation)
        add(gradients, self.x, dx)
        if self.bias is not None:
            gradients[self.bias] = dbias

    def again(self, values: Values) -> None:
        """As of `ConvNorm`."""
        values[self.out] = excite(values[self.x], values[self.weight], at(values, self.bias), self.activation)


class Gate(NamedTuple):
    """out = `resnext.kernels.affine_gate` of z; ``residual`` and ``residual_norm`` may be None."""

    z: int
    norm: int
    relu: bool
    gate: int
    residual: int | None
    residual_norm: int | None
    out: int

    @property
    def result(self) -> int:
        """As of `ConvNorm`."""
        return self.out

    def forward(self, values: Values) -> tuple[bool, Saved]:
        """As of `ConvNorm`."""
        z, residual = values[self.z], at(values, self.residual)
        affine, residual_affine = affine_at(values, self.norm), affine_at(values, self.residual_norm)
        gate = values[self.gate].to(affine[1].dtype)  # type: ignore[union-attr]
        channels_last = checks.is_channels_last(z)
        out = GATE.kernel(z, *affine, self.relu, gate, residual, *residual_affine, channels_last)
        values[self.out] = out
        kept = residual if self.residual_norm is not None else None
        return channels_last, (out if self.residual is not None else None, z, *affine, gate, kept, *residual_affine)

    def backward(self, channels_last: bool, saved: Saved, gradients: Values, wanted: Sequence[bool]) -> None:
        """As of `ConvNorm`."""
        out, z, *vectors = saved
        affine, gate, residual, residual_affine = vectors[:3], vectors[3], vectors[4], vectors[5:]
        dout, gradients[self.out] = gradients[self.out], None
        wants_residual = self.residual is not None and wanted[self.residual]
        dgate, dresidual, dscale, dshift = gate_gradients(
            dout, out, z, affine, self.relu, residual, residual_affine, channels_last, wants_residual
        )
        add(gradients, self.gate, dgate.to(z.dtype))
        gradients[self.z] = Gated(dout, out, gate)
        if wants_residual:
            if self.residual_norm is None:  # which is dout where ReLU lets it through
                gradients[self.z] = Gated(dresidual, None, gate)
            add(gradients, self.residual, dresidual)  # type: ignore[arg-type]
        if self.residual_norm is not None:
            add_norm(gradients, self.residual_norm, dscale, dshift)

    def again(self, values: Values) -> None:
        """As of `ConvNorm`."""
        residual_affine = None if self.residual_norm is None else values[self.residual_norm][:3]
        affine, residual = values[self.norm][:3], at(values, self.residual)
        values[self.out] = affine_gate(values[self.z], values[self.gate], affine, self.relu, residual, residual_affine)
