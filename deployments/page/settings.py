"""Settings of the page, from the options of `llava page`.

Keys are not settings: the page's own is in the environment, a visitor's is typed into the page.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from llava_core.client.exchange import DEFAULT_URL


class LogArgs(BaseModel):
    """Where conversations of visitors who agree are kept, for how many days, and the text they agree to.

    `pictures` keeps pictures too; without it, only their MD5 sums. `consent` replaces the page's own text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path
    days: int = Field(default=30, ge=1)
    pictures: bool = False
    consent: str | None = None


class PageArgs(BaseModel):
    """`url` is the service's. Without `log` nothing is kept. `moderation` is `module:function` or an address, which
    checks every question before it is asked. `allow_anyone` lets the page listen where other machines can reach it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = DEFAULT_URL
    title: str = "LLaVA"
    log: LogArgs | None = None
    moderation: str | None = None
    allow_anyone: bool = False
