"""The commands as typed: exit statuses, readable JSON, one-line errors, and usable files."""

import json
import signal
from pathlib import Path
from types import FrameType

import pytest
from click.testing import CliRunner

from llava_core.cli import main
from tests.original import Kind, write_original


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_inspect_prints_text_and_json(tiny_checkpoint: Path) -> None:
    code, out, _ = run("inspect", tiny_checkpoint, "--image-size", "640x480", "--image-size", "30x28")
    assert code == 0
    assert "layout: llava-hf" in out
    assert out.endswith("problems: none\n")
    code, out, _ = run("inspect", tiny_checkpoint, "--format", "json", "--image-size", "30x28")
    assert code == 0
    assert json.loads(out)["image_tokens"] == {"30x28": 4}


def test_inspect_fails_on_problems_but_still_prints_the_report(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "tokenizer.json").unlink()
    code, out, _ = run("inspect", checkpoint_copy, "--format", "json")
    assert code == 1
    report = json.loads(out)
    assert len(report["problems"]) == 1
    assert report["decoder"]["architecture"] == "llama"


def test_merge_convert_and_delta_in_sequence(tmp_path: Path) -> None:
    original = write_original(tmp_path / "source", Kind(layout="lora"))
    merged, hf, back = (tmp_path / name for name in ("merged", "hf", "back"))
    assert run("merge", original.folder, merged, "--base", original.base) == (0, "", "")
    assert run("convert", merged, hf, "--to", "llava-hf", "--max-shard-size", "20KB") == (0, "", "")
    assert (hf / "model.safetensors.index.json").exists()
    assert run("convert", hf, back, "--to", "original")[0] == 0
    assert run("delta", "make", original.base, back, tmp_path / "delta")[0] == 0
    assert run("delta", "apply", original.base, tmp_path / "delta", tmp_path / "applied")[0] == 0
    assert [run("inspect", folder)[0] for folder in (merged, hf, back, tmp_path / "applied")] == [0, 0, 0, 0]
    code, _, err = run("ask", "--model", tmp_path / "delta", "What?")
    assert code == 1
    assert "llava delta apply" in err


@pytest.mark.parametrize("command", ["convert", "merge", "make", "apply"])
def test_sigterm_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    original = write_original(tmp_path / "source", Kind(layout="projector"))
    merged, delta, out = (tmp_path / name for name in ("merged", "delta", "out"))
    assert run("merge", original.folder, merged, "--base", original.base)[0] == 0
    assert run("delta", "make", original.base, merged, delta)[0] == 0
    arguments = {
        "convert": ("convert", merged, out, "--to", "llava-hf"),
        "merge": ("merge", original.folder, out, "--base", original.base),
        "make": ("delta", "make", original.base, merged, out),
        "apply": ("delta", "apply", original.base, delta, out),
    }
    ignored: list[int] = []

    def ignore(number: int, _: FrameType | None) -> None:
        ignored.append(number)

    before = signal.signal(signal.SIGTERM, ignore)
    try:
        # The last step before the folder gets its final name.
        monkeypatch.setattr("os.fsync", lambda _: signal.raise_signal(signal.SIGTERM))
        code, _, err = run(*arguments[command])
        assert signal.getsignal(signal.SIGTERM) is ignore
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (code, err, ignored) == (1, "\nAborted!\n", [])
    assert {path.name for path in tmp_path.iterdir()} == {"source", "merged", "delta"}


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("convert", "MODEL", "MODEL", "--to", "original"), 1, "exists and is not overwritten"),
        (("merge", "MODEL", "OUT"), 1, "nothing to merge"),
        (
            ("convert", "MODEL", "OUT", "--to", "original", "--max-shard-size", "many"),
            2,
            "is not a size; write for example",
        ),
        (("inspect", "MODEL", "--image-size", "640"), 2, "is not a size in pixels"),
        (("inspect", "MODEL", "--image-size", "0x5"), 2, "is not a size in pixels"),
        (("delta", "apply", "MODEL", "MODEL", "OUT"), 1, "has no delta_base"),
        (("delta", "apply", "MODEL", "MODEL", "MODEL", "--force"), 1, "exists and is not overwritten"),
        (("delta", "apply", "/no/such", "MODEL", "OUT"), 1, "no such checkpoint folder"),
    ],
)
def test_mistakes_give_a_one_line_error(
    tiny_checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, named: str
) -> None:
    words = {"MODEL": str(tiny_checkpoint), "OUT": str(tmp_path / "out")}
    got, _, err = run(*(words.get(argument, argument) for argument in arguments))
    assert got == code
    assert named in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
