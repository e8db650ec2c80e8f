"""Who may import whom, who reads the environment, and what importing the package does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import resnext

ROOT = Path(__file__).parent.parent
KERNELS, RESNEXT = ROOT / "kernels", ROOT / "resnext"
STANDARD = sys.stdlib_module_names

# module -> what it may import besides the standard library; "." stands before a sibling in kernels/.
TRITON = {".config", "triton", "torch"}
ALLOWED = {
    "kernels/__init__": {
        ".attention",
        ".attention_steps",
        ".block",
        ".block_steps",
        ".config",
        ".dispatch",
        ".flops",
        ".fused",
        ".fused_checks",
        ".ops",
        ".reasons",
    },
    "kernels/attention": {
        ".checks",
        ".config",
        ".dispatch",
        ".fused_checks",
        ".fused_ops",
        ".operators",
        ".ops",
        ".reference",
        "torch",
    },
    "kernels/attention_steps": {".attention", ".block_steps", ".checks", "torch"},
    "kernels/block": {".attention_steps", ".block_steps", ".calls", ".dispatch", ".operators", "torch"},
    "kernels/block_steps": {
        ".checks",
        ".config",
        ".dispatch",
        ".fused",
        ".fused_checks",
        ".fused_conv_ops",
        ".fused_ops",
        "torch",
    },
    "kernels/calls": {".dispatch", "torch"},
    "kernels/operators": {".calls", ".dispatch", "torch"},
    "kernels/ops": {".calls", ".checks", ".dispatch", ".operators", ".reference", "torch"},
    "kernels/fused": {
        ".calls",
        ".checks",
        ".config",
        ".dispatch",
        ".fused_checks",
        ".fused_conv_ops",
        ".fused_ops",
        ".ops",
        ".reference",
        "torch",
    },
    "kernels/fused_checks": {".checks", ".config", ".ops", "torch"},
    "kernels/fused_conv_ops": {
        ".checks",
        ".composed",
        ".config",
        ".dispatch",
        ".fused_ops",
        ".operators",
        ".ops",
        ".reference",
        "torch",
    },
    "kernels/fused_ops": {".checks", ".config", ".dispatch", ".operators", ".ops", ".reference", "torch"},
    "kernels/flops": {".fused_conv_ops", ".fused_ops", ".ops", "torch"},
    "kernels/dispatch": {
        ".checks",
        ".composed",
        ".onednn",
        ".reference",
        ".config",
        ".extension",
        ".grouped_conv",
        ".tuning",
        "torch",
    },
    "kernels/tuning": {".config", "torch"},
    "kernels/reasons": {".checks", ".dispatch", "torch"},
    "kernels/composed": {".config", ".reference", "torch"},
    "kernels/onednn": {".reference", "torch"},
    "kernels/dense_conv": {".composed", ".config", ".extension", ".onednn", ".reference", "torch"},
    "kernels/checks": {"torch"},
    "kernels/config": {"torch"},
    "kernels/candidates": {".config", "torch"},
    "kernels/reference": {".checks", ".config", "torch"},
    "kernels/extension": {".checks", ".config", ".reference", "torch", "resnext._C"},
    "kernels/extension_attention": {".config", ".extension", "torch"},
    "kernels/launch": TRITON,
    "kernels/statistics": TRITON | {".launch"},
    "kernels/batch_norm": TRITON | {".batch_norm_kernels", ".launch", ".statistics"},
    "kernels/batch_norm_kernels": TRITON | {".grouped_conv_tiles", ".statistics"},
    "kernels/attention_kernels": TRITON | {".batch_norm_kernels", ".grouped_conv_tiles", ".launch", ".statistics"},
    "kernels/max_pool": TRITON | {".batch_norm_kernels", ".grouped_conv_tiles", ".launch", ".statistics"},
    "kernels/grouped_conv": TRITON | {".grouped_conv_plan", ".grouped_conv_tiles", ".launch", ".statistics", ".tuning"},
    "kernels/grouped_conv_plan": TRITON
    | {".grouped_conv_forward", ".grouped_conv_dgrad", ".grouped_conv_wgrad", ".launch"},
    "kernels/grouped_conv_forward": TRITON | {".grouped_conv_fusion", ".grouped_conv_tiles"},
    "kernels/grouped_conv_dgrad": TRITON | {".grouped_conv_fusion", ".grouped_conv_tiles"},
    "kernels/grouped_conv_wgrad": TRITON | {".grouped_conv_fusion", ".grouped_conv_tiles"},
    "kernels/grouped_conv_tiles": TRITON | {".grouped_conv_fusion"},
    "kernels/grouped_conv_fusion": TRITON | {".statistics"},
    "kernels/pointwise_conv": TRITON | {".launch", ".pointwise_conv_kernels", ".statistics", ".tuning"},
    "kernels/pointwise_conv_kernels": TRITON | {".grouped_conv_fusion", ".grouped_conv_tiles", ".statistics"},
    "kernels/stem_conv": TRITON
    | {".batch_norm", ".composed", ".launch", ".statistics", ".stem_conv_kernels", ".tuning"},
    "kernels/stem_conv_kernels": TRITON
    | {".grouped_conv_fusion", ".grouped_conv_tiles", ".pointwise_conv_kernels", ".statistics"},
    "kernels/bottleneck_tail": TRITON | {".grouped_conv_fusion", ".grouped_conv_tiles", ".launch", ".tuning"},
    "resnext/__init__": {
        "resnext.checkpoint_files",
        "resnext.checkpoints",
        "resnext.convert",
        "resnext.features",
        "resnext.kernels",
        "resnext.layers",
        "resnext.models",
        "resnext.pretrained",
        "resnext.resnet",
        "resnext.summary",
    },
    "resnext/layers": {"resnext.kernels", "torch"},
    "resnext/batch_norm": {"resnext.kernels", "resnext.layers", "torch"},
    "resnext/effects": {"torch"},
    "resnext/graph": {"resnext.effects", "resnext.layers", "torch"},
    "resnext/steps": {"resnext.graph", "torch"},
    "resnext/roles": {
        "resnext.batch_norm",
        "resnext.graph",
        "resnext.kernels",
        "resnext.layers",
        "resnext.steps",
        "torch",
    },
    "resnext/plan": {
        "resnext.batch_norm",
        "resnext.graph",
        "resnext.kernels",
        "resnext.layers",
        "resnext.roles",
        "resnext.steps",
        "torch",
    },
    "resnext/reasons": {
        "resnext.batch_norm",
        "resnext.graph",
        "resnext.kernels",
        "resnext.layers",
        "resnext.roles",
        "resnext.steps",
        "torch",
    },
    "resnext/folding": {
        "resnext.batch_norm",
        "resnext.graph",
        "resnext.kernels",
        "resnext.layers",
        "resnext.reasons",
        "resnext.steps",
        "torch",
    },
    "resnext/recorded": {"resnext.batch_norm", "resnext.kernels", "resnext.layers", "resnext.steps", "torch"},
    "resnext/fusion": {
        "resnext.batch_norm",
        "resnext.folding",
        "resnext.graph",
        "resnext.kernels",
        "resnext.layers",
        "resnext.reasons",
        "resnext.recorded",
        "resnext.steps",
        "torch",
    },
    "resnext/convert": {
        "resnext.batch_norm",
        "resnext.folding",
        "resnext.fusion",
        "resnext.graph",
        "resnext.kernels",
        "resnext.layers",
        "resnext.plan",
        "resnext.reasons",
        "resnext.roles",
        "resnext.steps",
        "torch",
    },
    "resnext/blocks": {"resnext.convert", "torch"},
    "resnext/stages": {"torch"},
    "resnext/resnet": {"resnext.blocks", "resnext.convert", "resnext.stages", "torch"},
    "resnext/features": {"resnext.convert", "resnext.resnet", "resnext.stages", "torch"},
    "resnext/models": {"resnext.blocks", "resnext.features", "resnext.resnet"},
    "resnext/summary": {
        "resnext.convert",
        "resnext.effects",
        "resnext.fusion",
        "resnext.kernels",
        "resnext.layers",
        "resnext.steps",
        "torch",
        "torchinfo",
    },
    "resnext/__main__": {"resnext.cli"},
    "resnext/checkpoint_keys": {"torch"},
    "resnext/checkpoint_files": {"resnext.checkpoint_keys", "safetensors", "torch"},
    "resnext/checkpoints": {"resnext.checkpoint_files", "resnext.checkpoint_keys", "torch"},
    "resnext/pretrained": {
        "resnext.__version__",
        "resnext.checkpoint_files",
        "resnext.checkpoints",
        "resnext.features",
        "resnext.models",
        "resnext.resnet",
        "huggingface_hub",
        "torch",
    },
}
# The command line stands on the public names of resnext ("resnext") and on other packages; "." stands before a sibling.
ALLOWED |= {
    "resnext/cli/__init__": {".arguments", ".errors", "torch"},
    "resnext/cli/arguments": {"resnext"},
    "resnext/cli/building": {".errors", "resnext", "torch", "torchvision"},
    "resnext/cli/checkpointing": {".arguments", ".building", ".errors", ".preprocessing", "resnext"},
    "resnext/cli/data": {
        ".arguments",
        ".distributed",
        ".errors",
        ".folders",
        ".preprocessing",
        "sklearn",
        "torch",
        "torchvision",
    },
    "resnext/cli/distributed": {".errors", "resnext", "torch"},
    "resnext/cli/engine": {".errors", "torch", "torchmetrics", "tqdm"},
    "resnext/cli/errors": set(),
    "resnext/cli/evaluation": {
        ".arguments",
        ".checkpointing",
        ".data",
        ".distributed",
        ".engine",
        ".errors",
        ".loading",
        ".logs",
        ".plots",
        "torch",
        "torchmetrics",
    },
    "resnext/cli/exporting": {
        ".arguments",
        ".checkpointing",
        ".errors",
        "onnxscript",
        "resnext",
        "resnext.checkpoint_files",
        "torch",
    },
    "resnext/cli/folders": {".errors", "PIL", "torchvision"},
    "resnext/cli/inspection": {".arguments", ".building", ".checkpointing", ".errors", "resnext"},
    "resnext/cli/loading": {".distributed", ".errors", ".folders", "torch"},
    "resnext/cli/logs": {".plots", "resnext.checkpoint_files"},
    "resnext/cli/optimization": {".arguments", "torch"},
    "resnext/cli/plots": {"matplotlib", "resnext.checkpoint_files", "torch", "torchmetrics"},
    "resnext/cli/prediction": {
        ".arguments",
        ".checkpointing",
        ".distributed",
        ".engine",
        ".errors",
        ".folders",
        ".logs",
        ".plots",
        "torch",
        "torchvision",
    },
    "resnext/cli/preprocessing": {"torch", "torchvision"},
    "resnext/cli/training": {
        ".arguments",
        ".building",
        ".checkpointing",
        ".data",
        ".distributed",
        ".engine",
        ".errors",
        ".loading",
        ".logs",
        ".optimization",
        ".preprocessing",
        "resnext",
        "torch",
    },
}
FILES = sorted([*KERNELS.glob("*.py"), *RESNEXT.glob("*.py"), *(RESNEXT / "cli").glob("*.py")])
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in FILES)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            if path.parent.name == "cli":
                base = re.sub(r"^resnext\.cli(\.|$)", ".", base)
                if base == "resnext":
                    assert {alias.name for alias in node.names} <= set(resnext.__all__)
                    found.add(base)
                    continue
            if base in (".", "resnext"):  # `from . import ops` imports modules, not names
                found |= {base.rstrip(".") + "." + alias.name for alias in node.names}
            else:
                found.add(base)
    return {name for name in found if name.split(".")[0] not in STANDARD}


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_layers(module):
    assert module in ALLOWED, f"{module}.py is new: say in ALLOWED what it may import"
    for name in imports(ROOT / f"{module}.py"):
        top = name if name.startswith((".", "resnext")) else name.split(".")[0]
        assert top in ALLOWED[module], f"{module}.py may not import {name}"


def test_the_list_of_layers_has_no_module_that_is_gone():
    assert set(ALLOWED) == set(MODULES)


def test_layers_use_public_names_of_kernels_only():
    for path in RESNEXT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "resnext.kernels":
                assert not [alias.name for alias in node.names if alias.name.startswith("_")]


def test_only_dispatch_reads_the_environment():
    readers = [
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(word in path.read_text() for word in ("os.environ", "getenv"))
    ]
    # The command line sets what cuBLAS reads, and reads nothing.
    assert readers == ["kernels/dispatch.py", "resnext/cli/training.py"]


def test_import_is_quiet_and_light():
    """Importing prints nothing and loads neither Triton kernels, nor the extension, nor other libraries."""
    code = (
        "import sys, torch\nfrom resnext import ResNeXt50Fused\n"
        "loaded = [m for m in ('resnext._C', 'resnext.kernels.grouped_conv', 'torchvision', 'timm', 'numpy.testing',"
        " 'matplotlib', 'torch._dynamo', 'torch._inductor') if m in sys.modules]\n"
        "assert not loaded, loaded\nassert not torch.cuda.is_initialized()"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_bare_kernels_package_refuses_to_be_imported():
    """A folder named like a well-known package must not be taken for it."""
    result = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0
    assert "ImportError: this folder is the package resnext.kernels, not 'kernels'" in result.stderr
