"""Deploys applications to the Serve that this process is connected to, and watches until ours runs.

Ray is imported where it is used, because it reads its environment when it is imported.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from deployments.errors import LaunchError
from deployments.launch.config_file import fault
from deployments.launch.deploy_failures import raise_if_failed

_POLL_S = 0.1


def serve_schema(config: Mapping[str, Any], host: str, port: int) -> Any:
    """A configuration as parsed by Serve itself, with the address of its proxy replaced. Raises LaunchError, also for
    fields that Serve would ignore."""
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    try:
        schema = ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        raise fault(error) from None
    _check_fields("", config, ServeDeploySchema)
    _check_fields("http_options.", config.get("http_options") or {}, HTTPOptionsSchema)
    for index, application in enumerate(config["applications"]):
        _check_fields(f"applications.{index}.", application, ServeApplicationSchema)
    schema.http_options = schema.http_options.model_copy(update={"host": host, "port": port})
    return schema


def _check_fields(where: str, given: Mapping[str, Any], schema: type[BaseModel]) -> None:
    if unknown := sorted(set(given) - set(schema.model_fields)):
        known = ", ".join(sorted(schema.model_fields))
        raise LaunchError(f"the configuration is wrong at {where}{unknown[0]}: Serve's settings there are {known}")


def deploy(schema: Any) -> None:
    """Returns at once. As with `serve deploy`, replicas of a running application of the same name are replaced."""
    _client().deploy_apps(schema)


def watch(application: str) -> Iterator[str]:
    """Yields the names of deployments as they become ready, until all are. Raises LaunchError when one cannot start."""
    client = _client()
    ready: set[str] = set()
    while True:
        # Not `serve.status`, which processes every setting of every deployment each time.
        overview = client.get_serve_status(application)
        stages = {each.name: each for each in overview.deployment_statuses}
        for name in sorted(set(stages) - ready):
            if stages[name].status == "HEALTHY":
                ready.add(name)
                yield name
        status = overview.app_status
        if status.status == "RUNNING":
            return
        messages = {name: each.message for name, each in stages.items() if name not in ready}
        raise_if_failed(str(status.status.value), status.message, messages)
        time.sleep(_POLL_S)


class StatusQuestion:
    """Asks Serve's controller what the deployments of an application do, without waiting: it may be away itself."""

    def __init__(self, application: str) -> None:
        self._application = application
        self._asked = _ask_for_details()

    def poll(self) -> dict[str, dict[str, Any]]:
        """Returns what Serve reported of each deployment since the last call, and asks again; nothing if no answer has
        arrived yet."""
        import ray
        from ray.exceptions import RayError

        try:
            if not ray.wait([self._asked], timeout=0)[0]:
                return {}
            answered, self._asked = self._asked, _ask_for_details()
            applications = ray.get(answered)["applications"]
        except RayError:
            # The next answer will do.
            return {}
        return dict(applications[self._application]["deployments"]) if self._application in applications else {}


def _ask_for_details() -> Any:
    # The client's own methods wait. They cannot do so in a thread: `ray.shutdown` would end this process.
    return _client()._controller.get_serve_instance_details.remote()


def _client() -> Any:
    """The client of Serve's controller."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    return client
