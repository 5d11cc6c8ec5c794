"""Questions as stored in files: a text, pictures by path or as bytes, an id; and requests built from them.

Reads LLaVA's question files unchanged. Knows nothing about who answers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_core.client.messages import is_address, read_picture, user_message
from llava_core.errors import ImageError, RequestError
from llava_core.prepare import Preparer
from llava_core.types import GenerationRequest, ImagePart, PreparedRequest, SamplingParams
from llava_core.views import DicomView


@dataclass(frozen=True)
class Question:
    """One question. `id` is whatever the file gave it. A picture is the path of a file or its contents; `names` are the
    paths as the file gave them, "" for contents."""

    text: str
    images: tuple[Path | bytes, ...] = field(default=(), repr=False)
    id: object = None
    names: tuple[str, ...] = field(default=(), repr=False, compare=False)


def parse_row(line: str, where: str) -> dict[str, Any]:
    """Parse a line as a JSON object. Raises RequestError, whose message begins with `where`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not a JSON object: {error}", param="questions") from error
    if not isinstance(row, dict):
        raise RequestError(f"{where} is not a JSON object but {type(row).__name__}", param="questions")
    return row


def read_question(row: Mapping[str, Any], where: str, folder: Path, *, default_text: str | None = None) -> Question:
    """`question` or `text` is the text; `image` or `images` name files relative to `folder`, or hold a file's bytes,
    also as `bytes` in an object; `question_id` or `id` is the id. An empty text or list of pictures counts as absent.
    Raises RequestError, whose message begins with `where`."""
    name, text = _find(row, ("question", "text"), _is_empty)
    text = default_text if text is None else text
    if text is None:
        raise RequestError(f"{where} needs `question`, a text that is not empty", param="questions")
    if not isinstance(text, str):
        raise RequestError(f"{where} has {_kind(text)} as `{name}`, not a text", param="questions")
    name, images = _find(row, ("images", "image"), lambda given: given in (None, []))
    place = f"in `{name}`" if isinstance(images, list) else f"as `{name}`"
    given = images if isinstance(images, list) else [] if images is None else [images]
    pictures = [_picture(each, where, place) for each in given]
    return Question(
        text,
        tuple(folder / each if isinstance(each, str) else each for each in pictures),
        question_id(row),
        tuple(each if isinstance(each, str) else "" for each in pictures),
    )


def question_id(row: Mapping[str, Any]) -> object:
    """The id of a row, question or not; None where it has none, or only NaN or infinity, as rows of tables may."""
    ids = (row.get(name) for name in ("question_id", "id"))
    return next(
        (each for each in ids if not (isinstance(each, float) and not math.isfinite(each)) and each is not None), None
    )


def _is_empty(text: object) -> bool:
    return text is None or (isinstance(text, str) and not text.strip())


def _kind(value: object) -> str:
    """What a value is, in the terms of JSON."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    kinds: dict[type, str] = {str: "an empty text", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def _find(row: Mapping[str, Any], names: Sequence[str], is_absent: Callable[[object], bool]) -> tuple[str, Any]:
    """The first of these fields that is given, as name and value; the value is None where none is."""
    return next(((name, row[name]) for name in names if not is_absent(row.get(name))), (names[0], None))


def _picture(given: object, where: str, place: str) -> str | bytes:
    """The name or the contents of a picture's file. Raises RequestError for anything else."""
    found = given
    if isinstance(given, Mapping):
        _, found = _find(given, ("bytes", "path"), lambda each: each is None)
    if isinstance(found, bytes):
        return found
    if not isinstance(found, str) or not found:
        what = f"{where} has {_kind(given)} {place}"
        raise RequestError(f"{what}, not the name or the contents of a file", param="questions")
    what = f"{where} has {found[:60]!r} {place}"
    if "://" in found or is_address(found):
        raise RequestError(f"{what}, but pictures are read from files: download it first", param="questions")
    if not _is_file_name(found):
        raise RequestError(f"{what}, which no file can be called", param="questions")
    return found


def _is_file_name(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def read_questions(file: Path) -> Iterator[Question]:
    """The questions of a JSON-lines file. Raises RequestError naming the first line that is not one."""
    try:
        # Not splitlines(): a text may contain other characters that Python counts as line breaks.
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} cannot be read: {error}", param="questions") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file}:{number}"
            yield read_question(parse_row(line, where), where, file.parent)


def prepare_question(
    preparer: Preparer, question: Question, sampling: SamplingParams, request_id: str, *, view: DicomView | None = None
) -> PreparedRequest:
    """Read pictures and prepare the request. Raises RequestError, which names the file if a picture is at fault."""
    datas = [image if isinstance(image, bytes) else read_picture(image) for image in question.images]
    message = user_message(question.text, [ImagePart(data, dicom=view) for data in datas])
    try:
        return preparer.prepare(GenerationRequest(request_id, (message,), sampling))
    except ImageError as error:
        # The pictures come first in the message, so content indices equal picture indices.
        names = {f"messages[0].content[{i}].image_url": _name(image, i) for i, image in enumerate(question.images)}
        raise ImageError(f"{names[error.param or '']}: {error.message}", param=error.param, code=error.code) from error


def _name(image: Path | bytes, index: int) -> str:
    return f"image {index + 1}" if isinstance(image, bytes) else str(image)
