"""What a network that computes on a processor's cores tells who shares them with it. Standard library only."""

from __future__ import annotations

from typing import Protocol


class Cores(Protocol):
    """Told by one thread."""

    def claim(self) -> None:
        """There is something to compute; called before every part of it."""
        ...

    def release(self) -> None:
        """There is nothing to compute."""
        ...


class OwnCores:
    """Nobody else's."""

    def claim(self) -> None:
        """Nobody to tell."""

    def release(self) -> None:
        """Nobody to tell."""
