"""What a checkpoint is, without its weights: configuration, image preprocessing, and how its requests are prepared.

Does not import torch, so a CPU-only preprocessing replica stays small.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from llava_core.checkpoints.files import read_json
from llava_core.checkpoints.tokenizer import CheckpointTokenizer, choose_template, load_tokenizer
from llava_core.config import ModelConfig, read_llava_hf_config
from llava_core.errors import CheckpointError
from llava_core.images.preprocess import CLIP_MEAN, CLIP_STD, PreprocessConfig
from llava_core.prepare import Preparer, RequestLimits


def load_config(folder: Path) -> ModelConfig:
    """The model's configuration. Raises CheckpointError naming the file or field at fault."""
    return read_llava_hf_config(read_json(folder, "config.json"))


def load_preprocess_config(folder: Path) -> PreprocessConfig:
    """How the checkpoint wants its pictures. Raises CheckpointError for a way that is not ours."""
    # transformers 5 writes one file for image processor and tokenizer, earlier versions one for pictures alone.
    name = "preprocessor_config.json"
    if not (folder / name).exists() and (folder / "processor_config.json").exists():
        name = "processor_config.json"
    raw = read_json(folder, name)
    raw = raw.get("image_processor", raw)
    for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
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
        aspect="pad" if raw.get("do_pad") else "crop",
        mean=tuple(raw.get("image_mean", CLIP_MEAN)),
        std=tuple(raw.get("image_std", CLIP_STD)),
        resample=Image.Resampling(raw.get("resample", Image.Resampling.BICUBIC)),
    )


def _side(size: object) -> int | None:
    """The one number of a size that is a number, or an object of equal numbers; None for any other."""
    values = set(size.values()) if isinstance(size, dict) else {size}
    side = values.pop() if len(values) == 1 else None
    return side if isinstance(side, int) else None


def load_preparer(
    folder: Path,
    tokenizer: CheckpointTokenizer | None = None,
    *,
    template: str | None = None,
    limits: RequestLimits | None = None,
) -> Preparer:
    """What a checkpoint needs of its requests; reads no weights."""
    tokenizer = tokenizer or load_tokenizer(folder)
    return Preparer(
        config=load_config(folder),
        template=choose_template(tokenizer, template),
        tokenizer=tokenizer,
        preprocess=load_preprocess_config(folder),
        reserved_texts=tokenizer.reserved_texts,
        limits=limits or RequestLimits(),
    )
