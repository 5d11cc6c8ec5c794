"""Draws a scene as a picture: shapes as polygons, printed text in several fonts, plain and uneven backgrounds.

Deterministic in the scene's seed. Knows nothing about how the scene was chosen or what will be asked about it.
"""

import functools
import io
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from llava_core.scenes.scene import Rgb, Scene, SceneObject, SceneText

Points = list[tuple[float, float]]


def draw_scene(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of `scene.width` by `scene.height` pixels."""
    rng = random.Random(scene.seed)
    # Half of the small pictures are drawn without antialiasing, as most drawing code does.
    scale = 2 if max(scene.width, scene.height) <= 700 and rng.random() < 0.5 else 1
    picture = _background(scene, np.random.default_rng(scene.seed))
    if scale != 1:
        picture = picture.resize((scene.width * scale, scene.height * scale), Image.Resampling.BILINEAR)
    canvas = ImageDraw.Draw(picture)
    for thing in scene.objects:
        _draw_object(canvas, thing, scale, rng)
    if scene.text is not None:
        _draw_text(canvas, scene.text, scale)
    if scale != 1:
        picture = picture.resize((scene.width, scene.height), Image.Resampling.LANCZOS)
    return picture


def compress_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """The picture after a JPEG round trip at this quality."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def _background(scene: Scene, rng: np.random.Generator) -> Image.Image:
    if scene.background_style == "plain":
        return Image.new("RGB", (scene.width, scene.height), scene.background)
    base = np.array(scene.background, np.float32)
    if scene.background_style == "noise":
        noise = rng.standard_normal((scene.height, scene.width, 3), np.float32)
        field = base + noise * float(rng.uniform(4, 18))
    elif scene.background_style == "gradient":
        ramp = np.linspace(-1, 1, scene.width if rng.random() < 0.5 else scene.height, dtype=np.float32)
        plane = ramp[None, :] if ramp.size == scene.width else ramp[:, None]
        field = base + np.broadcast_to(plane, (scene.height, scene.width))[..., None] * float(rng.uniform(10, 28))
    else:
        coarse = rng.standard_normal((5, 5, 3), np.float32) * float(rng.uniform(6, 14)) + base
        small = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
        return small.resize((scene.width, scene.height), Image.Resampling.BICUBIC).filter(ImageFilter.BoxBlur(1))
    return Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))


def _draw_object(canvas: ImageDraw.ImageDraw, thing: SceneObject, scale: int, rng: random.Random) -> None:
    x, y, radius = thing.x * scale, thing.y * scale, thing.diameter * scale / 2
    outline = _outline(thing.rgb, rng)
    width = max(1, round(radius * rng.uniform(0.04, 0.1)))
    if thing.shape == "circle":
        radius *= 0.96
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=thing.rgb, outline=outline, width=width)
        return
    points = shape_points(thing.shape, x, y, radius, rng)
    canvas.polygon(points, fill=thing.rgb)
    if outline is not None:
        canvas.line([*points, points[0]], fill=outline, width=width, joint="curve")


def _outline(fill: Rgb, rng: random.Random) -> Rgb | None:
    if rng.random() < 0.7:
        return None
    if rng.random() < 0.5 and sum(fill) > 120:
        return (0, 0, 0)
    return (int(fill[0] * 0.6), int(fill[1] * 0.6), int(fill[2] * 0.6))


def shape_points(shape: str, x: float, y: float, radius: float, rng: random.Random) -> Points:
    """The corners of a shape that fits a circle of this radius (for a square and a cross: nearly)."""
    if shape == "square":
        corners = [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
    elif shape == "triangle":
        corners = [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)]
        if rng.random() < 0.2:
            corners = [(a, -b) for a, b in corners]
    elif shape == "diamond":
        waist = rng.uniform(0.68, 1.0)
        corners = [(0.0, -1.0), (waist, 0.0), (0.0, 1.0), (-waist, 0.0)]
    elif shape == "star":
        inner = rng.uniform(0.36, 0.5)
        radii = [1.0, inner] * 5
        corners = [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]
    else:
        corners = _cross_corners(rng.uniform(0.25, 0.38))
    tilt = math.radians(rng.uniform(-9, 9)) if rng.random() < 0.4 else 0.0
    cos, sin = math.cos(tilt), math.sin(tilt)
    return [(x + radius * (a * cos - b * sin), y + radius * (a * sin + b * cos)) for a, b in corners]


def _cross_corners(arm: float) -> Points:
    end = 0.95
    quarter = [(-arm, -end), (arm, -end), (arm, -arm)]
    corners: Points = []
    for turn in range(4):
        cos, sin = (1, 0, -1, 0)[turn], (0, 1, 0, -1)[turn]
        corners += [(a * cos - b * sin, a * sin + b * cos) for a, b in quarter]
    return corners


def _draw_text(canvas: ImageDraw.ImageDraw, text: SceneText, scale: int) -> None:
    font = fit_font(text, scale)
    left, top, right, bottom = font.getbbox(text.text)
    x = text.left * scale + (text.width * scale - (right - left)) / 2 - left
    y = text.top * scale + (text.height * scale - (bottom - top)) / 2 - top
    canvas.text((x, y), text.text, fill=text.rgb, font=font)


def character_centres(text: SceneText) -> Points:
    """The centre of each printed character in pixels of the picture."""
    font = fit_font(text, 1)
    left, _, right, _ = font.getbbox(text.text)
    origin = text.left + (text.width - (right - left)) / 2 - left
    ends = [font.getlength(text.text[:index]) for index in range(len(text.text) + 1)]
    middle = text.top + text.height / 2
    return [(origin + (ends[i] + ends[i + 1]) / 2, middle) for i in range(len(text.text))]


def fit_font(text: SceneText, scale: int) -> ImageFont.FreeTypeFont:
    """The text's font in the largest size at which the text fits its box at this scale."""
    names = font_files()
    name = names[text.font % len(names)]
    probe = _font(name, 100)
    left, top, right, bottom = probe.getbbox(text.text)
    size = 100 * min(text.width / max(right - left, 1), text.height / max(bottom - top, 1)) * scale
    return _font(name, max(4, int(size)))


@functools.cache
def font_files() -> tuple[str, ...]:
    """The fonts to print in: Pillow's own (empty name) and the DejaVu family that ships with matplotlib."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    families = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif")
    return ("", *(str(folder / f"{family}{weight}.ttf") for family in families for weight in ("", "-Bold")))


@functools.lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return font
