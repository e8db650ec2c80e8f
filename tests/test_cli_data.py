"""The data of the command line: folders, CIFAR-10, digits, order, augmentation, what is skipped."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from resnext.cli.arguments import Options, parse
from resnext.cli.data import Data, load_data
from resnext.cli.distributed import Processes
from resnext.cli.loading import JoinedBatches, Samples, derived_seed, evaluation_loader, training_loader
from resnext.cli.preprocessing import Preprocessing

from .commands import run, truncate, write_images

CPU = torch.device("cpu")
ONE = Processes(CPU)
HALF = (0.5, 0.5, 0.5)


def load(*arguments: object) -> Data:
    options: Options = parse(["train", *map(str, arguments)])
    return load_data(options, ONE)


class TestDigits:
    def test_images(self):
        data = load()
        assert (len(data.train), len(data.test)) == (1437, 360)
        image, label = data.train[0]
        assert (image.dtype, image.shape) == (torch.uint8, (1, 8, 8))
        assert data.class_names[label] == str(label)
        assert max(int(data.train[index][0].max()) for index in range(20)) == 255

    def test_parts_are_apart_and_balanced(self):
        data = load()
        train, test = ({id(dataset[index][0]) for index in range(len(dataset))} for dataset in (data.train, data.test))
        assert not train & test
        counts = np.bincount([label for _, label in data.test])
        assert counts.min() >= 34

    def test_always_the_same(self):
        labels = [[label for _, label in load("--seed", seed).test] for seed in (0, 1)]
        assert labels[0] == labels[1]


class TestFolders:
    def test_train_and_val(self, tmp_path):
        write_images(tmp_path / "train", {"cat": 3, "dog": 2})
        write_images(tmp_path / "val", {"cat": 1, "dog": 1})
        data = load("--data", tmp_path)
        assert (len(data.train), len(data.test), data.class_names) == (5, 2, ["cat", "dog"])
        assert data.preprocessing == Preprocessing(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def test_split(self, tmp_path):
        """Fixed by its seed; no image in both parts."""
        write_images(tmp_path, {"cat": 20, "dog": 20})
        parts = {}
        for seed in (0, 0, 1):
            data = load("--data", tmp_path, "--val-fraction", 0.25, "--split-seed", seed)
            assert (len(data.train), len(data.test)) == (30, 10)
            assert sorted([*data.train.indices, *data.test.indices]) == list(range(40))
            assert [label for _, label in data.test].count(0) == 5
            assert parts.setdefault(seed, data.test.indices) == data.test.indices
        assert parts[0] != parts[1]

    def test_small_classes_are_in_both_parts(self, tmp_path):
        write_images(tmp_path, {f"class{i}": 2 + i % 3 for i in range(12)})
        for seed in range(5):
            data = load("--data", tmp_path, "--split-seed", seed)
            for part in (data.train, data.test):
                assert {label for _, label in part} == set(range(12))

    def test_hidden_files_and_folders_are_not_seen(self, tmp_path):
        write_images(tmp_path, {"cat": 4, "dog": 4, ".ipynb_checkpoints": 2})
        (tmp_path / "cat" / "._0.png").write_bytes(b"no image")
        data = load("--data", tmp_path)
        assert data.class_names == ["cat", "dog"]
        assert len(data.train) + len(data.test) == 8

    def test_unreadable_images_are_skipped_and_listed(self, tmp_path, capsys):
        write_images(tmp_path / "train", {"cat": 3, "dog": 3})
        write_images(tmp_path / "val", {"cat": 2, "dog": 2})
        bad = [truncate(tmp_path / "train" / "cat" / "1.png"), truncate(tmp_path / "val" / "dog" / "0.png")]
        data = load("--data", tmp_path, "--bad-images", "skip")
        assert (len(data.train), len(data.test)) == (5, 3)
        assert capsys.readouterr().err.splitlines() == [f"skipped, unreadable: {path}" for path in bad]
        assert str(bad[0]) not in [path for path, _ in data.train.samples]

    def test_at_most(self, tmp_path):
        write_images(tmp_path / "train", {"cat": 9, "dog": 9})
        write_images(tmp_path / "val", {"cat": 2, "dog": 2})
        data = load("--data", tmp_path, "--limit", 8)
        assert (len(data.train), len(data.test)) == (8, 4)
        assert {label for _, label in data.train} == {0, 1}


def write_cifar(root: Path) -> Path:
    """A small archive in CIFAR-10's format."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 8, 9]}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    archive = root / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, CIFAR10.base_folder)
    return archive


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


class TestCifar:
    @pytest.fixture
    def archive(self, tmp_path, monkeypatch) -> Path:
        archive = write_cifar(tmp_path / "made")
        folder = archive.parent / CIFAR10.base_folder
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
        for name in ("train_list", "test_list"):
            monkeypatch.setattr(CIFAR10, name, [[file, md5(folder / file)] for file, _ in getattr(CIFAR10, name)])
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(folder / "batches.meta")})
        return archive

    def test_folder(self, archive):
        data = load("--data", "cifar10", "--root", archive.parent)
        assert (len(data.train), len(data.test)) == (20, 4)
        assert data.class_names[-2:] == ["ship", "truck"]
        assert data.preprocessing.image_size == 32

    def test_archive(self, archive, tmp_path):
        """Unpacked without a download."""
        (tmp_path / "data").mkdir()
        archive.rename(tmp_path / "data" / archive.name)
        data = load("--data", "cifar10", "--root", tmp_path / "data")
        assert (len(data.train), len(data.test)) == (20, 4)

    def test_training(self, archive, tmp_path, capsys):
        arguments = ["--data", "cifar10", "--root", archive.parent, "--model", "resnext29_32x4d_cifar"]
        result = run(capsys, "train", *arguments, "--image-size", 8, "--epochs", 1, "--out", tmp_path / "out")
        assert result.code == 0, result.err
        result = run(capsys, "evaluate", tmp_path / "out", "--out", tmp_path / "evaluation")
        assert result.code == 0, result.err
        assert result.out.startswith("Images: 4, top-1: ")


def test_synthetic():
    data = load("--data", "synthetic", "--image-size", 24)
    image, label = data.train[0]
    assert (image.size, 0 <= label < 10, len(data.class_names)) == ((24, 24), True, 10)
    first, other = np.asarray(data.train[0][0]), np.asarray(data.test[0][0])
    assert (first != other).any()


class TestPreprocessing:
    IMAGE = torch.arange(3 * 30 * 40, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(3, 30, 40)

    def test_values(self):
        """Of the square in the middle."""
        preprocessing = Preprocessing(20, 30, (0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
        got = preprocessing.transform()(self.IMAGE)
        middle = self.IMAGE[:, 5:25, 10:30].double() / 255
        wanted = (middle - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.25, 0.125])[
            :, None, None
        ]
        assert (type(got), got.dtype) == (torch.Tensor, torch.float32)
        torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)

    def test_dict(self):
        preprocessing = Preprocessing(20, 30, (0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
        assert Preprocessing.from_dict(preprocessing.as_dict()) == preprocessing

    def test_gray_images(self):
        got = Preprocessing(8, 8, HALF, HALF).transform()(self.IMAGE[:1])
        assert got.shape == (3, 8, 8)
        assert torch.equal(got[0], got[2])

    @pytest.mark.parametrize("kind", ["digits", "objects", "photos"])
    def test_training(self, kind):
        preprocessing = Preprocessing(16, 16, HALF, HALF)
        plain = preprocessing.transform()(self.IMAGE)
        torch.manual_seed(0)
        for augment in ("none", "standard", "trivial"):
            transform = preprocessing.training_transform(augment, kind)
            results = [transform(self.IMAGE) for _ in range(6)]
            assert {(each.shape, each.dtype) for each in results} == {(plain.shape, plain.dtype)}
            differ = any(not torch.equal(each, plain) for each in results)
            assert differ == (augment != "none")

    def test_digits_are_never_mirrored(self):
        """An image that is black on the left stays so."""
        image = torch.zeros(1, 16, 16, dtype=torch.uint8)
        image[:, :, 10:] = 255
        transform = Preprocessing(16, 16, HALF, HALF).training_transform("standard", "digits")
        assert all(transform(image)[0, :, 3].max() == -1 for _ in range(20))


class TestOrder:
    def batches(self, processes: Processes, epoch: int, images: int = 21, size: int = 8) -> list[list[int]]:
        sampler = JoinedBatches(images, size, processes, seed=7)
        sampler.epoch = epoch
        batches = list(sampler)
        assert len(batches) == len(sampler)
        return batches

    def test_all_images_in_another_order_in_each_epoch(self):
        first, second, again = ([*chain(*self.batches(ONE, epoch))] for epoch in (1, 2, 1))
        assert sorted(first) == sorted(second) == list(range(21))
        assert first != second
        assert first == again

    def test_processes_share_the_batches_of_one(self):
        whole = self.batches(ONE, 3)
        shares = [self.batches(Processes(CPU, rank, 2), 3) for rank in (0, 1)]
        assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in whole]

    @pytest.mark.parametrize(
        ("images", "size", "sizes"),
        [
            (21, 8, [7, 7, 7]),
            (17, 16, [9, 8]),  # and not a last batch of one image
            (16, 16, [16]),
            (3, 2, [3]),  # where nothing else is left
            (1437, 64, [63] * 11 + [62] * 12),
        ],
    )
    def test_sizes(self, images, size, sizes):
        assert JoinedBatches(images, size, ONE, seed=0).sizes == sizes
        assert [len(batch) for batch in self.batches(ONE, 1, images, size)] == sizes

    def test_every_image_is_tested_once(self):
        samples = Samples([(index, index) for index in range(11)], lambda image: image)
        seen = [
            label
            for rank in range(3)
            for _, labels in evaluation_loader(samples, 2, Processes(CPU, rank, 3), workers=0)
            for label in labels.tolist()
        ]
        assert sorted(seen) == list(range(11))


class TestRandomChanges:
    """They depend on seed, epoch and image, and on nothing else."""

    def samples(self, seed: int = 0) -> Samples:
        return Samples([(index, index) for index in range(24)], lambda image: torch.rand(2), seed)

    def seen(self, samples: Samples, epoch: int, processes: Processes = ONE, workers: int = 0) -> dict[int, Any]:
        loader, batches = training_loader(samples, 8, processes, workers)
        samples.epoch = batches.epoch = epoch
        return {
            int(label): tuple(values.tolist())
            for images, labels in loader
            for label, values in zip(labels, images, strict=True)
        }

    def test_workers_and_processes_change_nothing(self):
        wanted = self.seen(self.samples(), 2)
        assert len(set(wanted.values())) == 24
        torch.rand(3)
        assert self.seen(self.samples(), 2) == wanted
        assert self.seen(self.samples(), 2, workers=2) == wanted
        parts = [self.seen(self.samples(), 2, Processes(CPU, rank, 2)) for rank in (0, 1)]
        assert parts[0] | parts[1] == wanted

    def test_epochs_and_seeds_do(self):
        results = [self.seen(self.samples(seed), epoch) for seed, epoch in ((0, 1), (0, 2), (1, 1))]
        assert len({tuple(sorted(result.items())) for result in results}) == 3

    def test_other_random_numbers_are_left_alone(self):
        torch.manual_seed(3)
        wanted = torch.rand(2)
        torch.manual_seed(3)
        self.samples()[0]
        assert torch.equal(torch.rand(2), wanted)

    def test_seeds_of_several_numbers(self):
        seeds = {derived_seed(*parts) for parts in ((1, 23), (12, 3), (1, 2, 3), (123,))}
        assert len(seeds) == 4
        assert derived_seed(1, 23) in seeds
