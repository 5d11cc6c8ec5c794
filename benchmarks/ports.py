"""Free ports of the loopback interface, for services that a benchmark or a test starts."""

from __future__ import annotations

import contextlib
import secrets
import socket

# Above the ports of Ray's workers (to 19999), below those of Serve (from 30000) and those that a system gives to
# whoever asks for any (Linux: from 32768): a service listens on its port only when it has started, seconds later. Every
# second one, because a service's metrics get the next.
_PORTS = range(20_000, 30_000, 2)


def free_port() -> int:
    """Return a random port on which nobody listens, and that nobody gets by chance before it is used."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := secrets.choice(_PORTS)))
            return port
