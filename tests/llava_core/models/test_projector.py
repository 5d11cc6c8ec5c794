"""Projectors: the layers of every kind by their checkpoint names, and equality with transformers."""

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from llava_core.errors import CheckpointError
from llava_core.models.projector import Projector
from tests.tiny import HIDDEN, VISION_HIDDEN


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("identity", []),
        ("linear", ["0.weight", "0.bias"]),
        ("mlp1x_gelu", ["0.weight", "0.bias"]),
        ("mlp2x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    ],
)
def test_parameters_are_named_as_in_the_original_checkpoints(kind: str, names: list[str]) -> None:
    assert list(Projector(kind, 8, 8).state_dict()) == names


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_the_last_axis_is_projected(kind: str) -> None:
    assert Projector(kind, 8, 12)(torch.zeros(3, 5, 8)).shape == (3, 5, 12)


def test_identity_changes_nothing() -> None:
    features = torch.randn(2, 8)
    assert torch.equal(Projector("identity", 8, 8)(features), features)


def test_two_layers_equal_transformers(reference_model: LlavaForConditionalGeneration) -> None:
    reference = reference_model.model.multi_modal_projector
    projector = Projector("mlp2x_gelu", VISION_HIDDEN, HIDDEN)
    weights = reference.state_dict()
    renamed = {name.replace("linear_1", "0").replace("linear_2", "2"): value for name, value in weights.items()}
    projector.load_state_dict(renamed)
    features = torch.randn(7, VISION_HIDDEN)
    torch.testing.assert_close(projector(features), reference(features))


def test_bias_can_be_left_out() -> None:
    assert list(Projector("mlp2x_gelu", 8, 8, bias=False).state_dict()) == ["0.weight", "2.weight"]


def test_the_activation_is_exact_gelu() -> None:
    (activation,) = (layer for layer in Projector("mlp2x_gelu", 8, 8) if not isinstance(layer, nn.Linear))
    torch.testing.assert_close(activation(torch.tensor(1.0)), torch.tensor(0.8413447))


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_relu", "qformer", ""])
def test_an_unknown_kind_is_refused_and_the_known_ones_listed(kind: str) -> None:
    with pytest.raises(CheckpointError, match="known are linear"):
        Projector(kind, 8, 8)


def test_identity_between_different_sizes_is_refused() -> None:
    with pytest.raises(CheckpointError, match="8 features into 12"):
        Projector("identity", 8, 12)
