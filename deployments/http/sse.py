"""Server-sent events as OpenAI frames them: `data: <json>` and a blank line. Knows framing, not what is framed."""

import json
from collections.abc import Mapping
from typing import Any

MEDIA_TYPE = "text/event-stream"
# Proxies that buffer would turn a stream into one late answer.
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"
# A comment, which is not an event.
COMMENT = b": \n\n"


def event(content: Mapping[str, Any]) -> bytes:
    """One event. JSON escapes line breaks, so the content is always one line."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
