"""A model of ours written as a llava-hf checkpoint that transformers loads as it is. Never leaves half a checkpoint.

Knows the layout's files and names; nothing about training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llava_core.checkpoints.keymaps import Key, to_llava_hf
from llava_core.config import ModelConfig
from llava_core.errors import CheckpointError
from llava_core.images.preprocess import PreprocessConfig
from llava_core.models.language import LanguageSide
from llava_core.vision.clip import ClipTower

JsonObject = Mapping[str, Any]


def save_llava_hf(
    folder: Path,
    tower: ClipTower,
    language: LanguageSide,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write weights, configs and tokenizer.

    Raises FileExistsError when `folder` exists: nothing is overwritten; CheckpointError for what the layout has no
    words for.
    """
    _check(language.config)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another folder or remove it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {to_llava_hf(key): tensor.to(dtype).contiguous() for key, tensor in _tensors(tower, language)}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    # safetensors creates files for their owner alone; a checkpoint is there to be read.
    (partial / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(partial)
    name = str(dtype).removeprefix("torch.")
    _write(partial / "config.json", config_json(language.config, dtype=name))
    image = preprocessor_json(tower.preprocess)
    _write(partial / "preprocessor_config.json", image)
    _write(partial / "processor_config.json", _processor_json(language.config))
    eos = list(language.config.eos_token_ids)
    _write(partial / "generation_config.json", {"bos_token_id": 1, "eos_token_id": eos, "do_sample": False})
    partial.rename(folder)


def _check(config: ModelConfig) -> None:
    words = {"projector_type": "mlp2x_gelu", "merge_type": "flat", "pinpoints": (), "image_start_end": False}
    for field, only in words.items():
        if vars(config)[field] != only:
            raise CheckpointError(
                f"{field} {vars(config)[field]!r} cannot be saved as llava-hf, which has {only!r} only"
            )


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
    strategies = {"patch": "default", "cls_patch": "full"}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.vision.tokens_per_tile,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.projector_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vision_feature_layer": config.vision.select_layer,
        "vision_feature_select_strategy": strategies[config.vision.select_feature],
        "text_config": dict(config.text),
        "vision_config": dict(config.vision.architecture),
    }


def preprocessor_json(config: PreprocessConfig) -> JsonObject:
    """The preprocessor_config.json that makes transformers prepare pictures as we do."""
    side = {"height": config.size, "width": config.size}
    return {
        "image_processor_type": "LlavaImageProcessor" if config.aspect == "pad" else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_pad": config.aspect == "pad",
        "do_resize": True,
        "size": {"shortest_edge": config.size},
        "resample": int(config.resample),
        "do_center_crop": True,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def _processor_json(config: ModelConfig) -> JsonObject:
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default" if config.vision.select_feature == "patch" else "full",
        "image_token": "<image>",
    }


def _write(path: Path, content: JsonObject) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
