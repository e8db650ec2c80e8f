"""Training: some hundred steps of a small ResNeXt follow the plain model as closely as it follows itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnext.blocks import Bottleneck

from .block_cases import reason_of, resnet

datasets = pytest.importorskip("sklearn.datasets")

BATCH = 32


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits of 8x8 pixels with values from 0 to 16."""
    data = datasets.load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)


def network(block: type[nn.Module]) -> nn.Sequential:
    """As for CIFAR: a 3x3 stem and three bottlenecks of 8 groups, the second at half the resolution."""

    def projection(inplanes: int, planes: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    widths = {"groups": 8, "base_width": 16}
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        block(16, 8, 1, projection(16, 32, 1), **widths),
        block(32, 8, **widths),
        block(32, 16, 2, projection(32, 64, 2), **widths),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def losses(model: nn.Module, digits: tuple[Tensor, Tensor], steps: int, shuffle: int | None = None) -> Tensor:
    """The loss of every step; ``shuffle`` seeds another order of the images within each batch, and so of all sums."""
    images, labels = digits
    model = copy.deepcopy(model)
    images = images.to(model[0].weight.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    batches, order = torch.Generator().manual_seed(0), torch.Generator()
    result = []
    for step in range(steps):
        batch = torch.randint(len(images), (BATCH,), generator=batches)
        if shuffle is not None:
            batch = batch[torch.randperm(BATCH, generator=order.manual_seed(shuffle + step))]
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(loss.detach())
    return torch.stack(result)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 200), (torch.float64, 100)], ids=["float32", "float64"])
def test_follows_the_plain_model_as_it_follows_itself(digits, dtype, steps):
    """Rounding errors grow from step to step, in ours as in plain runs with other orders of summation.

    In float32 a value soon falls on the other side of a ReLU, and from there on runs part quickly; in float64 they
    stay together, and any error in a gradient would stand out. Twice the spread: distances vary as much themselves.
    """
    torch.manual_seed(0)
    plain, ours = network(resnet.Bottleneck).to(dtype), network(Bottleneck).to(dtype)
    ours.load_state_dict(plain.state_dict())
    assert all(reason_of(module) is None for module in ours if isinstance(module, Bottleneck))
    runs = [losses(plain, digits, steps, shuffle) for shuffle in (None, 1000)]
    got = losses(ours, digits, steps)

    def distance(first: Tensor, second: Tensor) -> float:
        return float((first - second).square().mean().sqrt())

    spread = distance(*runs)
    nearest = min(distance(got, run) for run in runs)
    assert runs[0][-10:].mean() < 0.7 * runs[0][0]  # it learns
    assert nearest <= 2 * spread, f"{nearest:.3g}, spread {spread:.3g}"
