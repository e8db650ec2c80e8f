"""Settings that were measured on a GPU: which backend serves a problem there, and with what launch settings.

One JSON file per GPU, written by benchmarks/tune.py. The user's own, in a folder that dispatch.py names, counts more
than the one that comes with the package; where neither knows a problem, `config.py` decides. Nothing here touches the
GPU but to ask for its name.
"""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .config import (
    MOST_REGISTERS,
    Config,
    ConvProblem,
    PointwiseConfig,
    StripsConfig,
    TapsConfig,
    fits_descriptors,
    fits_strips,
)

FORMAT = 2  # Of the files; a file of another format is not used.
OPS = ("fwd", "dgrad", "wgrad", "bwd")  # "bwd": both gradients of `conv_stats` in one call
FUSIONS = ("plain", "stats", "affine")  # The launchers fwd, dgrad and wgrad; conv_stats_*; conv_affine.
BACKENDS = ("triton", "cuda", "torch")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FORMS: dict[str, type[Config] | type[PointwiseConfig]] = {
    "strips": StripsConfig,
    "taps": TapsConfig,
    "pointwise": PointwiseConfig,
}
_SHIPPED = Path(__file__).parent / "tuned"
_MOST_BATCHES_APART = 2.0
_user_folder: Path | None = None


class Key(NamedTuple):
    """What decides about the best settings, all but the batch.

    Attributes:
        kernel_size: 3 or 1, of both axes.
        op: One of `OPS`.
        fusion: One of `FUSIONS`.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        tf32: Whether float32 products may be rounded to TF32; False in 16 bits.
        channels_last: The layout of the activations.
        in_channels: Channels of the convolution's input.
        out_channels: Channels of its output.
        groups: Number of groups.
        height: Height of the convolution's input.
        width: Width of the convolution's input.
        stride: (stride_h, stride_w).
    """

    kernel_size: int
    op: str
    fusion: str
    dtype: str
    tf32: bool
    channels_last: bool
    in_channels: int
    out_channels: int
    groups: int
    height: int
    width: int
    stride: tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """What was measured for one problem.

    Attributes:
        key: The problem but for its batch.
        batch: Images.
        backend: The fastest of `BACKENDS`, for activations in the key's layout.
        config: The fastest settings of the Triton kernel; None for ``"bwd"``, which has those of its two passes.
        microseconds: Median times by name: backends, and ``"torch_nchw"`` for PyTorch in the other layout.
        measured: When and with what: texts, for people.
    """

    key: Key
    batch: int
    backend: str
    config: Config | PointwiseConfig | None
    microseconds: Mapping[str, float]
    measured: Mapping[str, str]


def tf32_allowed(dtype: torch.dtype) -> bool:
    """Whether convolutions of ``dtype`` may round products to TF32: those of float32, by PyTorch's flag for them."""
    if dtype != torch.float32:
        return False
    # The legacy flag, cudnn.allow_tf32, raises once a program has used the newer one; this one follows both.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def use_folder(folder: Path | None) -> None:
    """Let the user's own files be read from ``folder``; what was read before is forgotten."""
    global _user_folder
    _user_folder = folder
    _settings.cache_clear()


def user_folder() -> Path | None:
    """Where the user's own files are."""
    return _user_folder


def device_name(device: torch.device) -> str:
    """The GPU's name; ``"interpreter"`` for CPU tensors, which Triton kernels take in its interpreter only."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def file_name(name: str) -> str:
    """The name of a device's file, e.g. ``nvidia_h200.json``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".json"


def key_of(problem: ConvProblem, *, fusion: str, kernel_size: int, allow_tf32: bool, op: str | None = None) -> Key:
    """The key of a problem; ``op``: where it is not the problem's own (``"bwd"``)."""
    return Key(
        kernel_size=kernel_size,
        op=op or problem.op,
        fusion=fusion,
        dtype=str(problem.dtype).removeprefix("torch."),
        tf32=allow_tf32 and problem.dtype == torch.float32,
        channels_last=problem.channels_last,
        in_channels=problem.in_channels,
        out_channels=problem.out_channels,
        groups=problem.groups,
        height=problem.height,
        width=problem.width,
        stride=problem.stride,
    )


def lookup(
    problem: ConvProblem,
    device: torch.device,
    *,
    allow_tf32: bool,
    fusion: str = "plain",
    kernel_size: int = 3,
    op: str | None = None,
) -> Entry | None:
    """What was measured for a problem on the GPU of ``device``, or None.

    Of several batches the nearest in ratio counts, and it serves batches from half to twice as large.

    Args:
        problem: What to compute.
        device: Where.
        allow_tf32: Whether float32 products may be rounded to TF32.
        fusion: One of `FUSIONS`.
        kernel_size: 3 or 1.
        op: As in `key_of`.
    """
    settings = _settings(device_name(device))
    if not settings:
        return None
    key = key_of(problem, fusion=fusion, kernel_size=kernel_size, allow_tf32=allow_tf32, op=op)
    batches = settings.get(key)
    if not batches:
        return None

    def apart(batch: int) -> float:
        return max(batch, problem.batch) / min(batch, problem.batch)

    nearest = min(sorted(batches), key=apart)
    return batches[nearest] if apart(nearest) <= _MOST_BATCHES_APART else None


@functools.cache
def _settings(name: str) -> dict[Key, dict[int, Entry]]:
    """Everything known about a device: key -> batch -> entry."""
    found: dict[Key, dict[int, Entry]] = {}
    for folder in (_SHIPPED, _user_folder):
        if folder is None:
            continue
        path = folder / file_name(name)
        try:
            entries = read(path, name)
        except ValueError as error:
            warnings.warn(f"resnext: {error}; it is not used", RuntimeWarning, stacklevel=2)
            continue
        for entry in entries:
            found.setdefault(entry.key, {})[entry.batch] = entry
    return found


def read(path: Path, name: str) -> list[Entry]:
    """The entries of a file; none if there is no such file.

    Args:
        path: The file.
        name: The device that it must be about.

    Raises:
        ValueError: If it cannot be read, or is not a file of this format about this device.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected measured settings in JSON, got {type(error).__name__}: {error}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{path}: expected an object with a format, got something else")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT}, got {content['format']!r}; measure again, or update resnext"
        )
    if content.get("device") != name:
        raise ValueError(f"{path}: expected settings of {name!r}, got those of {content.get('device')!r}")
    records = content.get("entries")
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of entries, got {type(records).__name__}")
    entries = []
    for index, record in enumerate(records):
        try:
            entries.append(_entry(record))
        except ValueError as error:
            raise ValueError(f"{path}: entry {index}: {error}") from None
    return entries


def to_json(name: str, entries: Iterable[Entry]) -> str:
    """The text of a file, which `read` takes; one line per entry."""
    lines = ",\n".join(json.dumps(_record(entry)) for entry in entries)
    return f'{{"format": {FORMAT}, "device": {json.dumps(name)}, "entries": [\n{lines}\n]}}\n'


def _record(entry: Entry) -> dict[str, Any]:
    config = None
    if entry.config is not None:
        form = next(name for name, kind in _FORMS.items() if type(entry.config) is kind)
        config = {"form": form, **asdict(entry.config)}
    return {
        **entry.key._asdict(),
        "batch": entry.batch,
        "backend": entry.backend,
        "config": config,
        "microseconds": dict(entry.microseconds),
        "measured": dict(entry.measured),
    }


def _entry(record: Any) -> Entry:
    """The entry that a record describes; raises `ValueError` unless it is one that `_record` could have written."""
    _require_fields(record, (*Key._fields, *(field.name for field in fields(Entry) if field.name != "key")), "entry")
    stride = record["stride"]
    if not isinstance(stride, list) or len(stride) != 2 or any(s not in (1, 2) for s in stride):
        raise ValueError(f"expected a stride of two numbers, each 1 or 2, got {stride!r}")
    choices = {"kernel_size": (1, 3), "op": OPS, "fusion": FUSIONS, "dtype": tuple(_DTYPES), "backend": BACKENDS}
    for name, known in choices.items():
        if record[name] not in known:
            raise ValueError(f"expected a {name} of {', '.join(map(str, known))}, got {record[name]!r}")
    for name in ("tf32", "channels_last"):
        if not isinstance(record[name], bool):
            raise ValueError(f"expected {name} to be true or false, got {record[name]!r}")
    for name in ("batch", "in_channels", "out_channels", "groups", "height", "width"):
        _require_count(name, record[name])
    if record["in_channels"] % record["groups"] or record["out_channels"] % record["groups"]:
        raise ValueError(f"expected groups to divide the channels, got {record['groups']!r}")
    times = record["microseconds"]
    if not isinstance(times, dict) or record["backend"] not in times or not all(map(_is_time, times.values())):
        raise ValueError(f"expected times in microseconds, of {record['backend']} among others, got {times!r}")
    if not isinstance(record["measured"], dict):
        raise ValueError(f"expected texts about the measurement, got {record['measured']!r}")
    key = Key(**{name: record[name] for name in Key._fields} | {"stride": tuple(stride)})
    config = _config(record["config"], key, record["batch"])
    if config is None and (record["backend"] == "triton") and key.op != "bwd":
        raise ValueError("expected settings of the Triton kernel, got none")
    return Entry(key, record["batch"], record["backend"], config, times, record["measured"])


def _config(record: Any, key: Key, batch: int) -> Config | PointwiseConfig | None:
    """The launch settings that a record describes, checked to be such that the kernels compute right results."""
    if record is None:
        return None
    form = record.get("form") if isinstance(record, dict) else None
    if not isinstance(form, str) or form not in _FORMS:
        raise ValueError(f"expected settings of a form among {', '.join(_FORMS)}, got {form!r}")
    kind = _FORMS[form]
    names = [field.name for field in fields(kind)]
    _require_fields(record, ("form", *names), f"settings of form {form}")
    for field in fields(kind):
        _require_setting(field, record[field.name])
    config = kind(**{name: record[name] for name in names})
    op = "fwd" if key.op == "bwd" else key.op
    sizes = (batch, key.in_channels, key.out_channels, key.height, key.width, key.stride, key.groups)
    problem = ConvProblem(op, *sizes, _DTYPES[key.dtype], "cuda", key.channels_last)  # type: ignore[arg-type]
    if isinstance(config, PointwiseConfig) != (key.kernel_size == 1):
        raise ValueError(f"expected settings of a {key.kernel_size}x{key.kernel_size} convolution, got form {form}")
    if isinstance(config, StripsConfig) and not fits_strips(problem):
        raise ValueError("expected a form that serves the problem, got strips")
    if isinstance(config, PointwiseConfig) and config.tensor_descriptors and not fits_descriptors(problem):
        raise ValueError("expected tensor descriptors where they serve the problem, got them where they do not")
    if isinstance(config, TapsConfig) and config.merged > 1:
        widest = config.merged * max(problem.group_in, problem.group_out)
        if widest > min(config.block_n, config.block_k):
            raise ValueError(f"expected blocks that hold {config.merged} merged groups, got narrower ones")
    return config


def _require_setting(field: Field, value: Any) -> None:
    if field.type == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"expected {field.name} to be true or false, got {value!r}")
    elif value is not None or field.type != "int | None":
        _require_count(field.name, value)
        if (field.name.startswith("block_") or field.name in ("strip", "num_warps")) and value & (value - 1):
            raise ValueError(f"expected {field.name} to be a power of two, got {value}")
        if field.name == "max_registers" and value > MOST_REGISTERS:
            raise ValueError(f"expected max_registers to be at most {MOST_REGISTERS}, got {value}")


def _require_fields(record: Any, names: Iterable[str], what: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"expected {what} to be an object, got {type(record).__name__}")
    wrong = sorted(set(names) ^ set(record))
    if wrong:
        raise ValueError(f"expected the fields of this version, got an {what} where {', '.join(wrong)} differ")


def _require_count(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"expected {name} to be a whole number from 1 on, got {value!r}")


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
