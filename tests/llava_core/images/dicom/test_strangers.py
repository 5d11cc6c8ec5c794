"""Untrusted files: any content soon gives a picture or one of our errors, and never reveals patient data."""

import contextlib
import logging
import random
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from llava_core.errors import ImageError
from llava_core.images.loading import ImageLimits, decode_data_url, decode_image
from llava_core.views import DicomView
from tests.deployments.pictures import data_url
from tests.dicom_files import PLANTED, compressed, dicom, lossless_jpeg, radiograph

PARAM = "messages[0].content[1].image_url"
KINDS = ("plain", "implicit", "deflated", "runs", "jpeg 2000", "jpeg-ls", "lossless jpeg")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    values, more = radiograph(39, 37), {"bits": 12, "WindowCenter": [2000, 1], "WindowWidth": [3000, 2]}
    made = [
        dicom(values, **more),
        dicom(values, syntax=ImplicitVRLittleEndian, **more),
        dicom(values, syntax=DeflatedExplicitVRLittleEndian, **more),
        compressed(values, RLELossless, **more),
        compressed(values, JPEG2000Lossless, **more),
        compressed(values, JPEGLSLossless, **more),
        lossless_jpeg(values, tmp_path_factory.mktemp("jpeg"), **more),
    ]
    return dict(zip(KINDS, made, strict=True))


def refusal(data: bytes, limits: ImageLimits | None = None, **view: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, limits or ImageLimits(), param=PARAM, dicom=DicomView(**view))
    assert caught.value.param == PARAM
    assert PLANTED not in caught.value.message
    return caught.value


# The last two start a child process per file; test_apart.py tests damage to them.
@settings(max_examples=300)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS[:-2]))
def test_damaged_files_are_decoded_or_refused_never_anything_else(
    files: dict[str, bytes], seed: int, kind: str
) -> None:
    rng = random.Random(seed)
    data = bytearray(files[kind])
    for _ in range(rng.randint(1, 12)):
        # Most of a file is never read, so damage must also hit the end, where the picture is.
        start = rng.choice([132, len(data) // 2, max(0, len(data) - 300)])
        data[rng.randrange(start, len(data))] = rng.choice([0, 255, rng.randrange(256)])
    if rng.random() < 0.2:
        del data[rng.randrange(132, len(data)) :]
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter(rng.choice(["ignore", "error"]))
        mode, message = "RGB", ""
        try:
            mode = decode_image(bytes(data), ImageLimits(), param=PARAM).image.mode
        except ImageError as error:
            message = error.message
    assert mode == "RGB"
    assert PLANTED not in message
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("kind", KINDS)
def test_patient_data_is_never_revealed(
    files: dict[str, bytes], kind: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    data = files[kind]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        outputs = [repr(decode_image(data, ImageLimits(), param=PARAM, keeps_depth=deep)) for deep in (False, True)]
        for length in range(0, len(data), 61 if kind in KINDS[:-2] else 400):
            with contextlib.suppress(ImageError):
                decode_image(data[:length], ImageLimits(), param=PARAM)
        outputs.append(refusal(data, frame=9).message)
        outputs.append(refusal(data, window=9).message)
    outputs += [str(each.message) for each in warned] + [record.getMessage() for record in caplog.records]
    outputs += list(capfd.readouterr())
    assert PLANTED.lower() not in " ".join(outputs).lower()


def test_limits_hold_before_anything_is_decoded() -> None:
    data = dicom(radiograph(), bits=12)
    assert "40 x 48 pixels; at most 1000 pixels" in refusal(data, ImageLimits(max_pixels=1000)).message
    assert "at most 100" in refusal(data, ImageLimits(max_bytes=100)).message
    for more in ({"Rows": 65535, "Columns": 65535}, {"Rows": 0}, {"Columns": 60_000}):
        assert "pixels" in refusal(dicom(radiograph(), bits=12, **more)).message


def test_missing_frames_are_refused_without_allocating_them() -> None:
    assert "2147483647 frames" in refusal(dicom(radiograph(), bits=12, NumberOfFrames=2**31 - 1)).message


def test_data_urls_with_a_dicom_media_type_are_accepted(files: dict[str, bytes]) -> None:
    for media_type in ("application/dicom", "image/dicom", "Application/DICOM"):
        assert decode_data_url(data_url(files["plain"], media_type), ImageLimits(), PARAM) == files["plain"]


def test_frames_and_windows_are_refused_for_other_pictures(tmp_path: Path) -> None:
    from tests.deployments.pictures import plain

    assert "is not a DICOM file" in refusal(plain(), frame=1).message


def test_colours_are_unchanged() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    got = decode_image(dicom(colours, photometric="RGB"), ImageLimits(), param=PARAM)
    assert (np.asarray(got.image) == colours).all()
    assert got.transform is not None
    assert got.transform.window is None
