"""What a checkpoint is, without its weights: configuration, image preprocessing, and how its requests are prepared.

Does not import torch, so a CPU-only preprocessing replica stays small.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from llava_core.checkpoints.files import read_json
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint, with_generation_config
from llava_core.checkpoints.original_config import is_original_config
from llava_core.checkpoints.tokenizer import CheckpointTokenizer, choose_template, load_tokenizer
from llava_core.config import BIOVIL_T, JsonObject, ModelConfig, read_llava_hf_config
from llava_core.errors import CheckpointError
from llava_core.images.biovil import AnyPreprocessConfig, BioVilPreprocessConfig
from llava_core.images.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    SIGLIP_MEAN,
    SIGLIP_STD,
    Aspect,
    PreprocessConfig,
)
from llava_core.prepare import Preparer, RequestLimits
from llava_core.types import Size


def load_config(checkpoint: Path | Checkpoint) -> ModelConfig:
    """The model's configuration. Raises CheckpointError naming the file or field at fault."""
    if isinstance(checkpoint, Checkpoint):
        return checkpoint.config
    settings = read_json(checkpoint, "config.json")
    if is_original_config(settings):
        return open_checkpoint(checkpoint).config
    return with_generation_config(read_llava_hf_config(settings), checkpoint)


def load_preprocess_config(checkpoint: Path | Checkpoint) -> AnyPreprocessConfig:
    """How the checkpoint wants its pictures. Raises CheckpointError for a way that is not ours."""
    if isinstance(checkpoint, Path) and not is_original_config(settings := _settings(checkpoint)):
        pinpoints = read_llava_hf_config(settings).pinpoints if settings else ()
        return _read_preprocess_config(checkpoint, None, pinpoints)
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    config = opened.config
    if config.dialect == "llava_hf":
        return _read_preprocess_config(opened.folder, None, config.pinpoints)
    kind = config.vision.architecture["model_type"]
    if kind == BIOVIL_T:
        # Its config.json has LLaVA-1.5's image_aspect_ratio, which says nothing about radiographs.
        return BioVilPreprocessConfig(size=config.tile_size)
    aspect = _original_aspect(opened.settings)
    folder = opened.image_folder or opened.folder
    if not (folder / "preprocessor_config.json").exists():
        usual = PreprocessConfig(size=config.tile_size, aspect=aspect, pinpoints=config.pinpoints, rows_first=True)
        is_siglip = kind == "siglip_vision_model"
        return replace(usual, mean=SIGLIP_MEAN, std=SIGLIP_STD, stretches=True) if is_siglip else usual
    preprocess = replace(_read_preprocess_config(folder, aspect, config.pinpoints), rows_first=True)
    return replace(preprocess, size=config.tile_size) if config.s2_scales else preprocess


def _settings(folder: Path) -> JsonObject:
    return read_json(folder, "config.json") if (folder / "config.json").exists() else {}


def _original_aspect(settings: JsonObject) -> Aspect:
    """The original's `image_aspect_ratio`; what it does not know it treats like `square`."""
    value = settings.get("image_aspect_ratio", "square")
    return value if value in ("pad", "anyres") else "crop"


def _read_preprocess_config(folder: Path, aspect: Aspect | None, pinpoints: tuple[Size, ...]) -> PreprocessConfig:
    """preprocessor_config.json; `aspect` None: by its own fields, as transformers reads it."""
    # transformers 5 writes one file for image processor and tokenizer, earlier versions one for pictures alone.
    name = "preprocessor_config.json"
    if not (folder / name).exists() and (folder / "processor_config.json").exists():
        name = "processor_config.json"
    raw = read_json(folder, name)
    raw = raw.get("image_processor", raw)
    is_stretched = "Siglip" in str(raw.get("image_processor_type"))
    for step in ("do_resize", "do_rescale", "do_normalize", *(() if is_stretched else ("do_center_crop",))):
        if not raw.get(step, True):
            raise CheckpointError(
                f"{folder / name}: {step} is false; pictures are always resized, cropped and normalised"
            )
    sides = {_side(raw[key]) for key in ("size", "crop_size") if key in raw}
    side = sides.pop() if len(sides) == 1 else None
    if side is None:
        raise CheckpointError(
            f"{folder / name}: size is {raw.get('size')!r} and crop_size {raw.get('crop_size')!r}; "
            "expected the same side in pixels"
        )
    return PreprocessConfig(
        size=side,
        aspect=aspect or ("anyres" if pinpoints else "pad" if raw.get("do_pad") else "crop"),
        mean=tuple(raw.get("image_mean", CLIP_MEAN)),
        std=tuple(raw.get("image_std", CLIP_STD)),
        resample=Image.Resampling(raw.get("resample", Image.Resampling.BICUBIC)),
        pinpoints=pinpoints,
        stretches=is_stretched,
    )


def _side(size: object) -> int | None:
    """The one number of a size that is a number, or an object of equal numbers; None for any other."""
    values = set(size.values()) if isinstance(size, dict) else {size}
    side = values.pop() if len(values) == 1 else None
    return side if isinstance(side, int) else None


def load_preparer(
    checkpoint: Path | Checkpoint,
    tokenizer: CheckpointTokenizer | None = None,
    *,
    template: str | None = None,
    limits: RequestLimits | None = None,
) -> Preparer:
    """What a checkpoint needs of its requests; reads no weights."""
    config = load_config(checkpoint)
    tokenizer = tokenizer or load_tokenizer(checkpoint)
    return Preparer(
        config=config,
        template=choose_template(tokenizer, template, config),
        tokenizer=tokenizer,
        preprocess=load_preprocess_config(checkpoint),
        reserved_texts=tokenizer.reserved_texts,
        limits=limits or RequestLimits(),
    )
