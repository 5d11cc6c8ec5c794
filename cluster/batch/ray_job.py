"""A job's rows answered on Ray: connected, with room for the stages, and its errors as ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from cluster.batch.capacity import check_capacity
from cluster.batch.errors import JobError
from cluster.batch.job import Answering
from cluster.batch.ray_cluster import autoscaler_limit, node_resources, ray_cluster, set_environment
from cluster.batch.settings import JobSettings

_ERROR_LINE = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Exit): .+)$", re.MULTILINE)


@contextmanager
def on_ray(settings: JobSettings) -> Iterator[Answering]:
    """Raises CapacityError before anything waits for what will never come, JobError when Ray cannot go on."""
    set_environment()
    from ray.exceptions import RayError

    from cluster.batch.pipeline import READ_CPUS, answer_rows

    with ray_cluster():
        if not settings.waits_for_nodes:
            check_capacity(settings.stages, READ_CPUS, node_resources(), autoscaler_limit())
        try:
            yield partial(answer_rows, settings)
        except RayError as error:
            raise JobError(
                f"{cause(str(error))}. What was written stays; the same command goes on from there"
            ) from error


def cause(text: str) -> str:
    """The last exception that a traceback names, of those that say something."""
    lines = _ERROR_LINE.findall(text)
    return str(lines[-1]).strip().rstrip(".") if lines else text.strip()
