"""The report of `llava inspect`: one JSON object about a checkpoint, and the same as text.

Reads configurations and headers, and imports no torch. A failed step becomes a problem in the report, and the others
continue. Knows nothing about option parsing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llava_core.checkpoints.accounting import name_problems, tensor_problems, vocabulary_problems
from llava_core.checkpoints.contents import Stored, stored_tensors
from llava_core.checkpoints.files import has_model, read_json
from llava_core.checkpoints.headers import TensorInfo, read_header
from llava_core.checkpoints.hub import Hub
from llava_core.checkpoints.keymaps import Key, Part, from_tower
from llava_core.checkpoints.layout import DELTA_FIELD, Checkpoint, find_layout, open_checkpoint
from llava_core.checkpoints.lora import open_lora
from llava_core.checkpoints.memory import cache_bytes_per_token, weight_bytes
from llava_core.checkpoints.shapes import Shape, decoder_fields, expected_shapes
from llava_core.checkpoints.weights import find_weights
from llava_core.config import ModelConfig
from llava_core.errors import LlavaError, RequestError
from llava_core.images.geometry import num_image_tokens
from llava_core.images.preprocess import PreprocessConfig
from llava_core.prompts.templates import get_template
from llava_core.types import Quantization, Size

if TYPE_CHECKING:
    from llava_core.checkpoints.tokenizer import CheckpointTokenizer

Report = dict[str, Any]
Result = TypeVar("Result")

# Bytes per number, and how the decoder's linear layers are stored.
_PRECISIONS: dict[str, tuple[int, Quantization | None]] = {
    "float32": (4, None),
    "bfloat16": (2, None),
    "float16": (2, None),
    "8bit": (2, "8bit"),
    "4bit": (2, "4bit"),
}
DEFAULT_SIZES = (Size(336, 336), Size(640, 480), Size(1920, 1080))


def inspect_checkpoint(
    path_or_id: str,
    base: str | None = None,
    *,
    offline: bool = False,
    sizes: Sequence[Size] = (),
    template: str | None = None,
) -> Report:
    """Everything that can be learnt about a checkpoint; `problems` lists what is wrong.

    Raises CheckpointError when there is no folder, and UnknownNameError when there is no such template.
    """
    if template is not None:
        get_template(template)
    folder = Hub(offline=offline).find(path_or_id, "the model")
    problems: list[str] = []
    report: Report = {"folder": str(folder), "layout": _attempt(problems, lambda: find_layout(folder))}
    if report["layout"] == "delta":
        report["base"] = _attempt(problems, lambda: read_json(folder, "config.json")[DELTA_FIELD])
        problems.append(f"{folder} is a delta and cannot be loaded; apply it to its base: llava delta apply")
    opened = None
    if report["layout"] not in (None, "delta"):
        opened = _attempt(problems, lambda: open_checkpoint(folder, base, offline=offline))
    if opened is not None:
        report |= _describe(opened, sizes, template, problems)
    elif has_model(folder):
        report["parts"] = _attempt(problems, lambda: _parts(_own_tensors(folder)))
    return {**report, "problems": list(dict.fromkeys(problems))}


def _attempt(problems: list[str], step: Callable[[], Result]) -> Result | None:
    try:
        return step()
    except LlavaError as error:
        problems.append(str(error))
        return None


def _own_tensors(folder: Path) -> dict[Key, Stored]:
    """The tensors of a folder that could not be opened, for instance because its tower is missing."""
    return stored_tensors([find_weights(folder)])


def _describe(checkpoint: Checkpoint, sizes: Sequence[Size], template: str | None, problems: list[str]) -> Report:
    config = checkpoint.config
    found = _attempt(problems, lambda: stored_tensors(checkpoint.weights))
    stored = found or {}
    look = name_problems if found is None else partial(tensor_problems, stored=stored)
    problems += _attempt(problems, lambda: look(checkpoint)) or []
    shapes = _shapes(config, stored)
    counts = {part: sum(map(math.prod, each.values())) for part, each in shapes.items()}
    return {
        **_sources(checkpoint),
        "parts": _parts(stored),
        "adapter": _attempt(problems, lambda: _adapter(checkpoint.adapter)),
        "decoder": _decoder(config),
        "tower": _tower(config),
        "projector": {"type": config.projector_type, "bias": config.projector_bias},
        "pictures": _attempt(problems, lambda: _pictures(checkpoint)),
        **_prompt(checkpoint, sizes, template, problems),
        "num_parameters": {**counts, "total": sum(counts.values())},
        **_memory(config, shapes),
    }


def _sources(checkpoint: Checkpoint) -> Report:
    """Where the parts come from, None where the checkpoint holds them."""
    towers = [str(each.folder.resolve()) for each in checkpoint.weights if each.key_map is from_tower]
    # For a PEFT adapter the opened folder is the base.
    is_own = checkpoint.adapter is None or checkpoint.folder == checkpoint.adapter
    base = checkpoint.text_folder if not checkpoint.is_complete or not is_own else None
    return {
        "base": None if base is None else str(base),
        "tower_name": checkpoint.config.tower_name,
        "tower_folder": towers[0] if towers else None,
    }


def _parts(stored: Mapping[Key, Stored]) -> Report:
    """Tensors, numbers and dtypes of each part, as stored."""
    by_part: dict[str, list[TensorInfo]] = defaultdict(list)
    for key, each in stored.items():
        by_part[key.part].append(each.info)
    return {part: _summary(infos) for part, infos in sorted(by_part.items())}


def _summary(infos: Iterable[TensorInfo]) -> Report:
    infos = list(infos)
    return {
        "tensors": len(infos),
        "parameters": sum(info.num_elements for info in infos),
        "dtypes": sorted({info.dtype for info in infos}),
        "bytes": sum(info.num_bytes for info in infos),
    }


def _adapter(folder: Path | None) -> Report | None:
    if folder is None:
        return None
    file = open_lora(folder).file
    return {"file": str(file), **_summary(read_header(file).values())}


def _decoder(config: ModelConfig) -> Report:
    fields = decoder_fields(config)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {
        "architecture": fields["model_type"],
        **{name: fields[name] for name in (*names, "head_dim")},
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "dtype": config.dtype,
    }


def _tower(config: ModelConfig) -> Report:
    vision = config.vision
    return {
        "architecture": vision.architecture["model_type"],
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.architecture.get("num_hidden_layers"),
        "select_layer": vision.select_layer,
        "select_feature": vision.select_feature,
        "s2_scales": list(config.s2_scales),
    }


def _pictures(checkpoint: Checkpoint) -> Report:
    from llava_core.checkpoints.describe import load_preprocess_config

    preprocess, config = load_preprocess_config(checkpoint), checkpoint.config
    return {
        "aspect": preprocess.aspect if isinstance(preprocess, PreprocessConfig) else "as BioViL-T",
        "merge_type": config.merge_type,
        "pinpoints": [list(size) for size in config.pinpoints],
    }


def _prompt(checkpoint: Checkpoint, sizes: Sequence[Size], template: str | None, problems: list[str]) -> Report:
    """Template, tokenizer, and token counts of pictures. A checkpoint that does not determine its template is not at
    fault: `why` gives the reason."""
    from llava_core.checkpoints.tokenizer import choose_template, load_tokenizer

    counts = {size: num_image_tokens(checkpoint.config, size) for size in sizes or DEFAULT_SIZES}
    report: Report = {
        "prompt": {"template": None, "why": "the tokenizer cannot be read", "num_tokens": None},
        "image_tokens": {_named(size): count for size, count in counts.items()},
    }
    tokenizer = _attempt(problems, lambda: load_tokenizer(checkpoint))
    if tokenizer is None:
        return report
    problems += vocabulary_problems(checkpoint, tokenizer.num_tokens)
    reasons: list[str] = []
    chosen = _attempt(reasons, lambda: choose_template(tokenizer, template, checkpoint.config))
    name = chosen.name if chosen else None
    report["prompt"] = {"template": name, "why": reasons[0] if reasons else None, "num_tokens": tokenizer.num_tokens}
    refused = _refused(checkpoint, tokenizer, name or _SHORTEST, list(counts))
    # A refused default size is not a problem, unless all of them are refused.
    if sizes or len(refused) == len(counts):
        problems += [f"a picture of {size} is refused: {reason}" for size, reason in refused.items()]
    return {**report, "refused_sizes": refused}


# The template that adds the fewest tokens to a picture.
_SHORTEST = "plain"


def _refused(
    checkpoint: Checkpoint, tokenizer: CheckpointTokenizer, template: str, sizes: Sequence[Size]
) -> dict[str, str]:
    """The sizes that a service with default limits refuses, and why. Empty where image settings are not understood."""
    from llava_core.checkpoints.describe import load_preparer

    preparer = _attempt([], lambda: load_preparer(checkpoint, tokenizer, template=template))
    if preparer is None:
        return {}
    reasons = {}
    for size in sizes:
        try:
            preparer.check_size(size)
        except RequestError as error:
            reasons[_named(size)] = str(error)
    return reasons


def _named(size: Size) -> str:
    return f"{size.width}x{size.height}"


def _shapes(config: ModelConfig, stored: Mapping[Key, Stored]) -> dict[Part, dict[str, Shape]]:
    """The shapes that config.json calls for, by part and name; where it implies none, the stored ones."""
    shapes: dict[Part, dict[str, Shape]] = defaultdict(dict)
    for key, shape in expected_shapes(config).items():
        if shape is not None:
            shapes[key.part][key.name] = shape
        elif key in stored:
            shapes[key.part][key.name] = stored[key].info.shape
    return shapes


def _memory(config: ModelConfig, shapes: Mapping[Part, Mapping[str, Shape]]) -> Report:
    """Bytes of all weights at each precision, and of one token's keys and values."""
    weights = {
        name: sum(weight_bytes(part, each, itemsize, quantization) for part, each in shapes.items())
        for name, (itemsize, quantization) in _PRECISIONS.items()
    }
    cache = {name: cache_bytes_per_token(config, itemsize) for name, (itemsize, _) in _PRECISIONS.items()}
    return {"weight_bytes": weights, "kv_cache_bytes_per_token": cache}


def as_text(report: Report) -> str:
    """One line per value, those of an object indented below its name; problems last, one per line."""
    lines = list(_lines({name: value for name, value in report.items() if name != "problems"}, ""))
    problems = report["problems"]
    lines.append(f"problems: {len(problems) or 'none'}")
    return "\n".join([*lines, *(f"  - {problem}" for problem in problems)])


def _lines(values: Report, indent: str) -> Iterable[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            if not value:
                continue
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        elif value not in (None, []):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"{indent}{name}: {f'{shown:,}' if isinstance(shown, int) and abs(shown) > 9999 else shown}"
