"""``resnext evaluate``."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import ConcatDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from resnext.cli import plots
from resnext.cli.arguments import Options
from resnext.cli.checkpointing import load_trained
from resnext.cli.data import load_data
from resnext.cli.distributed import Processes, pick_device
from resnext.cli.engine import Placement, evaluate, progress_bar
from resnext.cli.errors import CommandError
from resnext.cli.loading import Samples, evaluation_loader
from resnext.cli.logs import table, write_text


def run(options: Options) -> None:
    """Test a trained model; print accuracies, and write the confusion matrix as CSV and PNG.

    Raises:
        CommandError: There is no such checkpoint or data, or their classes differ.
        OSError: Something cannot be written.
    """
    trained = load_trained(options.checkpoint)
    for name in ("data", "root", "val_fraction", "split_seed", "workers"):  # as in training, unless given
        if name not in options.given and trained.arguments.get(name) is not None:
            setattr(options, name, trained.arguments[name])
    options.root = Path(options.root)
    if options.data is None:
        raise CommandError("expected --data, got none, and the checkpoint does not tell; pass it")
    options.image_size = trained.preprocessing.image_size
    processes = Processes(pick_device(options.device))
    data = load_data(options, processes)
    if data.class_names != trained.class_names:
        raise CommandError(
            f"expected the classes of the checkpoint, {', '.join(trained.class_names)}, got "
            f"{', '.join(data.class_names)} in {options.data}; give the data that the model was trained for"
        )

    parts = {"train": data.train, "test": data.test, "all": ConcatDataset([data.train, data.test])}
    samples = Samples(parts[options.part], trained.preprocessing.transform())
    placement = Placement(processes.device)
    model, count = placement.model(trained.model), len(trained.class_names)
    metrics = MetricCollection(
        {
            "top5": MulticlassAccuracy(count, top_k=min(5, count), average="micro"),
            "classes": MulticlassAccuracy(count, average="none"),
            "confusion": MulticlassConfusionMatrix(count),
        },
        compute_groups=False,
    ).to(processes.device)
    workers = data.workers if options.workers is None else options.workers
    loader = evaluation_loader(samples, options.batch_size, processes, workers)
    with progress_bar("Test", len(samples), options.progress) as bar:
        scores = evaluate(model, loader, placement, count, bar, metrics)
    found = {name: value.cpu() for name, value in metrics.compute().items()}

    print(f"Images: {len(samples)}, top-1: {scores.accuracy:.2%}, ", end="")
    print(f"top-{min(5, count)}: {float(found['top5']):.2%}, loss: {scores.loss:.4f}")
    matrix = found["confusion"]
    for name, accuracy, images in zip(trained.class_names, found["classes"], matrix.sum(dim=1), strict=True):
        print(f"{name}: {float(accuracy):.2%} of {int(images)}")

    folder = options.out or (trained.path if trained.path.is_dir() else trained.path.parent)
    folder.mkdir(parents=True, exist_ok=True)
    rows = zip(trained.class_names, matrix.tolist(), strict=True)
    header = "true \\ predicted"
    records = [{header: name, **dict(zip(trained.class_names, row, strict=True))} for name, row in rows]
    write_text(folder / "confusion.csv", table(records))
    plots.save(plots.confusion(matrix, trained.class_names), folder / "confusion.png")
