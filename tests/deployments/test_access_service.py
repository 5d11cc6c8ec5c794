"""Keys and fetching as operators enable them: `llava serve`, a real local Ray, real HTTP, under a prefix."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from deployments.access.api_keys import ApiKey, editing, hash_key, make_key
from tests.deployments.pictures import plain
from tests.deployments.service import Running, messages, serving, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


class _Pictures(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "image/png")
        self.end_headers()
        self.wfile.write(plain())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def pictures() -> Iterator[int]:
    """Yield the port of a server with a picture at every path."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


def _add(path: Path, key_id: str, **limits: int) -> str:
    key = make_key(key_id)
    created_at = "2026-01-01T00:00:00Z"
    with editing(path) as keys:
        keys[key_id] = ApiKey.model_validate(
            {"id": key_id, "sha256": hash_key(key), "created_at": created_at, **limits}
        )
    return key


@pytest.fixture(scope="module")
def key(keys_file: Path) -> str:
    return _add(keys_file, "first")


@pytest.fixture(scope="module")
def service(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, keys_file: Path, key: str, pictures: int
) -> Iterator[Running]:
    compute = {"dtype": "float32", "device": "cpu", "threads": 1}
    fetch = {"allowed_hosts": [f"localhost:{pictures}"], "allowed_networks": ["127.0.0.0/8", "::1/128"]}
    with serving(
        tiny_checkpoint,
        tmp_path_factory.mktemp("service"),
        route_prefix="/vision",
        auth={"keys_file": str(keys_file)},
        fetch={**fetch, "allow_http": True, "timeout_s": 60},
        vision_encoder=compute,
        generator=compute,
    ) as running:
        yield running


def test_only_health_answers_without_a_key(service: Running) -> None:
    assert httpx.get(f"{service.url}/health").status_code == 200
    for method, path in [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/openapi.json")]:
        response = httpx.request(method, service.url + path)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "missing_api_key"
        assert response.json()["request_id"] == response.headers["x-request-id"]
    with pytest.raises(openai.AuthenticationError):
        service.client.models.list()


def test_the_openai_client_sends_its_key_and_is_rate_limited(service: Running, keys_file: Path, key: str) -> None:
    client = service.client.with_options(api_key=key)
    answer = client.chat.completions.create(model=service.model, messages=messages("hi"), max_tokens=3)
    assert answer.usage.completion_tokens >= 1
    limited = service.client.with_options(api_key=_add(keys_file, "limited", requests_per_minute=1))
    # The key's first request, once the service knows it, is the only one allowed per minute.
    until(lambda: _lists_models(limited))
    with pytest.raises(openai.RateLimitError) as caught:
        limited.models.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) >= 1


def _lists_models(client: openai.OpenAI) -> bool:
    try:
        return bool(client.models.list().data)
    except openai.AuthenticationError:
        return False


def test_a_revoked_key_is_refused_while_the_service_runs(service: Running, keys_file: Path) -> None:
    client = service.client.with_options(api_key=_add(keys_file, "short"))
    until(lambda: _lists_models(client))
    with editing(keys_file) as keys:
        del keys["short"]
    until(lambda: not _lists_models(client))


def test_a_picture_given_by_url_is_fetched_by_the_preprocessor(service: Running, key: str, pictures: int) -> None:
    client = service.client.with_options(api_key=key)

    def ask(url: str) -> openai.types.chat.ChatCompletion:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
        return client.chat.completions.create(
            model=service.model, messages=messages(parts), max_tokens=3, extra_body={"timings": True}
        )

    answer = ask(f"http://localhost:{pictures}/a.png")
    assert answer.usage.prompt_tokens_details.image_tokens > 0
    assert set(answer.timings) >= {"fetch", "preprocess", "encode"}
    for other in (f"http://127.0.0.1:{pictures}/a.png", "http://169.254.169.254/", "https://example.com/a.png"):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(other)
        assert caught.value.code == "image_url_not_allowed"


def test_no_log_contains_a_key(service: Running, key: str) -> None:
    secret = key.rsplit(".", 1)[1].encode()
    logs = [path for path in service.logs.rglob("*") if path.is_file()]
    assert logs
    assert [path for path in logs if secret in path.read_bytes()] == []
