"""Settings of LLaVA's own protocol: whether it is served, and which workers may register.

Knows names and bounds, but neither HTTP nor Ray.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deployments.settings.hosts import HostArgs
from deployments.settings.stages import Settings

Dispatch = Literal["lottery", "shortest_queue"]


class WorkerArgs(HostArgs):
    """External workers, which register themselves: none, unless their hosts are in `allowed_hosts`.

    Among workers with the same model, `dispatch` chooses one. A worker that promised heartbeats is forgotten
    `heart_beat_expiration_s` after its last one. `status_timeout_s` limits a status request, `silence_s` the wait for
    each next piece of an answer, `answer_timeout_s` a whole answer. At most `max_workers` are registered.
    """

    dispatch: Dispatch = "shortest_queue"
    heart_beat_expiration_s: float = Field(default=30, gt=0)
    status_timeout_s: float = Field(default=5, gt=0)
    silence_s: float = Field(default=60, gt=0)
    answer_timeout_s: float = Field(default=600, gt=0)
    max_workers: int = Field(default=64, ge=1)


class LlavaProtocolArgs(Settings):
    """`address` is the worker address given to clients, always this service's; None: the address they asked at. With
    `explain_errors` an error's text also contains its cause, which always has its own field as well."""

    enabled: bool = True
    address: str | None = Field(default=None, pattern=r"^https?://[^/?#\s]+(/[^?#\s]*)?$")
    explain_errors: bool = False
    workers: WorkerArgs = WorkerArgs()
