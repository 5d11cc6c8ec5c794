"""What can be set about LLaVA's own protocol: whether it is spoken, and which workers may register.

Knows names and bounds, and neither HTTP nor Ray.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deployments.host_settings import HostArgs
from deployments.stage_settings import Settings

Dispatch = Literal["lottery", "shortest_queue"]


class WorkerArgs(HostArgs):
    """Workers of others, which register themselves: none, unless their hosts are in `allowed_hosts`.

    Of several with the same model `dispatch` chooses one. One that promised to send heartbeats is forgotten
    `heart_beat_expiration_s` after the last. `status_timeout_s` is for what it says about itself, `silence_s` for each
    next piece of an answer, `answer_timeout_s` for a whole one. At most `max_workers` are known.
    """

    dispatch: Dispatch = "shortest_queue"
    heart_beat_expiration_s: float = Field(default=30, gt=0)
    status_timeout_s: float = Field(default=5, gt=0)
    silence_s: float = Field(default=60, gt=0)
    answer_timeout_s: float = Field(default=600, gt=0)
    max_workers: int = Field(default=64, ge=1)


class LlavaProtocolArgs(Settings):
    """`address` is where clients are told to find a worker, which is always this service: None is where they asked.
    With `explain_errors` an error's text goes on with its cause; the cause is in a field of its own in any case."""

    enabled: bool = True
    address: str | None = Field(default=None, pattern=r"^https?://[^/?#\s]+(/[^?#\s]*)?$")
    explain_errors: bool = False
    workers: WorkerArgs = WorkerArgs()
