"""The temporal pooler equals a slow reference in loops; positions are written out; dropout applies only in training."""

import math

import pytest
import torch
from torch import Tensor

from llava_core.vision.biovil_pooler import TemporalPooler, drop_path, sine_position_embedding

WIDTH, GRID, HEADS, BLOCKS = 8, 3, 2, 2


@pytest.fixture
def pooler() -> TemporalPooler:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pooler = TemporalPooler(WIDTH, GRID, num_heads=HEADS, num_blocks=BLOCKS)
        for parameter in pooler.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return pooler.eval()


@pytest.fixture
def maps() -> tuple[Tensor, Tensor]:
    current, prior = torch.randn(2, 2, WIDTH, GRID, GRID, generator=torch.Generator().manual_seed(1))
    return current, prior


def position(row: int, column: int, width: int, grid: int) -> Tensor:
    """Computes the position embedding of one patch, feature by feature."""
    half = width // 2
    values = []
    for place in (row, column):
        angle = (place + 1) / (grid + 1e-6) * 2 * math.pi
        for feature in range(half):
            frequency = angle / 10000 ** (2 * (feature // 2) / half)
            values.append(math.sin(frequency) if feature % 2 == 0 else math.cos(frequency))
    return torch.tensor(values)


def norm(token: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    spread = ((token - token.mean()) ** 2).mean()
    return (token - token.mean()) / torch.sqrt(spread + 1e-6) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(tokens: list[Tensor], weights: dict[str, Tensor], name: str) -> list[Tensor]:
    query, key, value = ([weights[f"{name}.proj_{kind}.weight"] @ token for token in tokens] for kind in "qkv")
    size = WIDTH // HEADS
    attended = []
    for one in query:
        heads = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = torch.stack([one[part] @ other[part] / math.sqrt(size) for other in key]).softmax(0)
            heads.append(sum(score * other[part] for score, other in zip(scores, value, strict=True)))
        attended.append(weights[f"{name}.proj.weight"] @ torch.cat(heads) + weights[f"{name}.proj.bias"])
    return attended


def reference_pooling(pooler: TemporalPooler, current: Tensor, prior: Tensor) -> Tensor:
    """Computes the pooler for one pair of maps (WIDTH, GRID, GRID), token by token."""
    weights = pooler.state_dict()
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    tokens, where = [], []
    for kind, features in enumerate((current, prior)):
        for row, column in cells:
            tokens.append(features[:, row, column])
            where.append(position(row, column, WIDTH, GRID) + weights["type_embed"][kind, 0])
    for block in range(BLOCKS):
        name = f"blocks.{block}"
        inputs = [norm(t, weights, f"{name}.norm1") + w for t, w in zip(tokens, where, strict=True)]
        tokens = [t + a for t, a in zip(tokens, attend(inputs, weights, f"{name}.attn"), strict=True)]
        for index, token in enumerate(tokens):
            hidden = weights[f"{name}.mlp.fc1.weight"] @ norm(token, weights, f"{name}.norm2")
            hidden = hidden + weights[f"{name}.mlp.fc1.bias"]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            tokens[index] = token + weights[f"{name}.mlp.fc2.weight"] @ hidden + weights[f"{name}.mlp.fc2.bias"]
    result = torch.zeros(WIDTH, GRID, GRID)
    for index, (row, column) in enumerate(cells):
        result[:, row, column] = norm(tokens[index], weights, "norm_post")
    return result


@torch.inference_mode()
def test_difference_features_equal_the_reference(pooler: TemporalPooler, maps: tuple[Tensor, Tensor]) -> None:
    got = pooler(*maps)
    expected = torch.stack([reference_pooling(pooler, current, prior) for current, prior in zip(*maps, strict=True)])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_swapping_current_and_prior_changes_the_result(pooler: TemporalPooler, maps: tuple[Tensor, Tensor]) -> None:
    current, prior = maps
    assert not torch.allclose(pooler(current, prior), pooler(prior, current), atol=1e-2)


@pytest.mark.parametrize(("grid", "width"), [(14, 256), (3, 8)])
def test_positions_equal_the_written_out_ones(grid: int, width: int) -> None:
    got = sine_position_embedding(grid, width)
    expected = torch.stack([position(row, column, width, grid) for row in range(grid) for column in range(grid)])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_positions_are_computed_and_not_saved(pooler: TemporalPooler) -> None:
    assert "position" not in pooler.state_dict()
    assert pooler.position.shape == (GRID * GRID, WIDTH)


def test_a_map_of_another_size_fails_an_assertion(pooler: TemporalPooler) -> None:
    with pytest.raises(AssertionError, match=r"not \(3, 3\)"):
        pooler(torch.zeros(1, WIDTH, 2, 2), torch.zeros(1, WIDTH, 2, 2))


def test_dropout_applies_only_in_training(pooler: TemporalPooler, maps: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(pooler(*maps), pooler(*maps))
    pooler.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(pooler(*maps), pooler(*maps))


def test_drop_path_keeps_the_mean() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = drop_path(torch.ones(4000, 2, 3), training=True)
    assert dropped.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert abs(float(dropped.mean()) - 1) < 0.05
    assert (dropped == dropped[:, :1, :1]).all()
