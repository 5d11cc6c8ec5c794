"""The floors' arithmetic against PyTorch's operation count for a real model of the same shape."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from benchmarks.peers.checkpoints import SHAPES, Network, Shape, make_config
from benchmarks.peers.floors import Rates, cache_bytes, encode_flop, floor, measure_rates, prefill_flop, weight_bytes

SHAPE = Shape(Network(16, 32, 3, 2, 2), Network(32, 64, 2, 4, 2), image=28, vocabulary=400)


@pytest.fixture(scope="module")
def model() -> Any:
    model: Any = LlavaForConditionalGeneration(make_config(SHAPE, num_tokens=400, image_token=399)).eval()
    # PyTorch counts its operations on every machine.
    model.set_attn_implementation("eager")
    return model


def counted(run: Any) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_encoding_counts_projector_and_tower_except_its_last_layer(model: Any) -> None:
    pixels = torch.zeros(1, 3, 28, 28)
    everything = counted(lambda: model.get_image_features(pixel_values=pixels))
    one_layer = counted(lambda: model.model.vision_tower.encoder.layers[0](torch.zeros(1, 5, 16), None))
    assert encode_flop(SHAPE) == pytest.approx(everything - one_layer)


def test_prefill_counts_only_causal_attention(model: Any) -> None:
    ids = torch.ones(1, 20, dtype=torch.int64)
    everything = counted(lambda: model(input_ids=ids, logits_to_keep=1, use_cache=False))
    # PyTorch also counts attention to later tokens.
    after = 4 * (20 * 19 / 2) * SHAPE.text.hidden * SHAPE.text.layers
    assert prefill_flop(SHAPE, 20, 20) == pytest.approx(everything - after)
    beginning_known = prefill_flop(SHAPE, 12, 12) + prefill_flop(SHAPE, 8, 20)
    assert beginning_known == pytest.approx(prefill_flop(SHAPE, 20, 20) + prefill_flop(SHAPE, 0, 20))


def test_a_step_reads_every_decoder_matrix_and_all_keys_and_values(model: Any) -> None:
    parts = [*model.model.language_model.layers.parameters(), model.lm_head.weight]
    assert weight_bytes(SHAPE) == 2 * sum(part.numel() for part in parts if part.dim() == 2)
    cache = model(input_ids=torch.ones(1, 20, dtype=torch.int64)).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cache_bytes(SHAPE.text, 20) == 2 * held


def test_floors_follow_from_rates() -> None:
    shape, rates = SHAPES["mid"], Rates(flop_per_s=1e12, bytes_per_s=1e10)
    alone = floor(shape, rates, clients=1, prompt_tokens=616, tokens=64, has_seen=False)
    many = floor(shape, rates, clients=8, prompt_tokens=616, tokens=64, has_seen=False)
    again = floor(shape, rates, clients=8, prompt_tokens=616, tokens=64, has_seen=True)
    assert alone["first_ms_p50"] == many["first_ms_p50"] == pytest.approx(720, rel=0.01)
    assert 60.6 < alone["token_ms_p50"] < many["token_ms_p50"]
    assert again["first_ms_p50"] < 0.05 * many["first_ms_p50"]
    assert alone["tokens_per_s"] < many["tokens_per_s"] < again["tokens_per_s"]


def test_this_machines_rates_are_measured() -> None:
    threads = torch.get_num_threads()
    rates = measure_rates()
    assert rates.flop_per_s > 1e9
    assert rates.bytes_per_s > 1e8
    assert torch.get_num_threads() == threads
