"""Who can reach the service: one that asks nobody who they are listens on the loopback interface alone.

Knows hosts as configurations write them, and not who starts what.
"""

from __future__ import annotations

from pathlib import Path

from deployments.api_keys import read_keys
from deployments.settings import AuthArgs
from llava_core.client.exchange import is_loopback
from llava_core.errors import LlavaError

# Set by whoever starts a Ray with an entrance of its own, for all replicas of that Ray: the host it listens on. Where
# Serve listens is then behind it.
ENTRANCE_VARIABLE = "LLAVA_SERVE_ENTRANCE_HOST"


class ExposureError(LlavaError):
    """The service would answer strangers."""


def check_exposure(host: str, auth: AuthArgs) -> None:
    """Raise ExposureError for a host that others reach where nobody is asked for a key, KeysFileError for keys that
    cannot be read."""
    if auth.keys_file is not None:
        read_keys(Path(auth.keys_file))
    elif not auth.allow_anyone and not is_loopback(host):
        raise ExposureError(
            f"the service would listen on {host}, where others reach it, and asks for no API keys; make some with "
            "`llava keys create` and name their file in auth.keys_file, listen on 127.0.0.1, or set auth.allow_anyone "
            "where something in front of it knows who may ask"
        )
