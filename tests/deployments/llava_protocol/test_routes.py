"""The protocol through the gateway: what the original clients see, and that the gateway's keys and limits apply."""

import asyncio
import base64
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from deployments.access.api_keys import ApiKey, editing, hash_key, make_key
from deployments.access.authorization import KeyRing
from deployments.errors import StageLostError
from deployments.gateway import Gateway
from deployments.llava_protocol.frames import SERVER_ERROR
from deployments.llava_protocol.routes import ProtocolSetup
from deployments.messages import Rejected
from deployments.metrics import ERRORS, HTTP_REQUESTS, TIME_TO_FIRST_TOKEN, WORKER_FAILURES
from deployments.settings.app import LimitArgs
from deployments.settings.llava_protocol import LlavaProtocolArgs
from llava_core.errors import EngineError, OverloadedError, PromptTooLongError, RequestError
from llava_core.types import RenderedRequest
from tests.deployments.fakes import FakeRecorder, ScriptedEngine, all_ready, answer
from tests.deployments.llava_protocol.original_clients import GradioPage, send_test_message
from tests.deployments.llava_protocol.original_worker import OriginalWorker, original_worker, words
from tests.deployments.service import until
from tests.sockets import serving_app

STREAM = "/worker_generate_stream"
HELLO = {"model": "m", "prompt": "USER: hi ASSISTANT:", "stop": "</s>"}


def setup(*workers: OriginalWorker, **fields: Any) -> ProtocolSetup:
    """Return a setup that lets these workers register."""
    hosts = [worker.url.removeprefix("http://") for worker in workers]
    allowed = {"allowed_hosts": hosts, "allowed_networks": ["127.0.0.0/8"], "allow_http": True}
    given = {**fields, "workers": {**allowed, **fields.get("workers", {})}}
    return ProtocolSetup(LlavaProtocolArgs.model_validate(given))


@contextmanager
def client(engine: ScriptedEngine | None = None, **options: Any) -> Iterator[TestClient]:
    engines = options.pop("engines", {"m": engine or ScriptedEngine(answer("Hel", "lo"))})
    gateway = Gateway(engines, all_ready, **options)
    with TestClient(gateway.app, raise_server_exceptions=False) as made:
        yield made


def frames(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    *whole, rest = response.content.split(b"\0")
    assert rest == b""
    return [json.loads(frame) for frame in whole]


def ask(asking: TestClient, **fields: Any) -> list[dict[str, Any]]:
    return frames(asking.post(STREAM, json={**HELLO, **fields}))


def test_a_rendered_prompt_reaches_the_model_unchanged() -> None:
    engine = ScriptedEngine(answer("Hel", "lo"))
    with client(engine) as asking:
        given = ask(asking, prompt="<s>USER: <image>\nhi</s>", images=[base64.b64encode(b"picture").decode()])
    assert [frame["text"] for frame in given] == ["<s>USER: <image>\nhi</s>Hel", "<s>USER: <image>\nhi</s>Hello"]
    [request] = engine.requests
    assert isinstance(request, RenderedRequest)
    assert request.prompt == "<s>USER: <image>\nhi</s>"
    assert [part.data for part in request.images] == [b"picture"]


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"model": "facebook/opt-350m"}, 2, "known are: m"),
        ({"images": ["aGk="]}, 1, "Number of images does not match number of <image> tokens in prompt"),
        ({"prompt": None}, 1, "prompt"),
        ({"temperature": "warm"}, 1, "temperature"),
    ],
)
def test_a_bad_request_gets_one_frame_with_the_references_code_and_a_cause(fields: dict, code: int, named: str) -> None:
    engine = ScriptedEngine(answer("x"))
    with client(engine) as asking:
        [frame] = ask(asking, **fields)
    assert (frame["text"], frame["error_code"]) == (SERVER_ERROR, code)
    assert named in frame["error"]["message"]
    assert frame["request_id"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (Rejected(RequestError("bad", param="images[0]", code="invalid_image")), 1),
        (Rejected(EngineError("broken")), 1),
        (ZeroDivisionError("oops"), 1),
        (StageLostError("gone"), 3),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_a_failure_is_the_last_frame_whether_or_not_the_answer_has_begun(
    failure: Any, code: int, *, begun: bool
) -> None:
    engine = ScriptedEngine([*answer("x", "y")[:1], failure] if begun else [failure])
    recorder = FakeRecorder()
    with client(engine, recorder=recorder) as asking:
        *before, last = ask(asking)
    assert len(before) == begun
    assert (last["text"], last["error_code"]) == (SERVER_ERROR, code)
    assert b"oops" not in json.dumps(last).encode()
    assert recorder.counted[ERRORS, (last["error"]["code"],)] == 1


def test_causes_are_in_the_text_if_configured() -> None:
    with client(llava=setup(explain_errors=True)) as asking:
        [frame] = ask(asking, images=["aGk="])
    assert frame["text"].startswith(SERVER_ERROR)
    assert frame["text"].endswith("Number of images does not match number of <image> tokens in prompt")


@pytest.mark.parametrize("too_long", [{"max_new_tokens": 0}, {}])
def test_a_prompt_without_room_for_an_answer_is_not_an_error(too_long: dict) -> None:
    with client(ScriptedEngine([Rejected(PromptTooLongError("600 tokens"))])) as asking:
        [frame] = ask(asking, **too_long)
    expected = HELLO["prompt"] + "Exceeds max token length. Please start a new conversation, thanks."
    assert frame == {"text": expected, "error_code": 0}


def test_overload_is_a_429_with_a_body_that_the_clients_can_read() -> None:
    with client(ScriptedEngine([Rejected(OverloadedError("full", limit="engine", retry_after_s=3))])) as asking:
        response = asking.post(STREAM, json=HELLO)
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    body = response.json()
    assert (body["text"], body["error_code"], body["error"]["code"]) == (SERVER_ERROR, 1, "overloaded")


@pytest.mark.parametrize("seconds", ["0", "soon"])
def test_an_invalid_header_is_refused_as_on_all_routes(seconds: str) -> None:
    with client() as asking:
        for route in (STREAM, "/list_models", "/get_worker_address"):
            response = asking.post(route, json=HELLO, headers={"x-request-timeout-seconds": seconds})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "x-request-timeout-seconds")


def test_deadlines_are_enforced() -> None:
    engine = ScriptedEngine(answer("x", "y")[:1], hangs=True)
    with client(engine) as asking:
        response = asking.post(STREAM, json=HELLO, headers={"x-request-timeout-seconds": "0.3"})
        first, last = frames(response)
    assert (first["error_code"], last["error"]["code"]) == (0, "deadline_exceeded")
    assert engine.num_open == 0


def test_bodies_are_bounded_as_on_all_routes() -> None:
    with client(limits=LimitArgs(max_body_bytes=1000, max_text=500)) as asking:
        response = asking.post(STREAM, json={**HELLO, "prompt": "x" * 2000})
        assert (response.status_code, response.json()["error_code"]) == (413, 1)
        [frame] = ask(asking, prompt="x" * 600)
        assert frame["error"]["code"] == "text_too_long"
        for route in ("/register_worker", "/receive_heart_beat", "/get_worker_address"):
            response = asking.post(route, content=b"x" * 70_000)
            assert response.json()["error"]["code"] == "request_too_large", route


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}"])
@pytest.mark.parametrize("route", ["/register_worker", "/receive_heart_beat", "/get_worker_address"])
def test_an_invalid_controller_message_is_refused(body: bytes, route: str) -> None:
    with client() as asking:
        assert asking.post(route, content=body).status_code == 400
        assert asking.get(route).status_code == 405


def test_a_client_disconnect_cancels_the_answer() -> None:
    engine = ScriptedEngine(answer("x", "y")[:1], hangs=True)
    with serving_app(Gateway({"m": engine}, all_ready).app) as url:
        showing = GradioPage(url).ask("m", "USER: hi", [], "</s>")
        assert next(showing) == "x▌"
        assert engine.num_open == 1
        # As the page does when its visitor leaves.
        showing.close()
        until(lambda: engine.num_open == 0)
    assert engine.num_left_early == 1


def test_the_model_may_be_omitted_only_if_there_is_just_one() -> None:
    with client() as asking:
        assert frames(asking.post(STREAM, json={"prompt": "hi"}))[-1]["text"] == "hiHello"
    with client(engines={"a": ScriptedEngine(), "b": ScriptedEngine()}) as asking:
        [frame] = frames(asking.post(STREAM, json={"prompt": "hi"}))
        assert frame["error"]["code"] == "missing_required_parameter"
        assert asking.post("/list_models").json() == {"models": ["a", "b"]}
        assert asking.post("/worker_get_status").json() == {"model_names": ["a", "b"], "speed": 2, "queue_length": 0}


def test_the_queue_length_counts_answers_in_progress() -> None:
    engine = ScriptedEngine(answer("x", "y")[:1], hangs=True)
    with serving_app(Gateway({"m": engine}, all_ready).app) as url, client() as _:
        page = GradioPage(url)
        showing = page.ask("m", "USER: hi", [], "</s>")
        next(showing)
        assert _status(url)["queue_length"] == 1
        showing.close()
        until(lambda: _status(url)["queue_length"] == 0)


def _status(url: str) -> dict[str, Any]:
    import requests

    return requests.post(f"{url}/worker_get_status", timeout=30).json()


@pytest.mark.parametrize(
    ("address", "expected"),
    [(None, "http://gpu.example:99"), ("https://public.example/llava/", "https://public.example/llava")],
)
def test_clients_get_the_address_they_used_or_the_configured_one(address: str | None, expected: str) -> None:
    with client(llava=setup(address=address)) as asking:
        for model, expected_address in (("m", expected), ("n", "")):
            response = asking.post("/get_worker_address", json={"model": model}, headers={"host": "gpu.example:99"})
            assert response.json() == {"address": expected_address}


def test_no_route_exists_when_the_protocol_is_disabled() -> None:
    gateway = Gateway({"m": ScriptedEngine()}, all_ready, llava=setup(enabled=False))
    assert not [route for route in gateway.routes if route.name.startswith("llava_")]
    with TestClient(gateway.app) as asking:
        response = asking.post(STREAM, json=HELLO)
    assert (response.status_code, set(response.json())) == (404, {"error", "request_id"})


# External workers.


def test_no_worker_can_register_unless_hosts_are_allowed() -> None:
    with original_worker() as worker, client() as asking:
        body = {"worker_name": worker.url, "check_heart_beat": True, "worker_status": worker.status}
        response = asking.post("/register_worker", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "permission_denied")
        beat = {"worker_name": worker.url, "queue_length": 0}
        assert asking.post("/receive_heart_beat", json=beat).json() == {"exist": False}
        assert asking.post("/list_models").json() == {"models": ["m"]}
    assert worker.num_status == 0


@pytest.mark.parametrize("dispatch", ["lottery", "shortest_queue"])
def test_a_registered_worker_is_listed_and_answers_through_this_service(dispatch: str) -> None:
    with original_worker(words(" Hel", "lo")) as worker:
        setting = setup(worker, workers={"dispatch": dispatch})
        recorder = FakeRecorder()
        with serving_app(Gateway({"m": ScriptedEngine()}, all_ready, llava=setting, recorder=recorder).app) as url:
            worker.register(url)
            assert worker.heart_beat(url)
            page = GradioPage(url)
            assert page.load() == ["llava-other", "m"]
            assert page.address("llava-other") == url
            shown = list(page.ask("llava-other", "USER: hi", ["aGk="] * 0, "###"))
            assert shown == ["Hel▌", "Hello▌"]
            assert send_test_message(url, "llava-other", "Tell me a story.") == " Hello"
            assert _status(url) == {"model_names": ["m", "llava-other"], "speed": 2, "queue_length": 2}
        assert worker.asked[0] == {
            "model": "llava-other",
            "prompt": "USER: hi",
            "temperature": 0.2,
            "top_p": 0.7,
            "max_new_tokens": 512,
            "stop": "###",
            "images": [],
        }
        assert recorder.observed[TIME_TO_FIRST_TOKEN, ("registered",)]


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (lambda _: [], "cut_off"),
        (lambda _: [b'{"text": "USER: hi Hel", "error_code": 0}\0{"text"'], "cut_off"),
        (lambda _: [b"\x00" * 10], "garbage"),
        (lambda _: [None], "silent"),
    ],
)
def test_a_misbehaving_worker_is_reported_and_contained(
    script: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with original_worker(script) as worker:
        recorder = FakeRecorder()
        options = {"llava": setup(worker, workers={"silence_s": 0.3}), "recorder": recorder}
        with client(**options) as asking, caplog.at_level(logging.WARNING):
            body = {"worker_name": worker.url, "check_heart_beat": True, "worker_status": worker.status}
            assert asking.post("/register_worker", json=body).content == b"null"
            *_, last = ask(asking, model="llava-other")
            # One frame reports it, with the reference's code for an unreachable worker.
            assert (last["text"], last["error_code"], last["error"]["code"]) == (SERVER_ERROR, 3, "worker_failed")
            assert recorder.counted[WORKER_FAILURES, (kind,)] == 1
            assert f"{worker.url} failed: {kind}" in caplog.text
            # It gets no more requests, and all others are served.
            [frame] = ask(asking, model="llava-other")
            assert frame["error_code"] == 2
            assert ask(asking)[-1]["text"].endswith("Hello")
            assert len(worker.asked) == 1


def test_forwarded_bodies_count_as_bytes_in_flight_until_answered() -> None:
    begun = b'{"text": "USER: hi x", "error_code": 0}\0'
    limits = LimitArgs(max_body_bytes=2000, max_bytes_in_flight=3000)
    with original_worker(lambda _: [begun, None]) as worker:
        gateway = Gateway({"m": ScriptedEngine(answer("x"))}, all_ready, llava=setup(worker), limits=limits)
        with serving_app(gateway.app) as url:
            worker.register(url)
            page = GradioPage(url)
            holding = page.ask("llava-other", "USER: hi", [], "</s>", note="x" * 1500)
            assert next(holding) == "x▌"
            refused = list(page.ask("m", "USER: hi", [], "</s>", note="x" * 1500))
            assert refused == [f"{SERVER_ERROR} (error_code: 1)"]
            holding.close()
            until(lambda: list(page.ask("m", "USER: hi", [], "</s>", note="x" * 1500)) == ["x▌"])


def test_a_dead_worker_yields_a_single_error_frame() -> None:
    with original_worker() as worker:
        setting = setup(worker)
    with client(llava=setting) as asking:
        body = {"worker_name": worker.url, "check_heart_beat": True, "worker_status": worker.status}
        asking.post("/register_worker", json=body)
        [frame] = ask(asking, model="llava-other")
    assert frame["error_code"] == 3


def test_forwarded_requests_are_not_forwarded_again() -> None:
    with original_worker() as worker, client(llava=setup(worker)) as asking:
        body = {"worker_name": worker.url, "check_heart_beat": True, "worker_status": worker.status}
        asking.post("/register_worker", json=body)
        for model, code in (("llava-other", 2), ("m", 0)):
            response = asking.post(STREAM, json={**HELLO, "model": model}, headers={"x-llava-forwarded": "1"})
            assert frames(response)[-1]["error_code"] == code
    assert worker.asked == []


def test_a_client_disconnect_ends_the_request_at_the_worker() -> None:
    begun = b'{"text": "USER: hi x", "error_code": 0}\0'
    with (
        original_worker(lambda _: [begun, None]) as worker,
        serving_app(Gateway({"m": ScriptedEngine()}, all_ready, llava=setup(worker)).app) as url,
    ):
        worker.register(url)
        showing = GradioPage(url).ask("llava-other", "USER: hi", [], "</s>")
        assert next(showing) == "x▌"
        showing.close()
        assert worker.hung_up.wait(30)


# Keys and limits.


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    (tmp_path / "keys.json").write_text('{"keys": []}')
    return tmp_path / "keys.json"


def add(path: Path, key_id: str = "team", **fields: Any) -> str:
    key = make_key(key_id)
    created_at = datetime(2026, 1, 1, tzinfo=UTC)
    with editing(path) as keys:
        keys[key_id] = ApiKey(id=key_id, sha256=hash_key(key), created_at=created_at, **fields)
    return key


def test_the_original_clients_can_send_a_key_as_a_password(keys_file: Path) -> None:
    """requests does so with a .netrc file, or with `http://name:key@host` as the address."""
    key = add(keys_file)
    gateway = Gateway({"m": ScriptedEngine(answer("Hi"))}, all_ready, keys=KeyRing(keys_file, max_age_s=0))
    with serving_app(gateway.app) as url:
        page = GradioPage(url, {"auth": ("any", key)})
        assert page.load() == ["m"]
        assert list(page.ask("m", "USER: hi", [], "</s>")) == ["Hi▌"]
        assert GradioPage(url.replace("://", f"://any:{key}@")).load() == ["m"]
        refused = GradioPage(url, {"auth": ("any", make_key("team"))})
        assert refused.options != page.options
        with pytest.raises(AssertionError):
            refused.load()


@pytest.mark.parametrize("given", ["Basic", "Basic x", "Basic eA==", "Basic \xff", "Bearer {basic}"])
def test_a_password_that_is_not_a_key_is_refused(given: str, keys_file: Path) -> None:
    basic = base64.b64encode(f"any:{add(keys_file)}".encode()).decode()
    with client(keys=KeyRing(keys_file, max_age_s=0)) as asking:
        header = given.format(basic=basic).encode("latin-1")
        assert asking.post("/list_models", headers={"authorization": header}).status_code == 401


def test_passwords_are_accepted_only_on_these_routes(keys_file: Path) -> None:
    basic = base64.b64encode(f"any:{add(keys_file)}".encode()).decode()
    with client(keys=KeyRing(keys_file, max_age_s=0)) as asking:
        headers = {"authorization": f"Basic {basic}"}
        assert asking.post("/list_models", headers=headers).status_code == 200
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/nothing")):
            assert asking.request(method, path, headers=headers, json={}).status_code == 401


def test_refusals_before_the_route_have_a_body_that_the_clients_can_read(keys_file: Path) -> None:
    recorder = FakeRecorder()
    with client(keys=KeyRing(keys_file), recorder=recorder) as asking:
        response = asking.post(STREAM, json=HELLO)
        assert response.status_code == 401
        assert list(response.json()) == ["text", "error_code", "error", "request_id"]
        assert response.json()["text"] == SERVER_ERROR
        # Errors of other routes have no such fields.
        assert set(asking.post("/v1/completions", json={}).json()) == {"error", "request_id"}
    assert recorder.counted[HTTP_REQUESTS, ("POST", STREAM, "401")] == 1


def test_a_key_may_be_restricted_to_workers(keys_file: Path) -> None:
    key = add(keys_file, routes=("llava_register_worker", "llava_receive_heart_beat"))
    with original_worker() as worker:
        gateway = Gateway({"m": ScriptedEngine()}, all_ready, llava=setup(worker), keys=KeyRing(keys_file, max_age_s=0))
        with serving_app(gateway.app) as url:
            worker.register(url, auth=("worker", key))
            assert worker.heart_beat(url, auth=("worker", key))
            with pytest.raises(AssertionError):
                worker.register(url)
            with pytest.raises(AssertionError):
                GradioPage(url, {"auth": ("worker", key)}).load()


def test_a_key_is_charged_for_tokens_or_for_a_workers_frames(keys_file: Path) -> None:
    with original_worker(words("a", "b", "c")) as worker:
        ring = KeyRing(keys_file, max_age_s=0)
        with client(llava=setup(worker), keys=ring) as asking:
            for model, number in (("llava-other", 3), ("m", 13)):
                key = add(keys_file, model, tokens_per_minute=number + 1)
                headers = {"authorization": f"Bearer {key}"}
                body = {"worker_name": worker.url, "check_heart_beat": False, "worker_status": worker.status}
                asking.post("/register_worker", json=body, headers=headers)
                for status in (200, 200, 429):
                    response = asking.post(STREAM, json={**HELLO, "model": model}, headers=headers)
                    assert response.status_code == status, model


def test_lightweight_routes_are_answered_even_when_the_service_is_full() -> None:
    """A worker whose heartbeat is refused gives up for good."""
    engine = ScriptedEngine(answer("x", "y")[:1], hangs=True)
    limits = LimitArgs(max_requests_in_flight=1)
    with serving_app(Gateway({"m": engine}, all_ready, limits=limits).app) as url:
        page = GradioPage(url)
        showing = page.ask("m", "USER: hi", [], "</s>")
        next(showing)
        assert page.load() == ["m"]
        # The page shows a refusal like this, without looking at its status.
        assert list(page.ask("m", "USER: hi", [], "</s>")) == [f"{SERVER_ERROR} (error_code: 1)"]
        showing.close()
        until(lambda: engine.num_open == 0)


def test_no_log_contains_prompts_or_answers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), client(ScriptedEngine(answer("SECRET", EngineError("x")))) as asking:  # type: ignore[arg-type]
        ask(asking, prompt="PLANTED <image>", images=["aGk="])
        ask(asking, prompt="PLANTED <image>")
    assert "PLANTED" not in caplog.text
    assert "SECRET" not in caplog.text


def test_concurrent_clients_get_their_own_answers() -> None:
    """Frames of one answer never reach another's client."""

    async def run() -> list[bytes]:
        import httpx

        engine = ScriptedEngine(answer("a", "b"))
        transport = httpx.ASGITransport(Gateway({"m": engine}, all_ready).app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as asking:
            bodies = [{**HELLO, "prompt": f"USER {number}:"} for number in range(20)]
            given = await asyncio.gather(*(asking.post(STREAM, json=body) for body in bodies))
        return [response.content for response in given]

    for number, content in enumerate(asyncio.run(run())):
        assert [json.loads(frame)["text"] for frame in content.split(b"\0")[:-1]] == [
            f"USER {number}:a",
            f"USER {number}:ab",
        ]
