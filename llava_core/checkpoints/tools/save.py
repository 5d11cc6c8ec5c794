"""Saves one of our models as a llava-hf checkpoint that transformers loads unchanged. Never leaves half a checkpoint.

Knows the layout's files and names; nothing about training.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llava_core.checkpoints.keymaps import Key, to_llava_hf
from llava_core.checkpoints.tools.writing import new_folder, write_json
from llava_core.config import JsonObject, ModelConfig
from llava_core.errors import CheckpointError
from llava_core.images.preprocess import PreprocessConfig
from llava_core.models.language import LanguageSide
from llava_core.types import Size
from llava_core.vision.clip import ClipTower


def save_llava_hf(
    folder: Path,
    tower: ClipTower,
    language: LanguageSide,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write weights, configs and tokenizer.

    Raises CheckpointError when `folder` exists, since nothing is overwritten, and for fields the layout cannot express.
    """
    check_llava_hf(language.config)
    with new_folder(folder) as partial:
        tensors = {to_llava_hf(key): tensor.to(dtype).contiguous() for key, tensor in _tensors(tower, language)}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        # safetensors creates files that only their owner can read; a checkpoint should be readable by others.
        (partial / "model.safetensors").chmod(0o644)
        tokenizer.save_pretrained(partial)
        name = str(dtype).removeprefix("torch.")
        write_settings(partial, language.config, tower.preprocess, dtype=name)
        eos = list(language.config.eos_token_ids)
        write_json(partial / "generation_config.json", {"bos_token_id": 1, "eos_token_id": eos, "do_sample": False})


def check_llava_hf(config: ModelConfig) -> None:
    """Raise CheckpointError naming the first field that the layout cannot express."""
    words = {"projector_type": "mlp2x_gelu", "image_start_end": False, "s2_scales": ()}
    words["merge_type"] = "spatial_unpad" if config.pinpoints else "flat"
    for field, only in words.items():
        if vars(config)[field] != only:
            tiles = " with anyres tiles" if field == "merge_type" and config.pinpoints else ""
            raise CheckpointError(
                f"{field} {vars(config)[field]!r} cannot be saved as llava-hf, which has {only!r} only{tiles}"
            )


def write_settings(folder: Path, config: ModelConfig, preprocess: PreprocessConfig, *, dtype: str) -> None:
    """Write config.json and the two files with image settings."""
    write_json(folder / "config.json", config_json(config, dtype=dtype))
    write_json(folder / "preprocessor_config.json", preprocessor_json(preprocess))
    write_json(folder / "processor_config.json", _processor_json(config))


def _tensors(tower: ClipTower, language: LanguageSide) -> Iterator[tuple[Key, Tensor]]:
    for name, tensor in tower.state_dict().items():
        yield Key("tower", name), tensor
    for name, tensor in language.projector.state_dict().items():
        yield Key("projector", name), tensor
    for name, tensor in language.decoder.state_dict().items():
        if not (language.config.tie_word_embeddings and name == "lm_head.weight"):
            yield Key("decoder", name), tensor


def config_json(config: ModelConfig, *, dtype: str) -> JsonObject:
    """The llava-hf config.json of a model; the inverse of config.read_llava_hf_config."""
    is_next = bool(config.pinpoints)
    tiles = {"image_grid_pinpoints": _height_first(config.pinpoints)} if is_next else {}
    return {
        "architectures": ["LlavaNextForConditionalGeneration" if is_next else "LlavaForConditionalGeneration"],
        "model_type": "llava_next" if is_next else "llava",
        "dtype": dtype,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.vision.tokens_per_tile,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.projector_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vision_feature_layer": config.vision.select_layer,
        "vision_feature_select_strategy": _strategy(config),
        **tiles,
        "text_config": dict(config.text),
        "vision_config": dict(config.vision.architecture),
    }


def _has_class_feature(config: ModelConfig) -> bool:
    return str(config.vision.architecture["model_type"]) == "clip_vision_model"


def _strategy(config: ModelConfig) -> str:
    """The feature strategy: `default` drops the first feature, which only CLIP has (the class feature)."""
    return "default" if config.vision.select_feature == "patch" and _has_class_feature(config) else "full"


def _height_first(sizes: tuple[Size, ...]) -> list[list[int]]:
    return [[size.height, size.width] for size in sizes]


def preprocessor_json(config: PreprocessConfig) -> JsonObject:
    """The preprocessor_config.json that makes transformers prepare pictures as we do."""
    side = {"height": config.size, "width": config.size}
    is_stretched = config.stretches and config.aspect == "crop"
    kinds = {"pad": "LlavaImageProcessor", "anyres": "LlavaNextImageProcessor", "crop": "CLIPImageProcessor"}
    tiles = {"image_grid_pinpoints": _height_first(config.pinpoints)} if config.pinpoints else {}
    return {
        "image_processor_type": "SiglipImageProcessor" if is_stretched else kinds[config.aspect],
        "do_convert_rgb": True,
        "do_pad": config.aspect != "crop",
        "do_resize": True,
        # By then the picture is square, so stretching and cropping give the same result.
        "size": side if is_stretched else {"shortest_edge": config.size},
        "resample": int(config.resample),
        **({} if is_stretched else {"do_center_crop": True, "crop_size": side}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        **tiles,
    }


def _processor_json(config: ModelConfig) -> JsonObject:
    return {
        "processor_class": "LlavaNextProcessor" if config.pinpoints else "LlavaProcessor",
        "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": int(_has_class_feature(config)),
        "vision_feature_select_strategy": _strategy(config),
        "image_token": "<image>",
    }
