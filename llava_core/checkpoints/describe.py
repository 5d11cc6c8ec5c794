"""How a checkpoint's requests are prepared, without its weights: image preprocessing, tokenizer and template.

Does not import torch, so a CPU-only preprocessing replica stays small.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from llava_core.checkpoints.files import naming, read_json
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint
from llava_core.checkpoints.tokenizer import CheckpointTokenizer, choose_template, load_tokenizer
from llava_core.config import BIOVIL_T, JsonObject
from llava_core.errors import CheckpointError
from llava_core.fields import Fields, as_number, is_whole, shown
from llava_core.images.biovil import AnyPreprocessConfig, BioVilPreprocessConfig
from llava_core.images.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    SIGLIP_MEAN,
    SIGLIP_STD,
    Aspect,
    PreprocessConfig,
)
from llava_core.lru import LruCache
from llava_core.prepare import Preparer
from llava_core.request_limits import RequestLimits
from llava_core.types import PreparedImage, Size


def load_preprocess_config(checkpoint: Checkpoint) -> AnyPreprocessConfig:
    """How to preprocess the checkpoint's pictures. Raises CheckpointError for settings that are not supported."""
    config = checkpoint.config
    kind = config.vision.architecture["model_type"]
    if kind == BIOVIL_T:
        # Its config.json has LLaVA-1.5's image_aspect_ratio, which does not apply to radiographs.
        return BioVilPreprocessConfig(size=config.tile_size)
    aspect = _original_aspect(checkpoint.settings) if config.dialect == "original" else None
    folder = checkpoint.image_folder or checkpoint.folder
    if aspect is not None and not (folder / "preprocessor_config.json").exists():
        usual = PreprocessConfig(size=config.tile_size, aspect=aspect, pinpoints=config.pinpoints, rows_first=True)
        is_siglip = kind == "siglip_vision_model"
        return replace(usual, mean=SIGLIP_MEAN, std=SIGLIP_STD, stretches=True) if is_siglip else usual
    preprocess = read_preprocess_config(folder, aspect=aspect, pinpoints=config.pinpoints)
    preprocess = replace(preprocess, rows_first=aspect is not None)
    if config.s2_scales:
        return replace(preprocess, size=config.tile_size)
    if preprocess.size != config.tile_size:
        raise CheckpointError(
            f"{_image_settings(folder)}: size and crop_size make tiles of {preprocess.size} pixels, but the tower of "
            f"{checkpoint.folder / 'config.json'} takes {config.tile_size}; correct the one that is wrong"
        )
    return preprocess


def _original_aspect(settings: JsonObject) -> Aspect:
    """The original's `image_aspect_ratio`; the original code treats unknown values like `square`."""
    value = settings.get("image_aspect_ratio", "square")
    return value if value in ("pad", "anyres") else "crop"


def _image_settings(folder: Path) -> Path:
    """The file with image settings: transformers 5 writes one for all processors, earlier versions one for images."""
    files = [folder / name for name in ("preprocessor_config.json", "processor_config.json")]
    return next((file for file in files if file.exists()), files[0])


def read_preprocess_config(
    folder: Path, *, aspect: Aspect | None = None, pinpoints: tuple[Size, ...] = ()
) -> PreprocessConfig:
    """A folder's settings for pictures; with `aspect` None they decide the aspect, as in transformers."""
    file = _image_settings(folder)
    fields = Fields(read_json(folder, file.name))
    with naming(file):
        if fields.has("image_processor"):
            fields = fields.section("image_processor")
        is_stretched = "Siglip" in fields.text("image_processor_type", "CLIPImageProcessor")
        for step in ("do_resize", "do_rescale", "do_normalize", *(() if is_stretched else ("do_center_crop",))):
            if not fields.flag(step, True):
                raise CheckpointError(f"{step} is false; pictures are always resized, cropped and normalised")
        return PreprocessConfig(
            size=_side(fields),
            aspect=aspect or ("anyres" if pinpoints else "pad" if fields.flag("do_pad", False) else "crop"),
            mean=_channels(fields, "image_mean", CLIP_MEAN),
            std=_channels(fields, "image_std", CLIP_STD, divides=True),
            resample=Image.Resampling(fields.whole("resample", Image.Resampling.BICUBIC, at_most=5)),
            pinpoints=pinpoints,
            stretches=is_stretched,
        )


def _side(fields: Fields) -> int:
    """The one number in `size` and `crop_size`, each a number or an object of equal numbers."""
    values = [value for name in ("size", "crop_size") if fields.has(name) for value in _sides(fields.values[name])]
    if not values or not all(is_whole(value) and 0 < value == values[0] for value in values):
        size, crop_size = (shown(fields.values.get(name)) for name in ("size", "crop_size"))
        raise CheckpointError(
            f"{fields.path}size is {size} and crop_size {crop_size}; expected the same side in pixels"
        )
    return int(values[0])


def _sides(size: object) -> list[Any]:
    return [side for side in size.values() if side is not None] if isinstance(size, dict) else [size]


def _channels(
    fields: Fields, name: str, default: tuple[float, float, float], *, divides: bool = False
) -> tuple[float, float, float]:
    """One number per colour, on a scale with white as 1."""
    found = [as_number(value) for value in fields.items(name)] if fields.has(name) else default
    values = [value for value in found if value is not None and 0 <= value <= 1 and not (divides and value == 0)]
    if len(found) != 3 or len(values) != 3:
        raise fields.wrong(name, f"three numbers {'above' if divides else 'from'} 0 {'and up ' if divides else ''}to 1")
    red, green, blue = values
    return red, green, blue


def load_preparer(
    checkpoint: Path | Checkpoint,
    tokenizer: CheckpointTokenizer | None = None,
    *,
    template: str | None = None,
    limits: RequestLimits | None = None,
    cache: LruCache[PreparedImage] | None = None,
) -> Preparer:
    """A checkpoint's Preparer; reads no weights. Prepared pictures are kept in `cache`."""
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    tokenizer = tokenizer or load_tokenizer(opened)
    return Preparer(
        config=opened.config,
        template=choose_template(tokenizer, template, opened.config),
        tokenizer=tokenizer,
        preprocess=load_preprocess_config(opened),
        reserved_texts=tokenizer.reserved_texts,
        limits=limits or RequestLimits(),
        cache=LruCache(0) if cache is None else cache,
    )
