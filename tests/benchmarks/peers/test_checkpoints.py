"""The checkpoints of the comparison: llava-serve and transformers read the same model, prompt and answer from them."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration, LlavaProcessor

from benchmarks.peers.checkpoints import SHAPES, Network, Shape, says_something, train_tokenizer, write_checkpoint
from benchmarks.peers.load import noise_png
from llava_core.inference import LocalModel
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart

SMALL = Shape(Network(16, 32, 3, 2, 2), Network(32, 64, 2, 4, 2), image=28, vocabulary=400)
QUESTION = "What is there?"
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("peers") / "small", SMALL, dtype=torch.float32)


def ask_transformers(folder: Path, picture: bytes) -> tuple[int, str]:
    """Return the number of prompt tokens, and the answer. The image processor named here needs no torchvision."""
    processor: Any = LlavaProcessor.from_pretrained(
        folder, image_processor=CLIPImageProcessorPil.from_pretrained(folder)
    )
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=prompt, images=Image.open(io.BytesIO(picture)), return_tensors="pt")
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)[0, length:]
    assert len(ids) == NUM_TOKENS
    return length, processor.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_both_read_the_same_prompt_and_write_the_same_endless_answer(folder: Path, seed: int) -> None:
    picture = noise_png(seed)
    message = Message("user", (ImagePart(picture), TextPart(QUESTION)))
    deltas = list(LocalModel(folder).stream(GenerationRequest("1", (message,), SamplingParams(max_tokens=NUM_TOKENS))))
    usage = deltas[-1].usage
    assert usage is not None
    assert usage.completion_tokens == NUM_TOKENS
    length, answer = ask_transformers(folder, picture)
    assert usage.prompt_tokens == length
    assert "".join(delta.text for delta in deltas) == answer.lstrip()


def test_only_tokens_with_text_of_their_own_can_be_answers() -> None:
    tokenizer = train_tokenizer(400)
    can_be_answer = {text: says_something(tokenizer, index) for text, index in tokenizer.get_vocab().items()}
    assert can_be_answer["e"]
    assert not any(can_be_answer[text] for text in ("<unk>", "<s>", "</s>", "<image>", "Ġ", "Ċ", "â"))


def test_the_vocabulary_has_the_stated_size() -> None:
    assert len(train_tokenizer(SHAPES["tiny"].vocabulary)) == SHAPES["tiny"].vocabulary + 1
