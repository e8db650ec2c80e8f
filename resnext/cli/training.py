"""``resnext train``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnext import save_checkpoint
from resnext.cli.arguments import Options
from resnext.cli.building import build_model, start_from
from resnext.cli.checkpointing import BEST, LAST, describe, read_run, resumed
from resnext.cli.data import load_data
from resnext.cli.distributed import Processes, processes
from resnext.cli.engine import Placement, Scores, Trainer, choose_amp, evaluate, progress_bar
from resnext.cli.errors import CommandError, Interrupted, mendable
from resnext.cli.loading import Samples, derived_seed, evaluation_loader, training_loader
from resnext.cli.logs import Record, line, write_logs
from resnext.cli.optimization import Schedule, make_optimizer


def run(options: Options) -> None:
    """Train a model, from the beginning or from where an earlier process was.

    Raises:
        CommandError: Something that was asked for cannot be done.
        OSError: Something cannot be written.
        Interrupted: By Ctrl-C.
    """
    options, checkpoint = _begin(options)
    with processes(options.device) as group, _repeatable(options.deterministic):
        _Run(options, group, checkpoint).go()


def _begin(options: Options) -> tuple[Options, dict[str, Any] | None]:
    """All arguments, and what the run has to go on from."""
    if isinstance(options.resume, Path):
        path, folder = options.resume, options.resume.parent
        if options.out is not None and options.out.resolve() != folder.resolve():
            raise CommandError(f"expected --out {folder}, where the run to resume is, got {options.out}; leave it out")
    else:
        folder = options.out or Path("runs", f"{Path(options.data).resolve().name}-{options.model}")
        path = folder / LAST
    options.out = folder
    if isinstance(options.resume, Path) or (options.resume and path.is_file()):
        checkpoint = read_run(path)
        return resumed(options, checkpoint), checkpoint
    if path.is_file() and not options.overwrite:
        raise CommandError(
            f"expected a folder without a run, got {folder} with a {LAST}; pass --resume to go on, --overwrite to "
            "start anew, or another --out"
        )
    return options, None


@contextmanager
def _repeatable(deterministic: bool) -> Iterator[None]:
    """With ``--deterministic`` only algorithms that give the same bits in every run."""
    if not deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without, cuBLAS is not; PyTorch insists on it
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class _Run:
    """A training run: its parts, its state, and its files.

    Args:
        options: The arguments.
        group: The processes.
        checkpoint: The state to go on from, if it is not the beginning.
    """

    def __init__(self, options: Options, group: Processes, checkpoint: Mapping[str, Any] | None) -> None:
        self.options, self.group, self.out = options, group, Path(options.out)
        data = load_data(options, group)
        self.class_count = len(data.class_names)
        placement = Placement(group.device, choose_amp(options.amp, group.device), options.channels_last)
        preprocessing = replace(
            data.preprocessing,
            mean=tuple(options.mean or data.preprocessing.mean),
            std=tuple(options.std or data.preprocessing.std),
        )

        torch.manual_seed(options.seed)
        self.model = build_model(options.model, options.model_arg, options.plain, num_classes=self.class_count)
        self.about = describe(self.model, data.class_names, preprocessing, options)
        if options.weights and checkpoint is None:
            self._say(start_from(self.model, options.weights))
        placement.model(self.model)
        if options.compile:
            with mendable(RuntimeError):  # no such backend
                self.model.compile(backend=options.compile)
        parallel = group.parallel(self.model, options.sync_bn, options.plain)
        with mendable(ValueError):
            optimizer = make_optimizer(options, self.model.parameters())
        self.schedule = Schedule(options, optimizer)
        self.trainer = Trainer(
            model=parallel,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler(group.device.type, enabled=placement.amp is torch.float16),
            criterion=nn.CrossEntropyLoss(label_smoothing=options.label_smoothing, reduction="sum"),
            placement=placement,
            class_count=self.class_count,
            processes=group.count,
            accumulate=options.accumulate,
            clip_norm=options.clip_norm,
            ema=options.ema
            and AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True),
        )

        workers = data.workers if options.workers is None else options.workers
        transform = preprocessing.training_transform(options.augment, data.kind)
        self.samples = Samples(data.train, transform, options.seed)
        self.loader, self.batches = training_loader(self.samples, options.batch_size, group, workers)
        tested = Samples(data.test, preprocessing.transform())
        self.test_loader = evaluation_loader(tested, options.batch_size, group, workers)
        self.tested = len(range(group.rank, len(tested), group.count))

        self.epoch, self.history, self.best = 0, [], None  # type: int, list[Record], Record | None
        if checkpoint is not None:
            self._restore(checkpoint)

    def go(self) -> None:
        """Train until the last epoch, then test the best weights."""
        with self._tensorboard() as write_scalars:
            if self.group.first:
                self._prepare_folder()
            try:
                while self.epoch < self.options.epochs:
                    record = self._train_epoch()
                    better = self.best is None or _merit(record) > _merit(self.best)
                    self.best = record if better else self.best
                    if self.group.first:
                        self._keep(record, better)
                        write_scalars(record)
                self._test_best()
            except KeyboardInterrupt:
                raise Interrupted(f"interrupted; resnext train --resume {self.out / LAST} goes on") from None

    def _train_epoch(self) -> Record:
        """Train and test once."""
        epoch = self.epoch + 1
        self.samples.epoch = self.batches.epoch = epoch
        # So that an epoch does not depend on how many there were in this process. Dropout differs between processes.
        torch.manual_seed(derived_seed(self.options.seed, epoch, self.group.rank))
        lr, start = self.schedule.lr, time.perf_counter()
        with self._bar(f"Epoch {epoch}", len(self.samples)) as bar:
            trained = self.trainer.epoch(self.loader, self.batches.sizes, bar)
        seconds = time.perf_counter() - start
        tested = self._test()
        self.schedule.step(epoch, tested.loss)
        record = {
            "epoch": epoch,
            "train_acc": trained.accuracy,
            "train_loss": trained.loss,
            "test_acc": tested.accuracy,
            "test_loss": tested.loss,
            "lr": lr,
            "images_per_second": round(len(self.samples) / seconds, 1),
        }
        self.epoch = epoch
        self.history.append(record)
        return record

    def _test(self) -> Scores:
        """Test the weights that are kept: averaged ones if there are any."""
        model = self.model if self.trainer.ema is None else self.trainer.ema.module
        with self._bar("Test", self.tested) as bar:
            return evaluate(model, self.test_loader, self.trainer.placement, self.class_count, bar)

    def _test_best(self) -> None:
        """Test the weights of the best epoch again, from their file."""
        epoch = None
        if self.group.first:
            best = read_run(self.out / BEST)
            epoch = best["record"]["epoch"]
            self.model.load_state_dict(best["model"])
        self.group.share(self.model)
        self.trainer.ema = None
        scores = self._test()
        self._say(f"Best: epoch {epoch}, Test_acc:{scores.accuracy:.1%}, Test_loss:{scores.loss:.3f}")

    def _keep(self, record: Record, better: bool) -> None:
        """Print and write what there is after an epoch.

        The last checkpoint comes after the best: a process that is killed in between repeats the epoch, with the
        same result.
        """
        print(line(record), flush=True)
        if better:
            ema = self.trainer.ema
            kept = self.model if ema is None else ema.module
            save_checkpoint({**self.about, "model": kept.state_dict(), "record": record}, self.out / BEST)
        save_checkpoint(self._state(), self.out / LAST)
        write_logs(self.out, self.history)

    def _prepare_folder(self) -> None:
        """Make the folder, with a checkpoint from the beginning on; remove what a killed process left half-written."""
        self.out.mkdir(parents=True, exist_ok=True)
        for leftover in self.out.glob(".*.*.[0-9]*.tmp"):
            leftover.unlink()
        save_checkpoint(self._state(), self.out / LAST)
        if self.epoch == 0:
            for name in (BEST, "log.csv", "log.jsonl", "curves.png"):  # of an earlier run
                (self.out / name).unlink(missing_ok=True)
        write_logs(self.out, self.history)

    def _state(self) -> dict[str, Any]:
        """What a run needs to go on. Random numbers need no state: each epoch seeds its own."""
        ema = self.trainer.ema
        return {
            **self.about,
            "model": self.model.state_dict(),
            **({} if ema is None else {"model_ema": ema.state_dict()}),
            "optimizer": self.trainer.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": self.trainer.scaler.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "best": self.best,
        }

    def _restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from what `_state` returned."""
        if checkpoint["class_names"] != self.about["class_names"]:
            raise CommandError(
                f"expected the classes that the run began with, {', '.join(checkpoint['class_names'])}, got "
                f"{', '.join(self.about['class_names'])} in {self.options.data}; restore the data"
            )
        with mendable(RuntimeError, ValueError, KeyError):
            self.model.load_state_dict(checkpoint["model"])
            if self.trainer.ema is not None:
                self.trainer.ema.load_state_dict(checkpoint["model_ema"])
            self.trainer.optimizer.load_state_dict(checkpoint["optimizer"])
            self.schedule.load_state_dict(checkpoint["scheduler"])
            self.trainer.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.best = checkpoint["epoch"], checkpoint["best"]
        self.history = list(checkpoint["history"])

    @contextmanager
    def _tensorboard(self) -> Iterator[Any]:
        """A function that writes an epoch's values, or nothing, for TensorBoard."""
        if not (self.options.tensorboard and self.group.first):
            yield lambda record: None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise CommandError("expected tensorboard for --tensorboard, got none; pip install tensorboard") from error

        with SummaryWriter(str(self.out / "tensorboard"), purge_step=self.epoch + 1) as writer:

            def write(record: Record) -> None:
                for name in record.keys() - {"epoch"}:
                    writer.add_scalar(name, record[name], record["epoch"])
                writer.flush()

            yield write

    def _bar(self, name: str, images: int) -> Any:
        return progress_bar(name, images, self.options.progress and self.group.first)

    def _say(self, text: str) -> None:
        if self.group.first:
            print(text, flush=True)


def _merit(record: Record) -> tuple[float, float]:
    """What makes an epoch the best: accuracy, and among equals the loss."""
    return record["test_acc"], -record["test_loss"]
