"""The engine's memory over many steps: random requests with pictures arrive, are preempted, aborted and repeated.

    python -m benchmarks.soak [--steps 100000] [--json FILE]

Uses a decoder of random weights, so small that a step is nearly all bookkeeping. The cache's integrity is checked at
every report; the resident memory of the last report must not exceed that of the first one taken after the cache was
full by more than 1 %.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.machine import describe_machine
from llava_core.checkpoints.files import DEFAULT_MODEL
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.engine.config import EngineConfig
from llava_core.engine.engine import Engine
from llava_core.models.fused import ready_language
from llava_core.models.language import LanguageSide
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.types import EngineRequest, ImageFeatures, SamplingParams

REPORTS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {"machine": describe_machine(), **soak(options.steps)}
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def build_engine() -> Engine:
    config = open_checkpoint(DEFAULT_MODEL).config
    text = {**config.text, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    side = LanguageSide(replace(config, text=text, hidden_size=64)).eval()
    ready_language(side)
    limits = EngineConfig(max_running=8, max_waiting=16, prefill_chunk=64, cache_tokens=1100)
    return Engine(side, load_tokenizer(DEFAULT_MODEL), limits)


def soak(steps: int) -> dict[str, Any]:
    engine, chance = build_engine(), random.Random(0)
    open_ids: list[str] = []
    resident: list[float] = []
    began = time.perf_counter()
    for step in range(steps):
        if len(open_ids) < 12 and chance.random() < 0.3:
            engine.add_request(make_request(engine, f"{step}", chance))
            open_ids.append(f"{step}")
        if open_ids and chance.random() < 0.01:
            engine.abort(open_ids.pop(chance.randrange(len(open_ids))))
        for output in engine.step():
            if getattr(output, "finish_reason", "failed") is not None and output.request_id in open_ids:
                open_ids.remove(output.request_id)
        if step % (steps // REPORTS) == steps // REPORTS - 1:
            engine.pool.check_integrity()
            resident.append(round(psutil.Process().memory_info().rss / 2**20, 1))
    stats = engine.stats
    # Compare with the second report: at the first, some blocks had not been written to yet.
    assert resident[-1] <= resident[1] * 1.01, resident
    return {
        "steps": steps,
        "ms_per_step": round((time.perf_counter() - began) / steps * 1e3, 2),
        "resident_mib": resident,
        "finished": stats.num_finished,
        "failed": stats.num_failed,
        "preemptions": stats.num_preemptions,
        "cached_tokens": stats.cached_tokens,
        "computed_tokens": stats.computed_tokens,
    }


def make_request(engine: Engine, name: str, chance: random.Random) -> EngineRequest:
    """Make a request with one of fifty pictures, hence one of fifty prefixes, a new question and a random length."""
    vision, kind = engine.model.config.vision, chance.randrange(50)
    generator = torch.Generator().manual_seed(kind)
    features = torch.randn(vision.tokens_per_tile, vision.hidden_size, generator=generator)
    question = [chance.randrange(5, 60) for _ in range(chance.randrange(1, 40))]
    ids = [1, *[IMAGE_TOKEN_ID] * vision.tokens_per_tile, *question]
    sampling = SamplingParams(max_tokens=chance.randrange(1, 60), temperature=chance.choice([0, 1]), ignore_eos=True)
    return EngineRequest(name, ids, [ImageFeatures(f"{kind}", features)], sampling)


if __name__ == "__main__":
    main()
