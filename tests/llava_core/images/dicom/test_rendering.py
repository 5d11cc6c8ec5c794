"""Rendering follows the standard pixel by pixel, compared with a slow reference implementation."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, Sequence

from llava_core.errors import ImageError
from llava_core.images.loading import DecodedImage, ImageLimits, decode_image
from llava_core.views import DicomView, ImageTransform, Window
from tests.dicom_files import Values, dicom, radiograph

Rule = Callable[[float], float]


def decoded(data: bytes, *, keeps_depth: bool = False, **view: Any) -> DecodedImage:
    return decode_image(data, ImageLimits(), param="here", keeps_depth=keeps_depth, dicom=DicomView(**view))


def transform(data: bytes, **view: Any) -> ImageTransform:
    found = decoded(data, **view).transform
    assert found is not None
    return found


def linear(centre: float, width: float) -> Rule:
    """Implements the pseudo-code of PS3.3 C.11.2.1.2.1."""

    def rule(x: float) -> float:
        if x <= centre - 0.5 - (width - 1) / 2:
            return 0.0
        if x > centre - 0.5 + (width - 1) / 2:
            return 1.0
        return (x - (centre - 0.5)) / (width - 1) + 0.5

    return rule


def linear_exact(centre: float, width: float) -> Rule:
    """Implements PS3.3 C.11.2.1.3.2."""

    def rule(x: float) -> float:
        if x <= centre - width / 2:
            return 0.0
        return 1.0 if x > centre + width / 2 else (x - centre) / width + 0.5

    return rule


def sigmoid(centre: float, width: float) -> Rule:
    """Implements PS3.3 C.11.2.1.3.1."""
    return lambda x: 1 / (1 + math.exp(-4 * (x - centre) / width))


def expected(values: Values, *rules: Rule, white: int = 255) -> Values:
    """Applies each rule to each pixel, one by one."""

    def seen(value: float) -> int:
        for rule in rules:
            value = rule(value)
        return round(value * white)

    return np.array([[seen(float(value)) for value in row] for row in values])


def check(data: bytes, wanted: Values, **view: Any) -> None:
    image = decoded(data, **view).image
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    assert (pixels == pixels[..., :1]).all()
    # Halves may be rounded either way.
    assert np.abs(pixels[..., 0] - wanted).max() <= 1
    assert (pixels[..., 0] == wanted).mean() > 0.99


def inverted(value: float) -> float:
    return 1 - value


def rescaled(slope: float, intercept: float) -> Rule:
    return lambda x: x * slope + intercept


@pytest.mark.parametrize(
    ("function", "rule"), [("LINEAR", linear), ("LINEAR_EXACT", linear_exact), ("SIGMOID", sigmoid)]
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_the_files_window_is_applied_by_each_function(
    function: str, rule: Callable[..., Rule], photometric: str
) -> None:
    values = radiograph()
    data = dicom(
        values, bits=12, photometric=photometric, WindowCenter=1500.5, WindowWidth=900, VOILUTFunction=function
    )
    inversion = [inverted] if photometric == "MONOCHROME1" else []
    check(data, expected(values, rule(1500.5, 900), *inversion))
    found = transform(data)
    assert found.window == Window(1500.5, 900, function, "file")
    assert (found.is_inverted, found.bits, found.photometric) == (bool(inversion), 12, photometric)


def test_the_first_window_is_used_unless_another_is_chosen() -> None:
    values = radiograph()
    data = dicom(values, bits=12, WindowCenter=[1000, 3000], WindowWidth=[500, 800])
    check(data, expected(values, linear(1000, 500)))
    check(data, expected(values, linear(1000, 500)), window=1)
    check(data, expected(values, linear(3000, 800)), window=2)
    check(data, expected(values, linear(2000, 4000)), window=(2000.0, 4000.0))
    assert transform(data, window=(2000.0, 4000.0)).window == Window(2000, 4000, "LINEAR", "request")
    with pytest.raises(ImageError, match="has 2 windows; there is no window 3"):
        decoded(data, window=3)


def test_signed_values_are_rescaled_before_the_window() -> None:
    values = radiograph().astype(np.int16) - 2000
    data = dicom(values, RescaleSlope="0.5", RescaleIntercept="-24", WindowCenter=40, WindowWidth=400)
    check(data, expected(values, rescaled(0.5, -24), linear(40, 400)))
    assert (transform(data).rescale, transform(data).is_signed) == ((0.5, -24), True)


def test_signed_values_of_12_bits_keep_their_sign() -> None:
    values = (radiograph().astype(np.int16) - 2048) & 0x0FFF
    meant = np.where(values >= 2048, values - 4096, values)
    check(dicom(values, bits=12, WindowCenter=0, WindowWidth=3000), expected(meant, linear(0, 3000)))


def test_without_a_window_the_range_is_that_of_values_except_padding() -> None:
    values = radiograph().astype(np.int16) % 1000 + 500
    values[:5] = -2000
    data = dicom(values, PixelPaddingValue=-2000)
    low, high = int(values[5:].min()), int(values.max())
    check(data, expected(values, linear_exact((low + high) / 2, high - low)))
    assert transform(data).window == Window((low + high) / 2, high - low, "LINEAR_EXACT", "values")


def test_a_picture_of_one_value_is_mid_grey() -> None:
    pixels = np.asarray(decoded(dicom(np.full((4, 5), 7, np.uint16), PixelPaddingValue=7)).image)
    assert (pixels == 128).all()


def lut(first: int, bits: int, entries: Values) -> Sequence:
    table = Dataset()
    table.LUTDescriptor = [len(entries) % 2**16, first, bits]
    table["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    table.LUTData = entries.astype("<u2").tobytes()
    table["LUTData"].VR = "OW"
    table.LUTExplanation = "not to be read"
    return Sequence([table])


def looked_up(first: int, entries: Values) -> Rule:
    return lambda x: float(entries[min(max(int(x) - first, 0), len(entries) - 1)])


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_a_voi_table_replaces_the_window(bits: int) -> None:
    values, entries = radiograph(), (np.linspace(0, 1, 3000) ** 2 * (2**bits - 1)).round()
    data = dicom(values, bits=12, VOILUTSequence=lut(500, bits, entries), WindowCenter=10, WindowWidth=20)
    check(data, expected(values, looked_up(500, entries), lambda x: x / (2**bits - 1)))
    assert (transform(data).has_voi_lut, transform(data).window) == (True, None)
    # A window named in the request takes precedence.
    check(data, expected(values, linear(10, 20)), window=1)


@pytest.mark.parametrize("first", [0, 700])
def test_a_modality_table_is_applied_before_the_window(first: int) -> None:
    values, entries = radiograph(), np.arange(2500)[::-1] * 3 % 60_000
    data = dicom(values, bits=12, ModalityLUTSequence=lut(first, 16, entries), WindowCenter=3000, WindowWidth=5000)
    check(data, expected(values, looked_up(first, entries), linear(3000, 5000)))
    assert transform(data).has_modality_lut


def test_a_table_of_signed_values_may_start_below_0() -> None:
    values, entries = radiograph().astype(np.int16) - 2000, np.arange(4096) * 16
    data = dicom(values, VOILUTSequence=lut(-2000, 16, entries))
    check(data, expected(values, looked_up(-2000, entries), lambda x: x / 65535))


def test_a_chosen_frame_is_rendered_with_its_own_window() -> None:
    frames = np.stack([radiograph(), radiograph()[::-1], radiograph()[:, ::-1]])

    def item(centre: float) -> Dataset:
        window, rescale, of_frame = Dataset(), Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = centre, 700
        rescale.RescaleSlope, rescale.RescaleIntercept = 2, centre
        of_frame.FrameVOILUTSequence = Sequence([window])
        of_frame.PixelValueTransformationSequence = Sequence([rescale])
        return of_frame

    data = dicom(frames, bits=12, PerFrameFunctionalGroupsSequence=Sequence([item(c) for c in (500, 1500, 2500)]))
    check(data, expected(frames[0], rescaled(2, 500), linear(500, 700)))
    check(data, expected(frames[2], rescaled(2, 2500), linear(2500, 700)), frame=3)
    assert (transform(data, frame=3).frame, transform(data, frame=3).num_frames) == (3, 3)
    with pytest.raises(ImageError, match="has 3 frames; there is no frame 4"):
        decoded(data, frame=4)


def test_a_window_shared_by_all_frames_is_used() -> None:
    window, shared = Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = 900, 700
    shared.FrameVOILUTSequence = Sequence([window])
    values = radiograph()
    check(dicom(values, bits=12, SharedFunctionalGroupsSequence=Sequence([shared])), expected(values, linear(900, 700)))


def test_keeping_the_depth_gives_16_bits() -> None:
    values = radiograph()
    data = dicom(values, bits=12, WindowCenter=2000, WindowWidth=3000, photometric="MONOCHROME1")
    image = decoded(data, keeps_depth=True).image
    assert image.mode == "I;16"
    wanted = expected(values, linear(2000, 3000), inverted, white=65535)
    assert np.abs(np.asarray(image).astype(int) - wanted).max() <= 1


def test_a_palette_becomes_colours() -> None:
    values = (radiograph() // 16).astype(np.uint8)
    ramps = [np.arange(256), np.arange(256)[::-1], np.arange(256) * 7 % 256]
    tables = {}
    for name, ramp in zip(("Red", "Green", "Blue"), ramps, strict=True):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tables[f"{name}PaletteColorLookupTableData"] = (ramp * 257).astype("<u2").tobytes()
    got = np.asarray(decoded(dicom(values, photometric="PALETTE COLOR", **tables)).image)
    assert (got == np.stack([ramp[values] for ramp in ramps], -1)).all()


def test_windows_are_refused_for_colour_pictures() -> None:
    colours = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ImageError, match="windows apply to grey pictures"):
        decoded(dicom(colours, photometric="RGB"), window=(40.0, 400.0))


@pytest.mark.parametrize(("function", "width"), [("LINEAR", 0.5), ("LINEAR_EXACT", 0), ("SIGMOID", -3)])
def test_a_window_without_width_is_refused_unless_one_is_given(function: str, width: float) -> None:
    data = dicom(radiograph(), bits=12, WindowCenter=5, WindowWidth=width, VOILUTFunction=function)
    with pytest.raises(ImageError, match=r"has a width of .*give a window of your own"):
        decoded(data)
    assert decoded(data, window=(5.0, 10.0)).image.mode == "RGB"


def test_a_window_one_wide_is_a_threshold() -> None:
    values = radiograph()
    check(dicom(values, bits=12, WindowCenter=1000, WindowWidth=1), expected(values, lambda x: float(x > 999.5)))


def test_extreme_rescaling_is_refused() -> None:
    with pytest.raises(ImageError, match="beyond any measurable value"):
        decoded(dicom(radiograph(), bits=12, RescaleSlope="1e300", RescaleIntercept="0"))
