"""Everything that a user can get wrong ends a command with one clear line and exit code 2, and nothing half-written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.datasets import CIFAR10

from resnext import create_model, save_checkpoint, unfuse_
from resnext.cli import main
from resnext.cli.distributed import Processes
from resnext.cli.errors import CommandError
from resnext.cli.loading import JoinedBatches

from .commands import ROOT, SMALL, fail, run, succeed, truncate, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), {"cat": 20, "dog": 20})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", "--out", str(folder), "--epochs", "1", *SMALL]) == 0
    return folder


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["--epochs", "0"], "argument --epochs: expected a whole number of at least 1, got '0'"),
            (["--lr", "-1"], "argument --lr: expected a positive number, got '-1'"),
            (["--lr", "nan"], "argument --lr: expected a positive number, got 'nan'"),
            (["--ema", "1"], "argument --ema: expected a number from 0 up to, not including, 1, got '1'"),
            (["--optimizer", "lion"], "argument --optimizer: invalid choice: 'lion' (choose from "),
            (["--model-arg", "stem"], "argument --model-arg: expected NAME=VALUE, got 'stem'"),
            (
                ["--seed", "99999999999999999999"],
                "argument --seed: expected a whole number of at least 0 and below 2**63",
            ),
            (["--colour"], "unrecognized arguments: --colour"),
        ],
    )
    def test_wrong(self, capsys, arguments, line):
        result = run(capsys, "train", *arguments)
        assert result.code == 2
        (written,) = result.err.splitlines()
        assert line in written
        assert written.endswith("--help lists what there is")

    def test_no_command(self, capsys):
        result = run(capsys)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "the following arguments are required: COMMAND" in result.err

    def test_wrong_file(self, capsys):
        line = fail(capsys, "predict", "best.pth", "image.png", "--out", "table.txt")
        assert "argument --out: expected a path that ends in .csv or .json, got 'table.txt'" in line


def train_fails(capsys, folder: Path, *arguments: object) -> str:
    """The line of a training that must fail before it writes anything."""
    out = folder / "out"
    line = fail(capsys, "train", "--out", out, *SMALL, *arguments)
    assert not out.exists()
    return line


class TestData:
    def test_missing_folder(self, capsys, tmp_path):
        assert train_fails(capsys, tmp_path, "--data", tmp_path / "nowhere") == (
            "expected --data to be digits, synthetic, cifar10 or a folder of images, "
            f"got {tmp_path}/nowhere; check the path"
        )

    def test_folder_without_classes(self, capsys, tmp_path):
        line = train_fails(capsys, tmp_path, "--data", tmp_path)
        assert line == f"expected a folder for each class in {tmp_path}, got none; sort the images into some"

    def test_empty_class(self, capsys, tmp_path):
        images = write_images(tmp_path / "images", {"cat": 3, "dog": 3, "bird": 0})
        line = train_fails(capsys, tmp_path, "--data", images)
        assert line == f"expected images of every class in {images}, got none of bird; add some, or remove it"

    def test_one_class_only(self, capsys, tmp_path):
        images = write_images(tmp_path / "images", {"cat": 3})
        line = train_fails(capsys, tmp_path, "--data", images)
        assert line == f"expected at least two classes in {images}, got only cat; add another"

    def test_corrupt_image(self, capsys, tmp_path):
        images = write_images(tmp_path / "images", {"cat": 6, "dog": 6})
        bad = [truncate(images / "cat" / "1.png"), images / "dog" / "2.png"]
        bad[1].write_text("no image")
        assert train_fails(capsys, tmp_path, "--data", images) == (
            f"expected readable images, got 2 that are not: {bad[0]}, {bad[1]}; "
            "replace or remove them, or pass --bad-images skip"
        )

    def test_corrupt_images_of_a_whole_class(self, capsys, tmp_path):
        images = write_images(tmp_path / "images", {"cat": 6, "dog": 1})
        truncate(images / "dog" / "0.png")
        line = train_fails(capsys, tmp_path, "--data", images, "--bad-images", "skip")
        assert line == f"expected images of every class in {images}, got none of dog; add some, or remove it"

    @pytest.mark.parametrize("workers", [0, 1])
    def test_corrupt_image_that_was_not_looked_for(self, capsys, tmp_path, workers):
        for part in ("train", "val"):
            write_images(tmp_path / "images" / part, {"cat": 6, "dog": 6})
        for path in tmp_path.glob("images/train/*/*.png"):
            path.write_text("no image")
        arguments = ["--data", tmp_path / "images", "--no-check-images", "--workers", workers]
        line = fail(capsys, "train", *arguments, "--out", tmp_path / "out", *SMALL)
        assert line.startswith("could not read image ")
        assert "cannot identify image file" in line
        assert line.endswith("check the data")

    def test_training_images_only(self, capsys, tmp_path):
        write_images(tmp_path / "images" / "train", {"cat": 3, "dog": 3})
        line = train_fails(capsys, tmp_path, "--data", tmp_path / "images")
        train = tmp_path / "images" / "train"
        assert line == f"expected a folder val or test beside {train}, got none; add it, or give {train}"

    def test_other_classes_in_the_test_images(self, capsys, tmp_path):
        for part, classes in (("train", {"cat": 3, "dog": 3}), ("val", {"cat": 3, "dog": 3, "bird": 3})):
            write_images(tmp_path / "images" / part, classes)
        line = train_fails(capsys, tmp_path, "--data", tmp_path / "images")
        assert "got only in one of them: bird; complete the other" in line

    def test_class_that_the_split_leaves_out(self, capsys, tmp_path):
        images = write_images(tmp_path / "images", {"cat": 10, "dog": 1})
        line = train_fails(capsys, tmp_path, "--data", images)
        assert "got none of dog; add some, or remove it" in line
        assert "(--val-fraction)" in line

    @pytest.mark.parametrize(("images", "batch_size"), [(3, 64), (64, 3)])
    def test_fewer_images_than_batch_norm_needs(self, images, batch_size):
        with pytest.raises(CommandError, match="expected two images at a time for each of 2 processes, got"):
            JoinedBatches(images, batch_size, Processes(torch.device("cpu"), 0, 2), seed=0)

    def test_no_cifar(self, capsys, tmp_path):
        line = train_fails(capsys, tmp_path, "--data", "cifar10", "--root", tmp_path)
        assert line == (
            f"expected CIFAR-10 in {tmp_path}, got neither {CIFAR10.base_folder} nor {CIFAR10.filename} there, "
            "or damaged ones; pass --download, or --root where they are"
        )

    def test_damaged_archive_of_cifar(self, capsys, tmp_path):
        archive = tmp_path / CIFAR10.filename
        archive.write_bytes(b"half")
        line = train_fails(capsys, tmp_path, "--data", "cifar10", "--root", tmp_path)
        assert line == f"expected the archive of CIFAR-10, got {archive}, damaged or another; get it anew"


class TestModel:
    def test_unknown_name(self, capsys, tmp_path):
        line = train_fails(capsys, tmp_path, "--model", "resnet19")
        assert line.startswith("create_model: expected the name of a model, got 'resnet19'; did you mean resnet18")

    def test_unknown_argument(self, capsys, tmp_path):
        assert "unexpected keyword argument 'depth'" in train_fails(capsys, tmp_path, "--model-arg", "depth=3")

    def test_wrong_argument(self, capsys, tmp_path):
        line = train_fails(capsys, tmp_path, "--model-arg", "drop_rate=2")
        assert line == "ResNet: expected drop_rate in [0, 1), got 2; give the probability of dropping"

    def test_unknown_compiler(self, capsys, tmp_path):
        assert "nocompiler" in train_fails(capsys, tmp_path, "--compile", "nocompiler")

    def test_features_only(self, capsys, tmp_path):
        line = train_fails(capsys, tmp_path, "--model-arg", "features_only=true")
        assert line == "expected a whole model, got --model-arg features_only; leave it out"

    def test_classes_are_those_of_the_data(self, capsys, tmp_path):
        line = train_fails(capsys, tmp_path, "--model-arg", "num_classes=7")
        assert line == "expected num_classes of the data, got --model-arg num_classes too; leave it out"

    def test_weights_of_another_model(self, capsys, tmp_path):
        save_checkpoint(create_model("resnet50_cifar"), tmp_path / "other.pth")
        line = train_fails(capsys, tmp_path, "--weights", tmp_path / "other.pth")
        assert line.startswith(
            "load_checkpoint: expected the weights of this ResNet, got others in "
            f"{tmp_path}/other.pth; build the model that they were made from"
        )

    def test_damaged_weights(self, capsys, tmp_path, trained):
        path = tmp_path / "best.pth"
        path.write_bytes((trained / "best.pth").read_bytes())
        line = train_fails(capsys, tmp_path, "--weights", truncate(path))
        assert line.startswith(f"read_checkpoint: expected a checkpoint, got {path}, damaged or something else")

    def test_no_such_weights(self, capsys, tmp_path):
        assert train_fails(capsys, tmp_path, "--weights", "ResNet19_Weights.BEST") == (
            "expected --weights to be a file or the name of torchvision's weights, got ResNet19_Weights.BEST; "
            "check the path, or give a name like ResNet50_Weights.IMAGENET1K_V2"
        )

    def test_nesterov_without_momentum(self, capsys, tmp_path):
        line = train_fails(capsys, tmp_path, "--optimizer", "sgd", "--nesterov", "--momentum", "0")
        assert line == "Nesterov momentum requires a momentum and zero dampening"


class TestDevice:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_no_gpu(self, capsys, tmp_path):
        line = train_fails(capsys, tmp_path, "--device", "cuda")
        assert line == "expected a GPU number 0, got 0 GPUs; pass --device cpu, or start fewer processes"

    def test_no_device(self, capsys, tmp_path):
        for name in ("meta", "gpu"):
            line = train_fails(capsys, tmp_path, "--device", name)
            assert line == f"expected the device cpu or cuda, got {name}; choose one of them"

    def test_half_precision(self, capsys, tmp_path):
        line = train_fails(capsys, tmp_path, "--device", "cpu", "--amp", "fp16")
        assert line == "expected a GPU for --amp fp16, got a CPU; pass --amp bf16 or off"

    def test_out_of_memory(self, capsys, tmp_path, monkeypatch):
        def raise_it(*arguments, **keywords):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

        monkeypatch.setattr("resnext.cli.training.build_model", raise_it)
        line = train_fails(capsys, tmp_path)
        assert line.startswith("out of GPU memory (CUDA out of memory. Tried to allocate 2 GiB.); lower --batch-size")

    def test_synchronised_norms_that_only_gpus_have(self):
        model = unfuse_(create_model("resnet18_cifar"))
        with pytest.raises(CommandError, match=r"expected fused blocks .* got the model not fused; pass --no-sync-bn"):
            Processes(torch.device("cpu"), 0, 2).parallel(model, sync_bn=True, plain=True)


class TestWriting:
    def test_no_permission(self, capsys, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        root = os.geteuid() == 0
        if root:  # whom no permissions stop
            os.seteuid(65534)
        try:
            line = fail(capsys, "train", "--out", tmp_path / "locked" / "out", *SMALL)
        finally:
            if root:
                os.seteuid(0)
        assert line.startswith(f"{tmp_path}/locked/out")
        assert line.endswith(": Permission denied")
        assert list((tmp_path / "locked").iterdir()) == []

    def test_file_in_place_of_the_folder(self, capsys, tmp_path):
        (tmp_path / "out").write_text("mine")
        assert fail(capsys, "train", "--out", tmp_path / "out", *SMALL) == f"{tmp_path}/out: File exists"
        assert (tmp_path / "out").read_text() == "mine"

    @pytest.mark.parametrize("begun", [False, True], ids=["at the start", "later"])
    def test_full_disk(self, capsys, tmp_path, begun):
        out = tmp_path / "out"
        if begun:
            succeed(capsys, "train", "--out", out, "--epochs", "1", "--schedule", "constant", *SMALL)
        before = {path.name: path.read_bytes() for path in out.glob("*")}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            line = fail(capsys, "train", "--out", out, *(["--resume", "--epochs", "2"] if begun else SMALL))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert line.startswith(f"save_checkpoint: could not write {out}/last.pth: ")
        assert line.endswith("check the space left on the disk")
        assert {path.name: path.read_bytes() for path in out.glob("*")} == before
        assert list(out.glob(".*")) == []

    def test_folder_of_another_run(self, capsys, trained):
        before = (trained / "last.pth").read_bytes()
        assert fail(capsys, "train", "--out", trained, *SMALL) == (
            f"expected a folder without a run, got {trained} with a last.pth; pass --resume to go on, "
            "--overwrite to start anew, or another --out"
        )
        assert (trained / "last.pth").read_bytes() == before

    def test_no_tensorboard(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        line = fail(capsys, "train", "--out", tmp_path, "--tensorboard", *SMALL)
        assert line == "expected tensorboard for --tensorboard, got none; pip install tensorboard"
        assert list(tmp_path.iterdir()) == []

    def test_diverged(self, capsys, tmp_path):
        arguments = ["--optimizer", "sgd", "--lr", "1e30", "--schedule", "constant", *SMALL]
        line = fail(capsys, "train", "--out", tmp_path, *arguments)
        assert line == "expected a finite training loss, got nan; lower --lr or pass --clip-norm 1"


class TestResuming:
    def test_no_such_file(self, capsys, tmp_path):
        line = fail(capsys, "train", "--resume", tmp_path / "last.pth")
        assert line == f"read_checkpoint: expected a file, got {tmp_path}/last.pth; check the path"

    def test_checkpoint_of_something_else(self, capsys, tmp_path):
        save_checkpoint(create_model("resnet18_cifar"), tmp_path / "weights.pth")
        assert fail(capsys, "train", "--resume", tmp_path / "weights.pth") == (
            f"expected a checkpoint from resnext train, got {tmp_path}/weights.pth without class names; "
            "start a run from such weights with resnext train --weights"
        )
        assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]

    def test_best_checkpoint(self, capsys, trained):
        line = fail(capsys, "train", "--resume", trained / "best.pth")
        assert line == "expected a run's last.pth to resume, got one without optimizer; give last.pth"

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["--model", "resnet18"], "expected --model resnext29_32x4d_cifar as the run began with, got resnet18"),
            (["--epochs", "3"], "expected --epochs 1 as the run began with, got 3"),  # a cosine depends on it
            (["--lr", "0.1"], "expected --lr None as the run began with, got 0.1"),
        ],
    )
    def test_other_arguments(self, capsys, trained, arguments, line):
        assert fail(capsys, "train", "--out", trained, "--resume", *arguments) == (
            f"{line}; leave it out, or start a new run"
        )

    def test_another_folder(self, capsys, trained, tmp_path):
        line = fail(capsys, "train", "--resume", trained / "last.pth", "--out", tmp_path)
        assert line == f"expected --out {trained}, where the run to resume is, got {tmp_path}; leave it out"

    def test_other_classes(self, capsys, tmp_path):
        images = write_images(tmp_path / "images", {"cat": 20, "dog": 20})
        out = tmp_path / "out"
        succeed(capsys, "train", "--data", images, "--out", out, "--epochs", "1", *SMALL)
        (images / "cat").rename(images / "cow")
        line = fail(capsys, "train", "--out", out, "--resume")
        assert (
            line
            == f"expected the classes that the run began with, cat, dog, got cow, dog in {images}; restore the data"
        )


class TestUsing:
    def test_no_checkpoint(self, capsys, tmp_path):
        for command in (["evaluate"], ["export"], ["predict", tmp_path]):
            line = fail(capsys, command[0], tmp_path / "best.pth", *command[1:])
            assert line == f"read_checkpoint: expected a file, got {tmp_path}/best.pth; check the path"

    def test_folder_without_a_model(self, capsys, tmp_path):
        line = fail(capsys, "evaluate", tmp_path)
        assert line.startswith(f"from_pretrained: expected config.json and model.safetensors in {tmp_path}")

    def test_checkpoint_of_something_else(self, capsys, tmp_path):
        save_checkpoint(create_model("resnet18_cifar"), tmp_path / "weights.pth")
        line = fail(capsys, "evaluate", tmp_path / "weights.pth")
        assert f"expected a checkpoint from resnext train, got {tmp_path}/weights.pth without class names" in line

    def test_data_of_other_classes(self, capsys, trained, images):
        line = fail(capsys, "evaluate", trained, "--data", images)
        assert line == (
            f"expected the classes of the checkpoint, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, got cat, dog in {images}; "
            "give the data that the model was trained for"
        )

    def test_no_image(self, capsys, trained, tmp_path):
        assert fail(capsys, "predict", trained, tmp_path) == f"expected images, got none in {tmp_path}; check the path"
        line = fail(capsys, "predict", trained, tmp_path / "a.png")
        assert line == f"expected images or folders, got {tmp_path}/a.png, which does not exist; check the path"

    def test_unreadable_image(self, capsys, trained, tmp_path):
        (tmp_path / "a.png").write_text("no image")
        assert fail(capsys, "predict", trained, tmp_path) == (
            f"expected readable images, got 1 that are not: {tmp_path}/a.png; "
            "replace or remove them, or pass --bad-images skip"
        )
        result = run(capsys, "predict", trained, tmp_path, "--bad-images", "skip")
        assert (result.code, result.err.splitlines()[-1]) == (
            2,
            "resnext predict: expected readable images, got none; give others",
        )

    def test_no_place_for_the_results(self, capsys, trained, images, tmp_path):
        line = fail(capsys, "predict", trained, images, "--out", tmp_path / "nowhere" / "table.csv")
        assert line.endswith(": No such file or directory")

    def test_onnx_without_its_packages(self, capsys, trained, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        line = fail(capsys, "export", trained, "--format", "onnx", "--out", tmp_path / "model.onnx")
        assert line == "expected onnxscript for --format onnx, got none; pip install onnx onnxscript"
        assert list(tmp_path.iterdir()) == []

    def test_summary(self, capsys, trained):
        assert "got 'resnet19'" in fail(capsys, "summary", "resnet19")
        line = fail(capsys, "summary", trained, "--model-arg", "stem=cifar")
        assert line.startswith("expected --model-arg with the name of a model only")


class TestInstallation:
    @pytest.mark.parametrize(
        ("source", "line"),
        [
            (
                "raise RuntimeError('operator torchvision::nms does not exist')",
                f"expected a torchvision made for torch {torch.__version__}, got one that does not import (operator "
                "torchvision::nms does not exist); install builds of the two that belong together, both for CPUs or "
                "both for CUDA",
            ),
            (
                "raise ModuleNotFoundError(\"No module named 'torchvision'\")",
                "expected the packages of resnext[train], got No module named 'torchvision'; pip install "
                "'resnext[train]'",
            ),
        ],
        ids=["of another build", "missing"],
    )
    def test_torchvision(self, tmp_path, source, line):
        (tmp_path / "torchvision.py").write_text(source)
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        result = subprocess.run(
            [sys.executable, "-m", "resnext", "train"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (result.returncode, result.stdout, result.stderr) == (2, "", f"resnext train: {line}\n")
        assert not (tmp_path / "runs").exists()
