"""Who can reach the service: without API keys it listens on the loopback interface only.

Knows hosts as configurations write them, but not who starts what.
"""

from __future__ import annotations

from pathlib import Path

from deployments.access.api_keys import read_keys
from deployments.settings.app import AuthArgs
from llava_core.client.exchange import is_loopback
from llava_core.errors import LlavaError

# The host on which the entrance in front of Serve listens. Whoever starts a Ray with such an entrance sets it for all
# replicas of that Ray; Serve then listens behind the entrance.
ENTRANCE_VARIABLE = "LLAVA_SERVE_ENTRANCE_HOST"


class ExposureError(LlavaError):
    """The service would answer strangers."""


def check_exposure(host: str, auth: AuthArgs) -> None:
    """Raise ExposureError for a host that others can reach without a key, KeysFileError for keys that cannot be
    read."""
    if auth.keys_file is not None:
        read_keys(Path(auth.keys_file))
    elif not auth.allow_anyone and not is_loopback(host):
        raise ExposureError(
            f"the service would listen on {host}, where others can reach it without API keys; create keys with "
            "`llava keys create` and name their file in auth.keys_file, listen on 127.0.0.1, or set auth.allow_anyone "
            "if something in front of the service authenticates its clients"
        )
