"""What can be said without a cluster; test_service.py sees references travel."""

import asyncio
from typing import Any

from deployments.handoff import LocalHandoff, RayHandoff


class _Handle:
    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def options(self, **options: Any) -> "_Handle":
        self.given = options
        return self


def test_results_go_by_reference_and_tokens_by_value() -> None:
    handle: Any = _Handle()
    assert RayHandoff().calling(handle, "encode").given == {"method_name": "encode", "_by_reference": True}
    streaming = RayHandoff().streaming(handle, "generate").given
    assert streaming == {"method_name": "generate", "stream": True, "_by_reference": False}


def test_what_is_no_reference_is_taken_as_it_is() -> None:
    value = object()
    assert asyncio.run(RayHandoff().take(value)) is value


def test_in_one_process_responses_are_passed_on_untouched() -> None:
    handle: Any = _Handle()
    response: Any = object()
    assert asyncio.run(LocalHandoff().give(response)) is response
    assert asyncio.run(LocalHandoff().take(response)) is response
    assert LocalHandoff().calling(handle, "encode").given == {"method_name": "encode"}
    assert LocalHandoff().streaming(handle, "generate").given == {"method_name": "generate", "stream": True}
