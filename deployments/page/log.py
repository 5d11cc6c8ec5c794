"""Conversations of visitors who agreed, kept for some days in files that LLaVA's own tools read: a line of JSON for
each answer and each vote.

Never written: API keys, visitors' addresses (`ip` is always empty), names of uploaded files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from deployments.page.settings import LogArgs
from deployments.page.talk import Choices, Talk, Turn
from llava_core.prompts.templates import TEMPLATES

Vote = Literal["upvote", "downvote", "flag"]

_DATED = re.compile(r"\d{4}-\d{2}-\d{2}(?=-conv\.json$|$)")
_PICTURES = "serve_images"
# Roles for a template that the service chooses, which this page does not know.
_ROLES = ("USER", "ASSISTANT")


class ConversationLog:
    """A folder of such files. Files that are too old are removed at the start and whenever a new day begins."""

    def __init__(self, args: LogArgs) -> None:
        self._args = args
        self._day: date | None = None
        self._begin(datetime.now(UTC).date())

    def chat(self, talk: Talk, choices: Choices, *, start: float, finish: float) -> None:
        """Log an answer, written from `start` to `finish` in seconds since 1970."""
        times = {"start": round(start, 4), "finish": round(finish, 4)}
        pictures = [Path(path).read_bytes() for turn in talk for path in turn.pictures]
        digests = [hashlib.md5(data, usedforsecurity=False).hexdigest() for data in pictures]
        self._write({"type": "chat", "model": choices.model, **times, **_state(talk, choices), "images": digests})
        if self._args.pictures:
            self._keep(dict(zip(digests, pictures, strict=True)))

    def vote(self, kind: Vote, talk: Talk, choices: Choices) -> None:
        """Log a visitor's vote on the last answer."""
        self._write({"type": kind, "model": choices.model, **_state(talk, choices)})

    def _write(self, entry: dict[str, Any]) -> None:
        now = datetime.now(UTC)
        if now.date() != self._day:
            self._begin(now.date())
        line = json.dumps({"tstamp": round(now.timestamp(), 4), **entry, "ip": ""}, ensure_ascii=False)
        _append(self._args.folder / f"{now.date()}-conv.json", f"{line}\n".encode())

    def _keep(self, pictures: dict[str, bytes]) -> None:
        folder = self._args.folder
        for name in (_PICTURES, str(self._day)):
            # mkdir would not apply the mode to parents.
            folder = folder / name
            folder.mkdir(mode=0o700, exist_ok=True)
        for digest, data in pictures.items():
            # The same bytes are the same picture.
            if not (path := folder / digest).exists():
                _append(path, data)

    def _begin(self, today: date) -> None:
        """Make the folder, and remove files that are too old."""
        self._args.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        oldest = today - timedelta(days=self._args.days)
        for path in (*self._args.folder.glob("*-conv.json"), *self._args.folder.glob(f"{_PICTURES}/*")):
            found = _DATED.match(path.name)
            if found is None or date.fromisoformat(found[0]) >= oldest:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self._day = today


def _state(talk: Talk, choices: Choices) -> dict[str, Any]:
    """Return the conversation as LLaVA's pages log it, plus the name of its template."""
    template = None if choices.template is None else TEMPLATES[choices.template]
    roles = _ROLES if template is None else template.roles
    messages = [[role, text] for turn in talk for role, text in zip(roles, _texts(turn), strict=True)]
    return {
        "state": {
            "system": choices.system or (template.system if template else ""),
            "roles": list(roles),
            "messages": messages,
            "offset": 0,
            "sep": template.sep if template else None,
            "sep2": (template.sep2 or None) if template else None,
            "template": choices.template,
        }
    }


def _texts(turn: Turn) -> tuple[str, str]:
    return turn.question + "\n<image>" * len(turn.pictures), turn.answer


def _append(path: Path, data: bytes) -> None:
    """Append in one write, so that no line is torn, to a file that only its owner can read."""
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab", buffering=0) as file:
        file.write(data)
