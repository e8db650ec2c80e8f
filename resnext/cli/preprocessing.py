"""From images to the model's input: what is random in training, and what is the same for every image later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torchvision.transforms import v2


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image outside training; kept in checkpoints.

    Attributes:
        image_size: Height and width of the input.
        resize_size: The shorter side before the square in the middle is cut out.
        mean: Of each channel, subtracted from values from 0 to 1.
        std: Of each channel, by which is then divided.
    """

    image_size: int
    resize_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `as_dict`."""
        return cls(values["image_size"], values["resize_size"], tuple(values["mean"]), tuple(values["std"]))

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def scaled(self, image_size: int) -> Preprocessing:
        """The same in proportion, for another size of the input."""
        return replace(self, image_size=image_size, resize_size=round(image_size * self.resize_size / self.image_size))

    def transform(self) -> v2.Transform:
        """Of an image, PIL's or (C, H, W) uint8, into (3, image_size, image_size) float32."""
        return v2.Compose(
            [
                v2.ToImage(),
                v2.RGB(),
                v2.Resize(self.resize_size, antialias=True),
                v2.CenterCrop(self.image_size),
                *self._to_input(),
            ]
        )

    def training_transform(self, augment: str, kind: str) -> v2.Transform:
        """The same with random changes.

        Args:
            augment: ``"none"``, ``"standard"`` or ``"trivial"``: TrivialAugmentWide (arXiv:2103.10158) too.
            kind: What standard changes are right for: ``"digits"`` (shifts), ``"objects"`` (small images: shifts and
                flips) or ``"photos"`` (crops of random size and flips).
        """
        if augment == "none":
            return self.transform()
        size = self.image_size
        if kind == "photos":
            steps: list[v2.Transform] = [v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True)]
        else:
            steps = [
                v2.Resize(self.resize_size, antialias=True),
                v2.CenterCrop(size),
                v2.RandomCrop(size, padding=max(1, size // 8)),
            ]
        if kind != "digits":
            steps.append(v2.RandomHorizontalFlip())
        if augment == "trivial":
            steps.append(v2.TrivialAugmentWide())
        return v2.Compose([v2.ToImage(), v2.RGB(), *steps, *self._to_input()])

    def _to_input(self) -> Sequence[v2.Transform]:
        # As a plain tensor: the class of images would cost time in every operation on a batch.
        return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std), v2.ToPureTensor()]
