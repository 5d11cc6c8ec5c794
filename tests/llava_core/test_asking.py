"""`llava ask`: JSON with exactly what other programs compare, files of questions, and mistakes named by line."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from llava_core.asking import Question, original_ids, read_questions
from llava_core.cli import main
from llava_core.errors import RequestError
from llava_core.types import PreparedRequest, SamplingParams
from tests.tiny import IMAGE_TOKENS, SYSTEM

KEYS = {
    "prompt",
    "prompt_token_ids",
    "num_image_tokens",
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


def test_json_has_prompt_ids_counts_answer_and_times(tiny_checkpoint: Path, tmp_path: Path) -> None:
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


def test_every_spelling_of_a_question_is_read(tmp_path: Path) -> None:
    lines = [
        '{"question": "a", "images": ["x.png", "/y.png"], "id": "k"}',
        "",
        '{"text": "b", "image": "z.png", "question_id": 3}',
        '{"text": "c", "image": null}',
    ]
    assert list(read_questions(write(tmp_path, "\n".join(lines)))) == [
        Question("a", (tmp_path / "x.png", Path("/y.png")), "k"),
        Question("b", (tmp_path / "z.png",), 3),
        Question("c", ()),
    ]


@pytest.mark.parametrize("line", ["not JSON", "[]", '{"image": "a.png"}', '{"text": "a", "images": [3]}'])
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(RequestError, match=r"questions\.jsonl:2 "):
        list(read_questions(write(tmp_path, f'{{"text": "a"}}\n{line}\n')))


def test_a_question_that_fails_does_not_stop_the_others(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = write(tmp_path, '{"text": "a", "image": "none.png", "id": 1}\n{"text": "b", "id": 2}\n')
    given = ["ask", "--model", str(tiny_checkpoint), "--max-tokens", "2", "--format", "json", "--questions", str(file)]
    result = CliRunner().invoke(main, given)
    failed, answered = map(json.loads, result.stdout.splitlines())
    assert "none.png cannot be read" in failed["error"]
    assert (answered["question_id"], set(answered)) == (2, KEYS | {"question_id"})
    assert result.exit_code == 1
    assert "1 of 2 questions" in result.stderr
