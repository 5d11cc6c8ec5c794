"""A job ends with one of this project's errors, so that the command line reports it in one line."""

import pytest

from cluster.batch.errors import CapacityError, InputError, JobError, OutputError
from llava_core.errors import LlavaError


@pytest.mark.parametrize("kind", [CapacityError, InputError, OutputError])
def test_each_error_is_a_job_error_and_one_of_ours(kind: type[JobError]) -> None:
    assert issubclass(kind, JobError)
    assert issubclass(kind, LlavaError)
