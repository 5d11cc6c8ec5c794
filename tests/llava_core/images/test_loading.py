"""Decoding untrusted pictures: all formats and pixel types become upright RGB; everything else is an ImageError."""

import base64
import contextlib
import io
import random
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, TiffImagePlugin

from llava_core.errors import ImageError
from llava_core.images.loading import ImageLimits, decode_data_url, decode_image
from llava_core.views import ImageTransform, Window

PARAM = "messages[0].content[1].image_url"
LIMITS = ImageLimits()
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data: bytes, limits: ImageLimits = LIMITS) -> Image.Image:
    return decode_image(data, limits, param=PARAM).image


def refusal(data: bytes, limits: ImageLimits = LIMITS) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decoded(data, limits)
    assert caught.value.param == PARAM
    # Neither the decoder's text nor its objects' addresses may reach a client.
    assert "0x" not in caught.value.message
    assert caught.value.__cause__ is None
    return caught.value


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // max(height - 1, 1), columns * 255 // max(width - 1, 1), 0 * rows + 90], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def png(width: int, height: int, *, bits: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """Builds a PNG of any declared size with any data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class TestAcceptedPictures:
    @pytest.mark.parametrize("format", FORMATS)
    def test_every_format_is_decoded(self, format: str) -> None:
        original = gradient()
        image = decoded(encoded(original, format))
        assert (image.mode, image.size) == ("RGB", original.size)
        difference = np.abs(np.asarray(image, np.int16) - np.asarray(original, np.int16))
        assert difference.mean() < (3 if format in ("JPEG", "WEBP") else 9 if format == "GIF" else 0.001)

    def test_lossless_webp_is_exact(self) -> None:
        assert decoded(encoded(gradient(), "WEBP", lossless=True)).tobytes() == gradient().tobytes()

    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
    def test_opaque_modes_are_converted_to_rgb(self, mode: str) -> None:
        image = gradient().convert(mode)
        assert decoded(encoded(image)).tobytes() == image.convert("RGB").tobytes()

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_transparency_becomes_white(self, mode: str) -> None:
        image = Image.new(mode, (4, 4), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
        assert decoded(encoded(image)).getpixel((2, 2)) == WHITE

    def test_half_transparency_is_mixed_with_white(self) -> None:
        assert decoded(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128)))).getpixel((0, 0)) == (255, 127, 127)

    def test_a_transparent_palette_entry_becomes_white(self) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putdata([0, 1])
        got = decoded(encoded(image, transparency=1))
        assert [got.getpixel((0, 0)), got.getpixel((1, 0))] == [RED, WHITE]

    def test_a_palette_with_an_alpha_for_each_entry_is_composited(self) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putdata([0, 1])
        got = decoded(encoded(image, transparency=b"\xff\x00"))
        assert [got.getpixel((0, 0)), got.getpixel((1, 0))] == [RED, WHITE]

    def test_a_transparent_colour_of_an_rgb_picture_becomes_white(self) -> None:
        image = Image.new("RGB", (2, 1), RED)
        image.putpixel((1, 0), (0, 0, 255))
        got = decoded(encoded(image, transparency=(0, 0, 255)))
        assert [got.getpixel((0, 0)), got.getpixel((1, 0))] == [RED, WHITE]

    @pytest.mark.parametrize("format", ["JPEG", "TIFF"])
    def test_cmyk_is_converted(self, format: str) -> None:
        red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
        pixel = decoded(encoded(red, format)).getpixel((8, 8))
        assert isinstance(pixel, tuple)
        assert max(abs(got - wanted) for got, wanted in zip(pixel, RED, strict=True)) <= 4

    @pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
    def test_an_animation_gives_its_first_frame(self, format: str) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
        assert Image.open(io.BytesIO(data)).n_frames == 3
        assert decoded(data).getpixel((4, 4)) == RED

    def test_a_multi_page_tiff_gives_its_first_page(self) -> None:
        pages = [Image.new("RGB", (8, 8), colour) for colour in (RED, WHITE)]
        assert decoded(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])).getpixel((4, 4)) == RED

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied_once(self, format: str, orientation: int) -> None:
        upright = Image.new("RGB", (32, 16), WHITE)
        upright.paste(RED, (0, 0, 16, 8))
        back = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }
        stored = upright.transpose(back[orientation]) if orientation in back else upright
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
        got = decoded(encoded(stored, format, exif=exif, **options))
        assert got.size == (32, 16)
        assert np.abs(np.asarray(got, np.int16) - np.asarray(upright, np.int16)).mean() < 3

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    @pytest.mark.parametrize("exif", [b"Exif\0\0damaged", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
    def test_unreadable_exif_data_is_ignored(self, exif: bytes) -> None:
        assert decoded(encoded(gradient(), "JPEG", exif=exif)).size == gradient().size

    def test_an_unknown_orientation_is_ignored(self) -> None:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 99
        assert decoded(encoded(gradient(), "PNG", exif=exif)).tobytes() == gradient().tobytes()

    def test_a_colour_profile_is_ignored(self) -> None:
        assert decoded(encoded(gradient(), icc_profile=b"not a profile")).tobytes() == gradient().tobytes()

    def test_a_one_pixel_picture_is_accepted(self) -> None:
        assert decoded(encoded(Image.new("RGB", (1, 1), RED))).getpixel((0, 0)) == RED


class TestDeepPixels:
    VALUES = np.array([[0, 257, 32896, 65535]], np.uint16)
    EXPECTED = (0, 1, 128, 255)

    @staticmethod
    def grey(image: Image.Image) -> tuple[int, ...]:
        pixels = np.asarray(image)
        assert (pixels == pixels[..., :1]).all()
        return tuple(int(value) for value in pixels[0, :, 0])

    @pytest.mark.parametrize("format", ["PNG", "TIFF"])
    def test_16_bit_grey_is_scaled_by_the_range_of_its_type(self, format: str) -> None:
        assert self.grey(decoded(encoded(Image.fromarray(self.VALUES), format))) == self.EXPECTED

    def test_transparent_16_bit_grey_is_seen_on_white(self) -> None:
        buffer = io.BytesIO()
        Image.fromarray(self.VALUES).save(buffer, "PNG", transparency=257)
        assert self.grey(decoded(buffer.getvalue())) == (0, 255, 128, 255)

    def test_16_bit_grey_is_not_stretched_to_its_values(self) -> None:
        dark = Image.fromarray(np.full((3, 3), 2570, np.uint16))
        assert self.grey(decoded(encoded(dark)))[0] == 10

    def test_big_endian_16_bit_grey_is_scaled(self) -> None:
        image = Image.frombytes("I;16B", (4, 1), self.VALUES.astype(">u2").tobytes())
        assert self.grey(decoded(encoded(image, "TIFF"))) == self.EXPECTED

    def test_16_bit_grey_with_white_as_zero_is_inverted(self) -> None:
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        data = bytearray(encoded(Image.fromarray(65535 - self.VALUES), "TIFF", tiffinfo=tags))
        entry = data.index(struct.pack("<HHI", 262, 3, 1))
        data[entry + 8] = 0
        assert self.grey(decoded(bytes(data))) == self.EXPECTED

    def test_12_bit_grey_is_scaled_by_the_range_of_12_bits(self) -> None:
        # Two 12-bit values in three bytes: 0xFFF and 0x800.
        data = bytearray(encoded(Image.fromarray(np.zeros((1, 2), np.uint16)), "TIFF"))
        data[data.index(struct.pack("<HHI", 258, 3, 1)) + 8] = 12
        offset = Image.open(io.BytesIO(bytes(data))).tile[0].offset
        data[offset : offset + 3] = b"\xff\xf8\x00"
        assert self.grey(decoded(bytes(data))) == (255, 128)

    @pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
    def test_the_depth_is_kept_on_request(self, mode: str) -> None:
        order = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
        image = Image.frombytes(mode, (4, 1), self.VALUES.astype(order).tobytes())
        kept = decode_image(encoded(image, "TIFF"), LIMITS, param=PARAM, keeps_depth=True).image
        assert kept.mode == "I;16"
        assert (np.asarray(kept) == self.VALUES).all()

    def test_kept_depth_is_upright_with_black_as_zero(self) -> None:
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[ExifTags.Base.Orientation] = 6
        data = bytearray(encoded(Image.fromarray(65535 - self.VALUES), "TIFF", tiffinfo=tags))
        data[data.index(struct.pack("<HHI", 262, 3, 1)) + 8] = 0
        kept = decode_image(bytes(data), LIMITS, param=PARAM, keeps_depth=True).image
        assert (np.asarray(kept) == self.VALUES.T).all()
        assert decode_image(encoded(gradient()), LIMITS, param=PARAM, keeps_depth=True).image.mode == "RGB"

    def test_16_bit_colour_loses_its_low_bytes(self) -> None:
        row = struct.pack(">B6H", 0, 65535, 0, 0x8000, 257, 514, 771)
        got = decoded(png(2, 1, bits=16, data=zlib.compress(row)))
        assert [got.getpixel((0, 0)), got.getpixel((1, 0))] == [(255, 0, 128), (1, 2, 3)]

    def test_32_bit_integers_within_16_bits_are_scaled(self) -> None:
        assert self.grey(decoded(encoded(Image.fromarray(self.VALUES.astype(np.int32)), "TIFF"))) == self.EXPECTED

    @pytest.mark.parametrize("value", [-1, 65536])
    def test_32_bit_integers_beyond_16_bits_are_refused(self, value: int) -> None:
        image = Image.fromarray(np.array([[0, value]], np.int32))
        assert "outside 0 to 65535" in refusal(encoded(image, "TIFF")).message

    @pytest.mark.parametrize(("format", "white"), [("PNG", 65535), ("TIFF", 65535)])
    def test_the_transform_of_deep_grey_is_reported(self, format: str, white: int) -> None:
        found = decode_image(encoded(Image.fromarray(self.VALUES), format), LIMITS, param=PARAM).transform
        window = Window(white / 2, white, "LINEAR_EXACT", "type")
        assert found == ImageTransform(format=format, photometric="MONOCHROME2", bits=16, window=window)
        assert decode_image(encoded(gradient(), format), LIMITS, param=PARAM).transform is None

    def test_floating_point_pixels_are_refused(self) -> None:
        assert "floating-point" in refusal(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")).message


class TestRefusedPictures:
    @pytest.mark.parametrize("format", FORMATS)
    def test_a_truncated_picture_is_refused(self, format: str) -> None:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
        data = encoded(noise, format)
        for keep in (len(data) // 2, 40, 12):
            assert format[:3] in refusal(data[:keep]).message.upper()

    @pytest.mark.parametrize(
        "data",
        [
            b"not a picture at all",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"%PDF-1.7 ...",
            b"%!PS-Adobe-3.0 EPSF-3.0",
            b"RIFF\x24\0\0\0WAVEfmt ",
            b"\0\0\0\x1cftypavif",
            b"P6 1 1 255 \xff\xff\xff",
            b"\x89PNG",
        ],
    )
    def test_an_unknown_format_is_refused(self, data: bytes) -> None:
        assert "PNG, JPEG, WebP, GIF, BMP and TIFF" in refusal(data).message

    def test_empty_data_is_refused(self) -> None:
        assert "0 bytes" in refusal(b"").message

    @pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
    def test_a_side_of_zero_is_refused(self, size: tuple[int, int]) -> None:
        assert "0 pixels" in refusal(png(*size)).message

    def test_too_many_bytes_are_refused(self) -> None:
        error = refusal(encoded(gradient()), ImageLimits(max_bytes=100))
        assert "at most 100" in error.message
        assert error.code == "image_too_large"

    def test_too_many_pixels_are_refused_before_decoding(self) -> None:
        # The data would not decode, but the error is about the size, so decoding was not tried.
        error = refusal(png(9000, 9000, data=b"rubbish"))
        assert "9000 x 9000" in error.message
        assert str(LIMITS.max_pixels) in error.message
        assert error.code == "image_too_large"

    @pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (65535, 65535)])
    def test_a_decompression_bomb_is_refused(self, size: tuple[int, int]) -> None:
        assert refusal(png(*size, data=zlib.compress(b"\0" * 10_000))).code == "image_too_large"

    def test_a_gif_frame_larger_than_its_header_is_refused(self) -> None:
        data = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
        frame = data.index(b",\0\0\0\0")
        data[frame + 5 : frame + 9] = struct.pack("<HH", 65535, 65535)
        refusal(bytes(data))

    def test_a_bomb_in_a_text_chunk_is_refused(self) -> None:
        text = b"comment\0\0" + zlib.compress(b"a" * 20_000_000, 9)
        body = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
        data = encoded(gradient())
        refusal(data[:33] + body + data[33:])

    def test_a_long_side_is_refused(self) -> None:
        assert "10000 per side" in refusal(encoded(Image.new("1", (10_001, 60)))).message

    def test_an_extreme_aspect_is_refused(self) -> None:
        assert "at most 200 times" in refusal(encoded(Image.new("1", (1, 201)))).message
        assert decoded(encoded(Image.new("1", (1, 200)))).size == (1, 200)

    def test_a_side_below_the_minimum_is_refused(self) -> None:
        assert "at least 8" in refusal(encoded(Image.new("1", (9, 7))), ImageLimits(min_side=8)).message

    def test_a_damaged_checksum_is_refused(self) -> None:
        data = bytearray(encoded(gradient()))
        data[20] ^= 1
        refusal(bytes(data))


class TestRobustness:
    @settings(max_examples=150)
    @given(seed=st.integers(0, 2**32), format=st.sampled_from(FORMATS), mode=st.sampled_from(["RGB", "P", "L", "RGBA"]))
    def test_damaged_files_are_decoded_or_refused_never_anything_else(self, seed: int, format: str, mode: str) -> None:
        mode = {"JPEG": "RGB"}.get(format, mode)
        rng = random.Random(seed)
        data = bytearray(encoded(gradient(17, 11).convert(mode), format))
        for _ in range(rng.randint(1, 12)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        with warnings.catch_warnings():
            warnings.simplefilter(rng.choice(["ignore", "error"]))
            with contextlib.suppress(ImageError):
                assert decode_image(bytes(data), LIMITS, param=PARAM).image.mode == "RGB"

    def test_concurrent_decoding_does_not_change_pillows_globals(self) -> None:
        before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
        good, bad = encoded(gradient()), png(9000, 9000)
        wrong: list[object] = []

        def work() -> None:
            for _ in range(20):
                if decoded(good).tobytes() != gradient().tobytes():
                    wrong.append("picture")
                with contextlib.suppress(ImageError):
                    wrong.append(decoded(bad))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before

    def test_torch_is_not_needed(self) -> None:
        import subprocess

        code = "import sys, llava_core.images.loading; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"


class TestDataUrls:
    @staticmethod
    def url(data: bytes, prefix: str = "data:image/png;base64,") -> str:
        return prefix + base64.b64encode(data).decode()

    @pytest.mark.parametrize(
        "prefix",
        [
            "data:image/png;base64,",
            "data:image/jpeg;base64,",
            "DATA:Image/PNG;BASE64,",
            "data:image/svg+xml;charset=utf-8;base64,",
        ],
    )
    def test_the_bytes_are_decoded(self, prefix: str) -> None:
        for length in range(5):
            assert decode_data_url(self.url(bytes(range(length)), prefix), LIMITS, PARAM) == bytes(range(length))

    @pytest.mark.parametrize(
        ("url", "named"),
        [
            ("https://example.com/cat.png", "must be a data: URL"),
            ("file:///etc/passwd", "must be a data: URL"),
            ("/tmp/cat.png", "must be a data: URL"),
            ("", "must be a data: URL"),
            ("data:text/plain;base64,aGk=", "data:image/<type>;base64,"),
            ("data:image/png,rawbytes", "data:image/<type>;base64,"),
            ("data:image/png;base64", "data:image/<type>;base64,"),
            ("data:;base64,aGk=", "data:image/<type>;base64,"),
            ("data:image/png;base64,aGk", "not valid base64"),
            ("data:image/png;base64,aG k=", "not valid base64"),
            ("data:image/png;base64,aG\nk=", "not valid base64"),
            ("data:image/png;base64,aG-_", "not valid base64"),
            ("data:image/png;base64,ä===", "not valid base64"),
            ("data:image/png;base64,%61Gk=", "not valid base64"),
        ],
    )
    def test_anything_else_is_refused(self, url: str, named: str) -> None:
        with pytest.raises(ImageError, match=named) as caught:
            decode_data_url(url, LIMITS, PARAM)
        code = "invalid_image" if named == "not valid base64" else "invalid_image_url"
        assert (caught.value.param, caught.value.code) == (PARAM, code)

    def test_the_size_is_checked_before_decoding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbidden(*_: object, **__: object) -> bytes:
            raise AssertionError("decoded")

        monkeypatch.setattr(base64, "b64decode", forbidden)
        with pytest.raises(ImageError, match="at most 100"):
            decode_data_url(self.url(bytes(103)), ImageLimits(max_bytes=100), PARAM)

    @pytest.mark.parametrize("length", [98, 99, 100])
    def test_the_limit_itself_is_allowed(self, length: int) -> None:
        assert len(decode_data_url(self.url(bytes(length)), ImageLimits(max_bytes=100), PARAM)) == length

    @pytest.mark.parametrize("length", [101, 102])
    def test_one_byte_above_the_limit_is_refused(self, length: int) -> None:
        with pytest.raises(ImageError, match=f"{length} bytes; at most 100"):
            decode_data_url(self.url(bytes(length)), ImageLimits(max_bytes=100), PARAM)

    def test_the_url_is_not_echoed(self) -> None:
        with pytest.raises(ImageError) as caught:
            decode_data_url("data:image/png;base64,s3cr3t!", LIMITS, PARAM)
        assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImageLimits(max_bytes=0),
        lambda: ImageLimits(max_pixels=0),
        lambda: ImageLimits(min_side=0),
        lambda: ImageLimits(max_side=5, min_side=6),
        lambda: ImageLimits(max_aspect=0.5),
        lambda: ImageLimits(max_aspect=float("nan")),
    ],
)
def test_impossible_limits_are_refused(make: Callable[[], ImageLimits]) -> None:
    with pytest.raises(ValueError, match="must"):
        make()
