"""LLaVA models as a library: prompts, pictures, towers, decoders, generation, training.

The public names below are imported on first use, so importing the package costs nothing and needs no torch. Knows
neither Ray nor HTTP.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_core.errors import CheckpointError, ImageError, LlavaError, RequestError
    from llava_core.inference import LocalModel
    from llava_core.types import (
        GenerationRequest,
        ImagePart,
        Message,
        SamplingParams,
        TextPart,
        TokenDelta,
        Usage,
    )

__version__ = "0.1.0"

_HOMES = {
    "CheckpointError": "errors",
    "ImageError": "errors",
    "LlavaError": "errors",
    "RequestError": "errors",
    "LocalModel": "inference",
    "GenerationRequest": "types",
    "ImagePart": "types",
    "Message": "types",
    "SamplingParams": "types",
    "TextPart": "types",
    "TokenDelta": "types",
    "Usage": "types",
}

__all__ = [
    "CheckpointError",
    "GenerationRequest",
    "ImageError",
    "ImagePart",
    "LlavaError",
    "LocalModel",
    "Message",
    "RequestError",
    "SamplingParams",
    "TextPart",
    "TokenDelta",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
