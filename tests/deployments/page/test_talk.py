"""How a visitor's turns are converted into a request."""

from pathlib import Path

import pytest

from deployments.page.talk import Choices, Turn, history
from llava_core.errors import RequestError
from llava_core.types import ImagePart, Message, TextPart
from llava_core.views import DicomView
from tests.deployments.pictures import plain
from tests.dicom_files import dicom, radiograph


def test_turns_are_sent_with_their_pictures_and_unanswered_ones_omitted(tmp_path: Path) -> None:
    red, blue = tmp_path / "red.png", tmp_path / "blue.png"
    red.write_bytes(plain("red"))
    blue.write_bytes(plain("blue"))
    talk = (
        Turn("One?", (str(red),), "1"),
        Turn("Lost?", (str(red),), "", problem="The service is busy."),
        Turn("Two?", (str(red), str(blue)), "2"),
    )
    assert history(talk) == [
        Message("user", (ImagePart(plain("red")), TextPart("One?"))),
        Message("assistant", (TextPart("1"),)),
        Message("user", (ImagePart(plain("red")), ImagePart(plain("blue")), TextPart("Two?"))),
        Message("assistant", (TextPart("2"),)),
    ]


def test_a_missing_picture_is_reported_without_its_path(tmp_path: Path) -> None:
    turn = Turn("What?", (str(tmp_path / "gone.png"),), "answer")
    with pytest.raises(RequestError, match="no longer kept") as caught:
        history([turn])
    assert str(tmp_path) not in str(caught.value)


def test_a_view_applies_only_to_dicom_files(tmp_path: Path) -> None:
    png, file = tmp_path / "red.png", tmp_path / "study.dcm"
    png.write_bytes(plain("red"))
    file.write_bytes(dicom(radiograph()))
    view = DicomView(2, (40.0, 400.0))
    turn = Turn("What?", (str(png), str(file)), view=view)
    asked = Message("user", (ImagePart(plain("red")), ImagePart(file.read_bytes(), dicom=view), TextPart("What?")))
    assert turn.asked == turn.begun().asked == asked


def test_only_chosen_options_are_sent() -> None:
    default = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 512, "image_transforms": True}
    assert Choices().options() == default
    chosen = Choices("m", "llava_v1", "", 0.5, 0.9, 64, 7).options()
    assert (chosen["model"], chosen["seed"], chosen["extra"]) == ("m", 7, {"template": "llava_v1"})


def test_no_repr_contains_a_visitors_text(tmp_path: Path) -> None:
    shown = repr(Turn("secret question", (str(tmp_path),), "secret answer"))
    assert "secret" not in shown
    assert str(tmp_path) not in shown
