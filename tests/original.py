"""Small random checkpoints in the original LLaVA code's layouts, and a slow, plain reference of how it answers.

Names and shapes of weights are written key by key from the format's description, not from the loader's tables. The
reference handles one prompt at a time, recomputes everything for every token, and shares only transformers' CLIP and
Llama with the code it checks.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from tests.tiny import build_tokenizer

SIDE, PATCH, VISION, HIDDEN, MLP, LAYERS = 28, 14, 16, 32, 48, 2
GRID = SIDE // PATCH
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """How checkpoints differ: architecture, layout, files, and how pictures become tokens."""

    decoder: str = "llama"
    layout: str = "full"
    files: str = "safetensors"
    num_shards: int = 1
    tokenizer: str = "fast"
    projector: str = "mlp2x_gelu"
    select: str = "patch"
    aspect: str = "pad"
    merge: str = "flat"
    start_end: bool = False
    tower_inside: bool = False
    pad_rows: int = 0
    s2: bool = False

    @property
    def num_features(self) -> int:
        """The tower's features per patch: twice as many at two scales."""
        return VISION * (2 if self.s2 else 1)


@dataclass
class Original:
    """A checkpoint on disk and, in memory, the configuration and weights that loading it must yield."""

    kind: Kind
    folder: Path
    base: Path | None
    config: dict[str, Any]
    weights: Tensors
    tower: Tensors
    num_tokens: int


def random_tensor(generator: torch.Generator, *shape: int, scale: float = 0.15) -> torch.Tensor:
    return torch.randn(*shape, generator=generator) * scale


def decoder_weights(generator: torch.Generator, rows: int, *, kv_heads: int) -> Tensors:
    """Draws a decoder's weights; Llama and Mistral have the same names."""
    weights = {
        "model.embed_tokens.weight": random_tensor(generator, rows, HIDDEN, scale=1.0),
        "model.norm.weight": 1 + random_tensor(generator, HIDDEN),
        "lm_head.weight": random_tensor(generator, rows, HIDDEN, scale=1.0),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        weights[f"{name}.input_layernorm.weight"] = 1 + random_tensor(generator, HIDDEN)
        weights[f"{name}.post_attention_layernorm.weight"] = 1 + random_tensor(generator, HIDDEN)
        weights[f"{name}.self_attn.q_proj.weight"] = random_tensor(generator, HIDDEN, HIDDEN)
        weights[f"{name}.self_attn.k_proj.weight"] = random_tensor(generator, 8 * kv_heads, HIDDEN)
        weights[f"{name}.self_attn.v_proj.weight"] = random_tensor(generator, 8 * kv_heads, HIDDEN)
        weights[f"{name}.self_attn.o_proj.weight"] = random_tensor(generator, HIDDEN, HIDDEN)
        weights[f"{name}.mlp.gate_proj.weight"] = random_tensor(generator, MLP, HIDDEN)
        weights[f"{name}.mlp.up_proj.weight"] = random_tensor(generator, MLP, HIDDEN)
        weights[f"{name}.mlp.down_proj.weight"] = random_tensor(generator, HIDDEN, MLP)
    return weights


def tower_weights(generator: torch.Generator) -> Tensors:
    """Draws the weights of a CLIP vision model, named as transformers 4 saves them."""
    name = "vision_model.embeddings"
    weights = {
        f"{name}.class_embedding": random_tensor(generator, VISION),
        f"{name}.patch_embedding.weight": random_tensor(generator, VISION, 3, PATCH, PATCH),
        f"{name}.position_embedding.weight": random_tensor(generator, GRID**2 + 1, VISION),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        weights |= norm_weights(generator, f"vision_model.{norm}")
    for layer in range(3):
        name = f"vision_model.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            weights |= norm_weights(generator, f"{name}.{norm}")
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights[f"{name}.self_attn.{part}.weight"] = random_tensor(generator, VISION, VISION)
            weights[f"{name}.self_attn.{part}.bias"] = random_tensor(generator, VISION)
        weights[f"{name}.mlp.fc1.weight"] = random_tensor(generator, 32, VISION)
        weights[f"{name}.mlp.fc1.bias"] = random_tensor(generator, 32)
        weights[f"{name}.mlp.fc2.weight"] = random_tensor(generator, VISION, 32)
        weights[f"{name}.mlp.fc2.bias"] = random_tensor(generator, VISION)
    return weights


def norm_weights(generator: torch.Generator, name: str) -> Tensors:
    return {
        f"{name}.weight": 1 + random_tensor(generator, VISION),
        f"{name}.bias": random_tensor(generator, VISION),
    }


def projector_weights(generator: torch.Generator, kind: Kind) -> Tensors:
    scale = 0.4
    if kind.projector == "linear":
        return {
            "model.mm_projector.weight": random_tensor(generator, HIDDEN, kind.num_features, scale=scale),
            "model.mm_projector.bias": random_tensor(generator, HIDDEN),
        }
    weights = {}
    for index, width in ((0, kind.num_features), (2, HIDDEN)):
        weights[f"model.mm_projector.{index}.weight"] = random_tensor(generator, HIDDEN, width, scale=scale)
        weights[f"model.mm_projector.{index}.bias"] = random_tensor(generator, HIDDEN)
    return weights


def write_original(root: Path, kind: Kind, seed: int = 0) -> Original:
    """Writes the checkpoint, its base if it has one, and its tower beside it."""
    generator = torch.Generator().manual_seed(seed)
    base = None if kind.layout == "full" else root / "decoder"
    folder = root / "checkpoint"
    folder.mkdir(parents=True)
    text_folder = base or folder
    text_folder.mkdir(exist_ok=True)
    num_tokens = write_tokenizer(text_folder, kind)
    rows = num_tokens + kind.pad_rows
    kv_heads = 2 if kind.decoder == "mistral" else 4
    decoder = decoder_weights(generator, rows, kv_heads=kv_heads)
    tower = tower_weights(generator)
    projector = projector_weights(generator, kind)
    if "unpad" in kind.merge:
        projector["model.image_newline"] = random_tensor(generator, HIDDEN, scale=1.0)
    text = text_config(kind, rows, kv_heads)
    config = {
        **text,
        "architectures": ["LlavaMistralForCausalLM" if kind.decoder == "mistral" else "LlavaLlamaForCausalLM"],
        "model_type": f"llava_{kind.decoder}",
        "mm_vision_tower": "../tower",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": kind.select,
        "mm_projector_type": kind.projector,
        "mm_hidden_size": kind.num_features,
        "s2": kind.s2,
        "s2_scales": f"{SIDE},{2 * SIDE}",
        "mm_use_im_start_end": kind.start_end,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": kind.merge,
        "image_aspect_ratio": kind.aspect,
        "image_grid_pinpoints": PINPOINTS,
        "unfreeze_mm_vision_tower": kind.tower_inside,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
    }
    write_json(folder / "config.json", config)
    other = tower_weights(generator) if kind.tower_inside else tower
    write_tower(root / "tower", other)
    inside = {f"model.vision_tower.vision_tower.{name}": value for name, value in tower.items()}
    own = {**projector, **(inside if kind.tower_inside else {})}
    weights = {**decoder, **projector}
    if kind.layout == "full":
        write_model(folder, {**decoder, **own}, kind)
    else:
        assert base is not None
        write_json(base / "config.json", {**text, "architectures": ["LlamaForCausalLM"], "model_type": kind.decoder})
        write_model(base, decoder, kind)
    if kind.layout == "projector":
        torch.save(own, folder / "mm_projector.bin")
        # The original code rounds the projector to float16, and nothing else.
        weights |= {name: value.half().float() for name, value in own.items()}
    if kind.layout == "lora":
        weights |= write_lora(folder, own, decoder, generator)
    return Original(kind, folder, base, config, weights, tower, num_tokens)


def text_config(kind: Kind, rows: int, kv_heads: int) -> dict[str, Any]:
    mistral = {"sliding_window": None, "rope_theta": 1e6} if kind.decoder == "mistral" else {}
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": rows,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
        **mistral,
    }


def write_lora(folder: Path, own: Tensors, decoder: Tensors, generator: torch.Generator) -> Tensors:
    """Writes adapter and other trained weights under PEFT's names; returns the decoder's weights that change."""
    rank, alpha, changed = 4, 16, {}
    adapter: Tensors = {}
    for name in [name for name in decoder if name.endswith("_proj.weight")]:
        rows, columns = decoder[name].shape
        down, up = random_tensor(generator, rank, columns), random_tensor(generator, rows, rank)
        module = "base_model.model." + name.removesuffix(".weight")
        adapter[f"{module}.lora_A.weight"], adapter[f"{module}.lora_B.weight"] = down, up
        changed[name] = decoder[name] + alpha / rank * (up @ down)
    torch.save(adapter, folder / "adapter_model.bin")
    torch.save({f"base_model.model.{name}": value for name, value in own.items()}, folder / "non_lora_trainables.bin")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter_config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "target_modules": modules}
    write_json(folder / "adapter_config.json", {**adapter_config, "base_model_name_or_path": "somewhere/else"})
    return changed


def write_model(folder: Path, tensors: Tensors, kind: Kind) -> None:
    suffix, prefix = ("safetensors", "model") if kind.files == "safetensors" else ("bin", "pytorch_model")
    weight_map: dict[str, str] = {}
    for shard in range(kind.num_shards):
        part = {name: tensors[name].contiguous() for name in sorted(tensors)[shard :: kind.num_shards]}
        single = kind.num_shards == 1
        file = f"{prefix}.{suffix}" if single else f"{prefix}-{shard + 1:05}-of-{kind.num_shards:05}.{suffix}"
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if kind.num_shards > 1:
        write_json(folder / f"{prefix}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_tower(folder: Path, tensors: Tensors) -> None:
    """Writes a tower as CLIP is on the hub: both halves in one model."""
    folder.mkdir()
    text_half = {"logit_scale": torch.ones(()), "text_model.final_layer_norm.bias": torch.zeros(3)}
    torch.save({**tensors, **text_half}, folder / "pytorch_model.bin")
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": TOWER_CONFIG})
    sides = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    write_json(folder / "preprocessor_config.json", {**sides, "image_mean": MEAN, "image_std": STD, "resample": 3})


TOWER_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": VISION,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def write_tokenizer(folder: Path, kind: Kind) -> int:
    """Writes a byte-level tokenizer.json or a trained sentencepiece model; returns the number of tokens."""
    extra = ["<im_start>", "<im_end>"] if kind.start_end else []
    if kind.tokenizer == "fast":
        tokenizer = build_tokenizer()
        tokenizer.chat_template = None
        tokenizer.add_tokens(extra, special_tokens=True)
        tokenizer.save_pretrained(folder)
        return len(tokenizer)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    if extra:
        write_json(folder / "added_tokens.json", {token: SP_SIZE + index for index, token in enumerate(extra)})
    return SP_SIZE + len(extra)


SP_SIZE = 400


def sentencepiece_model() -> bytes:
    text = ["A chat between a curious user and an assistant.", "USER: What is it? ASSISTANT: two red circles", "a\tb"]
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text * 8),
        model_writer=out,
        vocab_size=SP_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2))


# --- the reference implementation ------------------------------------------------------------------------------------


def prompt_ids(prompt: str, tokenize: Any, bos: int) -> list[int]:
    """Tokenizes every piece between images as a separate text; only the first BOS is kept."""
    pieces = [tokenize(piece) for piece in prompt.split("<image>")]
    assert all(piece[0] == bos for piece in pieces)
    ids = [bos, *pieces[0][1:]]
    for piece in pieces[1:]:
        ids += [-200, *piece[1:]]
    return ids


def resized(image: Image.Image, size: tuple[int, int], filter_: Image.Resampling) -> Image.Image:
    """Resizes as Pillow up to version 12 does for every picture: the rows, then the columns."""
    return image.resize((size[0], image.height), filter_).resize(size, filter_)


def to_pixels(image: Image.Image, side: int = SIDE) -> torch.Tensor:
    """Does what CLIP's processor does: resizes the shortest edge, crops the centre, scales, normalises."""
    width, height = image.size
    target = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    image = resized(image, target, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    values = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    return torch.from_numpy(((values - np.array(MEAN)) / np.array(STD)).astype(np.float32)).permute(2, 0, 1)


def expand_to_square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def choose_resolution(width: int, height: int) -> tuple[int, int]:
    best, best_effective, best_wasted = (0, 0), 0, math.inf
    for across, down in PINPOINTS:
        scale = min(across / width, down / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = across * down - effective
        if effective > best_effective or (effective == best_effective and wasted < best_wasted):
            best, best_effective, best_wasted = (across, down), effective, wasted
    return best


def anyres_pixels(image: Image.Image) -> torch.Tensor:
    across, down = choose_resolution(*image.size)
    if across / image.width < down / image.height:
        size = (across, min(math.ceil(image.height * (across / image.width)), down))
    else:
        size = (min(math.ceil(image.width * (down / image.height)), across), down)
    canvas = Image.new("RGB", (across, down), (0, 0, 0))
    canvas.paste(resized(image, size, Image.Resampling.BICUBIC), ((across - size[0]) // 2, (down - size[1]) // 2))
    tiles = [resized(image, (SIDE, SIDE), Image.Resampling.BICUBIC)]
    for top in range(0, down, SIDE):
        tiles += [canvas.crop((left, top, left + SIDE, top + SIDE)) for left in range(0, across, SIDE)]
    return torch.stack([to_pixels(tile) for tile in tiles])


def image_rows(original: Original, image: Image.Image) -> torch.Tensor:
    """Returns one picture's embeddings, (image tokens, hidden)."""
    kind, weights = original.kind, original.weights
    if kind.aspect == "anyres":
        pixels = anyres_pixels(image)
    else:
        square = expand_to_square(image) if kind.aspect == "pad" else image
        pixels = to_pixels(square, 2 * SIDE if kind.s2 else SIDE)[None]
    tower = CLIPVisionModel(CLIPVisionConfig(**TOWER_CONFIG)).eval()
    tower.load_state_dict({name.removeprefix("vision_model."): value for name, value in original.tower.items()})
    if kind.s2:
        states = two_scales(tower, pixels)
    else:
        states = tower(pixels, output_hidden_states=True).hidden_states[-2]
        states = states[:, 1:] if kind.select == "patch" else states
    if kind.projector == "linear":
        rows = functional.linear(states, weights["model.mm_projector.weight"], weights["model.mm_projector.bias"])
    else:
        first = functional.linear(states, weights["model.mm_projector.0.weight"], weights["model.mm_projector.0.bias"])
        rows = functional.linear(
            functional.gelu(first), weights["model.mm_projector.2.weight"], weights["model.mm_projector.2.bias"]
        )
    if kind.aspect != "anyres" or kind.merge == "flat":
        return rows.flatten(0, 1)
    return merge_plainly(original, rows, image)


def two_scales(tower: CLIPVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """Computes S2: the whole picture's features beside the pooled features of its four quarters at twice the size."""
    small = functional.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic")
    whole = tower(small, output_hidden_states=True).hidden_states[-2][:, 1:]
    large = torch.zeros(2 * GRID, 2 * GRID, VISION)
    for y in range(2):
        for x in range(2):
            quarter = pixels[:, :, y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE]
            patches = tower(quarter, output_hidden_states=True).hidden_states[-2][0, 1:]
            large[y * GRID : (y + 1) * GRID, x * GRID : (x + 1) * GRID] = patches.view(GRID, GRID, VISION)
    pooled = [large[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((0, 1)) for y in range(GRID) for x in range(GRID)]
    return torch.cat([whole, torch.stack(pooled)[None]], -1)


def merge_plainly(original: Original, rows: torch.Tensor, image: Image.Image) -> torch.Tensor:
    across, down = choose_resolution(*image.size)
    columns, lines = across // SIDE, down // SIDE
    large = torch.empty(lines * GRID, columns * GRID, HIDDEN)
    for index in range(lines * columns):
        y, x = divmod(index, columns)
        large[y * GRID : (y + 1) * GRID, x * GRID : (x + 1) * GRID] = rows[1 + index].view(GRID, GRID, HIDDEN)
    if original.kind.merge == "spatial":
        return torch.cat([rows[0], large.flatten(0, 1)])
    height, width = large.shape[:2]
    if image.width / image.height > width / height:
        cut = (height - int(image.height * (width / image.width))) // 2
        large = large[cut : height - cut]
    else:
        cut = (width - int(image.width * (height / image.height))) // 2
        large = large[:, cut : width - cut]
    newline = original.weights["model.image_newline"].expand(len(large), 1, HIDDEN)
    return torch.cat([rows[0], torch.cat([large, newline], 1).flatten(0, 1)])


@torch.inference_mode()
def answer_plainly(
    original: Original,
    ids: Sequence[int],
    images: Sequence[Image.Image],
    num_tokens: int,
    encode: Callable[[Original, Image.Image], torch.Tensor] = image_rows,
) -> tuple[list[int], torch.Tensor]:
    """Returns greedy tokens up to the end token, and their logits; recomputes the whole sequence for each token."""
    text = {name: original.config[name] for name in text_config(original.kind, 1, 1)}
    config = AutoConfig.for_model(original.kind.decoder, **{**text, "vocab_size": original.num_tokens})
    decoder = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    weights = {name: value for name, value in original.weights.items() if "mm_" not in name and "image" not in name}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][: original.num_tokens]
    decoder.load_state_dict(weights)
    blocks = iter([encode(original, image) for image in images])
    rows = [next(blocks) if token == -200 else weights["model.embed_tokens.weight"][[token]] for token in ids]
    embedded = torch.cat(rows)
    tokens: list[int] = []
    logits = []
    for _ in range(num_tokens):
        last = decoder(inputs_embeds=embedded[None]).logits[0, -1]
        logits.append(last)
        tokens.append(int(last.argmax()))
        if tokens[-1] == 2:
            break
        embedded = torch.cat([embedded, weights["model.embed_tokens.weight"][[tokens[-1]]]])
    return tokens, torch.stack(logits)
