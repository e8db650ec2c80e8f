"""Channel attention's launchers served by the compiled extension (`extension.py`); as in `reference`."""

from __future__ import annotations

from torch import Tensor

from . import extension
from .config import NO_AFFINE, Affine


def affine_mean(z: Tensor, affine: Affine | None, relu: bool, channels_last: bool) -> Tensor:
    """Mean (N, C, 1, 1) of each image's channels of act(affine(z)); act is ReLU or nothing, no affine the identity."""
    return extension._C.affine_mean(z, *(affine or NO_AFFINE), relu, _of_images(z), channels_last)


def affine_gate(
    z: Tensor,
    affine: Affine | None,
    relu: bool,
    gate: Tensor,
    residual: Tensor | None,
    residual_affine: Affine | None,
    channels_last: bool,
) -> Tensor:
    """Compute gate * act(affine(z)), with a residual relu(that + residual); ``gate``: (N, C, 1, 1)."""
    operands = (gate, residual, *(residual_affine or NO_AFFINE))
    return extension._C.affine_gate(z, *(affine or NO_AFFINE), relu, *operands, z.shape, channels_last)


def affine_gate_bwd(
    dout: Tensor,
    out: Tensor | None,
    z: Tensor,
    affine: Affine | None,
    relu: bool,
    residual: Tensor | None,
    residual_affine: Affine | None,
    channels_last: bool,
    wants_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the gate, the residual, and its scale and shift; of the rest: `gated_affine_bwd`."""
    residual_center, residual_scale, _ = residual_affine or NO_AFFINE
    vector = z.shape[1] if residual is not None else None
    sizes = (_of_images(z), z.shape if wants_residual else None, vector, vector)
    made = extension._C.affine_gate_bwd(
        *(dout, out, z, *(affine or NO_AFFINE), relu),
        *(residual, residual_center, residual_scale, *sizes, channels_last),
    )
    return extension.placed(made, sizes)  # type: ignore[return-value]


def gated_affine_bwd(
    z: Tensor,
    affine: Affine | None,
    relu: bool,
    dout: Tensor | None,
    out: Tensor | None,
    gate: Tensor | None,
    added: Tensor | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of z, scale and shift, where that of act(affine(z)) is gate * dout + added."""
    vector = None if affine is None else z.shape[1]
    sizes = (z.shape, vector, vector)
    made = extension._C.gated_affine_bwd(z, *(affine or NO_AFFINE), relu, dout, out, gate, added, *sizes, channels_last)
    return extension.placed(made, sizes)  # type: ignore[return-value]


def _of_images(z: Tensor) -> tuple[int, int, int, int, bool]:
    return (z.shape[0], z.shape[1], 1, 1, True)
