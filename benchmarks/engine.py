"""The engine in this process compared with transformers' generate, on the same random weights, without encoding.

    python -m benchmarks.engine [--rounds 3] [--size mid] [--dtype bfloat16] [--threads N] [--json FILE]
    python -m benchmarks.engine --device cuda --size 7b --json FILE

`mid` is a decoder of 24 layers of width 1,024, with prompts as long as LLaVA-1.5's (576 image tokens); `tiny` shows the
cost of bookkeeping. All requests begin with the same system text. All contenders take turns in every round; the figures
are medians. The engine also runs with transformers' own modules, which shows the gain from fusing and packing, and
without our kernels, which shows the speed on a machine without a C compiler. On a GPU, or with `--shares`, the device's
peak rates are measured too, and the share of them that is reached (benchmarks/shares.py).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import build, describe_device, release
from benchmarks.machine import describe_machine
from benchmarks.peers.checkpoints import CONTEXT, SHAPES, Shape
from benchmarks.shares import LLAVA_7B, SMALL, NoText, Works, measure_shares
from llava_core.checkpoints.files import DEFAULT_MODEL
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.engine.attention import Backend
from llava_core.engine.attention_cpu import CpuBackend
from llava_core.engine.config import EngineConfig
from llava_core.engine.engine import Engine
from llava_core.models.fused import ready_language
from llava_core.models.language import LanguageSide
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.types import EngineRequest, ImageFeatures, SamplingParams, TokenDelta

NUM_TOKENS = 64
SYSTEM, QUESTION = 20, 40

SIZES = {**SHAPES, "7b": LLAVA_7B}

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="default: every core")
    parser.add_argument("--shares", action="store_true", help="measure them on a CPU too, on a small scale")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    shape, device = SIZES[options.size], torch.device(options.device)
    side = build_side(shape, getattr(torch, options.dtype), device)
    results = {
        "machine": {**describe_machine(), "threads": torch.get_num_threads(), "device": describe_device(device)},
        "size": options.size,
        "parameters_m": round(sum(value.numel() for value in side.parameters()) / 1e6),
        "dtype": options.dtype,
        **measure(side, options.rounds, shape.image_tokens),
    }
    if device.type == "cuda" or options.shares:
        release(device)
        results["shares"] = measure_shares(side, shape, Works() if device.type == "cuda" else SMALL)
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def build_side(shape: Shape, dtype: torch.dtype, device: torch.device) -> LanguageSide:
    config, decoder = open_checkpoint(DEFAULT_MODEL).config, shape.text
    text = {
        **config.text,
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.mlp,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.hidden // decoder.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": CONTEXT,
    }
    torch.manual_seed(0)
    whole = replace(config, text=text, hidden_size=decoder.hidden, context_length=CONTEXT, tie_word_embeddings=False)
    return build(lambda: LanguageSide(whole), device, dtype)


def measure(side: LanguageSide, rounds: int, image_tokens: int) -> dict[str, Any]:
    ready = copy.deepcopy(side)
    ready_language(ready)
    contenders: dict[str, Callable[[list[EngineRequest]], Figures]] = {
        "transformers generate": lambda requests: ask_transformers(side, requests),
        "engine with transformers' modules": in_engine(side),
        "engine": in_engine(ready),
    }
    if side.device.type == "cpu":
        plain = copy.deepcopy(side)
        ready_language(plain, use_kernels=False)
        contenders["engine without our kernels"] = in_engine(plain, CpuBackend(use_kernels=False))
    works = {
        "1 request, new picture": (1, 1),
        "8 requests, new pictures": (8, 8),
        "8 requests, 2 pictures": (8, 2),
    }
    found: dict[str, dict[str, list[Figures]]] = {work: {name: [] for name in contenders} for work in works}
    for turn in range(rounds + 1):
        for work, (count, pictures) in works.items():
            requests = [make_request(side, f"{turn}{work}", i, i % pictures, image_tokens) for i in range(count)]
            for name, ask in contenders.items():
                figures = ask(requests)
                # The first turn warms up.
                if turn:
                    found[work][name].append(figures)
    return {
        work: {name: median(rows) for name, rows in by_name.items()} | ratio(by_name) for work, by_name in found.items()
    }


def ratio(by_name: dict[str, list[Figures]]) -> dict[str, float]:
    pairs = zip(by_name["engine"], by_name["transformers generate"], strict=True)
    ratios = [ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in pairs]
    return {"engine over transformers, tokens per second": round(statistics.median(ratios), 2)}


def median(rows: list[Figures]) -> Figures:
    return {name: round(statistics.median(row[name] for row in rows), 1) for name in rows[0]}


def make_request(side: LanguageSide, seed: str, number: int, picture: int, image_tokens: int) -> EngineRequest:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{picture}".encode()))
    features = torch.randn(image_tokens, side.config.vision.hidden_size, generator=generator)
    question = torch.randint(5, 3000, (QUESTION,), generator=torch.Generator().manual_seed(number)).tolist()
    ids = [1, *[7] * SYSTEM, *[IMAGE_TOKEN_ID] * image_tokens, *question]
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    return EngineRequest(f"{number}", ids, [ImageFeatures(f"{seed}:{picture}", features)], sampling)


def in_engine(side: LanguageSide, backend: Backend | None = None) -> Callable[[list[EngineRequest]], Figures]:
    engine = Engine(side, NoText(), EngineConfig(cache_tokens=16_384), backend=backend)

    def ask(requests: list[EngineRequest]) -> Figures:
        last: dict[str, float] = {}
        first: list[float] = []
        gaps: list[float] = []
        began = time.perf_counter()
        for request in requests:
            engine.add_request(request)
        while engine.has_work:
            for output in engine.step():
                assert isinstance(output, TokenDelta), output
                now = time.perf_counter()
                (gaps if output.request_id in last else first).append(now - last.get(output.request_id, began))
                last[output.request_id] = now
        wall = time.perf_counter() - began
        return {
            "tokens_per_s": NUM_TOKENS * len(requests) / wall,
            "first_ms": statistics.median(first) * 1e3,
            "gap_p50_ms": statistics.median(gaps) * 1e3,
            "gap_p99_ms": sorted(gaps)[int(0.99 * len(gaps))] * 1e3,
        }

    return ask


@torch.inference_mode()
def ask_transformers(side: LanguageSide, requests: list[EngineRequest]) -> Figures:
    """Answer all requests in one static batch: transformers' generate has no other way to answer several at once."""
    began = time.perf_counter()
    ids = torch.tensor([list(request.prompt_ids) for request in requests], device=side.device)
    features = [image.features for request in requests for image in request.features]
    embeddings = side.embed(ids, features)
    mask = torch.ones(ids.shape, dtype=torch.int64, device=side.device)
    decoder: Any = side.decoder
    out: Tensor = decoder.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
    )
    assert out.shape == (len(requests), NUM_TOKENS), out.shape
    return {"tokens_per_s": out.numel() / (time.perf_counter() - began)}


if __name__ == "__main__":
    main()
