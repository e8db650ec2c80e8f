"""The fused convolutions out of separate passes: where a library's convolution is fastest, or a backend has no other.

The batch norm before a convolution, and the gradient's part through the statistics, become tensors that live for one
call; what is saved for backward stays the same as with fused kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from . import reference
from .config import Affine, Norm
from .reference import Stride


@dataclass(frozen=True)
class Composed:
    """Launchers ``conv_stats_fwd``, ``conv_stats_bwd`` and ``conv_affine``, with PyTorch's own convolution.

    Attributes:
        elementwise: Its ``statistics``, ``affine_add_relu``, their backward passes and ``affine_add`` do the rest.
    """

    elementwise: ModuleType

    def conv_stats_fwd(
        self,
        x: Tensor,
        prologue: Affine | None,
        weight: Tensor,
        stride: Stride,
        groups: int,
        channels_last: bool,
        stats: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Convolve relu(prologue(x)); the result z with the mean and biased variance of its channels if ``stats``."""
        a = self._activation(x, prologue, channels_last)
        z = reference.fwd(a, weight, None, stride, groups, channels_last)
        return z, *(self.elementwise.statistics(z, channels_last) if stats else (None, None))

    @property
    def scales(self) -> bool:
        """As of `batch_norm`."""
        return getattr(self.elementwise, "scales", False)

    @property
    def merges(self) -> bool:
        """As of `batch_norm`."""
        return getattr(self.elementwise, "merges", False)

    def conv_norm_fwd(
        self,
        x: Tensor,
        prologue: Affine | None,
        weight: Tensor,
        stride: Stride,
        groups: int,
        channels_last: bool,
        norm: Norm,
    ) -> tuple[Tensor, ...]:
        """`conv_stats_fwd`, and scale and shift of a batch norm with these statistics; if `merges`."""
        z, _, _ = self.conv_stats_fwd(x, prologue, weight, stride, groups, channels_last, False)
        return z, *self.elementwise.statistics(z, channels_last, norm)

    def conv_stats_bwd(
        self,
        dz: Tensor,
        grad_prologue: tuple[Tensor, Tensor, Tensor, Tensor] | None,
        x: Tensor,
        prologue: Affine | None,
        weight: Tensor,
        stride: Stride,
        groups: int,
        channels_last: bool,
        wanted: tuple[bool, bool],
        deferred: bool = False,
        grad_scale: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Gradients of x, scale, shift and weight; ``grad_prologue``: z, mean, dmean, dvar; ``wanted``: x, weight.

        ``deferred``: as of `batch_norm.affine_add_relu_bwd`, if `merges`.
        """
        dscale = dshift = None
        g = dz
        if grad_prologue is not None:
            scaling = () if grad_scale is None else (grad_scale,)
            g = self.elementwise.statistics_bwd(dz, *grad_prologue, channels_last, *scaling)
        a = self._activation(x, prologue, channels_last) if wanted[1] else x  # else only its shape matters
        dx, dw = reference.bwd(g, a, weight, stride, groups, channels_last, wanted)
        del g, a
        if dx is not None and prologue is not None:
            also = {"deferred": True} if deferred else {}
            dx, _, dscale, dshift, _ = self.elementwise.affine_add_relu_bwd(
                dx, None, x, prologue, None, None, channels_last, (True, False, True), **also
            )
        return dx, dscale, dshift, dw

    def conv_affine(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        stride: Stride,
        groups: int,
        channels_last: bool,
    ) -> Tensor:
        """Compute scale * conv(x, weight) + shift + residual, then ReLU if asked for."""
        z = reference.fwd(x, weight, None, stride, groups, channels_last)
        affine = reference.default_affine(scale, shift, z)
        finish = self.elementwise.affine_add_relu if relu else self.elementwise.affine_add
        return finish(z, affine, residual, None, channels_last)

    def _activation(self, x: Tensor, prologue: Affine | None, channels_last: bool) -> Tensor:
        if prologue is None:
            return x
        return self.elementwise.affine_add_relu(x, prologue, None, None, channels_last)
