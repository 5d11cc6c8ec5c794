"""Random-weight LLaVA-1.5 checkpoints in the hub's layout, which every contender loads unchanged.

Their greedy answers never end by themselves, and every token is text: the output rows of all other tokens are zero. So
no server needs a special field to ignore the end of text, and none holds back part of a character. Knows nothing about
servers.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

CONTEXT = 4096
# llava-serve's template mistral_instruct: no system text, so that a prompt is almost only picture and question.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} [/INST]"
    "{% else %} {% for part in message['content'] %}{{ part['text'] }}{% endfor %} </s>"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Network:
    """Transformer layers: the tower's or the decoder's."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Shape:
    """Everything about a checkpoint but its weights."""

    vision: Network
    text: Network
    image: int
    vocabulary: int
    patch: int = 14

    @property
    def image_tokens(self) -> int:
        return (self.image // self.patch) ** 2


SHAPES = {
    # Shows the cost of the server rather than of arithmetic: 6 M parameters.
    "tiny": Shape(Network(128, 512, 4, 4, 4), Network(256, 688, 4, 4, 4), image=56, vocabulary=4000),
    # LLaVA-1.5's own tower over a decoder that two cores can run: 642 M parameters.
    "mid": Shape(Network(1024, 4096, 24, 16, 16), Network(1024, 2816, 24, 16, 4), image=336, vocabulary=32_000),
}


def write_checkpoint(folder: Path, shape: Shape, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a new folder with weights, tokenizer, processor and chat template."""
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(shape.vocabulary)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image_token, int)
    config = make_config(shape, num_tokens=len(tokenizer), image_token=image_token)
    config.dtype = dtype
    config.architectures = ["LlavaForConditionalGeneration"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight[[not says_something(tokenizer, index) for index in range(len(tokenizer))]] = 0
    weights = {hub_name(name): value.to(dtype) for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": shape.image}, crop_size=shape.image),
        tokenizer=tokenizer,
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def train_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on Python's standard library: text that every machine has."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(_corpus(), trainer)
    raw.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def says_something(tokenizer: PreTrainedTokenizerFast, index: int) -> bool:
    """Whether a token alone is text: not a special token, not only white space, not part of a longer character."""
    text = str(tokenizer.decode([index], skip_special_tokens=True)).strip()
    return bool(text) and text.isascii()


def hub_name(name: str) -> str:
    """Return a weight's name in the hub's checkpoints, which predate the names of transformers' modules."""
    if name.startswith("model.vision_tower."):
        return name.replace("model.vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return f"language_model.{name}" if name.startswith("lm_head.") else name.removeprefix("model.")


def make_config(shape: Shape, *, num_tokens: int, image_token: int) -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=shape.image, patch_size=shape.patch, **_fields(shape.vision)),
        text_config=LlamaConfig(
            vocab_size=num_tokens,
            max_position_embeddings=CONTEXT,
            num_key_value_heads=shape.text.kv_heads,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            **_fields(shape.text),
        ),
        image_token_index=image_token,
        image_seq_length=shape.image_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _fields(network: Network) -> dict[str, Any]:
    return {
        "hidden_size": network.hidden,
        "intermediate_size": network.mlp,
        "num_hidden_layers": network.layers,
        "num_attention_heads": network.heads,
    }


def _corpus() -> Iterator[str]:
    found = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return (path.read_text(encoding="utf-8", errors="ignore") for path in found)
