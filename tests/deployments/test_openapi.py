"""The OpenAPI description: it covers every route, matches the responses, and yields thousands of test requests."""

import json
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import CheckContext, GenerationMode, Response
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route
from starlette.testclient import TestClient

from deployments.gateway import Gateway
from deployments.http.errors import TABLE, HttpError
from deployments.messages import Item, Rejected
from deployments.openapi import OPERATIONS, describe_api
from deployments.settings.app import LimitArgs
from llava_core.checkpoints.describe import load_preparer
from llava_core.errors import LlavaError
from llava_core.prepare import Preparer
from llava_core.prompts.tokenize import Tokenized
from llava_core.types import AnyRequest
from tests.deployments.fakes import ScriptedEngine, all_ready, answer

PATH, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}
GATEWAY = Gateway({"m": ScriptedEngine(answer("Hel", "lo"))}, all_ready)
DESCRIPTION = describe_api(GATEWAY.routes, has_keys=False, max_timeout_seconds=LimitArgs().max_timeout_seconds)
TIMEOUT = "x-request-timeout-seconds"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(GATEWAY.app) as client:
        yield client


def _validate(value: Any, name: str) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DESCRIPTION["components"]}
    jsonschema.validate(value, schema, cls=jsonschema.Draft202012Validator)


def test_routes_and_description_match() -> None:
    routes = {route.name for route in GATEWAY.routes}
    assert routes == set(OPERATIONS)
    described = {(path, method) for path, methods in DESCRIPTION["paths"].items() for method in methods}
    assert (PATH, "post") in described
    assert len(described) == len(routes)


def test_an_undescribed_route_aborts_the_start() -> None:
    with pytest.raises(LookupError, match="secret_door"):
        describe_api(
            [Route("/secret", lambda _request: None, name="secret_door")], has_keys=False, max_timeout_seconds=1
        )


def test_the_description_is_served_and_valid(client: TestClient) -> None:
    response = client.get("/openapi.json")
    assert response.json() == DESCRIPTION
    _validate(response.json(), "OpenApi")
    # Every reference can be resolved.
    schemas = set(DESCRIPTION["components"]["schemas"])
    text = json.dumps(DESCRIPTION)
    named = {piece.split('"', 1)[0] for piece in text.split("#/components/schemas/")[1:]}
    assert named <= schemas
    assert schemas == named
    for schema in DESCRIPTION["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_keys_are_required_on_every_route_but_health() -> None:
    description = describe_api(GATEWAY.routes, has_keys=True, max_timeout_seconds=1)
    assert description["security"] == [{"key": []}]
    assert description["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, methods in description["paths"].items():
        for operation in methods.values():
            is_open = path == "/health"
            assert (operation.get("security") == []) == is_open
            assert ({"401", "403", "429"} <= operation["responses"].keys()) != is_open
    assert "security" not in DESCRIPTION


def test_headers_are_described_exactly_where_they_are_read(client: TestClient) -> None:
    for path, methods in DESCRIPTION["paths"].items():
        for method, operation in methods.items():
            headers = {each["name"]: each["schema"] for each in operation["parameters"] if each["in"] == "header"}
            assert set(headers) == ({"x-request-id", TIMEOUT} if method == "post" else {"x-request-id"})
            given = {"x-request-id": "mine", TIMEOUT: str(headers.get(TIMEOUT, {"maximum": 1})["maximum"] + 1)}
            response = client.request(method, path, headers=given, json={})
            # Routes that do not read the header accept any value.
            is_read = response.status_code == 400 and response.json()["error"]["param"] == TIMEOUT
            assert is_read == (TIMEOUT in headers), response.text
            assert response.headers["x-request-id"] == "mine"
            for status, described in operation["responses"].items():
                assert "x-request-id" in described["headers"]
                assert ("retry-after" in described["headers"]) == (status in ("429", "503"))


@pytest.mark.parametrize(
    ("error", "status"),
    [(row, row[1].status) for row in TABLE],
    ids=lambda each: each[0].__name__ if isinstance(each, tuple) else "",
)
def test_every_error_status_is_described_on_routes_that_may_return_it(
    error: tuple[type[BaseException], HttpError], status: int
) -> None:
    described = describe_api(GATEWAY.routes, has_keys=True, max_timeout_seconds=1)["paths"]
    assert str(status) in described[PATH]["post"]["responses"], error[0]
    # HAProxy's own responses, on every route.
    for methods in described.values():
        for operation in methods.values():
            assert {"502", "503", "504"} <= operation["responses"].keys()


def test_responses_match_the_description(client: TestClient) -> None:
    _validate(client.post(PATH, json=HELLO).json(), "ChatCompletion")
    _validate(client.post(PATH, json={**HELLO, "timings": True, "image_transforms": True}).json(), "ChatCompletion")
    _validate(client.post(COMPLETIONS, json={"prompt": "hi"}).json(), "Completion")
    for with_texts in (True, False):
        body = {"prompt": "hi", "return_token_strs": with_texts}
        _validate(client.post("/tokenize", json=body).json(), "Tokenized")
    _validate(client.post("/detokenize", json={"tokens": [1]}).json(), "Detokenized")
    _validate(client.get("/v1/models").json(), "ModelList")
    _validate(client.get("/v1/models/m").json(), "Model")
    _validate(client.get("/health").json(), "Health")
    _validate(client.get("/nothing").json(), "Error")
    options = {"stream": True, "timings": True, "stream_options": {"include_usage": True}}
    for path, body, name, least in (
        (PATH, HELLO, "ChatCompletionChunk", 4),
        (COMPLETIONS, {"prompt": "hi"}, "CompletionChunk", 2),
    ):
        for extra in ({}, options):
            text = client.post(path, json={**body, "stream": True, **extra}).text
            chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            assert len(chunks) >= least
            for chunk in chunks:
                _validate(chunk, name)


class _Preparing:
    """A graph of only the first stage: it detects faulty requests, and gives all others the same answer."""

    def __init__(self, preparer: Preparer) -> None:
        self._preparer = preparer

    async def stream(self, request: AnyRequest, on_sent: Callable[[], None]) -> AsyncGenerator[Item, None]:
        try:
            self._preparer.prepare(request)
        except LlavaError as error:
            yield Rejected(error)
            return
        for delta in answer("Hel", "lo"):
            yield delta

    async def tokenize(self, request: AnyRequest) -> Tokenized | Rejected:
        try:
            return self._preparer.tokenize(request)
        except LlavaError as error:
            return Rejected(error)

    async def detokenize(self, ids: Sequence[int]) -> str | Rejected:
        try:
            return self._preparer.detokenize(ids)
        except LlavaError as error:
            return Rejected(error)


@pytest.fixture(scope="module")
def prepared_schema(tiny_checkpoint: Path) -> Any:
    gateway = Gateway({"m": _Preparing(load_preparer(tiny_checkpoint))}, all_ready)
    schema = schemathesis.openapi.from_dict(DESCRIPTION)
    schema.app = gateway.app
    return schema


def _no_fault(context: CheckContext, response: Response, case: schemathesis.Case) -> bool | None:
    """Accept timeouts, which a request may ask for."""
    is_late = response.status_code == 504 and TIMEOUT in (case.headers or {})
    return None if is_late else not_a_server_error(context, response, case)


CHECKS = [
    _no_fault,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name)
@pytest.mark.parametrize("path", DESCRIPTION["paths"])
def test_generated_requests_are_answered_as_described(path: str, mode: GenerationMode, prepared_schema: Any) -> None:
    """Valid and invalid requests are generated from the description: none causes a server error, and each response is
    described."""
    (operation,) = prepared_schema[path].values()
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("nothing about it can be wrong")

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    ask()
