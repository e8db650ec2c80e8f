"""Which backend serves a problem, and why not the others.

Backends in order of preference: ``triton``, ``cuda`` (C++/CUDA extension), ``cpu`` (C++ extension), ``torch`` (plain
PyTorch, which takes everything). This is the only module that reads the environment:

* ``RESNEXT_BACKEND``: force one backend for the whole process (see `use_backend`);
* ``RESNEXT_CPU_CAPABILITY``: the instruction set of the ``cpu`` backend: ``amx_bf16``, ``avx512_bf16``, ``avx512``,
  ``avx2`` or ``portable``;
* ``TRITON_INTERPRET``: whether Triton runs in its interpreter, which also takes CPU tensors;
* ``XDG_CACHE_HOME``, else the home folder: where the user's measured settings are (tuning.py).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import checks, composed, onednn, tuning
from .config import ConvProblem, fits_stem, pointwise_by_triton, problem_of
from .reference import onednn_takes

BACKENDS = ("triton", "cuda", "cpu", "torch")
_MODULES = {"triton": "grouped_conv", "cuda": "extension", "cpu": "extension", "torch": "reference"}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class _Choice:
    """What the environment or one open `use_backend` block asks for; told from others by identity."""

    def __init__(self, name: str):
        self.name = name


# One choice for the process, not for the thread: backward of CUDA tensors runs in threads of PyTorch's own. The open
# blocks' choices stand behind the environment's, and the last one counts.
_choices = [_Choice(os.environ.get("RESNEXT_BACKEND", "auto"))]
tuning.use_folder(Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "resnext", "tuned"))


class BackendError(RuntimeError):
    """A backend was forced that cannot serve the call."""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend within a ``with`` block, and in the backward of what is computed inside it.

    Applies to the whole process, all threads included; of blocks that are open at once, the one entered last counts.
    A call that the backend cannot serve raises `BackendError` with the reason.

    Args:
        name: ``"triton"``, ``"cuda"``, ``"cpu"``, ``"torch"``, or ``"auto"`` for the automatic choice.

    Raises:
        ValueError: If there is no backend of that name.
    """
    _check_name(name, "use_backend")
    choice = _Choice(name)
    _choices.append(choice)
    try:
        yield
    finally:
        _choices.remove(choice)


def forced_backend() -> str | None:
    """The backend that `use_backend` or ``RESNEXT_BACKEND`` asks for, or None if the choice is automatic."""
    name = _choices[-1].name
    _check_name(name, "RESNEXT_BACKEND")
    return None if name == "auto" else name


def _check_name(name: str, where: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(('auto', *BACKENDS))}, got {name!r}")


def why_plain_torch(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: str | int | Sequence[int],
    dilation: tuple[int, ...],
    groups: int,
) -> str | None:
    """Why a valid call is not one for our operators and goes to ``F.conv2d`` as it is, or None.

    A compiler then sees PyTorch's own convolution, which it can fuse and lay out; it cannot look into our operators.
    """
    if torch.jit.is_tracing():
        return "torch.jit tracing records PyTorch's convolution, which loads anywhere and which counters know"
    if tuple(weight.shape[2:]) != checks.KERNEL_SIZE:
        return f"the kernel is {'x'.join(map(str, weight.shape[2:]))}, not 3x3"
    if dilation != (1, 1):
        return f"dilation is {dilation}, not 1"
    if not checks.same_as_one(padding, stride, dilation):
        return f"padding is {padding!r}, not 1"
    if any(s not in (1, 2) for s in stride):
        return f"stride is {stride}, neither 1 nor 2"
    if not x.is_floating_point():
        return f"the dtype is {x.dtype}, not floating-point"
    if x.layout is not torch.strided or weight.layout is not torch.strided:
        return f"x is {x.layout} and the weight {weight.layout}, not strided"
    if x.device.type not in ("cpu", "cuda", "meta"):
        return f"the device is {x.device.type}, neither cuda nor cpu"
    if 0 in x.shape or 0 in weight.shape:
        return f"there is nothing to compute: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}"
    if torch._C._are_functorch_transforms_active():
        return "the call is inside a torch.func transform (vmap, grad, jvp, ...)"
    if groups == 1 and forced_backend() is None:
        return "a dense convolution (groups 1) is what PyTorch's libraries are made for; force a backend to use ours"
    return None


def choose(problem: ConvProblem, device: torch.device, fusion: str = "plain", kernel_size: int = 3) -> str:
    """The name of the backend that serves ``problem`` on ``device``.

    Args:
        problem: What to compute.
        device: Where.
        fusion: What is computed with the convolution, as `tuning.FUSIONS` names it.
        kernel_size: 3, or 1 with what is fused.

    Raises:
        BackendError: If a forced backend cannot serve it.
    """
    name = forced_backend()
    if name is None:
        entry = measured(problem, device, fusion, kernel_size)
        fitting = [name for name in BACKENDS if not unsupported(name, problem.dtype, device)]
        return next(name for name in fitting if not not_chosen(name, problem, fusion != "plain", entry, fitting))
    if reason := unsupported(name, problem.dtype, device):
        raise BackendError(
            f"grouped_conv2d: the {name} backend was asked for and cannot serve this {problem.op}: {reason}; "
            "leave use_backend/RESNEXT_BACKEND at auto, or choose another backend"
        )
    return name


def launchers(*problem) -> ModuleType:
    """The module whose ``fwd``, ``dgrad`` and ``wgrad`` serve a problem; takes the arguments of `problem_of`.

    Raises:
        BackendError: If a forced backend cannot serve it.
    """
    return _launchers(forced_backend(), rounds_to_tf32(*problem[5:7]), *problem)


@functools.lru_cache(maxsize=4096)  # asked in every call
def _launchers(forced: str | None, tf32: bool, *problem) -> ModuleType:
    described = problem_of(*problem)
    return _module(_MODULES[choose(described, problem[-2])])


# --- the fused operators ---

_ELEMENTWISE = {"triton": "batch_norm", "cuda": "extension", "cpu": "extension", "torch": "reference"}
_POOLING = _ELEMENTWISE | {"triton": "max_pool"}
_ATTENTION = {
    "triton": "attention_kernels",
    "cuda": "extension_attention",
    "cpu": "extension_attention",
    "torch": "reference",
}
# Vectors of a few thousand numbers: what counts is how many kernels a GPU has to start.
_VECTORS = {"triton": "batch_norm", "cuda": "reference", "cpu": "extension", "torch": "reference"}


def elementwise(dtype: torch.dtype, device: torch.device) -> ModuleType:
    """The module of ``statistics``, ``affine_add_relu`` and their backward, for tensors of ``dtype`` on ``device``.

    Raises:
        BackendError: If a forced backend cannot serve them.
    """
    return _module(_ELEMENTWISE[_backend_for(forced_backend(), dtype, device)])


def pooling(dtype: torch.dtype, device: torch.device) -> ModuleType:
    """The module of ``affine_relu_max_pool`` and its backward; as `elementwise`."""
    return _module(_POOLING[_backend_for(forced_backend(), dtype, device)])


def attention(dtype: torch.dtype, device: torch.device) -> ModuleType:
    """The module of ``affine_mean``, ``affine_gate`` and their backward; as `elementwise`."""
    return _module(_ATTENTION[_backend_for(forced_backend(), dtype, device)])


def vectors(dtype: torch.dtype, device: torch.device) -> ModuleType:
    """The module of ``bn_affine`` and its backward; as `elementwise`."""
    return _module(_VECTORS[_backend_for(forced_backend(), dtype, device)])


@functools.lru_cache(maxsize=64)
def _backend_for(forced: str | None, dtype: torch.dtype, device: torch.device) -> str:
    """The backend of operators that any backend has for all tensors it takes."""
    if forced is None:
        names = BACKENDS if device.type == "cuda" else BACKENDS[1:]  # the interpreter only if asked for by name
        return next(name for name in names if not unsupported(name, dtype, device))
    if reason := unsupported(forced, dtype, device):
        raise BackendError(
            f"batch norm: the {forced} backend was asked for and cannot serve this call: {reason}; "
            "leave use_backend/RESNEXT_BACKEND at auto, or choose another backend"
        )
    return forced


def fused_launchers(*problem) -> Any:
    """What serves ``conv_stats_fwd`` (pass "fwd") or ``conv_stats_bwd`` ("dgrad"); takes the arguments of `problem_of`.

    A kernel that fuses where there is one for the problem, else a composition of separate passes.

    Raises:
        BackendError: If a forced backend cannot serve it.
    """
    return _fused_launchers(forced_backend(), rounds_to_tf32(*problem[5:7]), "stats", *problem)


@functools.lru_cache(maxsize=4096)
def _fused_launchers(forced: str | None, tf32: bool, fusion: str, *problem) -> Any:
    _, input_shape, weight_shape, _, groups, dtype, device, channels_last = problem
    described = problem_of(*problem)
    kernel_size = tuple(weight_shape[2:])
    name = choose(described, device, fusion, kernel_size[0])
    is_stem = name == "triton" and fits_stem(input_shape, weight_shape, groups, dtype, channels_last)
    if is_stem and (forced or dtype.itemsize == 2):  # in float32 a library's, until measured
        return _module("stem_conv")
    # Dense 3x3 convolutions are what PyTorch's libraries are made for, as in `why_plain_torch`; but on CPUs there is a
    # faster way for some.
    if kernel_size == checks.KERNEL_SIZE and name != "torch" and (groups > 1 or forced):
        return _module(_MODULES[name])
    if kernel_size == checks.KERNEL_SIZE and name == "cpu":
        if dtype == torch.float32 and channels_last:
            return _module("dense_conv")
        pairs = channels_last and described.in_channels % 2 == 0 and _products_by_cpu(dtype)
        if dtype.itemsize == 2 and (pairs or not onednn_takes(dtype)):
            return _module("extension")
    if kernel_size == (1, 1) and groups == 1:
        entry = measured(described, device, fusion, 1)
        if name == "triton" and (
            forced or entry is not None or pointwise_by_triton(described, affine=fusion == "affine")
        ):
            return _module("pointwise_conv")
        if name == "cpu" and channels_last and (forced or _products_by_cpu(dtype)):
            return _module("extension")
    return composed.Composed(elementwise(dtype, device))


def composes(*problem) -> bool:
    """Whether what `fused_launchers` gives for a problem computes the convolution with a library, in a forward pass."""
    launchers = fused_launchers(*problem)
    if isinstance(launchers, composed.Composed):
        return True
    return launchers is _module("dense_conv") and not launchers.serves(*problem[1:4])


def affine_launchers(*problem) -> Any:
    """What serves ``conv_affine``; takes the arguments of `problem_of`.

    Raises:
        BackendError: If a forced backend cannot serve it.
    """
    return _affine_launchers(forced_backend(), rounds_to_tf32(*problem[5:7]), *problem)


@functools.lru_cache(maxsize=4096)
def _affine_launchers(forced: str | None, tf32: bool, *problem) -> Any:
    launchers = _fused_launchers(forced, tf32, "affine", *problem)
    if not isinstance(launchers, composed.Composed) or forced == "torch":
        return launchers
    return onednn if onednn.serves(*problem[5:7]) else launchers


def _products_by_cpu(dtype: torch.dtype) -> bool:
    """Whether the CPU backend has matrix products as fast as libraries', which know processors' 16-bit instructions."""
    return dtype == torch.float32 or not onednn_takes(dtype) or _module("extension").multiplies_pairs(dtype)


def _fits_winograd(problem: ConvProblem) -> bool:
    """Whether the CPU kernels by Winograd's algorithm are for the dtype, layout and stride of a 3x3 convolution."""
    return problem.dtype == torch.float32 and problem.channels_last and problem.stride == (1, 1)


def gains_in_channels_last(problem: ConvProblem) -> bool:
    """Whether the CPU backend has a faster way for the forward of a 3x3 convolution in float32 than in NCHW."""
    if unsupported("cpu", problem.dtype, torch.device(problem.device_type)):
        return False
    image = (problem.batch, problem.in_channels, problem.height, problem.width)
    weight = (problem.out_channels, problem.group_in, *checks.KERNEL_SIZE)
    if problem.groups == 1:
        return _module("dense_conv").serves(image, weight, problem.stride)
    return _fits_winograd(problem) and _module("extension").winograd_serves("product", image, weight, problem.groups)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def unsupported(name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a backend cannot serve tensors of ``dtype`` on ``device``, or None if it can."""
    if name == "torch":
        return None
    if dtype not in _FLOATS:
        return f"the dtype is {dtype}; it takes float32, float16 and bfloat16"
    if name == "triton":
        return _no_triton(device)
    if name != device.type:
        return f"the tensors are on {device.type}"
    from . import extension

    if reason := extension.load():
        return reason
    _force_capability()
    if name == "cuda" and (reason := _too_old(device)):
        return reason
    if name == "cuda" and not extension.has_cuda():
        return "the extension was built without CUDA; that needs nvcc and a CUDA build of torch (RESNEXT_BUILD_CUDA=1)"
    return None


def not_chosen(
    name: str,
    problem: ConvProblem,
    fused: bool = False,
    entry: tuning.Entry | None = None,
    fitting: Sequence[str] = BACKENDS,
) -> str | None:
    """Why the automatic choice passes over a backend that could serve a problem, or None.

    Args:
        name: The backend.
        problem: What to compute.
        fused: Whether anything is computed with the convolution.
        entry: What was measured for the problem, by `measured`.
        fitting: The backends that could serve it.
    """
    if entry is not None and BACKENDS.index(name) < BACKENDS.index(entry.backend):
        fastest = "PyTorch" if entry.backend == "torch" else entry.backend
        time = entry.microseconds.get(name)
        against = f"; {name} was not measured" if time is None else f" against {time:.1f} us"
        return f"{fastest} was measured to be faster on this GPU: {entry.microseconds[entry.backend]:.1f} us{against}"
    if name == "triton" and problem.device_type == "cpu":
        return "Triton's interpreter is for checking kernels; it serves CPU tensors only when asked for by name"
    if name == "triton" and "cuda" in fitting and entry is None and _faster_in_cuda(problem, fused):
        return "CUDA C++ was measured to be faster on an H200: gradients in 16 bits with up to 32 channels per group"
    if name in ("triton", "cuda") and entry is None and not fused and _faster_in_cudnn(name, problem):
        return "cuDNN was measured to be faster on an H200, in 16 bits and with this many channels per group"
    if name != "cpu" or problem.op != "fwd" or problem.dtype != torch.float32 or problem.groups == 1:
        return None
    width = min(problem.group_in, problem.group_out)
    if width >= 112 and not _fits_winograd(problem):
        return "PyTorch was measured to be faster forward in float32 with 112 channels per group"
    # By less than separate passes around PyTorch's convolution take.
    strided = problem.stride == (2, 2) and problem.channels_last and not fused
    if strided and problem.out_width >= 14 and width >= _least_width_of_pytorch(problem, width):
        return "PyTorch was measured to be faster forward in float32 with stride 2 and this many channels per group"
    return None


def _on_tensor_cores_of_cuda(problem: ConvProblem) -> bool:
    """Whether a grouped convolution is for those kernels of csrc/cuda that were measured, up to 32 channels per group.

    Those with 1 and 2 are the kernels of 4: groups share a tile of 16 channels.
    """
    if problem.groups == 1 or problem.dtype.itemsize != 2 or not problem.channels_last:
        return False
    tiles = problem.group_in in (1, 2, 4, 8, 16, 32) and problem.in_channels % 16 == 0
    return tiles and problem.group_in == problem.group_out and problem.stride in ((1, 1), (2, 2))


def _faster_in_cuda(problem: ConvProblem, fused: bool) -> bool:
    """Weight gradients, and the input gradients of what is fused; measured in ResNeXt-50."""
    gradient = problem.op == "wgrad" or (fused and problem.op == "dgrad")
    return gradient and _on_tensor_cores_of_cuda(problem)


def _faster_in_cudnn(name: str, problem: ConvProblem) -> bool:
    """Weight gradients, and forward passes with stride 2, from some width of groups on; measured in ResNeXt-50."""
    if problem.groups == 1 or problem.dtype.itemsize != 2 or not problem.channels_last:
        return False
    strided = problem.stride == (2, 2)
    if problem.op != "wgrad" and not (problem.op == "fwd" and strided):
        return False
    least = 8
    if name == "cuda" and _on_tensor_cores_of_cuda(problem):
        least = 16 if strided else 32
    return min(problem.group_in, problem.group_out) >= least


def _least_width_of_pytorch(problem: ConvProblem, width: int) -> int:
    """From how many channels per group on PyTorch was faster forward with stride 2, for 14 pixels or more in a row."""
    if problem.out_width == 14:  # whole blocks of our kernel
        return 65 if problem.batch * problem.out_height >= 56 else 112
    return 24 if problem.out_width >= 28 and width % 16 else 40


def measured(
    problem: ConvProblem, device: torch.device, fusion: str = "plain", kernel_size: int = 3
) -> tuning.Entry | None:
    """What was measured on this GPU for a problem, where the backend that was the fastest can serve; else None.

    Arguments as of `choose`. The gradients of what is fused are served together, and measured so.
    """
    if device.type != "cuda" or all(unsupported(name, problem.dtype, device) for name in ("triton", "cuda")):
        return None
    op = "bwd" if fusion == "stats" and problem.op != "fwd" else None
    allow_tf32 = tuning.tf32_allowed(problem.dtype)
    found = tuning.lookup(problem, device, allow_tf32=allow_tf32, fusion=fusion, kernel_size=kernel_size, op=op)
    return None if found is None or unsupported(found.backend, problem.dtype, device) else found


def rounds_to_tf32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of ``dtype`` may be rounded to TF32 on ``device``, on which what was measured depends."""
    return device.type == "cuda" and tuning.tf32_allowed(dtype)


@functools.cache
def _force_capability() -> None:
    """Let the extension use the instruction set that the environment asks for."""
    if not (capability := os.environ.get("RESNEXT_CPU_CAPABILITY")):
        return
    from . import extension

    try:
        extension.force_cpu_capability(capability)
    except RuntimeError:
        raise ValueError(
            "RESNEXT_CPU_CAPABILITY: expected amx_bf16, avx512_bf16, avx512, avx2 or portable, and a machine that has "
            f"it, got {capability!r}; unset it for the best there is"
        ) from None


@functools.cache
def _no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and Triton's interpreter is off (TRITON_INTERPRET=1 at start)"
    if torch.version.hip is not None:
        return "the GPU is not NVIDIA's"
    if reason := _too_old(device):
        return reason
    try:
        from . import grouped_conv

        grouped_conv.probe(device)
    except Exception as error:
        reason = f"Triton does not start on this machine ({type(error).__name__}: {error})"
        warnings.warn(f"resnext: {reason}; another backend serves instead", RuntimeWarning, stacklevel=2)
        return reason
    return None


def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return None
    return f"the GPU has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0"
