"""How stages are called; and on a real Ray, that results bypass the gateway and are freed afterwards."""

import asyncio
import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.errors import StageSilentError
from deployments.graph import handoff
from deployments.graph.handoff import LocalHandoff, RayHandoff, Reference
from tests.deployments.graph import handoff_program
from tests.deployments.service import started


class _Handle:
    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def options(self, **options: Any) -> "_Handle":
        self.given = options
        return self


def test_results_are_passed_by_reference_and_tokens_by_value() -> None:
    handle: Any = _Handle()
    assert RayHandoff().calling(handle, "encode").given == {"method_name": "encode", "_by_reference": True}
    streaming = RayHandoff().streaming(handle, "generate").given
    assert streaming == {"method_name": "generate", "stream": True, "_by_reference": False}


def test_a_plain_value_is_taken_as_it_is() -> None:
    value = object()
    assert asyncio.run(RayHandoff().take(value)) is value


def test_small_features_are_passed_inline() -> None:
    small = np.zeros(1000, np.uint8)
    assert RayHandoff().share(small) is small
    assert asyncio.run(RayHandoff().shared(small)) is small
    # Larger ones need a Ray, see below.
    assert asyncio.run(LocalHandoff().shared(LocalHandoff().share(small))) is small


def test_in_one_process_responses_are_passed_on_untouched() -> None:
    handle: Any = _Handle()
    response: Any = object()
    assert asyncio.run(LocalHandoff().give(response)) is response
    assert asyncio.run(LocalHandoff().take(response)) is response
    assert LocalHandoff().calling(handle, "encode").given == {"method_name": "encode"}
    assert LocalHandoff().streaming(handle, "generate").given == {"method_name": "generate", "stream": True}


class _Out:
    """A reference whose object never arrives."""

    def __await__(self) -> Generator[Any, None, None]:
        yield from asyncio.Event().wait().__await__()


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_finished_result_that_does_not_arrive_is_unreachable(
    monkeypatch: pytest.MonkeyPatch, *, is_taken: bool
) -> None:
    ref: Any = _Out()
    looks = [False, False, False, True, True]
    monkeypatch.setattr(handoff, "SILENCE_S", 0.02)
    monkeypatch.setattr(handoff, "_is_made", lambda _ref: looks.pop(0))
    monkeypatch.setattr(handoff.ray, "ObjectRef", _Out)

    async def wait() -> None:
        with pytest.raises(StageSilentError):
            await (RayHandoff().take(Reference(ref)) if is_taken else RayHandoff().shared(ref))

    asyncio.run(wait())
    # However long the object takes to be made.
    assert looks == [True]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_results_bypass_the_gateway_and_leave_the_object_store(tmp_path: Path) -> None:
    program = Path(__file__).with_name("handoff_program.py")
    with started([sys.executable, str(program), str(tmp_path / "log")]) as (process, _):
        printed = process.communicate(timeout=200)[0].decode()
    assert process.returncode == 0, printed
    seen = json.loads(printed.strip().splitlines()[-1])
    assert seen["left"] <= seen["most_left"]
    # Each request puts only its first result into the store; what the second refers to is already there.
    per_request = seen["created"] / handoff_program.NUM_REQUESTS
    assert handoff_program.NUM_BYTES <= per_request < 1.5 * handoff_program.NUM_BYTES
    assert seen["lost"] == "StageLostError"
    assert seen["made"] == [False, True]
    # Two results per request, each unpacked once, by the stage that it was meant for.
    assert len(seen["unpacked_by"]) == 2 * (8 + 120)
    assert len(set(seen["unpacked_by"])) == 2
    assert seen["gateway"] not in seen["unpacked_by"]
