"""The ResNet trunk of BioViL-T: pixels in, the last residual stage's feature map out (He et al., arXiv 1512.03385).

The variant with the stride in the 3x3 convolution, as torchvision builds it, and with torchvision's weight names, which
every checkpoint of this trunk uses. Has no classifier on top. Knows nothing about X-rays.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

EXPANSION = 4


class ResNetTrunk(nn.Module):
    """Stem and four stages of bottleneck blocks. ResNet-50 has depths (3, 4, 6, 3) and width 64."""

    def __init__(self, depths: Sequence[int], width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        first, second, third, fourth = depths
        self.layer1 = _stage(width, width, first, stride=1)
        self.layer2 = _stage(EXPANSION * width, 2 * width, second, stride=2)
        self.layer3 = _stage(EXPANSION * 2 * width, 4 * width, third, stride=2)
        self.layer4 = _stage(EXPANSION * 4 * width, 8 * width, fourth, stride=2)
        self.num_channels = EXPANSION * 8 * width

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, num_channels, H / 32, W / 32)."""
        stem = functional.relu(self.bn1(self.conv1(pixels)))
        features = functional.max_pool2d(stem, 3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features = stage(features)
        return features


class Bottleneck(nn.Module):
    """1x1 to `width` channels, 3x3 with the stride, 1x1 to four times as many, and the input added."""

    def __init__(self, num_inputs: int, width: int, *, stride: int) -> None:
        super().__init__()
        num_outputs = EXPANSION * width
        self.conv1 = nn.Conv2d(num_inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, num_outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(num_outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or num_inputs != num_outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(num_inputs, num_outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(num_outputs)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, num_inputs, H, W) → (N, 4 * width, H / stride, W / stride)."""
        hidden = functional.relu(self.bn1(self.conv1(inputs)))
        hidden = functional.relu(self.bn2(self.conv2(hidden)))
        return functional.relu(self.bn3(self.conv3(hidden)) + self.downsample(inputs))


def _stage(num_inputs: int, width: int, depth: int, *, stride: int) -> nn.Sequential:
    rest = (Bottleneck(EXPANSION * width, width, stride=1) for _ in range(depth - 1))
    return nn.Sequential(Bottleneck(num_inputs, width, stride=stride), *rest)
