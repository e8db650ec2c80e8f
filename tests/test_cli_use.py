"""From photos to predictions: train on crops of some that ship with libraries, evaluate, predict, export, summarize."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnext import from_pretrained, read_checkpoint
from resnext.cli import main
from resnext.cli.checkpointing import load_trained

from .commands import MODEL, SMALL, run, succeed, write_images

CLASSES = ["astronaut", "cat", "china", "coffee", "flower", "rocket"]


def photos() -> dict[str, np.ndarray]:
    data = pytest.importorskip("skimage.data")
    china, flower = pytest.importorskip("sklearn.datasets").load_sample_images().images
    ours = {"astronaut": data.astronaut(), "cat": data.chelsea(), "coffee": data.coffee(), "rocket": data.rocket()}
    return {**ours, "china": china, "flower": flower}


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    """Squares out of each photo."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name, pixels in photos().items():
        height, width, _ = pixels.shape
        for part, count in (("train", 20), ("val", 6)):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                side = int(generator.integers(200, 280))
                top = int(generator.integers(0, height - side))
                left = int(generator.integers(0, width - side))
                crop = Image.fromarray(pixels[top : top + side, left : left + side])
                crop.save(root / part / name / f"{index}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def trained(crops, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    arguments = [
        "--data",
        str(crops),
        "--model",
        "resnet18",
        "--image-size",
        "64",
        "--epochs",
        "4",
        "--augment",
        "none",
        "--workers",
        "0",
    ]
    assert main(["train", *arguments, "--batch-size", "12", "--out", str(folder), "--no-progress"]) == 0
    return folder


def test_photos_are_told_apart(trained):
    best = read_checkpoint(trained / "best.pth")
    assert best["class_names"] == CLASSES
    assert best["record"]["test_acc"] >= 0.8


class TestEvaluate:
    def test_accuracies_and_confusion_matrix(self, capsys, trained, crops, tmp_path):
        first, *classes = succeed(capsys, "evaluate", trained, "--out", tmp_path).splitlines()
        found = re.fullmatch(r"Images: 36, top-1: (\d+\.\d\d)%, top-5: (\d+\.\d\d)%, loss: \d+\.\d{4}", first)
        record = read_checkpoint(trained / "best.pth")["record"]
        assert float(found[1]) == round(100 * record["test_acc"], 2)
        assert float(found[1]) <= float(found[2]) <= 100

        rows = list(csv.reader((tmp_path / "confusion.csv").read_text().splitlines()))
        assert rows[0][1:] == [row[0] for row in rows[1:]] == CLASSES
        matrix = np.array([[int(value) for value in row[1:]] for row in rows[1:]])
        assert (matrix.sum(axis=1) == 6).all()
        assert matrix.trace() == round(36 * record["test_acc"])
        assert classes == [f"{name}: {matrix[i, i] / 6:.2%} of 6" for i, name in enumerate(CLASSES)]
        with Image.open(tmp_path / "confusion.png") as picture:
            assert picture.format == "PNG"

    def test_part(self, capsys, trained, tmp_path):
        for part, images in (("train", 120), ("all", 156)):
            out = succeed(capsys, "evaluate", trained, "--part", part, "--out", tmp_path)
            assert out.startswith(f"Images: {images}, top-1: ")

    def test_other_folder_of_the_same_classes(self, capsys, trained, crops, tmp_path):
        out = succeed(capsys, "evaluate", trained / "last.pth", "--data", crops / "val", "--part", "all")
        assert out.startswith("Images: 36, ")
        assert (trained / "confusion.csv").is_file()

    def test_of_two_classes(self, capsys, tmp_path):
        write_images(tmp_path / "images", {"cat": 20, "dog": 20})
        succeed(capsys, "train", "--data", tmp_path / "images", "--out", tmp_path / "out", "--epochs", "1", *SMALL)
        out = succeed(capsys, "evaluate", tmp_path / "out")
        assert out.startswith("Images: 8, top-1: ")
        assert "top-2: 100.00%" in out


class TestPredict:
    def test_folder(self, capsys, trained, crops, tmp_path):
        table, grid = tmp_path / "table.csv", tmp_path / "grid.png"
        out = succeed(capsys, "predict", trained, crops / "val", "--out", table, "--grid", grid, "--top", "3")
        rows = list(csv.DictReader(table.read_text().splitlines()))
        assert len(rows) == len(out.splitlines()) == 36
        assert all(row["true"] == Path(row["path"]).parent.name for row in rows)
        right = sum(row["class_1"] == row["true"] for row in rows)
        assert right == round(36 * read_checkpoint(trained / "best.pth")["record"]["test_acc"])
        for row, printed in zip(rows, out.splitlines(), strict=True):
            values = [float(row[f"probability_{k}"]) for k in (1, 2, 3)]
            assert values == sorted(values, reverse=True)
            assert sum(values) <= 1 + 1e-5
            pattern = f"{row['path']}: {row['class_1']} \\((\\d+\\.\\d)%\\), true: {row['true']}"
            percent = float(re.fullmatch(pattern, printed)[1])
            assert percent == pytest.approx(100 * values[0], abs=0.0501)  # the table has more digits
        with Image.open(grid) as picture:
            assert picture.size == (960, 736)  # 24 images in 4 rows of 6

    def test_one_image(self, capsys, trained, crops, tmp_path):
        """Whose class nobody tells, by its path."""
        path = tmp_path / "picture.jpg"
        path.write_bytes((crops / "val" / "cat" / "0.jpg").read_bytes())
        succeed(capsys, "predict", trained, path, "--out", tmp_path / "table.json", "--grid", tmp_path / "grid.png")
        (record,) = json.loads((tmp_path / "table.json").read_text())
        assert (record["path"], record["true"]) == (str(path), None)
        predictions = record["predictions"]
        assert len(predictions) == 5
        assert {each["class"] for each in predictions} < set(CLASSES)

    def test_probabilities_are_the_models(self, capsys, trained, crops, tmp_path):
        path = crops / "val" / "rocket" / "1.jpg"
        succeed(capsys, "predict", trained, path, "--top", "6", "--out", tmp_path / "table.json")
        (record,) = json.loads((tmp_path / "table.json").read_text())
        loaded = load_trained(trained)
        with torch.no_grad(), Image.open(path) as image:
            wanted = loaded.model(loaded.preprocessing.transform()(image)[None]).softmax(1)[0]
        got = {each["class"]: each["probability"] for each in record["predictions"]}
        torch.testing.assert_close(torch.tensor([got[name] for name in CLASSES]), wanted, atol=1e-5, rtol=1e-4)

    def test_skipping(self, capsys, trained, crops, tmp_path):
        (tmp_path / "bad.png").write_text("no image")
        result = run(capsys, "predict", trained, tmp_path, crops / "val" / "cat", "--bad-images", "skip")
        assert (result.code, len(result.out.splitlines())) == (0, 6)
        assert result.err == f"skipped, unreadable: {tmp_path}/bad.png\n"


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64)


@pytest.fixture
def logits(trained, images) -> torch.Tensor:
    with torch.no_grad():
        return load_trained(trained).model(images)


class TestExport:
    def close(self, got: torch.Tensor, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("plain", [[], ["--plain"]], ids=["fused", "plain"])
    def test_program(self, capsys, trained, tmp_path, images, logits, plain):
        path = tmp_path / "model.pt2"
        assert succeed(capsys, "export", trained, "--out", path, *plain) == f"{path}\n"
        extra = {"class_names": "", "preprocessing": ""}
        program = torch.export.load(path, extra_files=extra)
        self.close(program.module()(images), logits)
        assert json.loads(extra["class_names"]) == CLASSES
        assert json.loads(extra["preprocessing"])["image_size"] == 64
        assert ("resnext" in str(program.graph)) == (not plain)

    def test_onnx(self, capsys, trained, tmp_path, images, logits):
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnx.reference")
        pytest.importorskip("onnxscript")
        path = tmp_path / "model.onnx"
        assert succeed(capsys, "export", trained, "--format", "onnx", "--out", path) == f"{path}\n"
        assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
        model = onnx.load(path)
        (got,) = onnx.reference.ReferenceEvaluator(model).run(None, {"images": images.numpy()})
        self.close(torch.from_numpy(got), logits)
        about = {each.key: json.loads(each.value) for each in model.metadata_props}
        assert about["class_names"] == CLASSES

    def test_folder(self, capsys, trained, tmp_path, images, logits, crops):
        path = tmp_path / "model"
        succeed(capsys, "export", trained, "--format", "folder", "--out", path)
        model = from_pretrained(path)
        with torch.no_grad():
            self.close(model(images), logits)
        loaded = load_trained(path)
        assert (loaded.class_names, loaded.preprocessing) == (CLASSES, load_trained(trained).preprocessing)
        out = succeed(capsys, "evaluate", path, "--data", crops, "--out", tmp_path)
        assert out.splitlines()[0] == succeed(capsys, "evaluate", trained, "--out", tmp_path).splitlines()[0]

    def test_beside_the_checkpoint(self, capsys, trained):
        assert succeed(capsys, "export", trained, "--format", "folder") == f"{trained / 'model'}\n"
        assert (trained / "model" / "model.safetensors").is_file()


class TestSummary:
    def test_name(self, capsys):
        out = succeed(capsys, "summary", MODEL, "--depth", "1")
        assert "Total params: 4,775,754" in out
        assert "[1, 64, 32, 32]" in out

    def test_arguments(self, capsys):
        arguments = ["--model-arg", "num_classes=7", "--model-arg", "in_chans=1", "--plain", "--image-size", "16"]
        out = succeed(capsys, "summary", MODEL, *arguments)
        assert "[1, 7]" in out
        assert "fused block" not in out
        assert "fused block" in succeed(capsys, "summary", MODEL, "--image-size", "16")

    def test_checkpoint(self, capsys, trained):
        out = succeed(capsys, "summary", trained, "--batch-size", "2")
        assert "[2, 64, 32, 32]" in out
        assert "[2, 6]" in out

    def test_needs_no_torchvision(self):
        code = "import sys; sys.modules['torchvision'] = None; from resnext.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "summary", MODEL, "--depth", "1"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert "Total params: 4,775,754" in result.stdout
