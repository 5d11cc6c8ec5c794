"""Foreign weight names to ours and back, as tables of prefixes. Plain data and string work; reads no files.

Our names: the tower's module (`vision/clip.py`), the projector's (`models/projector.py`), the decoder's own, and
`image_newline`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

from llava_core.vision.biovil_keys import from_biovil_t

Part = Literal["tower", "projector", "decoder", "newline"]


class Key(NamedTuple):
    """Where a tensor goes: the part and its name there."""

    part: Part
    name: str


# Our key for a foreign name, None if it is dropped on purpose; raises KeyError for a name no row covers.
KeyMap = Callable[[str], Key | None]
_Rows = tuple[tuple[str, Part, str], ...]

NEWLINE_KEY = Key("newline", "image_newline")
HEAD_KEY = Key("decoder", "lm_head.weight")
# The tensors with a row for each token.
VOCABULARY_KEYS = (Key("decoder", "model.embed_tokens.weight"), HEAD_KEY)

# (foreign prefix, part, our prefix); the first match wins. Grouped by the transformers version that saves them.
_LLAVA_HF: _Rows = (
    # transformers 4 and the hub's llava-hf checkpoints
    ("vision_tower.vision_model.", "tower", "model."),
    ("multi_modal_projector.linear_1.", "projector", "0."),
    ("multi_modal_projector.linear_2.", "projector", "2."),
    ("language_model.model.", "decoder", "model."),
    ("language_model.lm_head.", "decoder", "lm_head."),
    ("image_newline", *NEWLINE_KEY),
    # transformers 5: names as saved, then its module names
    ("vision_tower.", "tower", "model."),
    ("model.vision_tower.vision_model.", "tower", "model."),
    ("model.vision_tower.", "tower", "model."),
    ("model.multi_modal_projector.linear_1.", "projector", "0."),
    ("model.multi_modal_projector.linear_2.", "projector", "2."),
    ("model.language_model.", "decoder", "model."),
    ("model.image_newline", *NEWLINE_KEY),
    ("lm_head.", "decoder", "lm_head."),
)
_HUB_ROWS = 6

_LINEAR: _Rows = (
    ("model.mm_projector.weight", "projector", "0.weight"),
    ("model.mm_projector.bias", "projector", "0.bias"),
)
# The original LLaVA code, and a text-only decoder on its own.
_ORIGINAL: _Rows = (
    ("model.vision_tower.vision_tower.vision_model.", "tower", "model."),
    *_LINEAR,
    ("model.mm_projector.", "projector", ""),
    ("model.image_newline", *NEWLINE_KEY),
    ("model.embed_tokens.", "decoder", "model.embed_tokens."),
    ("model.layers.", "decoder", "model.layers."),
    ("model.norm.", "decoder", "model.norm."),
    ("lm_head.", "decoder", "lm_head."),
)

# A tower on its own, as a CLIP or SigLIP model of transformers 4, then as a vision model of transformers 5.
_TOWER: _Rows = (
    ("vision_model.", "tower", "model."),
    ("embeddings.", "tower", "model.embeddings."),
    ("encoder.", "tower", "model.encoder."),
    ("pre_layrnorm.", "tower", "model.pre_layrnorm."),
    ("post_layernorm.", "tower", "model.post_layernorm."),
    ("head.", "tower", "model.head."),
)
# The other half of a CLIP or SigLIP.
_NOT_THE_TOWERS = re.compile(r"(text_model\.|visual_projection\.|text_projection\.|logit_scale$|logit_bias$)")

# RaDialog's tower is a BioViL-T without a wrapper; CLIP's names have `vision_tower` twice.
_BIOVIL = re.compile(r"model\.vision_tower\.(?=encoder\.|projector\.)")

# Buffers that old versions saved, and that RaDialog saves like all others; they are computed, so a checkpoint's copy is
# dropped on purpose.
_COMPUTED = re.compile(r"(\.position_ids|\.rotary_emb\.(inv_freq|cos_cached|sin_cached))$")


def from_llava_hf(name: str) -> Key | None:
    """Our key for a llava-hf name; None for computed buffers. Raises KeyError for a name no row covers."""
    return _look_up(_LLAVA_HF, name)


def from_original(name: str) -> Key | None:
    """Our key for a name of the original code, or of a text-only decoder; None and KeyError as above."""
    if match := _BIOVIL.match(name):
        return from_biovil(name[match.end() :])
    return _look_up(_ORIGINAL, name)


def from_biovil(name: str) -> Key | None:
    """Our key for a name in the released file of BioViL-T; None for tensors that only its text half reads."""
    ours = from_biovil_t(name)
    return None if ours is None else Key("tower", ours)


def from_tower(name: str) -> Key | None:
    """Our key for a name in a tower's own checkpoint; None for computed buffers and for its text half."""
    return None if _NOT_THE_TOWERS.match(name) else _look_up(_TOWER, name)


def from_wrapped(name: str) -> Key | None:
    """Our key for a name as PEFT and training wrappers save it, in either dialect.

    Wrappers prefix `module.`, `base_model.` and usually one more `model.`, as the original code expects.
    """
    outer = name.removeprefix("module.").removeprefix("base_model.")
    inner = outer.removeprefix("model.")
    for look_up in (from_original, from_llava_hf):
        for candidate in (inner, outer):
            try:
                return look_up(candidate)
            except KeyError:
                continue
    raise KeyError(name)


def _look_up(rows: _Rows, name: str) -> Key | None:
    if _COMPUTED.search(name):
        return None
    for prefix, part, ours in rows:
        if name.startswith(prefix):
            return Key(part, ours + name.removeprefix(prefix))
    raise KeyError(name)


def to_llava_hf(key: Key) -> str:
    """The hub's name for one of our keys, in transformers 4's form, which every version loads."""
    for prefix, part, ours in _LLAVA_HF[:_HUB_ROWS]:
        if part == key.part and key.name.startswith(ours):
            return prefix + key.name.removeprefix(ours)
    raise KeyError(key)


def to_original(key: Key, projector_type: str) -> str:
    """The original code's name for one of our keys; its `linear` projector is a single layer, not a sequence."""
    rows = _ORIGINAL if projector_type == "linear" else [row for row in _ORIGINAL if row not in _LINEAR]
    for prefix, part, ours in rows:
        if part == key.part and key.name.startswith(ours):
            return prefix + key.name.removeprefix(ours)
    raise KeyError(key)


def to_tower(key: Key) -> str:
    """The name for one of our keys in a tower's own checkpoint."""
    prefix, part, ours = _TOWER[0]
    if key.part != part or not key.name.startswith(ours):
        raise KeyError(key)
    return prefix + key.name.removeprefix(ours)
