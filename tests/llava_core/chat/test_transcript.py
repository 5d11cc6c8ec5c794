"""Transcripts load as they were saved, are readable by people, and damage is reported."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava_core.chat.transcript import FORMAT, Transcript, load_transcript
from llava_core.errors import RequestError
from llava_core.types import ImagePart, ImageUrl, Message, TextPart
from llava_core.views import DicomView
from tests.deployments.pictures import encode, plain

RED = plain()
TALK = Transcript(
    "m",
    "Be brief: é.",
    (
        Message("user", (ImagePart(RED), ImageUrl("https://example.com/a.png"), TextPart("What?\n\u2028"))),
        Message("assistant", (TextPart("A red one."),)),
        Message("user", (TextPart("before"), ImagePart(RED), TextPart("after"))),
    ),
)


def save(folder: Path, content: str | bytes) -> Path:
    path = folder / "talk.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_saved_transcript_loads_unchanged(tmp_path: Path) -> None:
    assert load_transcript(save(tmp_path, TALK.dump())) == TALK
    empty = Transcript("m", None, ())
    assert load_transcript(save(tmp_path, empty.dump())) == empty


def test_pictures_of_any_kind_keep_their_bytes(tmp_path: Path) -> None:
    from PIL import Image

    for data in (encode(Image.new("L", (3, 3)), "JPEG"), b"\0" * 128 + b"DICM", b"of no known kind"):
        talk = Transcript("m", None, (Message("user", (ImagePart(data),)),))
        assert load_transcript(save(tmp_path, talk.dump())) == talk


def test_dicom_views_are_kept(tmp_path: Path) -> None:
    views = (None, DicomView(2), DicomView(window=3), DicomView(4, (-600.5, 1500)))
    pictures = tuple(ImagePart(b"\0" * 128 + b"DICM", dicom=view) for view in views)
    talk = Transcript("m", None, (Message("user", pictures),))
    assert load_transcript(save(tmp_path, talk.dump())) == talk


def test_a_transcript_is_readable_by_people() -> None:
    text, pictures = TALK.dump().split('"images": {')
    assert "base64" not in text
    assert max(map(len, text.splitlines())) < 100
    assert "A red one." in text
    assert "é" in text
    assert pictures.count("base64") == 1, "a picture that comes again stands there once"


GOOD: dict[str, Any] = json.loads(TALK.dump())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "other"}, f"`format` is not {FORMAT}"),
        ({"messages": 3}, "damaged"),
        ({"messages": [{"role": "system", "content": []}]}, "role must be user or assistant"),
        ({"messages": [{"role": "user", "content": [{"image": 9}]}]}, "KeyError: '9'"),
        ({"messages": [{"role": "user", "content": [{"text": 3}]}]}, "text is wanted, not int"),
        ({"messages": [{"role": "user"}]}, "damaged"),
        *(
            ({"messages": [{"role": "user", "content": [{"image": 1, "dicom": view}]}]}, named)
            for view, named in [
                (3, "damaged"),
                ({"frame": 1}, "window"),
                ({"frame": "1", "window": None}, "a frame is a number, not str"),
                ({"frame": 0, "window": None}, "counted from 1"),
                ({"frame": 1, "window": [40, 0]}, "width above 0"),
                ({"frame": 1, "window": [40]}, "IndexError"),
                ({"frame": 1, "window": ["a", 1]}, "damaged"),
            ]
        ),
        ({"images": {"1": "data:image/png;base64,§"}}, "not base64"),
        ({"images": {"1": "/etc/passwd"}}, "not the address of a picture"),
        ({"images": []}, "damaged"),
        ({"system": 3}, "text is wanted"),
    ],
)
def test_damage_is_reported_with_the_file(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = save(tmp_path, json.dumps(GOOD | change))
    with pytest.raises(RequestError, match=named) as raised:
        load_transcript(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"[1]", b"{"])
def test_files_that_are_no_transcript_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(RequestError, match=r"talk\.json is no"):
        load_transcript(save(tmp_path, content))
    with pytest.raises(RequestError, match=r"none\.json cannot be read"):
        load_transcript(tmp_path / "none.json")
