"""What may be chosen of a DICOM file checks itself."""

import pytest

from llava_core.views import DicomView


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
def test_frames_and_windows_that_cannot_be_are_refused(given: dict) -> None:
    with pytest.raises(ValueError, match=r"counted from 1|width above 0"):
        DicomView(**given)


def test_two_views_are_equal_only_where_all_of_them_is() -> None:
    assert DicomView(2, (40.0, 400.0)) == DicomView(2, (40.0, 400.0))
    assert len({DicomView(), DicomView(2), DicomView(window=1), DicomView(window=(1.0, 2.0))}) == 4
