"""Views of a DICOM file, frame and window, validate themselves."""

import pytest

from llava_core.views import DicomView, read_frame, read_window


@pytest.mark.parametrize(
    "given",
    [
        {"frame": 0},
        {"window": 0},
        {"window": (40.0, 0.0)},
        {"window": (40.0, -1.0)},
        {"window": (float("nan"), 1.0)},
        {"window": (0.0, float("inf"))},
    ],
)
def test_impossible_frames_and_windows_are_refused(given: dict) -> None:
    with pytest.raises(ValueError, match=r"counted from 1|width above 0"):
        DicomView(**given)


def test_views_are_equal_only_if_all_fields_are() -> None:
    assert DicomView(2, (40.0, 400.0)) == DicomView(2, (40.0, 400.0))
    assert len({DicomView(), DicomView(2), DicomView(window=1), DicomView(window=(1.0, 2.0))}) == 4


@pytest.mark.parametrize(("text", "window"), [("2", 2), ("40,400", (40.0, 400.0)), ("-600.5 , 1500", (-600.5, 1500.0))])
def test_a_window_is_parsed_from_centre_and_width_or_a_number(text: str, window: object) -> None:
    assert read_window(text) == window


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "x", "40,", "40,0", "40,-3", "1,2,3", "nan,1", "1,inf"])
def test_an_invalid_window_gets_an_error_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="give CENTRE,WIDTH such as 40,400"):
        read_window(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "one", "+2"])
def test_an_invalid_frame_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        read_frame(text)


def test_a_frame_is_parsed() -> None:
    assert read_frame("12") == 12
