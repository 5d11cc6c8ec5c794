"""A LLaVA small enough to build in a test: random weights, a byte-level tokenizer, llava-hf layout, about 250 kB.

Weight names are derived here from the transformers module, not from our key tables: each checks the other.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

Names = Literal["hub", "saved", "module"]

IMAGE_SIZE = 28
PATCH_SIZE = 14
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
CONTEXT_LENGTH = 512
VISION_HIDDEN = 16
HIDDEN = 32

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHAT_TEMPLATE = (
    "{{ system }} {% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} "
    "{% else %}ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
).replace("{{ system }}", SYSTEM)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per byte, plus `<unk> <s> </s> <image>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({text: index for index, text in enumerate(["<unk>", "<s>", "</s>", *alphabet])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_vision_config() -> CLIPVisionConfig:
    """Describes a tower of three layers with weights large enough for varied answers."""
    return CLIPVisionConfig(
        hidden_size=VISION_HIDDEN,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        initializer_factor=3.0,
    )


def build_text_config(vocab_size: int, context_length: int, *, num_layers: int = 2) -> LlamaConfig:
    """Describes a decoder with two heads per KV group and weights large enough for varied answers."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_length,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def build_reference_model(
    seed: int = 0, *, num_layers: int = 2, context_length: int = CONTEXT_LENGTH
) -> LlavaForConditionalGeneration:
    """Builds the model with transformers: float32, in evaluation mode, with weights large enough for varied answers."""
    tokenizer = build_tokenizer()
    config = LlavaConfig(
        vision_config=build_vision_config(),
        text_config=build_text_config(len(tokenizer), context_length, num_layers=num_layers),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        with torch.no_grad():
            for name, bias in model.named_parameters():
                if name.endswith("bias"):
                    bias.normal_(0, 0.1)
    return model.eval()


def write_checkpoint(
    folder: Path, model: LlavaForConditionalGeneration, *, names: Names = "hub", num_shards: int = 1
) -> Path:
    """Writes everything a llava-hf folder holds. `names`: weight names as on the hub (transformers 4), as transformers
    5 saves them, or as its modules are called."""
    folder.mkdir(parents=True, exist_ok=True)
    rename = {"hub": hub_name, "saved": saved_name, "module": str}[names]
    write_weights(folder, {rename(name): value for name, value in model.state_dict().items()}, num_shards=num_shards)
    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "LlavaImageProcessor",
            "do_pad": True,
            "do_resize": True,
            "do_center_crop": True,
            "size": {"shortest_edge": IMAGE_SIZE},
            "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
        },
    )
    return folder


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], *, num_shards: int = 1) -> None:
    """Writes one safetensors file, or several with an index."""
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    if num_shards == 1:
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: contiguous[name] for name in sorted(contiguous)[shard::num_shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def hub_name(name: str) -> str:
    """Names as in transformers 4: the tower inside `vision_model`, the decoder and its head inside `language_model`."""
    if name.startswith("model.vision_tower."):
        return name.replace("model.vision_tower.", "vision_tower.vision_model.", 1)
    return saved_name(name)


def saved_name(name: str) -> str:
    """Names as in transformers 5, which writes the old prefixes but leaves `vision_model` out."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return name.removeprefix("model.")


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2))


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    """Reads a JSON file, lets `edit` change its content in place, and writes it back."""
    content = json.loads(path.read_text())
    edit(content)
    write_json(path, content)


def cut_short(path: Path, *, keep: int) -> None:
    """Truncates a file to its first `keep` bytes."""
    os.truncate(path, keep)
