"""The engine against the device: the share of its measured peak rates that decoding, prefill and the tower reach.

A floor counts only unavoidable work (benchmarks/peers/floors.py): each weight, and each cached key and value, read once
per step; matrix products and attention. A share is the floor divided by the measured time. transformers runs the same
workloads in the same run, before the decoder is fused, which cannot be undone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.device import build, median_seconds, release, wait_for
from benchmarks.peers.checkpoints import Network, Shape
from benchmarks.peers.floors import BYTES, Rates, cache_bytes, encode_flop, prefill_flop, weight_bytes
from llava_core.config import VisionConfig
from llava_core.engine.config import EngineConfig
from llava_core.engine.engine import Engine
from llava_core.images.preprocess import PreprocessConfig
from llava_core.kernels.attention import NAME as DENSE
from llava_core.models.fused import ready_language
from llava_core.models.language import LanguageSide
from llava_core.types import EngineRequest, SamplingParams, TokenDelta
from llava_core.vision.inference import ready_tower
from llava_core.vision.towers import VisionTower, build_tower

# LLaVA-1.5-7B.
LLAVA_7B = Shape(Network(1024, 4096, 24, 16, 16), Network(4096, 11_008, 32, 32, 32), image=336, vocabulary=32_000)


@dataclass(frozen=True)
class Works:
    """The workloads: decode steps of one and of many answers after prompts of the given lengths, prompts prefilled in
    one step, pictures encoded in one batch; and the sizes of the products and copies that give the device's rates."""

    alone_context: int = 640
    many: int = 64
    many_context: int = 1024
    steps: int = 32
    prompts: int = 8
    prompt_tokens: int = 640
    pictures: int = 32
    repeats: int = 5
    product: int = 8192
    copied_bytes: int = 2**30


# For trying out the command itself.
SMALL = Works(
    alone_context=40, many=4, many_context=64, steps=4, prompts=2, prompt_tokens=64, pictures=2, repeats=2, product=256,
    copied_bytes=2**20,
)  # fmt: skip


class NoText:
    """Skips detokenization, which costs the same everywhere."""

    def decode(self, ids: object) -> str:
        return ""


def measure_shares(side: LanguageSide, shape: Shape, works: Works) -> dict[str, Any]:
    """Measure all workloads. Fuses `side`."""
    device, dtype = side.device, side.decoder.dtype
    rates = measure_device(device, dtype, works)
    theirs = in_transformers(side, works)
    release(device)
    ready_language(side)
    ours = in_engine(side, works)
    release(device)
    tower = build_clip(shape, device, dtype)
    ready_tower(tower)
    ours["tower"] = encode_seconds(tower, works)
    theirs["tower"] = encode_seconds(build_clip(shape, device, dtype, attention="sdpa"), works)
    bounds = floors(shape, works, rates)
    return {
        "bandwidth_gb_per_s": round(rates.bytes_per_s / 1e9),
        "products_tflop_per_s": round(rates.flop_per_s / 1e12, 1),
        **{work: row(bounds[work], ours[work], theirs[work]) for work in bounds},
    }


def row(floor_s: float, ours_s: float, theirs_s: float) -> dict[str, float]:
    return {
        "floor_ms": round(floor_s * 1e3, 3),
        "engine_ms": round(ours_s * 1e3, 3),
        "share": round(floor_s / ours_s, 3),
        "transformers_ms": round(theirs_s * 1e3, 3),
        "transformers_over_engine": round(theirs_s / ours_s, 2),
    }


def floors(shape: Shape, works: Works, rates: Rates) -> dict[str, float]:
    """Return the floor of each workload in seconds: no program could be faster."""

    def step(rows: int, context: int) -> float:
        # The average context: half way through the measured steps.
        kept = rows * cache_bytes(shape.text, context + works.steps / 2)
        return (weight_bytes(shape) + kept) / rates.bytes_per_s

    projector = 2 * shape.image_tokens * (shape.vision.hidden + shape.text.hidden) * shape.text.hidden
    prompts = works.prompts * prefill_flop(shape, works.prompt_tokens, works.prompt_tokens)
    return {
        "decode, alone": step(1, works.alone_context),
        "decode, many": step(works.many, works.many_context),
        "prefill": prompts / rates.flop_per_s,
        "tower": works.pictures * (encode_flop(shape) - projector) / rates.flop_per_s,
    }


def measure_device(device: torch.device, dtype: torch.dtype, works: Works) -> Rates:
    """Measure the device's rates with products of random square matrices, and with a copy, which reads and writes."""
    assert dtype.itemsize == BYTES or device.type == "cpu", "floors assume a half precision"
    left, right = (torch.randn(works.product, works.product, device=device).to(dtype) for _ in range(2))
    product_s = median_seconds(lambda: left @ right, works.repeats, device)
    source = torch.ones(works.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = median_seconds(lambda: target.copy_(source), works.repeats, device)
    return Rates(2 * works.product**3 / product_s, 2 * works.copied_bytes / copy_s)


def in_engine(side: LanguageSide, works: Works) -> dict[str, float]:
    return {
        "decode, alone": decode_seconds(side, works, 1, works.alone_context),
        "decode, many": decode_seconds(side, works, works.many, works.many_context),
        "prefill": prefill_seconds(side, works),
    }


def decode_seconds(side: LanguageSide, works: Works, rows: int, context: int) -> float:
    """Return the median time of a step that decodes `rows` answers and nothing else, from schedule to tokens."""
    chunk = 8192
    num_tokens = works.steps + rows * context // chunk + 2
    limits = EngineConfig(
        max_running=rows,
        max_step_tokens=chunk + rows,
        prefill_chunk=chunk,
        # One block more for each than it can fill, so that none is preempted.
        cache_tokens=rows * (context + num_tokens + 2 * 16),
    )
    engine = Engine(side, NoText(), limits)
    for request in make_requests(rows, context, num_tokens):
        engine.add_request(request)
    seconds = []
    while engine.has_work:
        before, began = engine.stats.computed_tokens, time.perf_counter()
        outputs = engine.step()
        taken = time.perf_counter() - began
        assert all(isinstance(output, TokenDelta) for output in outputs), outputs
        if len(outputs) == rows and engine.stats.computed_tokens - before == rows:
            seconds.append(taken)
    assert len(seconds) >= works.steps // 2, seconds
    return statistics.median(seconds)


def prefill_seconds(side: LanguageSide, works: Works) -> float:
    """Return the median time of a step that prefills all prompts and samples each one's first token."""
    tokens = works.prompts * works.prompt_tokens
    limits = EngineConfig(max_running=works.prompts, max_step_tokens=max(1024, 2 * tokens), cache_tokens=2 * tokens)
    engine = Engine(side, NoText(), limits)
    seconds = []
    for turn in range(works.repeats + 1):
        for request in make_requests(works.prompts, works.prompt_tokens, 1, seed=turn):
            engine.add_request(request)
        before, began = engine.stats.num_steps, time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds.append(time.perf_counter() - began)
        assert engine.stats.num_steps - before == 1, "all prompts in one step"
    return statistics.median(seconds[1:])


def make_requests(count: int, length: int, num_tokens: int, seed: int = 0) -> list[EngineRequest]:
    """Make requests whose prompts share nothing."""
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    return [EngineRequest(f"{i}", ids, [], sampling) for i, ids in enumerate(random_ids(count, length, seed))]


def random_ids(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(5, 3000, (count, length), generator=generator).tolist()
    return ids


def in_transformers(side: LanguageSide, works: Works) -> dict[str, float]:
    def decode(rows: int, context: int) -> float:
        ids = random_ids(rows, context)
        # Warm up; then time one more token, without the prompt.
        generate_seconds(side, ids, 2)
        few, many = (generate_seconds(side, ids, tokens) for tokens in (1, works.steps + 1))
        return (many - few) / works.steps

    prompts = random_ids(works.prompts, works.prompt_tokens)
    return {
        "decode, alone": decode(1, works.alone_context),
        "decode, many": decode(works.many, works.many_context),
        "prefill": statistics.median(generate_seconds(side, prompts, 1) for _ in range(works.repeats)),
    }


@torch.inference_mode()
def generate_seconds(side: LanguageSide, ids: Sequence[Sequence[int]], num_tokens: int) -> float:
    decoder: Any = side.decoder
    tokens = torch.tensor(ids, device=side.device)
    wait_for(side.device)
    began = time.perf_counter()
    out = decoder.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
    )
    wait_for(side.device)
    assert out.shape[1] == tokens.shape[1] + num_tokens, out.shape
    return time.perf_counter() - began


def build_clip(shape: Shape, device: torch.device, dtype: torch.dtype, *, attention: str = DENSE) -> VisionTower:
    """Build a CLIP of this shape with random weights, with features from the layer that LLaVA uses."""
    vision = VisionConfig(
        shape.image,
        shape.patch,
        shape.vision.hidden,
        -2,
        "patch",
        {
            "model_type": "clip_vision_model",
            "hidden_size": shape.vision.hidden,
            "intermediate_size": shape.vision.mlp,
            "num_hidden_layers": shape.vision.layers,
            "num_attention_heads": shape.vision.heads,
            "image_size": shape.image,
            "patch_size": shape.patch,
        },
    )
    preprocess = PreprocessConfig(size=shape.image)
    return build(lambda: build_tower(vision, preprocess, attention=attention), device, dtype)


@torch.inference_mode()
def encode_seconds(tower: VisionTower, works: Works) -> float:
    size, device = tower.preprocess.size, tower.model.device
    tiles = torch.randint(0, 256, (works.pictures, size, size, 3), dtype=torch.uint8, device=device)
    return median_seconds(lambda: tower(tiles), works.repeats, device)
