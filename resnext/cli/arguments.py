"""The arguments of the commands."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from resnext import __version__, list_models

Options = argparse.Namespace


class _Parser(argparse.ArgumentParser):
    """Whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists what there is\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind every help text that does not tell them itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line.

    Returns:
        The value of every argument of the command, and ``given``: the names of those that were on the command line.

    Raises:
        SystemExit: With exit code 2 after one line on standard error, or with 0 after ``--help``.
    """
    parser, commands = _parsers()
    options = parser.parse_args(arguments)
    names = vars(options).keys() - {"command"}
    commands[options.command].set_defaults(**dict.fromkeys(names))
    options.given = sorted(name for name, value in vars(parser.parse_args(arguments)).items() if value is not None)
    options.given.remove("command")
    return options


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser("resnext", description="Train, evaluate and use ResNet and ResNeXt models.")
    parser.add_argument("--version", action="version", version=f"resnext {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    commands = {}
    for name, add, text in [
        ("train", _add_train, "train a model; writes checkpoints, logs and curves into a folder"),
        ("evaluate", _add_evaluate, "test a trained model: top-1, top-5, each class, confusion matrix"),
        ("predict", _add_predict, "classify images or folders of them"),
        ("summary", _add_summary, "the layers of a model: shapes, parameters, FLOPs, backends"),
        ("export", _add_export, "write a trained model as torch.export program, as ONNX, or as a folder"),
    ]:
        command = subparsers.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=_Help
        )
        add(command)
        commands[name] = command
    return parser, commands


def _add_train(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    _add_data(group, default="digits")
    group.add_argument("--augment", choices=["none", "standard", "trivial"], default="standard", help=_AUGMENT)
    group.add_argument("--image-size", type=_at_least(1), metavar="PIXELS", help="default: 32, folders: 224")
    group.add_argument("--mean", type=float, nargs=3, metavar="X", help="of the channels, default: that of the data")
    group.add_argument("--std", type=_positive, nargs=3, metavar="X", help="of the channels, default: that of the data")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="resnet18_cifar", metavar="NAME", help=f"one of {', '.join(list_models())}")
    _add_model_arguments(group)
    group.add_argument(
        "--weights",
        metavar="WEIGHTS",
        help="to start from: a checkpoint of anyone's, or the name of weights of torchvision's, which are downloaded "
        "(ResNeXt50_32X4D_Weights.IMAGENET1K_V2)",
    )

    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", type=_at_least(1), default=10, metavar="N", help="how many")
    group.add_argument("--batch-size", type=_at_least(2), default=64, metavar="N", help="of all processes together")
    group.add_argument("--accumulate", type=_at_least(1), default=1, metavar="N", help="batches for one step")
    group.add_argument("--optimizer", choices=["sgd", "adam", "adamw"], default="adam", help="which")
    group.add_argument("--lr", type=_positive, help="learning rate, default: 0.05 (sgd), 0.001 (adam, adamw)")
    group.add_argument("--momentum", type=_fraction, default=0.9, help="of sgd")
    group.add_argument("--nesterov", action="store_true", help="Nesterov momentum in sgd")
    group.add_argument("--weight-decay", type=_not_negative, default=0.0, help="L2 penalty, in adamw decoupled")
    group.add_argument("--label-smoothing", type=_fraction, default=0.0, help="in training")
    group.add_argument("--clip-norm", type=_positive, metavar="X", help="largest norm of the gradient")
    group.add_argument("--ema", type=_fraction, metavar="DECAY", help="test and keep averaged weights (0.999, say)")

    group = parser.add_argument_group("learning rate schedule")
    schedules = ["constant", "step", "lambda", "cosine", "plateau"]
    group.add_argument("--schedule", choices=schedules, default="cosine", help=_SCHEDULE)
    group.add_argument("--step-size", type=_at_least(1), default=10, metavar="EPOCHS", help="of step and lambda")
    group.add_argument("--gamma", type=_positive, help="default: 0.1 (step, plateau), 0.97 (lambda)")
    group.add_argument("--patience", type=_at_least(0), default=10, metavar="EPOCHS", help="of plateau")
    group.add_argument("--min-lr", type=_not_negative, default=0.0, help="of cosine and plateau")
    group.add_argument("--warmup-epochs", type=_at_least(0), default=0, metavar="N", help="of growing rates before it")

    group = parser.add_argument_group("how to compute")
    _add_device(group)
    group.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help=_AMP)
    _add_flag(group, "--channels-last", True, "the faster layout")
    group.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the model, by inductor"
    )
    _add_flag(group, "--sync-bn", True, "in several processes: batch norm over the images of all")
    group.add_argument("--seed", type=_seed, default=0, help="of all random numbers")
    group.add_argument("--deterministic", action="store_true", help="only algorithms that repeat to the bit")

    group = parser.add_argument_group("what is written")
    group.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/DATA-MODEL")
    group.add_argument("--resume", nargs="?", const=True, type=Path, metavar="CHECKPOINT", help=_RESUME)
    group.add_argument("--overwrite", action="store_true", help="start anew in a folder that has a checkpoint")
    group.add_argument("--tensorboard", action="store_true", help="logs for TensorBoard too, in FOLDER/tensorboard")
    _add_flag(group, "--progress", True, "a progress bar, on a terminal")


_AUGMENT = (
    "of the training images; standard: shifts, for CIFAR-10 also flips, for folders crops of random size and flips; "
    "trivial: TrivialAugmentWide too"
)
_SCHEDULE = (
    "step: times gamma every step-size epochs; lambda: the same as a function, gamma ** (epoch // step-size); "
    "cosine: down to min-lr; plateau: times gamma after patience epochs without a smaller test loss"
)
_AMP = "mixed precision; auto: bf16 on GPUs that have it, fp16 on older ones, off on CPUs"
_RESUME = (
    "go on from a run's last.pth, without a value from the one in --out if there is one; its arguments need not be "
    "repeated, and only those that leave results alone can change"
)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_trained(parser)
    _add_data(parser, default=None)
    parser.add_argument("--part", choices=["train", "test", "all"], default="test", help="of the data")
    parser.add_argument("--batch-size", type=_at_least(1), default=64, metavar="N", help="how many images at once")
    _add_device(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for confusion.csv, .png, default: CHECKPOINT's")
    _add_flag(parser, "--progress", True, "a progress bar, on a terminal")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    _add_trained(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="files, or folders of any depth")
    parser.add_argument("--top", type=_at_least(1), default=5, metavar="K", help="how many classes to tell of each")
    parser.add_argument("--out", type=_suffix(".csv", ".json"), metavar="FILE", help="write a .csv or .json")
    parser.add_argument("--grid", type=_suffix(".png"), metavar="FILE", help="write a .png of the first images")
    parser.add_argument("--grid-images", type=_at_least(1), default=24, metavar="N", help="how many in the picture")
    _add_bad_images(parser)
    parser.add_argument("--batch-size", type=_at_least(1), default=64, metavar="N", help="how many images at once")
    _add_device(parser)


def _add_summary(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a name, a checkpoint or folder of a run")
    _add_model_arguments(parser)
    parser.add_argument("--batch-size", type=_at_least(1), default=1, metavar="N", help="of the input")
    parser.add_argument("--image-size", type=_at_least(1), metavar="PIXELS", help="default: 224, for CIFAR 32")
    parser.add_argument("--depth", type=_at_least(1), default=3, help="how many levels of modules")


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_trained(parser)
    parser.add_argument("--format", choices=["torch", "onnx", "folder"], default="torch", help=_FORMAT)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: beside the checkpoint")
    parser.add_argument("--plain", action="store_true", help="without our kernels: loads where resnext is missing")


_FORMAT = "torch: torch.export program (.pt2); onnx: needs onnxscript; folder: for resnext.from_pretrained and timm"


def _add_trained(parser: argparse.ArgumentParser) -> None:
    text = "best.pth or last.pth of a run, its folder, or a folder from resnext.save_pretrained"
    parser.add_argument("checkpoint", type=Path, help=text)


def _add_data(parser: Any, default: str | None) -> None:
    text = "digits, synthetic, cifar10, or a folder of images: FOLDER/train/CLASS and FOLDER/val/CLASS, or FOLDER/CLASS"
    parser.add_argument("--data", default=default, help=text if default else f"{text}; default: that of the training")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where CIFAR-10 is, or its archive")
    parser.add_argument("--download", action="store_true", help="CIFAR-10, if it is not in --root")
    parser.add_argument("--val-fraction", type=_fraction, default=0.2, help="of a folder that has no train and val")
    parser.add_argument("--split-seed", type=_seed, default=0, help="of that split")
    parser.add_argument("--limit", type=_at_least(2), metavar="N", help="use at most N images of each part")
    _add_bad_images(parser)
    _add_flag(parser, "--check-images", True, "open every image of a folder first")
    text = "that load images; default: up to 4, for digits none"
    parser.add_argument("--workers", type=_at_least(0), metavar="N", help=f"processes {text}")


def _add_bad_images(parser: Any) -> None:
    choices = ["refuse", "skip"]
    parser.add_argument("--bad-images", choices=choices, default="refuse", help="what to do about unreadable ones")


def _add_model_arguments(parser: Any) -> None:
    text = "an argument of the model, say stem=cifar or drop_path_rate=0.1; can be repeated"
    parser.add_argument("--model-arg", type=_key_value, action="append", default=[], metavar="NAME=VALUE", help=text)
    parser.add_argument("--plain", action="store_true", help="PyTorch's own computation instead of the fused one")


def _add_device(parser: Any) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU if there is one")


def _add_flag(parser: Any, name: str, default: bool, text: str) -> None:
    parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=text)


def _checked(convert: Callable[[str], Any], holds: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """A type for argparse: a converted text that meets a condition."""

    def checked(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return checked


def _at_least(least: int) -> Callable[[str], int]:
    return _checked(int, lambda value: value >= least, f"a whole number of at least {least}")


_seed = _checked(int, lambda value: 0 <= value < 2**63, "a whole number of at least 0 and below 2**63")


def _suffix(*suffixes: str) -> Callable[[str], Path]:
    return _checked(Path, lambda path: path.suffix in suffixes, f"a path that ends in {' or '.join(suffixes)}")


_positive = _checked(float, lambda value: 0 < value < float("inf"), "a positive number")
_not_negative = _checked(float, lambda value: 0 <= value < float("inf"), "a number of at least 0")
_fraction = _checked(float, lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1")


def _key_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
