"""``resnext train``: what it prints and writes, and that a run that stopped goes on to the same result."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from resnext import create_model, load_checkpoint, read_checkpoint, save_checkpoint, why_not_fused
from resnext.cli import main, training
from resnext.cli.arguments import parse
from resnext.cli.engine import Placement, Trainer, choose_amp, progress_bar
from resnext.cli.logs import line
from resnext.cli.optimization import Schedule, make_optimizer
from resnext.convert import FusedModule

from .commands import MODEL, SIZE, SMALL, run, start, state, succeed, wait_for_line

LINE = re.compile(
    r"Epoch:[ \d]\d, Train_acc:\d+\.\d%, Train_loss:\d+\.\d{3}, Test_acc:\d+\.\d%, Test_loss:\d+\.\d{3}, "
    r"Lr:\d\.\d\dE[-+]\d\d"
)


def test_line_is_that_of_the_articles():
    record = {"train_acc": 0.8094, "train_loss": 0.5731, "test_acc": 0.83, "test_loss": 0.4327, "lr": 1e-4}
    assert line({"epoch": 1, **record}) == (
        "Epoch: 1, Train_acc:80.9%, Train_loss:0.573, Test_acc:83.0%, Test_loss:0.433, Lr:1.00E-04"
    )
    assert line({"epoch": 10, **record}).startswith("Epoch:10, ")


class TestFiles:
    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, tmp_path_factory) -> tuple[Path, str]:
        """A run's folder, and what it printed."""
        folder = tmp_path_factory.mktemp("runs") / "digits"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main(["train", "--out", str(folder), "--epochs", "2", "--tensorboard", *SMALL]) == 0
        return folder, printed.getvalue()

    def test_one_line_for_each_epoch(self, trained):
        *epochs, best = trained[1].splitlines()
        assert len(epochs) == 2
        assert all(LINE.fullmatch(each) for each in epochs)
        assert re.fullmatch(r"Best: epoch [12], Test_acc:\d+\.\d%, Test_loss:\d+\.\d{3}", best)

    def test_best_line_is_that_of_its_epoch(self, trained):
        *epochs, best = trained[1].splitlines()
        number = int(best.split()[2].strip(","))
        test = re.search(r"Test_acc:\S+ Test_loss:\S+", epochs[number - 1])[0].strip(",")
        assert best.endswith(test)

    def test_names(self, trained):
        names = {path.name for path in trained[0].iterdir()}
        assert names == {"best.pth", "last.pth", "log.csv", "log.jsonl", "curves.png", "tensorboard"}
        assert list((trained[0] / "tensorboard").glob("events.*"))

    def test_logs_hold_what_is_printed(self, trained):
        folder, printed = trained
        records = [json.loads(each) for each in (folder / "log.jsonl").read_text().splitlines()]
        assert [line(record) for record in records] == printed.splitlines()[:2]
        rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
        assert [{key: float(value) for key, value in row.items()} for row in rows] == records
        assert records == read_checkpoint(folder / "last.pth")["history"]

    def test_curves(self, trained):
        with Image.open(trained[0] / "curves.png") as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10

    @pytest.mark.parametrize("name", ["best.pth", "last.pth"])
    def test_checkpoints_load_without_code(self, trained, name):
        """With what a user of the model needs."""
        checkpoint = torch.load(trained[0] / name, weights_only=True)
        assert checkpoint["class_names"] == [str(digit) for digit in range(10)]
        assert checkpoint["preprocessing"] == {
            "image_size": SIZE,
            "resize_size": SIZE,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        }
        assert checkpoint["arguments"]["batch_size"] == 16
        assert checkpoint["config"] == {"architecture": MODEL, "num_classes": 10}
        report = load_checkpoint(create_model(MODEL), trained[0] / name)
        assert report.differences == ""

    def test_weights_of_a_run_start_another(self, trained, capsys, tmp_path):
        path = trained[0] / "best.pth"
        out = succeed(capsys, "train", "--weights", path, "--out", tmp_path, "--epochs", "1", "--lr", "1e-9", *SMALL)
        assert out.startswith(
            f"weights: {len(create_model(MODEL).state_dict())} tensors from {path}; used the entry 'model'\n"
        )
        assert read_checkpoint(tmp_path / "last.pth")["history"][0]["train_loss"] < 2.5  # as good as it was

    def test_finished_run_only_tests_again(self, trained, capsys):
        folder, printed = trained
        before = state(folder)
        out = succeed(capsys, "train", "--resume", folder / "last.pth")
        assert out.splitlines() == printed.splitlines()[2:]
        assert_equal(state(folder), before)

    def test_overwriting(self, trained, capsys, tmp_path):
        (tmp_path / "last.pth").write_bytes(b"old")
        (tmp_path / "best.pth").write_bytes(b"old")
        succeed(capsys, "train", "--out", tmp_path, "--overwrite", "--epochs", "2", *SMALL)
        assert_equal(state(tmp_path), state(trained[0]))


def assert_equal(got: Any, wanted: Any, where: str = "") -> None:
    """Nested values, bit by bit."""
    assert type(got) is type(wanted), where
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), where
        for key in wanted:
            assert_equal(got[key], wanted[key], f"{where}/{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted), where
        for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
            assert_equal(one, other, f"{where}/{index}")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(got, wanted), where
    else:
        assert got == wanted, where


# Between them all that a run has to remember: optimizer, schedule, averaged weights, random numbers, order.
RUNS = {
    "adam, warm-up, cosine, ema, dropout": [
        *("--warmup-epochs", "1", "--ema", "0.9", "--label-smoothing", "0.1", "--augment", "trivial"),
        *("--model-arg", "drop_rate=0.3", "--model-arg", "drop_path_rate=0.2"),
    ],
    "sgd, plateau, accumulation, bf16, workers": [
        *("--optimizer", "sgd", "--nesterov", "--schedule", "plateau", "--patience", "0", "--lr", "0.01"),
        *("--accumulate", "2", "--clip-norm", "1", "--amp", "bf16", "--workers", "1", "--deterministic"),
    ],
    "adamw, lambda": ["--optimizer", "adamw", "--weight-decay", "0.05", "--schedule", "lambda", "--step-size", "1"],
}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, also where a shell has started the tests in the background, which ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestResuming:
    @pytest.mark.usefixtures("interruptible")
    @pytest.mark.parametrize("name", RUNS)
    def test_equals_an_uninterrupted_run(self, capsys, tmp_path, monkeypatch, name):
        """After Ctrl-C in the middle of an epoch; its checkpoint is that of the epoch before."""
        arguments = ["--epochs", "3", "--seed", "5", *SMALL, *RUNS[name]]
        succeed(capsys, "train", "--out", tmp_path / "whole", *arguments)

        step, calls = Trainer._step, []

        def interrupted(self):
            step(self)
            calls.append(None)
            if len(calls) == steps_before + 1:
                signal.raise_signal(signal.SIGINT)

        steps_before = 2 if "--accumulate" in arguments else 3  # the first epoch's, of 40 images
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", interrupted)
            result = run(capsys, "train", "--out", tmp_path / "parts", *arguments)
        last = tmp_path / "parts" / "last.pth"
        assert result.code == 130
        assert result.err == f"resnext train: interrupted; resnext train --resume {last} goes on\n"
        assert read_checkpoint(last)["epoch"] == 1
        out = succeed(capsys, "train", "--resume", last)
        assert [each[:8] for each in out.splitlines()] == ["Epoch: 2", "Epoch: 3", "Best: ep"]
        assert_equal(state(tmp_path / "parts"), state(tmp_path / "whole"))
        for each in ("best.pth", "last.pth"):
            assert_equal(
                read_checkpoint(tmp_path / "parts" / each)["model"], read_checkpoint(tmp_path / "whole" / each)["model"]
            )

    def test_folder_that_has_moved(self, capsys, tmp_path, monkeypatch):
        succeed(capsys, "train", "--out", tmp_path / "old", "--epochs", "1", *SMALL)
        (tmp_path / "old").rename(tmp_path / "new")
        monkeypatch.chdir(tmp_path / "new")
        assert succeed(capsys, "train", "--resume", "last.pth").startswith("Best: epoch 1")
        assert not (tmp_path / "old").exists()

    def test_more_epochs(self, capsys, tmp_path):
        """Which only a schedule that does not know the last one allows."""
        arguments = ["--schedule", "step", "--step-size", "1", *SMALL]
        succeed(capsys, "train", "--out", tmp_path / "whole", "--epochs", "2", *arguments)
        succeed(capsys, "train", "--out", tmp_path / "parts", "--epochs", "1", *arguments)
        succeed(capsys, "train", "--out", tmp_path / "parts", "--resume", "--epochs", "2")
        assert_equal(state(tmp_path / "parts"), state(tmp_path / "whole"))

    def test_nothing_to_go_on_from_yet(self, capsys, tmp_path):
        out = succeed(capsys, "train", "--out", tmp_path, "--resume", "--epochs", "1", *SMALL)
        assert out.startswith("Epoch: 1")

    def test_killed(self, capsys, tmp_path):
        """By SIGKILL while it writes a checkpoint, and once more in the middle of an epoch."""
        arguments = ["--epochs", "4", *SMALL]
        succeed(capsys, "train", "--out", tmp_path / "whole", *arguments)

        out = tmp_path / "parts"
        process = start("train", "--out", out, *arguments)
        wait_for_line(process, "Epoch: 1")
        kill_when(process, lambda: list(out.glob(".last.pth.*.tmp")))
        (leftover,) = out.glob(".last.pth.*.tmp")
        epoch = read_checkpoint(out / "last.pth")["epoch"]
        assert epoch < 4

        process = start("train", "--resume", out / "last.pth")
        first = wait_for_line(process, "Epoch:")
        assert first.startswith(f"Epoch: {epoch + 1},")
        assert not leftover.exists()
        wait_until(process, lambda: read_checkpoint(out / "last.pth")["epoch"] == epoch + 1)
        kill_when(process, lambda: True)

        succeed(capsys, "train", "--resume", out / "last.pth")
        assert_equal(state(out), state(tmp_path / "whole"))
        assert [path.name for path in out.glob(".*")] == []


def wait_until(process: Any, holds: Any) -> None:
    """Look again and again until something holds while a process runs."""
    end = time.monotonic() + 60
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.001)


def kill_when(process: Any, holds: Any) -> None:
    wait_until(process, holds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


class TestRates:
    """The learning rate of each epoch, against the schedule's formula."""

    @staticmethod
    def rates(losses: list[float], *arguments: str) -> list[float]:
        options = parse(["train", "--epochs", str(len(losses)), "--optimizer", "sgd", "--lr", "1", *arguments])
        optimizer = make_optimizer(options, [nn.Parameter(torch.zeros(1))])
        schedule, rates = Schedule(options, optimizer), []
        for epoch, loss in enumerate(losses, start=1):
            rates.append(schedule.lr)
            optimizer.step()
            schedule.step(epoch, loss)
        return rates

    def test_constant(self):
        assert self.rates([1.0] * 3, "--schedule", "constant") == [1, 1, 1]

    def test_step_by_ten(self):
        assert self.rates([1.0] * 21, "--schedule", "step") == pytest.approx([1] * 10 + [0.1] * 10 + [0.01])

    def test_lambda(self):
        wanted = [0.97 ** (epoch // 10) for epoch in range(25)]
        assert self.rates([1.0] * 25, "--schedule", "lambda") == pytest.approx(wanted)

    def test_cosine(self):
        assert self.rates([1.0] * 4, "--schedule", "cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447], rel=1e-5)

    def test_plateau(self):
        rates = self.rates([3.0, 2.0, 2.0, 2.0, 2.0, 1.0], "--schedule", "plateau", "--patience", "1")
        assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1])

    @pytest.mark.parametrize("schedule", ["constant", "step", "lambda", "cosine", "plateau"])
    def test_warm_up(self, schedule):
        rates = self.rates([1.0] * 6, "--schedule", schedule, "--warmup-epochs", "3")
        assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
        assert rates[4] <= 1

    def test_smallest(self):
        rates = self.rates([1.0] * 5, "--schedule", "plateau", "--patience", "0", "--min-lr", "0.05")
        assert rates == pytest.approx([1, 1, 0.1, 0.05, 0.05])

    def test_schedules_are_pytorchs(self):
        options = parse(["train", "--schedule", "step"])
        schedule = Schedule(options, make_optimizer(options, [nn.Parameter(torch.zeros(1))]))
        assert isinstance(schedule.by_epoch, LRScheduler)

    @pytest.mark.parametrize(("name", "lr"), [("sgd", 0.05), ("adam", 0.001), ("adamw", 0.001)])
    def test_default(self, name, lr):
        options = parse(["train", "--optimizer", name])
        assert make_optimizer(options, [nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == lr


class TestEngine:
    """One epoch of a linear model, whose steps can be computed by hand."""

    IMAGES, LABELS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2

    def trainer(self, **arguments: Any) -> Trainer:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        defaults: dict[str, Any] = {
            "optimizer": torch.optim.SGD(model.parameters(), 0.1),
            "scaler": torch.amp.GradScaler("cpu", enabled=False),
            "criterion": nn.CrossEntropyLoss(reduction="sum"),
            "placement": Placement(torch.device("cpu"), channels_last=False),
            "class_count": 2,
        }
        return Trainer(model, **{**defaults, **arguments})

    def batches(self, *sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.IMAGES.split(sizes), self.LABELS.split(sizes), strict=True))

    def epoch(self, trainer: Trainer, *sizes: int) -> Any:
        return trainer.epoch(self.batches(*sizes), sizes, progress_bar("", 12, show=False))

    def test_accumulation_equals_larger_batches(self):
        whole, parts = self.trainer(), self.trainer(accumulate=2)
        self.epoch(whole, 8, 4)
        self.epoch(parts, 5, 3, 4)
        torch.testing.assert_close(parts.model.weight, whole.model.weight)

    def test_scores_are_means_over_images(self):
        trainer = self.trainer()
        trainer.optimizer.param_groups[0]["lr"] = 0.0
        scores = self.epoch(trainer, 7, 5)
        logits = trainer.model(self.IMAGES).detach()
        assert scores.loss == pytest.approx(float(nn.functional.cross_entropy(logits, self.LABELS)), rel=1e-6)
        assert scores.accuracy == pytest.approx(float((logits.argmax(1) == self.LABELS).float().mean()))

    def test_clipping(self):
        trainer = self.trainer(clip_norm=1e-3)
        before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        self.epoch(trainer, 12)
        after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        assert float((after - before).norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)

    def test_precision(self):
        cpu = torch.device("cpu")
        assert [choose_amp(name, cpu) for name in ("auto", "off", "bf16")] == [None, None, torch.bfloat16]


class TestProgress:
    """A bar with images per second, on terminals only."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    @pytest.mark.parametrize(
        ("stream", "show", "shown"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
    )
    def test_bar(self, monkeypatch, stream, show, shown):
        written = stream()
        monkeypatch.setattr(sys, "stderr", written)
        with progress_bar("Epoch 1", 100, show) as bar:
            bar.update(50)
            bar.refresh()
        assert ("Epoch 1" in written.getvalue()) == shown
        assert ("images/s" in written.getvalue()) == shown


class TestModels:
    def test_plain(self, capsys, tmp_path, monkeypatch):
        """Nothing runs fused, in training as in testing; otherwise everything does."""
        built = []
        build = training.build_model
        monkeypatch.setattr(training, "build_model", lambda *a, **k: built.append(build(*a, **k)) or built[-1])
        for arguments, expected in ((["--plain"], False), ([], True)):
            succeed(capsys, "train", "--out", tmp_path / str(expected), "--epochs", "1", *arguments, *SMALL)
            assert any(isinstance(module, FusedModule) for module in built[-1].modules()) == expected
            assert why_not_fused(built[-1]) == {}

    def test_compiled(self, capsys, tmp_path):
        arguments = ["--epochs", "1", *SMALL, "--model", "resnet18", "--image-size", "32", "--plain"]
        succeed(capsys, "train", "--out", tmp_path / "eager", *arguments)
        succeed(capsys, "train", "--out", tmp_path / "compiled", *arguments, "--compile", "eager")
        eager, compiled = (state(tmp_path / name) for name in ("eager", "compiled"))
        assert compiled["model"].keys() == eager["model"].keys()
        assert compiled["history"][0]["train_loss"] == pytest.approx(eager["history"][0]["train_loss"], rel=0.05)

    def test_weights_of_torchvision(self, capsys, tmp_path, monkeypatch):
        """By name; here the download is a model of ours."""
        from torchvision.models import ResNet18_Weights

        donor = create_model("resnet18")
        monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda self, **kwargs: donor.state_dict())
        weights = ["--model", "resnet18", "--weights", "ResNet18_Weights.IMAGENET1K_V1"]
        out = succeed(capsys, "train", "--out", tmp_path, "--epochs", "1", "--lr", "1e-12", *SMALL, *weights)
        assert "weights: 120 tensors from ResNet18_Weights.IMAGENET1K_V1; " in out
        assert "skipped the classifier: it has 10 classes, the checkpoint 1000" in out
        kept = read_checkpoint(tmp_path / "last.pth")["model"]["layer4.1.conv2.weight"]
        torch.testing.assert_close(kept, donor.state_dict()["layer4.1.conv2.weight"], atol=1e-9, rtol=1e-6)

    def test_last_batch_of_one_image(self, capsys, tmp_path):
        """There is none: 17 images are batches of 9 and 8."""
        out = succeed(capsys, "train", "--out", tmp_path, "--epochs", "1", *SMALL, "--limit", "17")
        assert LINE.fullmatch(out.splitlines()[0])

    def test_averaged_weights_are_tested_and_kept(self, capsys, tmp_path):
        succeed(capsys, "train", "--out", tmp_path, "--epochs", "1", "--ema", "0.5", *SMALL)
        last, best = read_checkpoint(tmp_path / "last.pth"), read_checkpoint(tmp_path / "best.pth")
        averaged = {key.removeprefix("module."): value for key, value in last["model_ema"].items()}
        assert averaged.pop("n_averaged") == 3
        assert_equal(dict(best["model"]), averaged)
        assert not torch.equal(averaged["fc.weight"], last["model"]["fc.weight"])

    def test_weights_can_be_kept_as_safetensors(self, capsys, tmp_path):
        succeed(capsys, "train", "--out", tmp_path, "--epochs", "1", *SMALL)
        weights = dict(read_checkpoint(tmp_path / "best.pth")["model"])
        save_checkpoint(weights, tmp_path / "weights.safetensors")
        assert_equal(read_checkpoint(tmp_path / "weights.safetensors"), weights)
