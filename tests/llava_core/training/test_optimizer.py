"""Two optimizers as one: the assignment of parameters, equal steps, and seamless resuming from a checkpoint."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from llava_core.training.optimizer import MuonAdamW, hidden_matrices

SPEEDS = {"learning_rate": 1e-2, "muon_learning_rate": 5e-2}


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(config)


def take_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_hidden_matrices_exclude_embeddings_and_head(model: LlamaForCausalLM) -> None:
    hidden = {id(parameter) for parameter in hidden_matrices(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in hidden}
    assert len(names) == 7
    assert all(name.startswith("model.layers.0.") and name.endswith("_proj.weight") for name in names)


def test_frozen_parameters_are_not_hidden_matrices(model: LlamaForCausalLM) -> None:
    model.model.layers.requires_grad_(False)
    assert hidden_matrices(model) == []


def test_steps_equal_those_of_the_two_optimizers(model: LlamaForCausalLM) -> None:
    start = weights(model)
    ours = MuonAdamW(model, **SPEEDS, weight_decay=0.1)
    for seed in range(3):
        take_step(model, ours, seed)
    got = weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    matrices = {name: p for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    muon = Muon(matrices.values(), lr=5e-2, weight_decay=0.1)
    adam = AdamW(others, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    for seed in range(3):
        ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        muon.step()
        adam.step()
    assert all(torch.equal(got[name], value) for name, value in weights(model).items())


def test_a_scheduler_affects_both_optimizers(model: LlamaForCausalLM) -> None:
    optimizer = MuonAdamW(model, **SPEEDS, weight_decay=0.1)
    before = weights(model)
    LambdaLR(optimizer, lambda _: 0.0)
    take_step(model, optimizer, 0)
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_resuming_from_a_checkpoint_gives_the_same_weights(model: LlamaForCausalLM) -> None:
    optimizer = MuonAdamW(model, **SPEEDS, weight_decay=0.1)
    take_step(model, optimizer, 0)
    middle, state = weights(model), copy.deepcopy(optimizer.state_dict())
    take_step(model, optimizer, 1)
    through = weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(middle[name])
    resumed = MuonAdamW(model, **SPEEDS, weight_decay=0.1)
    resumed.load_state_dict(state)
    take_step(model, resumed, 1)
    assert all(torch.equal(through[name], value) for name, value in weights(model).items())
