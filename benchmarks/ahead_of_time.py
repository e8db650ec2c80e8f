"""Compile Triton launches ahead of time, with no GPU, and read what the machine code uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from resnext.kernels.config import Config, PointwiseConfig, StripsConfig, TapsConfig
from resnext.kernels.launch import Launch

VECTORS = ("center_ptr", "scale_ptr", "shift_ptr", "partials_ptr")  # float32 whatever the activations are
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}
# Shared memory of one program. The code for 8.0 also runs on 8.6 and 8.9, which have the least.
SHARED_LIMITS = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses.

    Attributes:
        registers: Of a thread.
        shared: Bytes of shared memory of a program.
        spills: Instructions that move registers to memory and back.
        matrix_instruction: The first one, or "-".
    """

    registers: int
    shared: int
    spills: int
    matrix_instruction: str


def pointers(launch: Launch, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What a convolution's pointers point to where activations are of ``dtype``; without those that are None."""
    names = (name for name in launch.kernel.arg_names if name.endswith("_ptr") and name not in launch.constants)
    return {name: torch.float32 if name.endswith(VECTORS) else dtype for name in names}


def compile_launch(launch: Launch, tensors: Mapping[str, torch.dtype], arch: int) -> triton.compiler.CompiledKernel:
    """Compile as a launch on tensors of these dtypes would, which then finds the kernel in Triton's cache.

    Absent tensors and sizes of 1 become constants, multiples of 16 are known to be such.
    """
    constants, signature, attributes = dict(launch.constants), {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        size = launch.sizes.get(name)
        if name in launch.blocks:
            rows, columns = launch.blocks[name]
            signature[name] = f"tensordesc<{POINTERS[tensors[name]][1:]}[{rows}, {columns}]>"
        elif name in tensors:
            signature[name] = POINTERS[tensors[name]]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in constants or size in (None, 1):
            constants.setdefault(name, size)
            signature[name] = "constexpr"
            if isinstance(constants[name], str):
                attributes[(i,)] = []
        elif isinstance(size, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            attributes[(i,)] = [] if size % 16 else [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def specialization(launch: Launch, dtype: torch.dtype) -> Hashable:
    """What tells one compiled kernel from another: launches that share it are compiled once."""
    sizes = [(name, size == 1, size % 16 == 0) for name, size in launch.sizes.items()]
    return (launch.kernel, dtype, *launch.constants.items(), *launch.options.items(), *launch.blocks.items(), *sizes)


def machine_code(kernel: triton.compiler.CompiledKernel) -> str:
    """SASS and resource usage, read with the tools that Triton ships."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(kernel: triton.compiler.CompiledKernel) -> Usage:
    """What the machine code uses."""
    text = machine_code(kernel)
    registers = re.search(r"REG:(\d+)", text)
    matrix = re.search(r"\b(HGMMA|HMMA|UTC\w*MMA)[\w.]*", text)
    if registers is None or "EXIT" not in text:
        raise RuntimeError(f"cuobjdump showed no code for {kernel.metadata.name}:\n{text[:2000]}")
    spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
    return Usage(int(registers[1]), kernel.metadata.shared, spills, matrix[0] if matrix else "-")


def exceeds(usage: Usage, shared_limit: int) -> str | None:
    """Why a kernel is not worth running: it would not fit the machine, or spill; or None."""
    if usage.shared > shared_limit:
        return f"{usage.shared} bytes of shared memory, of {shared_limit}"
    return f"{usage.spills} spills" if usage.spills else None


def describe(config: Config | PointwiseConfig) -> str:
    """Launch settings in words."""
    form = {StripsConfig: "strips", TapsConfig: "taps"}.get(type(config), "")
    tile = f"strip {config.strip}" if isinstance(config, StripsConfig) else f"N {config.block_n} K {config.block_k}"
    merged = "" if isinstance(config, PointwiseConfig) else f"merged {config.merged} "
    text = f"{form} {merged}M {config.block_m} {tile} warps {config.num_warps} stages {config.num_stages}"
    if config.max_registers is not None:
        text += f" registers {config.max_registers}"
    for name in ("source_in_registers", "tensor_descriptors"):
        if getattr(config, name, False):
            text += f" {name.replace('_', ' ')}"
    return text.strip()
