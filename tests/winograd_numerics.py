"""How far Winograd's algorithm may be off: the sums of its own terms' magnitudes, in float64.

    results = A' [(G weight G') * (B' source B)] A,      dw = C' [(H grad H') * (B' x B)] C

with every matrix, and every operand, replaced by its magnitudes. What was zero in a sum of plain products need not be
here: neighbours meet in a tile, and cancel up to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resnext.kernels import extension

ROUNDINGS = 16  # of the transforms, at most, beside those of the sum over channels or tiles


def _matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).abs()


_SOURCE = _matrix([1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1])  # B'
_WEIGHT = _matrix([1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1])  # G
_RESULTS = _matrix([1, 1, 1, 0], [0, 1, -1, -1])  # A'
_GRAD = _matrix([1, 0], [0.5, 0.5], [0.5, -0.5], [0, 1])  # H
_TAPS = _matrix([1, 1, 1, 0], [0, 1, -1, 0], [0, 1, 1, -1])  # C'


def serves(op: str, case, channels_last: bool, device: str = "cpu") -> bool:
    """Whether the extension computes a pass of a case so; a case has batch, channels, groups, height, width, stride."""
    if not channels_last or device != "cpu" or case.stride != (1, 1) or getattr(case, "kernel", 3) != 3:
        return False
    if extension.load() is not None or not hasattr(extension._C, "winograd_serves"):  # the emulated GPU has no such
        return False
    channels = (case.in_channels, case.out_channels)
    shape = (case.batch, channels[0], case.height, case.width)
    use = "gradient" if op == "wgrad" else "product"
    return extension.winograd_serves(use, shape, (channels[1],), case.groups)


def magnitude(op: str, left: Tensor, right: Tensor, groups: int) -> Tensor:
    """The magnitudes' sum for "fwd" (x, weight), "dgrad" (grad, weight) or "wgrad" (grad, x), all float64, NCHW."""
    left, right = left.abs(), right.abs()
    if op == "wgrad":
        return _gradient(left, right, groups)
    if op == "dgrad":
        filters = right.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        return _product(left, filters.flip(2, 3), groups)
    return _product(left, right, groups)


def _both_sides(matrix: Tensor, tiles: Tensor) -> Tensor:
    return matrix @ tiles @ matrix.T


def _tiles(image: Tensor, before: int) -> Tensor:
    """(N, C, rows, columns, size, size): tiles of 2 + 2 * before pixels, two apart, the first one `before` outside."""
    height, width = image.shape[2:]
    padded = F.pad(image, (before, before + width % 2, before, before + height % 2))
    size = 2 + 2 * before
    return padded.unfold(2, size, 2).unfold(3, size, 2)


def _product(source: Tensor, weight: Tensor, groups: int) -> Tensor:
    height, width = source.shape[2:]
    tiles = _both_sides(_SOURCE, _tiles(source, 1)).unflatten(1, (groups, -1))
    filters = _both_sides(_WEIGHT, weight).unflatten(0, (groups, -1))
    sums = torch.einsum("ngirsab,goiab->ngorsab", tiles, filters).flatten(1, 2)
    results = _both_sides(_RESULTS, sums).transpose(3, 4)
    return results.flatten(2, 3).flatten(3, 4)[:, :, :height, :width]


def _gradient(grad: Tensor, x: Tensor, groups: int) -> Tensor:
    grads = _both_sides(_GRAD, _tiles(grad, 0)).unflatten(1, (groups, -1))
    tiles = _both_sides(_SOURCE, _tiles(x, 1)).unflatten(1, (groups, -1))
    sums = torch.einsum("ngorsab,ngirsab->goiab", grads, tiles).flatten(0, 1)
    return _both_sides(_TAPS, sums)
