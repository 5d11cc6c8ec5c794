"""Checkpoints with a SigLIP tower, in both dialects, whose side is no multiple of the patch: features and answers."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig, SiglipVisionModel

from llava_core.asking import original_ids
from llava_core.checkpoints.accounting import check_tensors
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.load import LoadOptions
from llava_core.config import build_vision_config
from llava_core.errors import CheckpointError
from llava_core.inference import LocalModel
from llava_core.types import GenerationRequest, ImagePart, Message, PreparedRequest, SamplingParams, TextPart
from llava_core.vision.encode import encode_images
from tests.original import Kind, Original, answer_plainly, write_json, write_original
from tests.tiny import Names, build_text_config, build_tokenizer, write_checkpoint

# 30 pixels are two patches of 14 and two uncovered pixels, like so400m's 384 pixels: 27 patches and six pixels.
SIDE, PATCH, TOKENS, WIDTH, LAYER = 30, 14, 4, 16, -2
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
PROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 52, 3), np.uint8))


def vision_model() -> SiglipVisionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipVisionModel(SiglipVisionConfig(**TOWER))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def pixels(image: Image.Image) -> torch.Tensor:
    values = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    return torch.from_numpy((values / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]


def prepare(model: LocalModel) -> PreparedRequest:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    parts = (ImagePart(buffer.getvalue()), TextPart("What is it?"))
    return model.preparer.prepare(GenerationRequest("r", (Message("user", parts),), SamplingParams(max_tokens=12)))


def answer(model: LocalModel, prepared: PreparedRequest) -> list[int]:
    return [token for delta in model.stream(prepared) for token in delta.token_ids]


@pytest.fixture(scope="module")
def llava_hf() -> LlavaForConditionalGeneration:
    tokenizer = build_tokenizer()
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**TOWER),
        text_config=build_text_config(len(tokenizer), 512),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=LAYER,
        vision_feature_select_strategy="full",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision_model().state_dict())
    return model.eval()


@pytest.mark.parametrize("names", ["hub", "module"])
@torch.inference_mode()
def test_a_llava_hf_checkpoint_gives_the_same_answers_as_transformers(
    llava_hf: LlavaForConditionalGeneration, tmp_path: Path, names: Names
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", llava_hf, names=names)
    write_json(folder / "preprocessor_config.json", PROCESSOR)
    check_tensors(folder)
    model = LocalModel(folder, options=LoadOptions(dtype="float32"))
    prepared = prepare(model)
    assert prepared.num_image_tokens == (TOKENS,)
    (features,) = encode_images(model.tower, prepared.images)
    states = vision_model()(pixels(PICTURE), output_hidden_states=True).hidden_states
    torch.testing.assert_close(features.features, states[LAYER][0], atol=1e-4, rtol=1e-4)
    image_token = llava_hf.config.image_token_id
    ids = torch.tensor([[image_token if token < 0 else token for token in prepared.prompt_ids]])
    expected = llava_hf.generate(input_ids=ids, pixel_values=pixels(PICTURE), max_new_tokens=12, do_sample=False)
    assert answer(model, prepared) == expected[0, ids.shape[1] :].tolist()


def write_original_siglip(root: Path, *, is_inside: bool) -> Original:
    """Write an original whose tower folder holds both halves of a SigLIP, under the names of transformers 4."""
    original = write_original(root, Kind())
    weights = {f"vision_model.{name}": value for name, value in vision_model().state_dict().items()}
    shutil.rmtree(root / "tower")
    (root / "tower").mkdir()
    write_json(root / "tower" / "config.json", {"model_type": "siglip", "vision_config": TOWER})
    write_json(root / "tower" / "preprocessor_config.json", PROCESSOR)
    text_half = {"logit_scale": torch.ones(1), "logit_bias": torch.ones(1), "text_model.head.bias": torch.zeros(3)}
    save_file({**({} if is_inside else weights), **text_half}, root / "tower" / "model.safetensors")
    if is_inside:
        file = original.folder / "model.safetensors"
        inside = {f"model.vision_tower.vision_tower.{name}": value for name, value in weights.items()}
        save_file({**load_file(file), **inside}, file)
        config = json.loads((original.folder / "config.json").read_text())
        write_json(original.folder / "config.json", {**config, "unfreeze_mm_vision_tower": True})
    return original


def projected(original: Original, image: Image.Image) -> torch.Tensor:
    square = Image.new("RGB", (max(image.size), max(image.size)), (127, 127, 127))
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    rows = vision_model()(pixels(square), output_hidden_states=True).hidden_states[LAYER][0]
    first, second = (
        (original.weights[f"model.mm_projector.{index}.weight"], original.weights[f"model.mm_projector.{index}.bias"])
        for index in (0, 2)
    )
    return functional.linear(functional.gelu(functional.linear(rows, *first)), *second)


@pytest.mark.parametrize("has_processor", [True, False])
@pytest.mark.parametrize("is_inside", [True, False])
def test_an_original_gives_the_same_answers_as_its_restatement(
    tmp_path: Path, *, is_inside: bool, has_processor: bool
) -> None:
    original = write_original_siglip(tmp_path, is_inside=is_inside)
    if not has_processor:
        (tmp_path / "tower" / "preprocessor_config.json").unlink()
    checkpoint = open_checkpoint(original.folder, offline=True)
    check_tensors(checkpoint)
    model = LocalModel(checkpoint, options=LoadOptions(dtype="float32"), template="vicuna_v1")
    prepared = prepare(model)
    assert prepared.num_image_tokens == (TOKENS,)
    assert answer(model, prepared) == answer_plainly(original, original_ids(prepared), [PICTURE], 12, projected)[0]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    original = write_original_siglip(tmp_path, is_inside=False)
    file = tmp_path / "tower" / "model.safetensors"
    weights = load_file(file)
    del weights["vision_model.embeddings.position_embedding.weight"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"tower model\.embeddings\.position_embedding\.weight is missing"):
        check_tensors(open_checkpoint(original.folder, offline=True))


def test_so400m_has_27_patches_per_side() -> None:
    config = {**TOWER, "model_type": "siglip_vision_model", "image_size": 384}
    assert build_vision_config(config, -2, "full", "vision_feature_layer").tokens_per_tile == 27**2 == 729
