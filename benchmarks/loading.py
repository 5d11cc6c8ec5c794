"""Memory and time to load a checkpoint: ours and transformers' from_pretrained on the same random weights.

    python -m benchmarks.loading [--rounds 5] [--hidden 1536] [--json FILE]

Each load runs in its own process; the two take turns. Peak memory is the process's peak resident size less its size
after the imports, divided by the size of the weights in the compute dtype. The weights are read once before anything
is measured, so no load pays for the disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

_MEASURE = """
import json, resource, sys, time
import torch
from pathlib import Path
{imports}
def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
before, begun = resident("VmRSS"), time.perf_counter()
{load}
seconds = time.perf_counter() - begun
# Mapped weights are in memory once they have been read: read them all.
total = sum(float(value.detach().float().abs().max()) for part in parts for value in part.parameters())
print(json.dumps({{"seconds": seconds, "peak": resident("VmHWM") - before, "sum": total}}))
"""
OURS = _MEASURE.format(
    imports="from llava_core.checkpoints.load import LoadOptions, load_language_side, load_tower",
    load="""
options = LoadOptions(dtype=sys.argv[2])
parts = [load_tower(Path(sys.argv[1]), options), load_language_side(Path(sys.argv[1]), options)]
""",
)
THEIRS = _MEASURE.format(
    imports="from transformers import LlavaForConditionalGeneration",
    load="""
parts = [LlavaForConditionalGeneration.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))]
""",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=1536, help="of the decoder; 1536 makes 642 M parameters")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_checkpoint(Path(folder) / "model", options.hidden)
        results = {
            "machine": describe_machine(),
            "parameters_m": round(parameters / 1e6),
            "stored": "float16",
            **{dtype: measure(Path(folder) / "model", dtype, options.rounds, parameters) for dtype in SIZES},
        }
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}


def write_checkpoint(folder: Path, hidden: int) -> int:
    """Write random weights in float16 in the llava-hf layout; returns the number of parameters."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from llava_core.scenes.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(seed=0, num_scenes=50)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image_token, int)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=12,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
        ),
        image_token_index=image_token,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).half()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    return sum(value.numel() for value in model.parameters())


def measure(folder: Path, dtype: str, rounds: int, parameters: int) -> dict[str, Any]:
    """Return the medians of both, and of their ratio load by load."""
    pairs = [(run(OURS, folder, dtype), run(THEIRS, folder, dtype)) for _ in range(rounds + 1)][1:]
    assert len({round(one["sum"], 3) for pair in pairs for one in pair}) == 1, "both must have loaded the same weights"
    size = parameters * SIZES[dtype]
    figures = {}
    for name, column in (("ours", 0), ("transformers", 1)):
        figures[name] = {
            "seconds": round(statistics.median(pair[column]["seconds"] for pair in pairs), 2),
            "peak_over_weights": round(statistics.median(pair[column]["peak"] for pair in pairs) / size, 2),
        }
    ratio = statistics.median(ours["seconds"] / theirs["seconds"] for ours, theirs in pairs)
    return {**figures, "seconds_ours_over_transformers": round(ratio, 2)}


def run(code: str, folder: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-c", code, str(folder), dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
