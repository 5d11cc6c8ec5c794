"""What a bulk job refuses to begin with, and what ends one."""

from __future__ import annotations

from llava_core.errors import LlavaError


class JobError(LlavaError):
    """The job cannot go on. What it has written stays; the same command goes on from there once the cause is gone."""


class InputError(JobError):
    """The input is not one, or has changed."""


class OutputError(JobError):
    """The output cannot be written: it is another run's, another job is writing it, or its disk is full."""


class CapacityError(JobError):
    """The cluster can never have what the stages ask for."""
