"""Serve's reason for a failed deployment, in one line."""

import pytest

from deployments.errors import LaunchError
from deployments.launch.deploy_failures import cause, raise_if_failed

TRACEBACK = """Deploying app failed. Error:
Traceback (most recent call last):
  File "replicas.py", line 3, in __init__
llava_core.errors.CheckpointError: /models/x: tower tensor a has shape (1,), config.json says (2,)
"""


def test_a_stage_that_cannot_start_is_named_with_its_cause() -> None:
    with pytest.raises(LaunchError, match=r"^VisionEncoder: /models/x: tower tensor a has shape"):
        raise_if_failed("DEPLOY_FAILED", "failed", {"VisionEncoder": TRACEBACK, "Generator": ""})
    with pytest.raises(LaunchError, match=r"^nobody knows$"):
        raise_if_failed("UNHEALTHY", "nobody knows", {})


def test_other_errors_keep_their_class() -> None:
    assert cause("Traceback ...\n  x\ntorch.OutOfMemoryError: CUDA out of memory") == (
        "OutOfMemoryError: CUDA out of memory"
    )
