"""LLaVA-NeXT checkpoints of llava-hf answer as transformers does with its own processor: tiles, ids, logits, tokens."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llava_core.checkpoints.accounting import check_tensors
from llava_core.checkpoints.describe import load_preparer
from llava_core.checkpoints.load import LoadOptions
from llava_core.images.preprocess import preprocess
from llava_core.inference import LocalModel
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from llava_core.vision.clip import normalise
from tests.served import first_logits
from tests.tiny import (
    IMAGE_SIZE,
    build_text_config,
    build_tokenizer,
    build_vision_config,
    hub_name,
    write_json,
    write_weights,
)

# Height first, as transformers has it; the order decides ties.
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


@pytest.fixture(scope="module")
def reference() -> LlavaNextForConditionalGeneration:
    tokenizer = build_tokenizer()
    config = LlavaNextConfig(
        vision_config=build_vision_config(),
        text_config=build_text_config(len(tokenizer), 1024),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlavaNextForConditionalGeneration(config).eval()


def write(folder: Path, model: LlavaNextForConditionalGeneration, rename: Callable[[str], str]) -> Path:
    folder.mkdir()
    write_weights(folder, {rename(name): value for name, value in model.state_dict().items()})
    model.config.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", PROCESSOR.to_dict())
    return folder


PROCESSOR = LlavaNextImageProcessorPil(
    size={"shortest_edge": IMAGE_SIZE},
    crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    image_grid_pinpoints=PINPOINTS,
)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def ask(*images: Image.Image) -> GenerationRequest:
    parts = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        parts.append(ImagePart(buffer.getvalue()))
    sampling = SamplingParams(max_tokens=16, ignore_eos=True)
    return GenerationRequest("r", (Message("user", (*parts, TextPart("What?"))),), sampling)


@pytest.mark.parametrize("rename", [hub_name, str], ids=["hub", "module"])
def test_answers_equal_transformers(
    reference: LlavaNextForConditionalGeneration, tmp_path: Path, rename: Callable[[str], str]
) -> None:
    folder = write(tmp_path / "next", reference, rename)
    check_tensors(folder)
    model = LocalModel(folder, options=LoadOptions(dtype="float32"))
    images = [picture(61, 40), picture(30, 97), picture(50, 50)]
    prepared = model.preparer.prepare(ask(*images))
    image_token = reference.config.image_token_index
    ids = torch.tensor([[image_token if token == IMAGE_TOKEN_ID else token for token in prepared.prompt_ids]])
    given = {
        **PROCESSOR(images, return_tensors="pt"),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }
    with torch.inference_mode():
        expected = reference(**given).logits[0, -1]
    torch.testing.assert_close(first_logits(model, prepared), expected, atol=1e-4, rtol=1e-4)
    generated = reference.generate(**given, max_new_tokens=16, min_new_tokens=16, do_sample=False, eos_token_id=None)
    tokens = [token for delta in model.stream(prepared) for token in delta.token_ids]
    assert tokens == generated[0, ids.shape[1] :].tolist()


def test_low_detail_uses_only_the_overview_like_a_single_tile_in_transformers(
    reference: LlavaNextForConditionalGeneration, tmp_path: Path
) -> None:
    model = LocalModel(write(tmp_path / "next", reference, hub_name), options=LoadOptions(dtype="float32"))
    image = picture(61, 40)
    whole = ask(image)
    image_part, text_part = whole.messages[0].parts
    assert isinstance(image_part, ImagePart)
    low = replace(whole, messages=(Message("user", (replace(image_part, low_detail=True), text_part)),))
    prepared, tiled = model.preparer.prepare(low), model.preparer.prepare(whole)
    assert prepared.num_image_tokens == (5,)
    assert tiled.num_image_tokens > prepared.num_image_tokens
    assert np.array_equal(prepared.images[0].tiles, tiled.images[0].tiles[:1])

    inner = reference.model
    with torch.inference_mode():
        pixels = PROCESSOR([image], return_tensors="pt")["pixel_values"][0, :1]
        seen = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[
            reference.config.vision_feature_layer
        ]
        rows = inner.multi_modal_projector(seen[:, 1:])
        [packed], _ = inner.pack_image_features([rows], [image.size[::-1]], "default", inner.image_newline)
        ids = torch.tensor(prepared.prompt_ids)
        embedded = inner.get_input_embeddings()(ids.clamp(min=0))
        embedded[ids == IMAGE_TOKEN_ID] = packed
        hidden = inner.language_model(inputs_embeds=embedded[None]).last_hidden_state
        expected = reference.lm_head(hidden)[0, -1]
    torch.testing.assert_close(first_logits(model, prepared), expected, atol=1e-4, rtol=1e-4)
    # Through the engine, with the other picture in between: neither's cache is used for the other.
    answers = [[token for delta in model.stream(each) for token in delta.token_ids] for each in (low, whole, low)]
    assert answers[0] == answers[2] != answers[1]


@pytest.mark.parametrize("size", [(61, 40), (30, 97), (28, 28), (56, 56), (200, 11), (57, 55), (1, 90)])
def test_tiles_equal_transformers(
    tmp_path: Path, reference: LlavaNextForConditionalGeneration, size: tuple[int, int]
) -> None:
    config = load_preparer(write(tmp_path / "next", reference, hub_name)).preprocess
    ours = normalise(torch.from_numpy(preprocess(picture(*size), config).copy()), config)
    theirs = PROCESSOR([picture(*size)], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
