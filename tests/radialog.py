"""A RaDialog checkpoint with a full-size tower and a small decoder, and a slow, plain reference of its image encoding.

Names are written key by key as its training saves them: everything trained beside the LoRA, and every buffer, even
those that can be computed. The reference computes with tensors by name and shares no code with what it checks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from tests.original import HIDDEN, LAYERS, Kind, Original, Tensors, resized, write_json, write_lora, write_original

DEPTHS, WIDTHS, FEATURES = (3, 4, 6, 3), (64, 128, 256, 512), 512
FILE = "non_lora_trainables.bin"
Make = Callable[..., torch.Tensor]


def empty(*shape: int) -> torch.Tensor:
    """Returns zeros that take no space on disk."""
    return torch.zeros(()).expand(shape)


def random_like_trained(seed: int) -> Make:
    """Returns a maker of weights scaled to keep a deep network's activations near one, in bfloat16 as released."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        fan_in = max(1, int(np.prod(shape[1:])))
        return (torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5).bfloat16()

    return make


def batch_norm(name: str, width: int, make: Make) -> Tensors:
    return {
        f"{name}.weight": make(width).abs() * 0.3,
        f"{name}.bias": make(width) * 0.1,
        f"{name}.running_mean": make(width) * 0.1,
        f"{name}.running_var": make(width).abs() + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(21_000),
    }


def trunk_weights(make: Make) -> Tensors:
    weights = {"conv1.weight": make(64, 3, 7, 7), **batch_norm("bn1", 64, make)}
    num_inputs = 64
    for stage, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True), 1):
        for block in range(depth):
            name = f"layer{stage}.{block}"
            weights[f"{name}.conv1.weight"] = make(width, num_inputs, 1, 1)
            weights[f"{name}.conv2.weight"] = make(width, width, 3, 3)
            weights[f"{name}.conv3.weight"] = make(4 * width, width, 1, 1)
            for index, outputs in ((1, width), (2, width), (3, 4 * width)):
                weights |= batch_norm(f"{name}.bn{index}", outputs, make)
            if block == 0:
                weights[f"{name}.downsample.0.weight"] = make(4 * width, num_inputs, 1, 1)
                weights |= batch_norm(f"{name}.downsample.1", 4 * width, make)
            num_inputs = 4 * width
    return {**weights, "fc.weight": make(1000, 2048), "fc.bias": make(1000)}


def pooler_weights(make: Make) -> Tensors:
    weights = {"type_embed": make(2, 1, 256), "norm_post.weight": make(256), "norm_post.bias": make(256)}
    for block in range(3):
        for layer in ("attn.proj_q", "attn.proj_k", "attn.proj_v", "attn.proj", "mlp.fc1", "mlp.fc2"):
            weights[f"blocks.{block}.{layer}.weight"] = make(256, 256)
        for layer in ("attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"):
            weights[f"blocks.{block}.{layer}.bias"] = make(256)
        for layer in ("norm1", "norm2"):
            weights[f"blocks.{block}.{layer}.weight"] = make(256)
    return {**weights, "pos_embed": make(1, 196, 256)}


def tower_weights(make: Make) -> Tensors:
    """Makes every weight of BioViL-T's image model, including those that no language model reads."""
    return {
        **{f"encoder.encoder.{name}": value for name, value in trunk_weights(make).items()},
        "encoder.backbone_to_vit.weight": make(256, 2048, 1, 1),
        "encoder.missing_previous_emb": make(1, 256, 1, 1),
        **{f"encoder.vit_pooler.{name}": value for name, value in pooler_weights(make).items()},
        "projector.model.0.weight": make(128, 512, 1, 1),
        **batch_norm("projector.model.1", 128, make),
        "projector.model.3.weight": make(128, 128, 1, 1),
        "projector.model.3.bias": make(128),
    }


def own_weights(make: Make) -> Tensors:
    """Makes the weights that the training saves beside the LoRA, without PEFT's prefix."""
    weights = {f"model.vision_tower.{name}": value for name, value in tower_weights(make).items()}
    for index, width in ((0, FEATURES), (2, HIDDEN)):
        weights[f"model.mm_projector.{index}.weight"] = make(HIDDEN, width)
        weights[f"model.mm_projector.{index}.bias"] = make(HIDDEN)
    for layer in range(LAYERS):
        for name in ("inv_freq", "cos_cached", "sin_cached"):
            weights[f"model.layers.{layer}.self_attn.rotary_emb.{name}"] = make(4)
    return weights


def write_radialog(root: Path, make: Make) -> Original:
    """Writes the checkpoint on top of a complete LLaVA-1.5 that has another tower and a projector of another shape."""
    base = write_original(root / "base", Kind(tokenizer="slow"))
    folder = root / "checkpoint"
    folder.mkdir()
    config = {
        **base.config,
        "model_type": "llava",
        "mm_vision_tower": "biovil",
        "mm_hidden_size": FEATURES,
        "mv_type": "concat",
        "tokenizer_model_max_length": 1300,
    }
    write_json(folder / "config.json", config)
    own = own_weights(make)
    decoder = {name: value for name, value in base.weights.items() if "mm_" not in name}
    changed = write_lora(folder, own, decoder, torch.Generator().manual_seed(1))
    projector = {name: value.float() for name, value in own.items() if "mm_projector" in name}
    tower = {name.removeprefix("model.vision_tower."): value for name, value in own.items() if "vision_tower" in name}
    return Original(base.kind, folder, base.folder, config, {**decoder, **changed, **projector}, tower, base.num_tokens)


def edit_own(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Reads the weights saved beside the LoRA, lets `edit` change them in place, and writes them back."""
    tensors = torch.load(folder / FILE, weights_only=True)
    edit(tensors)
    torch.save(tensors, folder / FILE)


def edit_config(folder: Path, **changes: object) -> None:
    write_json(folder / "config.json", {**json.loads((folder / "config.json").read_text()), **changes})


# --- the reference implementation ------------------------------------------------------------------------------------


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Stretches contrast to the picture's own range, resizes the shorter side to 512, crops the central 448; subtracts
    no mean and divides by no deviation."""
    values = np.asarray(image).astype(float)
    values -= values.min()
    values /= values.max()
    grey = Image.fromarray((values * 255).astype(np.uint8)).convert("L")
    width, height = grey.size
    size = (512, int(512 * height / width)) if width <= height else (int(512 * width / height), 512)
    grey = resized(grey, size, Image.Resampling.BILINEAR)
    left, top = round((grey.width - 448) / 2), round((grey.height - 448) / 2)
    tile = np.asarray(grey.crop((left, top, left + 448, top + 448)), np.float32) / 255
    return torch.from_numpy(tile).expand(1, 3, 448, 448)


def normed(weights: Tensors, name: str, features: torch.Tensor) -> torch.Tensor:
    mean, variance = (weights[f"{name}.{kind}"][:, None, None] for kind in ("running_mean", "running_var"))
    scale, shift = (weights[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
    return (features - mean) / (variance + 1e-5).sqrt() * scale + shift


def trunk_features(weights: Tensors, pixels: torch.Tensor) -> torch.Tensor:
    stem = functional.conv2d(pixels, weights["conv1.weight"], stride=2, padding=3)
    features = functional.max_pool2d(normed(weights, "bn1", stem).relu(), 3, stride=2, padding=1)
    for stage, depth in enumerate(DEPTHS, 1):
        for block in range(depth):
            name, stride = f"layer{stage}.{block}", 2 if block == 0 and stage > 1 else 1
            hidden = functional.conv2d(features, weights[f"{name}.conv1.weight"])
            hidden = normed(weights, f"{name}.bn1", hidden).relu()
            hidden = functional.conv2d(hidden, weights[f"{name}.conv2.weight"], stride=stride, padding=1)
            hidden = normed(weights, f"{name}.bn2", hidden).relu()
            hidden = normed(weights, f"{name}.bn3", functional.conv2d(hidden, weights[f"{name}.conv3.weight"]))
            if block == 0:
                features = functional.conv2d(features, weights[f"{name}.downsample.0.weight"], stride=stride)
                features = normed(weights, f"{name}.downsample.1", features)
            features = (hidden + features).relu()
    return features


@torch.inference_mode()
def radiograph_rows(original: Original, image: Image.Image) -> torch.Tensor:
    """Returns the embeddings of one picture without a prior, (196, hidden)."""
    tower = {name: value.float() for name, value in original.tower.items()}
    trunk = {name.removeprefix("encoder.encoder."): value for name, value in tower.items()}
    static = functional.conv2d(trunk_features(trunk, to_pixels(image)), tower["encoder.backbone_to_vit.weight"])
    missing = tower["encoder.missing_previous_emb"].repeat(1, 1, 14, 14)
    patches = torch.cat([static, missing], 1)[0]
    rows = torch.stack([patches[:, y, x] for y in range(14) for x in range(14)])
    weights = original.weights
    for index in (0, 2):
        rows = rows @ weights[f"model.mm_projector.{index}.weight"].T + weights[f"model.mm_projector.{index}.bias"]
        rows = functional.gelu(rows) if index == 0 else rows
    return rows
