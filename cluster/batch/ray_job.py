"""Answers a job's rows on Ray: connects, checks that the stages fit, and turns Ray's errors into ours."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.batch.capacity import check_capacity, waiting
from cluster.batch.errors import JobError
from cluster.batch.job import Answering
from cluster.batch.ray_cluster import autoscaler_limit, node_resources, ray_cluster, set_environment, total_and_free
from cluster.batch.records import Record
from cluster.batch.settings import JobSettings
from cluster.batch.sources import Plan, Source

_ERROR_LINE = re.compile(r"^([\w.]+\.)?(\w*(?:Error|Exception|Exit): .+)$", re.MULTILINE)
_OF_RAY = "ray.exceptions."


@dataclass(frozen=True)
class OnRay:
    """The Answering of job.py, valid while Ray is connected."""

    settings: JobSettings

    def __call__(
        self, source: Source, plan: Plan, written: npt.NDArray[np.bool_], *, isolated: bool
    ) -> Generator[list[Record], None, None]:
        """See pipeline.py."""
        from cluster.batch.pipeline import answer_rows

        return answer_rows(self.settings, source, plan, written, isolated=isolated)

    def waits_for(self) -> str:
        """Say what is free and what the stages ask for."""
        return waiting(self.settings.stages, *total_and_free())


@contextmanager
def on_ray(settings: JobSettings) -> Iterator[Answering]:
    """Connect to Ray and yield its Answering. Raises CapacityError at once if the stages can never fit, and JobError
    when Ray cannot continue."""
    set_environment()
    from ray.exceptions import RayError

    from cluster.batch.pipeline import READ_CPUS

    with ray_cluster():
        if not settings.waits_for_nodes:
            check_capacity(settings.stages, READ_CPUS, node_resources(), autoscaler_limit())
        try:
            yield OnRay(settings)
        except RayError as error:
            raise JobError(
                f"{cause(str(error))}. What was written stays; the same command resumes from there"
            ) from error


def cause(text: str) -> str:
    """Return the last exception with a message that a traceback names; one of Ray's, in which Ray wraps others, only if
    there is no other."""
    found = _ERROR_LINE.findall(text)
    lines = [line for module, line in found if module != _OF_RAY] or [line for _, line in found]
    return str(lines[-1]).strip().rstrip(".") if lines else text.strip()
