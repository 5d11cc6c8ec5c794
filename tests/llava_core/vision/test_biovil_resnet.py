"""The trunk equals transformers' ResNet of the same sizes, and its weights match torchvision's ResNet-50."""

import re

import pytest
import torch
from transformers import ResNetConfig, ResNetModel

from llava_core.vision.biovil_resnet import ResNetTrunk

DEPTHS, WIDTH = (2, 1, 3, 1), 4


def torchvision_name(name: str) -> str:
    """Translates a weight name of transformers' ResNet to torchvision's."""
    name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
    name = re.sub(r"encoder\.stages\.(\d)\.layers\.", lambda match: f"layer{int(match[1]) + 1}.", name)
    name = name.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
    name = re.sub(r"layer\.(\d)\.convolution", lambda match: f"conv{int(match[1]) + 1}", name)
    return re.sub(r"layer\.(\d)\.normalization", lambda match: f"bn{int(match[1]) + 1}", name)


@pytest.fixture(scope="module")
def reference() -> ResNetModel:
    sizes = [4 * WIDTH, 8 * WIDTH, 16 * WIDTH, 32 * WIDTH]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNetModel(ResNetConfig(embedding_size=WIDTH, hidden_sizes=sizes, depths=list(DEPTHS)))
        for name, value in model.state_dict().items():
            if "normalization" in name and value.is_floating_point():
                value.uniform_(0.5, 1.5)
    return model.eval()


def build(reference: ResNetModel) -> ResNetTrunk:
    trunk = ResNetTrunk(DEPTHS, WIDTH)
    trunk.load_state_dict({torchvision_name(name): value for name, value in reference.state_dict().items()})
    return trunk.eval()


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (75, 75)])
@torch.inference_mode()
def test_features_equal_transformers(reference: ResNetModel, size: tuple[int, int]) -> None:
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = reference(pixels).last_hidden_state
    features = build(reference)(pixels)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert features.shape[1] == ResNetTrunk(DEPTHS, WIDTH).num_channels


def test_resnet_50_has_the_weights_of_torchvision() -> None:
    with torch.device("meta"):
        trunk = ResNetTrunk((3, 4, 6, 3), 64)
        # 25,557,032 parameters, minus the classifier's 2048 * 1000 + 1000.
        assert sum(parameter.numel() for parameter in trunk.parameters()) == 23_508_032
        assert trunk(torch.empty(1, 3, 448, 448)).shape == (1, 2048, 14, 14)
    shapes = {name: tuple(value.shape) for name, value in trunk.state_dict().items()}
    assert len(shapes) == 318
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer3.5.conv2.weight"] == (256, 256, 3, 3)
    assert shapes["layer4.0.downsample.0.weight"] == (2048, 1024, 1, 1)
    assert shapes["layer1.0.downsample.1.running_var"] == (256,)
    assert not any(name.startswith("layer1.1.downsample") for name in shapes)
