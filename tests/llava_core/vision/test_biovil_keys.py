"""Key tables: every name of the released file is accounted for, and every name of the tower has a counterpart."""

import pytest
import torch

from llava_core.config import VisionConfig
from llava_core.images.biovil import BioVilPreprocessConfig
from llava_core.vision.biovil_keys import from_biovil_t, tensor_names, to_biovil_t
from llava_core.vision.biovil_t import BioVilTTower

DROPPED = [
    "encoder.vit_pooler.pos_embed",
    "encoder.encoder.fc.weight",
    "encoder.encoder.fc.bias",
    "projector.model.0.weight",
    *(f"projector.model.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    "projector.model.3.weight",
    "projector.model.3.bias",
]


def batch_norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.num_batches_tracked": (), **{f"{name}.{kind}": (width,) for kind in kinds}}


def trunk() -> dict[str, tuple[int, ...]]:
    shapes = {"conv1.weight": (64, 3, 7, 7), **batch_norm("bn1", 64)}
    inputs = 64
    for stage, (depth, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(depth):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1.weight"] = (width, inputs, 1, 1)
            shapes[f"{name}.conv2.weight"] = (width, width, 3, 3)
            shapes[f"{name}.conv3.weight"] = (4 * width, width, 1, 1)
            for index, outputs in enumerate((width, width, 4 * width), 1):
                shapes |= batch_norm(f"{name}.bn{index}", outputs)
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * width, inputs, 1, 1)
                shapes |= batch_norm(f"{name}.downsample.1", 4 * width)
            inputs = 4 * width
    return shapes


def pooler() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"type_embed": (2, 1, 256), "norm_post.weight": (256,)}
    shapes["norm_post.bias"] = (256,)
    for block in range(3):
        for layer in ("attn.proj_q", "attn.proj_k", "attn.proj_v", "attn.proj", "mlp.fc1", "mlp.fc2"):
            shapes[f"blocks.{block}.{layer}.weight"] = (256, 256)
        for layer in ("attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"):
            shapes[f"blocks.{block}.{layer}.bias"] = (256,)
        shapes[f"blocks.{block}.norm1.weight"] = shapes[f"blocks.{block}.norm2.weight"] = (256,)
    return shapes


def released() -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the weights that the tower reads, written down independently of it."""
    return {
        **{f"encoder.encoder.{name}": shape for name, shape in trunk().items()},
        "encoder.backbone_to_vit.weight": (256, 2048, 1, 1),
        "encoder.missing_previous_emb": (1, 256, 1, 1),
        **{f"encoder.vit_pooler.{name}": shape for name, shape in pooler().items()},
    }


def test_released_names_match_the_towers_exactly() -> None:
    with torch.device("meta"):
        vision = VisionConfig(448, 32, 512, -1, "patch", {"model_type": "biovil_t"})
        state = BioVilTTower(vision, BioVilPreprocessConfig()).state_dict()
    ours = {name: tuple(value.shape) for name, value in state.items()}
    assert {from_biovil_t(name): shape for name, shape in released().items()} == ours
    assert {to_biovil_t(name): shape for name, shape in ours.items()} == released()
    assert tensor_names() == set(ours)


@pytest.mark.parametrize("name", DROPPED)
def test_weights_that_do_not_reach_the_language_model_are_dropped(name: str) -> None:
    assert from_biovil_t(name) is None


@pytest.mark.parametrize(
    "name", ["", "projector.model.2.weight", "encoder.encoder.fc.scale", "encoder.pos_embed", "classifier.weight"]
)
def test_any_other_name_is_an_error(name: str) -> None:
    with pytest.raises(KeyError):
        from_biovil_t(name)


@pytest.mark.parametrize("name", ["", "model.embeddings.class_embedding", "trunk.conv1.weight"])
def test_a_name_unknown_to_the_tower_is_an_error(name: str) -> None:
    with pytest.raises(KeyError):
        to_biovil_t(name)
