"""`llava ask`: JSON with exactly the fields that other programs compare, question files, and one-line errors."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_core import asking
from llava_core.asking import original_ids, shown
from llava_core.cli import main
from llava_core.errors import EngineError
from llava_core.inference import LocalModel
from llava_core.scenes.draw import draw_scene
from llava_core.scenes.scene import sample_scene
from llava_core.types import PreparedRequest, SamplingParams, TokenDelta
from llava_core.views import ImageTransform, Window
from tests.dicom_files import PLANTED, dicom
from tests.tiny import IMAGE_TOKENS, SYSTEM, cut_short

KEYS = {
    "prompt",
    "prompt_token_ids",
    "num_image_tokens",
    "image_transforms",
    "token_ids",
    "text",
    "finish_reason",
    "usage",
    "timings",
}


def ask(checkpoint: Path, *arguments: str) -> dict[str, object]:
    given = ("ask", "--model", str(checkpoint), "--dtype", "float32", "--max-tokens", "4", "--format", "json")
    result = CliRunner().invoke(main, [*given, *arguments])
    assert result.exit_code == 0, result.stderr
    answer: dict[str, object] = json.loads(result.stdout)
    return answer


def test_json_has_prompt_ids_counts_answer_and_timings(tiny_checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    picture = str(tmp_path / "red.png")
    answer = ask(tiny_checkpoint, "--image", picture, "--image", picture, "")
    assert set(answer) == KEYS
    assert answer["prompt"] == f"{SYSTEM} USER: <image>\n<image>\n ASSISTANT:"
    ids = answer["prompt_token_ids"]
    assert isinstance(ids, list)
    assert ids.count(-200) == 2
    assert ids[0] == 1
    assert answer["num_image_tokens"] == [IMAGE_TOKENS, IMAGE_TOKENS]
    assert answer["usage"]["image_tokens"] == 2 * IMAGE_TOKENS  # type: ignore[index]
    assert len(answer["token_ids"]) == answer["usage"]["completion_tokens"]  # type: ignore[arg-type,index]
    assert set(answer["timings"]) >= {"preprocess", "encode", "queue", "prefill", "decode", "total"}  # type: ignore[call-overload]


def test_a_question_without_pictures_has_none(tiny_checkpoint: Path) -> None:
    answer = ask(tiny_checkpoint, "Hi")
    assert answer["num_image_tokens"] == []
    assert answer["prompt"] == f"{SYSTEM} USER: Hi ASSISTANT:"


def test_each_image_is_one_sentinel() -> None:
    ids = (1, -200, -200, -200, -200, -200, 5, -200)
    prepared = PreparedRequest("r", ids, (), SamplingParams(), num_image_tokens=(2, 3, 1))
    assert original_ids(prepared) == [1, -200, -200, 5, -200]


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    return file


def test_a_failed_question_does_not_stop_the_others(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = write(tmp_path, '{"text": "a", "image": "none.png", "id": 1}\n{"text": "b", "id": 2}\n')
    given = ["ask", "--model", str(tiny_checkpoint), "--max-tokens", "2", "--format", "json", "--questions", str(file)]
    result = CliRunner().invoke(main, given)
    failed, answered = map(json.loads, result.stdout.splitlines())
    assert "none.png cannot be read" in failed["error"]
    assert (answered["question_id"], set(answered)) == (2, KEYS | {"question_id"})
    assert result.exit_code == 1
    assert "1 of 2 questions" in result.stderr


def test_a_failure_of_the_engine_does_not_stop_other_questions(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = LocalModel.stream

    def failing(model: LocalModel, request: PreparedRequest) -> Iterator[TokenDelta]:
        if "fails" in request.prompt:
            raise EngineError("the logits are not finite")
        return stream(model, request)

    monkeypatch.setattr(LocalModel, "stream", failing)
    file = write(tmp_path, '{"text": "fails"}\n{"text": "b"}\n')
    given = ["ask", "--model", str(tiny_checkpoint), "--max-tokens", "2", "--format", "json", "--questions", str(file)]
    result = CliRunner().invoke(main, given)
    failed, answered = map(json.loads, result.stdout.splitlines())
    assert failed == {"error": "the logits are not finite"}
    assert set(answered) == KEYS
    assert "1 of 2 questions" in result.stderr


def test_an_invalid_picture_among_valid_ones_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "text.png").write_text("not a picture")
    file = write(tmp_path, '{"text": "a", "images": ["red.png", "text.png", "red.png"]}\n')
    given = ["ask", "--model", str(tiny_checkpoint), "--max-tokens", "2", "--format", "json", "--questions", str(file)]
    answer = json.loads(CliRunner().invoke(main, given).stdout)
    assert answer["error"].startswith(f"{tmp_path}/text.png: the data is not an image of a supported format")


def break_image(folder: Path) -> list[str]:
    (folder / "text.png").write_text("not a picture")
    return ["--image", str(folder / "text.png")]


def break_shape(folder: Path) -> list[str]:
    tensors = load_file(folder / "model.safetensors")
    tensors["multi_modal_projector.linear_2.bias"] = torch.zeros(5)
    save_file(tensors, folder / "model.safetensors")
    return []


def break_vocabulary(folder: Path) -> list[str]:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    token = {"content": "<more>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"].append({**token, "id": 260, "special": True})
    file.write_text(json.dumps(content))
    return []


BROKEN: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "picture": (break_image, "text.png: the data is not an image"),
    "no picture": (lambda _: ["--image", "/no/such.png"], "/no/such.png cannot be read"),
    "template": (lambda _: ["--template", "nonsense"], "unknown template 'nonsense'"),
    "long answer": (lambda _: ["--max-tokens", "5000"], "context of 512"),
    "truncated": (lambda folder: cut_short(folder / "model.safetensors", keep=2_000) or [], "damaged or truncated"),
    "shape": (break_shape, r"projector 2.bias has shape (5,)"),
    "vocabulary": (break_vocabulary, "the tokenizer has 261 tokens, but vocab_size in"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_mistakes_are_reported_before_anything_is_loaded(
    checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(asking, "load_model", lambda *_: pytest.fail("weights were read"))
    breaks, named = BROKEN[name]
    result = CliRunner().invoke(main, ["ask", "--model", str(checkpoint_copy), *breaks(checkpoint_copy), "What?"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert named in result.stderr


def test_torch_is_not_imported_for_errors_found_without_it(checkpoint_copy: Path) -> None:
    break_shape(checkpoint_copy)
    code = (
        "import sys; from llava_core.cli import main\n"
        f"try: main(['ask', '--model', {str(checkpoint_copy)!r}, 'What?'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


def scene_as_dicom(folder: Path) -> tuple[Path, Path]:
    """Writes a drawn scene in grey as a PNG and as a 12-bit detector would store it, where 0 is white."""
    grey = draw_scene(sample_scene(random.Random(5))).convert("L")
    grey.save(folder / "scene.png")
    stored = 4095 - np.rint(np.asarray(grey) * (4095 / 255)).astype(np.uint16)
    data = dicom(stored, bits=12, photometric="MONOCHROME1", WindowCenter=[1, 2048], WindowWidth=[2, 4096])
    (folder / "scene.dcm").write_bytes(data)
    return folder / "scene.png", folder / "scene.dcm"


def test_a_dicom_file_is_answered_like_the_same_scene_as_png(tmp_path: Path) -> None:
    png, dcm = scene_as_dicom(tmp_path)
    answers = []
    for options in (["--image", str(png)], ["--image", str(dcm), "--window", "2"]):
        result = CliRunner().invoke(main, ["ask", *options, "Describe the picture."])
        assert result.exit_code == 0, result.stderr
        answers.append(result)
    assert answers[0].stdout == answers[1].stdout
    assert len(answers[0].stdout.split()) > 3
    assert answers[0].stderr == ""
    assert answers[1].stderr == (
        f"{dcm}: DICOM, 12 bits, MONOCHROME1, window 2048 wide 4096 (LINEAR, of the file), turned over\n"
    )


def test_json_reports_the_image_transform_but_no_patient_data(tiny_checkpoint: Path, tmp_path: Path) -> None:
    _, dcm = scene_as_dicom(tmp_path)
    answer = ask(tiny_checkpoint, "--image", str(dcm), "--window", "100,4000.5", "--frame", "1", "What?")
    assert answer["image_transforms"][0]["window"] == {  # type: ignore[index]
        "centre": 100.0, "width": 4000.5, "function": "LINEAR", "source": "request",
    }  # fmt: skip
    assert PLANTED not in json.dumps(answer)


@pytest.mark.parametrize("window", ["0", "x", "40", "40,0", "40,-3", "1,2,3", "nan,1"])
def test_an_invalid_or_missing_window_is_refused(tiny_checkpoint: Path, tmp_path: Path, window: str) -> None:
    _, dcm = scene_as_dicom(tmp_path)
    arguments = ["ask", "--model", str(tiny_checkpoint), "--image", str(dcm), "--window", window, "What?"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code in (1, 2)
    assert "there is no window 40" in result.stderr if window == "40" else "CENTRE,WIDTH" in result.stderr


def test_an_image_transform_is_shown_on_one_line() -> None:
    window = Window(40, 400.5, "SIGMOID", "values")
    seen = ImageTransform("DICOM", "MONOCHROME2", 16, True, 2, 3, (2.0, -1024.0), window=window)
    assert shown(seen) == (
        "DICOM, 16 bits, MONOCHROME2, frame 2 of 3, times 2 plus -1024, window 40 wide 400.5 (SIGMOID, of the values)"
    )
    tables = ImageTransform("DICOM", "MONOCHROME1", 8, has_modality_lut=True, has_voi_lut=True, is_inverted=True)
    assert shown(tables) == (
        "DICOM, 8 bits, MONOCHROME1, by the file's modality table, by the file's window table, turned over"
    )
