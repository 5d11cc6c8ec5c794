"""Pictures for tests, good and bad, as encoded bytes."""

import base64
import io
import struct
import zlib
from typing import Any

from PIL import Image


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(colour: str | tuple[int, int, int] = "red", size: tuple[int, int] = (60, 40)) -> bytes:
    return encode(Image.new("RGB", size, colour))


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that declares a size and contains almost nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 16)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def unusual() -> dict[str, bytes]:
    """Return unusual pictures that must be answered."""
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    palette = Image.new("P", (20, 20))
    palette.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "animated": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "16-bit": encode(Image.new("I;16", (20, 20), 40_000)),
        "CMYK": encode(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG"),
        "palette with transparency": encode(palette, "PNG", transparency=0),
        "EXIF-rotated": encode(Image.new("RGB", (30, 20), "red"), "JPEG", exif=exif),
        "one pixel": plain(size=(1, 1)),
        "WebP": encode(Image.new("RGB", (20, 20), "red"), "WEBP"),
        "grey": encode(Image.new("L", (20, 20), 128)),
    }


def unusable() -> dict[str, bytes]:
    """Return pictures that must be refused."""
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    return {
        "empty": b"",
        "no image": b"%PDF-1.7 this is no picture",
        "truncated": encode(noise)[:900],
        "damaged header": b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
        "bomb": png_header(60_000, 60_000),
        "zero-sized": png_header(0, 20),
        "too many pixels": plain(size=(700, 700)),
    }
