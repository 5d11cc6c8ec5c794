"""Why an application could not be deployed: one line per cause, from what Serve reports of it and its stages.

Knows Serve's status names and what tracebacks look like; standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from deployments.errors import LaunchError

_ERROR_LINE = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Exit)): (.+)$", re.MULTILINE)


def raise_if_failed(status: str, message: str, stage_messages: Mapping[str, str]) -> None:
    """Raise LaunchError if the application cannot start, with each stage's cause or else the application's message."""
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


def starting_failure(text: str) -> str:
    """Why a replica did not start, in one line without the ids and numbers of Serve's message, so that repeated
    failures with the same cause are equal."""
    return cause(text) if _ERROR_LINE.search(text) else "its process ended, or no node has room for it; see the logs"
