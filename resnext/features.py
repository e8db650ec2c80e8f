"""Models as backbones: the maps of several stages instead of logits, for detection and segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from resnext.convert import fuse_
from resnext.resnet import ResNet
from resnext.stages import checkpoint_stages


class FeatureInfo:
    """What the maps of `FeatureMaps` are; the methods are those of timm's.

    Args:
        info: Of the stem and each stage, a dictionary with ``num_chs``, ``reduction`` and ``module``.
        out_indices: Which of them are returned.
    """

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info = list(info)
        self.out_indices = tuple(out_indices)

    def channels(self) -> list[int]:
        """Channels of each returned map."""
        return self._values("num_chs")

    def reduction(self) -> list[int]:
        """By how much each returned map's height and width are the image's divided."""
        return self._values("reduction")

    def module_name(self) -> list[str]:
        """Name of the module whose output each returned map is."""
        return self._values("module")

    def get_dicts(self) -> list[dict[str, Any]]:
        """All of this, a dictionary for each returned map."""
        return [self.info[index] for index in self.out_indices]

    def _values(self, key: str) -> list[Any]:
        return [each[key] for each in self.get_dicts()]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)


class FeatureMaps(nn.Module):
    """The stem and stages of a `ResNet` without its head; returns the outputs of several of them.

    Input (N, in_chans, H, W); output a list of maps (N, C, H / reduction, W / reduction), rounded up, from fine to
    coarse. Children and parameters are the model's own, under the same names; what follows the last map is left out.

    Args:
        model: Where stem and stages come from.
        out_indices: Which maps, in increasing order: 0 is the stem's, before its max pooling, 1 the first stage's,
            and so on; negative ones count from the end. None: all.

    Attributes:
        feature_info: Channels, reductions and module names of the maps.
        config: As the model's, with ``features_only`` and ``out_indices``.

    Raises:
        ValueError: ``out_indices`` is not as above.
    """

    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module

    def __init__(self, model: ResNet, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        number = len(model.feature_info)
        wanted = range(number) if out_indices is None else out_indices
        indices = [index + number if index < 0 else index for index in wanted]
        if not indices or indices != sorted({*indices} & {*range(number)}):
            raise ValueError(
                f"FeatureMaps: expected out_indices from {-number} to {number - 1} in increasing order, got "
                f"{out_indices}; 0 is the stem, {number - 1} the last stage"
            )
        self.feature_info = FeatureInfo(model.feature_info, indices)
        self.config = model.config
        if model.config:
            self.config = {**model.config, "features_only": True, "out_indices": indices}
        names = ["conv1", "bn1", "relu", "maxpool", *[each["module"] for each in model.feature_info[1:]]]
        for name in names[: 4 + indices[-1]]:
            self.add_module(name, getattr(model, name))
        self.train(model.training)
        fuse_(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (N, in_chans, H, W) to a list of maps, from fine to coarse."""
        x = self.relu(self.bn1(self.conv1(x)))
        maps = [x]
        x = self.maxpool(x)
        for stage in self._stages():
            x = stage(x)
            maps.append(x)
        return [maps[index] for index in self.feature_info.out_indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `ResNet.set_grad_checkpointing`."""
        checkpoint_stages(self._stages(), enable)

    def _stages(self) -> list[nn.Sequential]:
        last = self.feature_info.out_indices[-1]
        return [getattr(self, each["module"]) for each in self.feature_info.info[1 : last + 1]]
