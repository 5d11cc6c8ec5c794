"""Splicing against a loop over single positions, for any mix of text and images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llava_core.models.splice import splice
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID

VOCAB, HIDDEN = 11, 5
EMBEDDING = nn.Embedding(VOCAB, HIDDEN).requires_grad_(False)
TOKEN = st.one_of(st.integers(0, VOCAB - 1), st.just(IMAGE_TOKEN_ID))


def slow_splice(ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    out, used = [], 0
    for token in ids.flatten().tolist():
        if token == IMAGE_TOKEN_ID:
            out.append(rows[used])
            used += 1
        else:
            out.append(EMBEDDING.weight[token])
    assert used == len(rows)
    return torch.stack(out).reshape(*ids.shape, HIDDEN)


@given(
    st.integers(1, 3).flatmap(
        lambda rows: st.lists(st.lists(TOKEN, min_size=4, max_size=4), min_size=rows, max_size=rows)
    )
)
def test_splicing_any_mix_equals_the_loop(tokens: list[list[int]]) -> None:
    ids = torch.tensor(tokens)
    rows = torch.randn(int((ids == IMAGE_TOKEN_ID).sum()), HIDDEN)
    assert torch.equal(splice(ids, EMBEDDING, rows), slow_splice(ids, rows))
    if not len(rows):
        assert torch.equal(splice(ids, EMBEDDING, None), slow_splice(ids, rows))


@given(st.lists(TOKEN, min_size=1, max_size=12), st.integers(0, 12))
def test_a_wrong_number_of_rows_is_an_error_with_both_numbers(tokens: list[int], num_rows: int) -> None:
    needed = tokens.count(IMAGE_TOKEN_ID)
    if needed != num_rows:
        with pytest.raises(ValueError, match=f"{needed} image placeholders but {num_rows} feature rows"):
            splice(torch.tensor(tokens), EMBEDDING, torch.zeros(num_rows, HIDDEN))


def test_missing_features_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 image placeholders but 0"):
        splice(torch.tensor([IMAGE_TOKEN_ID]), EMBEDDING, None)


def test_the_image_placeholder_is_never_embedded() -> None:
    seen: list[torch.Tensor] = []

    def embed(ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return EMBEDDING(ids)

    splice(torch.tensor([3, IMAGE_TOKEN_ID, 4]), embed, torch.zeros(1, HIDDEN))
    assert torch.cat(seen).tolist() == [3, 4]


def test_features_are_cast_to_the_dtype_of_the_embeddings() -> None:
    out = splice(torch.tensor([1, IMAGE_TOKEN_ID]), EMBEDDING, torch.ones(1, HIDDEN, dtype=torch.bfloat16))
    assert out.dtype == torch.float32
    assert out[1].tolist() == [1.0] * HIDDEN


def test_gradients_reach_the_features() -> None:
    rows = torch.zeros(1, HIDDEN, requires_grad=True)
    splice(torch.tensor([1, IMAGE_TOKEN_ID, 2]), EMBEDDING, rows).sum().backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[1.0] * HIDDEN]
