"""Why an application could not be deployed, in one line each, out of what Serve says of it and its stages.

Knows Serve's words for it and what tracebacks look like; standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from deployments.errors import LaunchError

_ERROR_LINE = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Exit)): (.+)$", re.MULTILINE)


def raise_if_failed(status: str, message: str, stage_messages: Mapping[str, str]) -> None:
    """Raise LaunchError with the cause that each stage gave, or else the application's message, if it cannot start."""
    if status in ("DEPLOY_FAILED", "UNHEALTHY"):
        reasons = [f"{stage}: {cause(text)}" for stage, text in stage_messages.items() if _ERROR_LINE.search(text)]
        raise LaunchError("; ".join(reasons) or cause(message))


def cause(text: str) -> str:
    """The last exception named in a traceback, without the traceback."""
    lines = _ERROR_LINE.findall(text)
    if not lines:
        return text.strip()
    kind, message = lines[-1]
    return str(message) if kind == "CheckpointError" else f"{kind}: {message}"
