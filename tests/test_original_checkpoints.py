"""Original checkpoints of every layout answer as the original code does: prompt, ids, logits and greedy tokens."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from llava_core.asking import original_ids
from llava_core.checkpoints.accounting import check_tensors
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.load import LoadOptions
from llava_core.checkpoints.sentencepiece_tokenizer import SentencePieceBackend
from llava_core.inference import LocalModel
from llava_core.prompts.templates import get_template
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from tests.original import Kind, Original, answer_plainly, prompt_ids, write_original
from tests.served import first_logits

FP32 = LoadOptions(dtype="float32")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

KINDS = {
    "llama, sharded bin": Kind(files="bin", num_shards=3),
    "llama, slow tokenizer": Kind(tokenizer="slow"),
    "anyres, unpadded, own tower": Kind(aspect="anyres", merge="spatial_unpad", tower_inside=True, num_shards=2),
    "anyres, spatial": Kind(aspect="anyres", merge="spatial"),
    "anyres, flat": Kind(aspect="anyres"),
    "mistral, square": Kind(decoder="mistral", aspect="square"),
    "start and end, linear, cls_patch": Kind(start_end=True, projector="linear", select="cls_patch"),
    "start and end, slow tokenizer": Kind(start_end=True, tokenizer="slow"),
    "two scales": Kind(s2=True),
    "more rows than tokens": Kind(pad_rows=24),
    "projector over a base": Kind(layout="projector", files="bin"),
    "LoRA over a base": Kind(layout="lora"),
    "LoRA, anyres, mistral": Kind(layout="lora", decoder="mistral", aspect="anyres", merge="spatial_unpad"),
}


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ask(images: list[Image.Image], question: str = "What is it?", name: str = "r") -> GenerationRequest:
    parts = (*(ImagePart(png(image)) for image in images), TextPart(question))
    return GenerationRequest(name, (Message("user", parts),), SamplingParams(max_tokens=24))


def build(root: Path, kind: Kind) -> tuple[Original, LocalModel]:
    original = write_original(root, kind)
    checkpoint = open_checkpoint(original.folder, original.base, offline=True)
    check_tensors(checkpoint)
    return original, LocalModel(checkpoint, options=FP32, template="vicuna_v1")


def expected_ids(original: Original, prompt: str) -> list[int]:
    folder = original.base or original.folder
    if original.kind.tokenizer == "slow":
        backend = SentencePieceBackend(folder)
        return prompt_ids(prompt, lambda piece: [1, *(token for token, _, _ in backend.encode(piece))], 1)
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    return prompt_ids(prompt, lambda piece: fast(piece)["input_ids"], 1)


IMAGES = [picture(45, 30, 0), picture(31, 64, 1)]


@pytest.mark.parametrize("name", KINDS)
def test_an_original_gives_the_same_answers_as_its_restatement(tmp_path: Path, name: str) -> None:
    original, model = build(tmp_path, KINDS[name])
    prepared = model.preparer.prepare(ask(IMAGES))
    image = "<im_start><image><im_end>" if original.kind.start_end else "<image>"
    assert prepared.prompt == f"{SYSTEM} USER: {image}\n{image}\nWhat is it? ASSISTANT:"
    ids = original_ids(prepared)
    assert ids == expected_ids(original, prepared.prompt)
    tokens, logits = answer_plainly(original, ids, IMAGES, 24)
    assert [token for delta in model.stream(prepared) for token in delta.token_ids] == tokens
    torch.testing.assert_close(first_logits(model, prepared), logits[0], atol=1e-4, rtol=1e-4)
    assert len(set(tokens)) > 3, "weights so small that every answer is alike compare nothing"


TEMPLATES = ("vicuna_v1", "llava_v1", "v0", "llava_llama_2", "mistral_instruct", "chatml_direct", "plain")


def test_every_template_gives_the_same_ids_and_answers_as_the_restatement(tmp_path: Path) -> None:
    original, model = build(tmp_path, KINDS["start and end, slow tokenizer"])
    for name in TEMPLATES:
        model.preparer = replace(model.preparer, template=get_template(name))
        prepared = model.preparer.prepare(ask(IMAGES[:1]))
        ids = original_ids(prepared)
        assert ids == expected_ids(original, prepared.prompt), name
        tokens = [token for delta in model.stream(prepared) for token in delta.token_ids]
        assert tokens == answer_plainly(original, ids, IMAGES[:1], 24)[0], name


def test_requests_in_one_batch_get_the_same_answers_as_alone(tmp_path: Path) -> None:
    original, model = build(tmp_path, KINDS["anyres, unpadded, own tower"])
    requests = [ask([], name="text"), ask(IMAGES, name="two"), ask(IMAGES[:1], "Where?", name="one")]
    for request in requests:
        model.add(request)
    together: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while model.engine.has_work:
        for output in model.engine.step():
            together[output.request_id] += output.token_ids  # type: ignore[union-attr]
    images = {"text": [], "two": IMAGES, "one": IMAGES[:1]}
    for request in requests:
        ids = original_ids(model.preparer.prepare(request))
        assert together[request.request_id] == answer_plainly(original, ids, images[request.request_id], 24)[0]


def test_an_images_single_placeholder_is_expanded_for_the_model(tmp_path: Path) -> None:
    _, model = build(tmp_path, KINDS["anyres, unpadded, own tower"])
    prepared = model.preparer.prepare(ask(IMAGES))
    assert original_ids(prepared).count(IMAGE_TOKEN_ID) == 2
    assert prepared.prompt_ids.count(IMAGE_TOKEN_ID) == sum(prepared.num_image_tokens)


def test_a_folders_name_does_not_matter(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    renamed = original.folder.rename(tmp_path / "model")
    assert open_checkpoint(renamed, original.base).adapter == renamed
    assert json.loads((renamed / "config.json").read_text())["model_type"] == "llava_llama"
