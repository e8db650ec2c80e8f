"""Checkpoint files: read them without running code, write them whole or not at all.

Only tensors and plain values are ever read: safetensors, or pickles with ``weights_only=True``.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from resnext.checkpoint_keys import without_wrappers

_PICKLES = (".pt", ".pth", ".bin", ".tar", ".ckpt")


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read a checkpoint file without running any code that it may hold.

    Args:
        path: A ``.safetensors`` file, or with any other suffix what ``torch.save`` wrote.

    Returns:
        What the file holds, on the CPU: most often a mapping, for safetensors always one of tensors.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: A ``.safetensors`` file, and safetensors is not installed.
        ValueError: The file is damaged or is no checkpoint, or holds more than tensors, plain values and
            ``argparse.Namespace``: the message says what, and the way out.
    """
    path = Path(path)
    if not path.is_file():
        advice = "use resnext.from_pretrained for a folder" if path.is_dir() else "check the path"
        raise FileNotFoundError(f"read_checkpoint: expected a file, got {path}; {advice}")
    if path.suffix == ".safetensors":
        safetensors = _import_safetensors("read_checkpoint")
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"read_checkpoint: expected a safetensors file, got {path}: {error}; get it anew"
            ) from error
    try:
        # Training scripts keep their arguments in the checkpoint: a Namespace is as harmless as a dict.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if needed := _needed_classes(path, error):
            raise ValueError(
                f"read_checkpoint: expected tensors and plain values, got {path}, which needs {', '.join(needed)} too; "
                "if you trust the file, either call this inside `with torch.serialization.safe_globals([...]):` naming "
                "those, or once save only the weights: torch.save(torch.load(path, weights_only=False)[...], new_path)"
            ) from error
        raise ValueError(_not_a_checkpoint(path, error)) from error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"read_checkpoint: expected weights, got the TorchScript program {path}; "
                "if you trust it, load torch.jit.load(path).state_dict() instead of the path"
            ) from error
        raise ValueError(_not_a_checkpoint(path, error)) from error
    except (EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # damaged pickles
        raise ValueError(_not_a_checkpoint(path, error)) from error


def save_checkpoint(
    checkpoint: nn.Module | Mapping[str, Any],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint, whole or not at all: into a temporary file beside it, which then takes its place.

    Killed at any moment, or with the disk full, the file that was there before is still there, unharmed.

    Args:
        checkpoint: A model, of which the ``state_dict`` is saved under names without what ``torch.compile`` and
            data parallelism add; or a mapping: of tensors for safetensors, of anything that ``torch.load`` reads
            with ``weights_only=True`` otherwise (say model, optimizer and epoch of a training run).
        path: The file. ``.safetensors`` is the safest and fastest choice for weights; ``.pt``, ``.pth``, ``.bin``,
            ``.tar`` and ``.ckpt`` are written by ``torch.save``.
        metadata: Texts to keep in a safetensors file beside the tensors.

    Returns:
        The path.

    Raises:
        ImportError: A ``.safetensors`` file, and safetensors is not installed.
        OSError: The file cannot be written: no such folder, no permission, disk full.
        TypeError: A ``.safetensors`` file is to hold something else than tensors.
        ValueError: Another suffix, or ``metadata`` for another format than safetensors.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *_PICKLES):
        raise ValueError(
            f"save_checkpoint: expected a path ending in .safetensors or one of {', '.join(_PICKLES)}, got {path}; "
            "add the suffix of the format you want"
        )
    if isinstance(checkpoint, nn.Module):
        state = without_data_parallel(checkpoint).state_dict()
        checkpoint = {without_wrappers(key): value for key, value in state.items()}
    if path.suffix == ".safetensors":
        safetensors = _import_safetensors("save_checkpoint")
        tensors = _separate_tensors(checkpoint)
        texts = {"format": "pt", **(metadata or {})}
        return write_atomically(path, lambda file: file.write_bytes(safetensors.torch.save(tensors, texts)))
    if metadata is not None:
        raise ValueError(
            f"save_checkpoint: expected no metadata for {path.suffix}, got {dict(metadata)}; add them to the mapping"
        )
    return write_atomically(path, lambda file: torch.save(checkpoint, file))


def without_data_parallel(model: nn.Module) -> nn.Module:
    """The model inside PyTorch's data-parallel wrappers, if it is in one."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def write_atomically(path: Path, write: Callable[[Path], Any]) -> Path:
    """Call ``write`` with the path of a temporary file, which then takes the place of ``path``, or goes if that fails.

    Raises:
        OSError: The file cannot be written.
    """
    target = Path(os.path.realpath(path))  # through a symbolic link, as if written in place
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()  # fails with the right OSError where torch.save says less
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the contents, without
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # what torch.save makes of a full disk
            raise OSError(
                f"save_checkpoint: could not write {path}: {error}; check the space left on the disk"
            ) from error
        raise
    return path


def _separate_tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Contiguous tensors of their own memory, as safetensors wants them: tied ones are written once for each name."""
    if other := [key for key, value in checkpoint.items() if not isinstance(value, Tensor)]:
        raise TypeError(
            f"save_checkpoint: expected only tensors for .safetensors, got {type(checkpoint[other[0]]).__name__} at "
            f"{other[0]!r}; save to .pth, or put texts into metadata"
        )
    seen: set[int] = set()
    tensors = {}
    for key, value in checkpoint.items():
        value = value.detach().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        tensors[key] = value
    return tensors


def _needed_classes(path: Path, error: pickle.UnpicklingError) -> list[str]:
    """What a pickle refers to beyond tensors and plain values."""
    try:
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {"argparse.Namespace"})
    except (ValueError, RuntimeError):  # the format of torch before 1.6 has no such list: only the first is known
        return re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]


def _not_a_checkpoint(path: Path, error: Exception) -> str:
    # The unpickler's advice, to try again with weights_only=False, would not help.
    detail = "" if isinstance(error, pickle.UnpicklingError) else f" ({(str(error) or repr(error)).splitlines()[0]})"
    return f"read_checkpoint: expected a checkpoint, got {path}, damaged or something else{detail}; get it anew"


def _import_safetensors(caller: str) -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{caller}: expected safetensors to be installed, got none; pip install safetensors, or use a .pth file"
        ) from error
    return safetensors
