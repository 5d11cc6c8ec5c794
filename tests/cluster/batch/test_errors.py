"""A job ends with one of this project's errors, so that the command line reports it in one line."""

import pytest

from cluster.batch.errors import CapacityError, InputError, JobError, OutputError
from llava_core.errors import LlavaError


@pytest.mark.parametrize("kind", [CapacityError, InputError, OutputError])
def test_each_ends_the_job_and_is_said_in_a_line(kind: type[JobError]) -> None:
    assert issubclass(kind, JobError)
    assert issubclass(kind, LlavaError)
