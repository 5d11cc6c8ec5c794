"""Foreign weight names to ours and back, as tables of prefixes. Plain data and string work; reads no files.

Our names: the tower's module (`vision/clip.py`), the projector's (`models/projector.py`) and the decoder's own.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Part = Literal["tower", "projector", "decoder"]


class Key(NamedTuple):
    """Where a tensor goes: the part and its name there."""

    part: Part
    name: str


# (foreign prefix, part, our prefix); the first match wins. Grouped by the transformers version that saves them.
_LLAVA_HF: tuple[tuple[str, Part, str], ...] = (
    # transformers 4 and the hub's llava-hf checkpoints
    ("vision_tower.vision_model.", "tower", "model."),
    ("multi_modal_projector.linear_1.", "projector", "0."),
    ("multi_modal_projector.linear_2.", "projector", "2."),
    ("language_model.model.", "decoder", "model."),
    ("language_model.lm_head.", "decoder", "lm_head."),
    # transformers 5: as it saves them, then as its modules are called
    ("vision_tower.", "tower", "model."),
    ("model.vision_tower.vision_model.", "tower", "model."),
    ("model.vision_tower.", "tower", "model."),
    ("model.multi_modal_projector.linear_1.", "projector", "0."),
    ("model.multi_modal_projector.linear_2.", "projector", "2."),
    ("model.language_model.", "decoder", "model."),
    ("lm_head.", "decoder", "lm_head."),
)
_HUB_ROWS = 5

# Buffers that old versions saved; they are computed, so a checkpoint's copy is dropped on purpose.
_COMPUTED = re.compile(r"(\.position_ids|\.rotary_emb\.inv_freq)$")


def from_llava_hf(name: str) -> Key | None:
    """Our key for a llava-hf name; None for computed buffers. Raises KeyError for a name no row covers."""
    if _COMPUTED.search(name):
        return None
    for prefix, part, ours in _LLAVA_HF:
        if name.startswith(prefix):
            return Key(part, ours + name.removeprefix(prefix))
    raise KeyError(name)


def to_llava_hf(key: Key) -> str:
    """The hub's name (transformers 4 form, which every version loads) of one of our keys."""
    for prefix, part, ours in _LLAVA_HF[:_HUB_ROWS]:
        if part == key.part and key.name.startswith(ours):
            return prefix + key.name.removeprefix(ours)
    raise KeyError(key)
