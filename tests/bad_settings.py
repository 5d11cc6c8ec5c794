"""Small checkpoints of every layout, with every field of their JSON files set to every bad value.

`cases` yields all of them; a test tries some per field, because trying all takes minutes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlavaForConditionalGeneration

from llava_core.architectures import DECODER_FIELDS, TOWER_FIELDS
from tests.original import Kind, write_original
from tests.radialog import empty, write_radialog
from tests.tiny import edit_json, write_checkpoint, write_json

BAD: tuple[Any, ...] = (
    "three",
    "",
    "x" * 5000,
    "a\0b",
    None,
    [],
    ["three"],
    [[1.5, None]],
    {},
    {"a": []},
    -1,
    0,
    1.5,
    True,
    10**12,
    10**400,
    float("inf"),
    float("nan"),
)
Way = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """A checkpoint that loads; `root` holds it together with its base and its tower."""

    root: Path
    folder: Path
    base: Path | None


@dataclass(frozen=True)
class Case:
    """A field, given by its path through the file's objects, and the value to put there."""

    file: Path
    way: Way
    value: Any

    def __str__(self) -> str:
        return f"{self.file.parent.name}/{self.file.name} {'.'.join(self.way)} = {repr(self.value)[:20]}"


# Fields that a file may have and the small checkpoints do not.
_ORIGINAL = ("mm_use_im_patch_token", "delta_base", "quantization_config", "mv_type", "vision_tower", "dtype")
_LLAVA_HF = ("projector_hidden_act", "multimodal_projector_bias", "image_grid_pinpoints", "torch_dtype", "model_type")
_ADAPTER = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
_PICTURES = ("do_rescale", "do_normalize", "rescale_factor", "image_processor", "image_processor_type", "image_mean")
_TOKENS = ("added_tokens_decoder", "additional_special_tokens", "add_bos_token", "legacy", "chat_template", "bos_token")
_TOKENS += ("unk_token", "eos_token", "pad_token", "tokenizer_class", "model_max_length", "extra_special_tokens")


def write_layouts(root: Path, reference: LlavaForConditionalGeneration) -> dict[str, Layout]:
    """Writes a checkpoint of each layout, with every file that it may have."""
    hf = write_checkpoint(root / "hf" / "model", reference)
    layouts = {"llava-hf": Layout(root / "hf", hf, None)}
    adapter = root / "adapter" / "adapter"
    kinds = {
        "original": Kind(aspect="anyres", merge="spatial_unpad", tower_inside=True, pad_rows=4, num_shards=2),
        "mistral": Kind(decoder="mistral", files="bin", num_shards=2),
        "two scales": Kind(s2=True, tokenizer="slow", start_end=True),
        "projector": Kind(layout="projector", tokenizer="slow"),
        "LoRA": Kind(layout="lora"),
    }
    for name, kind in kinds.items():
        original = write_original(root / name.replace(" ", "_"), kind)
        layouts[name] = Layout(original.folder.parent, original.folder, original.base)
    radialog = write_radialog(root / "radialog", empty)
    layouts["RaDialog"] = Layout(root / "radialog", radialog.folder, radialog.base)
    adapter.mkdir(parents=True)
    for file in ("adapter_config.json", "adapter_model.bin"):
        shutil.copy(layouts["LoRA"].folder / file, adapter)
    whole = write_original(root / "adapter" / "base", Kind())
    layouts["PEFT adapter"] = Layout(root / "adapter", adapter, whole.folder)
    for layout in layouts.values():
        _complete(layout)
    return layouts


def _complete(layout: Layout) -> None:
    """Adds the optional files of a checkpoint."""
    for config in sorted(layout.root.rglob("config.json")):
        if "vocab_size" in (content := json.loads(config.read_text())) or "text_config" in content:
            write_json(config.with_name("generation_config.json"), {"bos_token_id": 1, "eos_token_id": 2})
        if (config.with_name("tokenizer.model")).exists():
            write_json(config.with_name("special_tokens_map.json"), {"bos_token": "<s>", "unk_token": "<unk>"})
            added = {"400": {"content": "<im_start>", "special": True}, "401": {"content": "<im_end>", "special": True}}
            if config.with_name("added_tokens.json").exists():
                edit = {"added_tokens_decoder": added}
                edit_json(config.with_name("tokenizer_config.json"), lambda settings, edit=edit: settings.update(edit))


def cases(layout: Layout) -> Iterator[Case]:
    """Yields every bad value for every field of every file."""
    for file in sorted(layout.root.rglob("*.json")):
        for way in ways(file):
            for value in BAD:
                yield Case(file, way, value)


def ways(file: Path) -> list[Way]:
    """Lists all fields that a file has or might have."""
    content = json.loads(file.read_text())
    # The vocabulary counts as one field, because it has thousands of entries.
    found = list(_ways(content, () if file.name != "tokenizer.json" else None))
    if file.name == "config.json":
        if "text_config" in content:
            found += [("text_config", name) for name in (*DECODER_FIELDS, "dtype", "tie_word_embeddings")]
            found += [("vision_config", name) for name in TOWER_FIELDS]
            found += [(name,) for name in (*_LLAVA_HF, *_ORIGINAL)]
        elif "vision_config" in content:
            found += [("vision_config", name) for name in TOWER_FIELDS]
        else:
            found += [(name,) for name in (*DECODER_FIELDS, *_ORIGINAL)]
    more = {"adapter_config.json": _ADAPTER, "preprocessor_config.json": _PICTURES, "tokenizer_config.json": _TOKENS}
    found += [(name,) for name in more.get(file.name, ())]
    if file.name == "adapter_config.json":
        found += [("rank_pattern", "q_proj"), ("alpha_pattern", "q_proj"), ("rank_pattern", "(")]
    return sorted(set(found))


def _ways(content: dict[str, Any], inside: Way | None) -> Iterator[Way]:
    for name, value in content.items():
        yield (*(inside or ()), name)
        if inside is not None and isinstance(value, dict):
            # A few tensors of an index stand for all.
            some = dict(list(value.items())[:3]) if name == "weight_map" else value
            yield from _ways(some, (*inside, name))


_CONTRADICTION = "|".join(
    (
        r"layers, the files hold",
        r"(image_newline|(decoder|tower|projector) \S+) is (missing|present)",
        r"has shape",
        r"the tokenizer has \d+ tokens",
        r"make tiles of",
        r"gives \d+ features",
    )
)


@contextmanager
def applied(case: Case) -> Iterator[None]:
    """Writes the value to the file for the duration of the block."""
    before = case.file.read_text()
    content = json.loads(before)
    part = content
    for name in case.way[:-1]:
        part = part.setdefault(name, {})
    part[case.way[-1]] = case.value
    case.file.write_text(json.dumps(content))
    try:
        yield
    finally:
        case.file.write_text(before)


def fault(case: Case, look: Callable[[], object], error_kind: type[Exception]) -> str | None:
    """Returns what is wrong with the handling of a case: another exception, or a message without file and field."""
    with applied(case):
        try:
            look()
        except error_kind as error:
            message = str(error)
        except Exception as error:  # noqa: BLE001
            return f"{case}: {type(error).__name__}: {str(error)[:200]}"
        else:
            return None
    is_named = case.file.name in message and any(name in message for name in case.way)
    # The value would be valid if it did not contradict the weights or the tokenizer.
    contradicts = re.search(_CONTRADICTION, message)
    # For these the library does not report a field.
    is_whole = case.file.name == "tokenizer.json" and "tokenizer.json cannot be read" in message
    return None if is_named or contradicts or is_whole else f"{case}: not named in {message[:300]!r}"
