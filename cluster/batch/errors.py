"""Errors that keep a bulk job from starting, or end it."""

from __future__ import annotations

from llava_core.errors import LlavaError


class JobError(LlavaError):
    """The job cannot continue. What it has written stays; the same command resumes once the cause is fixed."""


class InputError(JobError):
    """The input is invalid, or has changed."""


class OutputError(JobError):
    """The output cannot be written: it belongs to another run, another job is writing it, or its disk is full."""


class CapacityError(JobError):
    """The cluster can never provide what the stages ask for."""
