"""What an operator sees of a running service: metrics, logs and traces show what happened, and never any content."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from deployments.commands.top import Page, top
from deployments.metrics import (
    CACHE_HITS,
    CACHE_MISSES,
    CANCELLATIONS,
    CHUNK_GAP,
    ERRORS,
    FINISHED,
    GENERATED_TOKENS,
    HTTP_DURATION,
    HTTP_REQUESTS,
    IMAGE_TOKENS,
    IMAGES,
    PROMPT_TOKENS,
    QUEUE_WAIT,
    STAGE_DURATION,
    TIME_TO_FIRST_TOKEN,
    Histogram,
)
from tests.deployments.pictures import plain, unusable
from tests.deployments.service import Running, content, events, messages, serving, until
from tests.tiny import IMAGE_TOKENS as TOKENS_OF_A_PICTURE

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
CHAT = "/v1/chat/completions"
STAGES = ("preprocess", "encode", "transfer", "prefill", "decode")
# Planted in a prompt, in a model's name, in invalid JSON, in a query and in a header.
PLANTED = "xyzzy plugh"
MAX_TOKENS = 8
# Colours of the pictures in requests: two of one colour and one of another.
COLOURS = ("red", "red", "blue")


@pytest.fixture(scope="module")
def service(long_context: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    options = {
        "logging_config": {"encoding": "JSON"},
        "tracing_config": {"enabled": True, "sampling_ratio": 1.0},
    }
    stage = {"num_cpus": 0.05}
    compute = {**stage, "dtype": "float32", "threads": 1}
    with pytest.MonkeyPatch.context() as patch:
        # Write each log record at once.
        patch.setenv("RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE", "1")
        with serving(
            long_context,
            tmp_path_factory.mktemp("service"),
            options=options,
            gateway=stage,
            preprocessor=stage,
            vision_encoder=compute,
            generator=compute,
        ) as running:
            yield running


def _num_observed(page: Page, histogram: Histogram, **labels: str) -> float:
    return page.buckets(histogram, **labels)[-1]


@pytest.fixture(scope="module")
def usages(service: Running) -> list[dict[str, Any]]:
    """Send every kind of request once; returns the usage of those that were answered."""
    found: list[dict[str, Any]] = []
    for colour in COLOURS:
        body = {"messages": messages(content(plain(colour), PLANTED)), "max_tokens": MAX_TOKENS, "ignore_eos": True}
        stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{service.url}{CHAT}", json=stream, timeout=60) as response:
            found.append([event for event in events(response) if event != "[DONE]"][-1]["usage"])
        found.append(service.post(**body).json()["usage"])
    headers = {"x-request-id": "found-again", "x-other": PLANTED}
    bad: list[dict[str, Any]] = [
        {"json": {"messages": messages(PLANTED), "model": PLANTED}},
        {"json": {"messages": messages(PLANTED), "temperature": PLANTED}},
        {"json": {"messages": messages(content(unusable()["no image"], PLANTED))}},
        {"json": {"messages": messages(PLANTED), "tools": [PLANTED]}},
        {"content": json.dumps({"messages": PLANTED})[:-1]},
    ]
    for request in bad:
        assert httpx.post(f"{service.url}{CHAT}?q={PLANTED}", headers=headers, timeout=60, **request).is_client_error
    httpx.get(f"{service.url}/v1/models/{PLANTED}", timeout=60)
    endless = {"messages": messages(content(plain(), PLANTED)), "max_tokens": 7_000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{service.url}{CHAT}", json=endless, timeout=60) as response:
        next(events(response))
    return found


def test_the_metrics_page_counts_the_requests(service: Running, usages: list[dict[str, Any]]) -> None:
    num_answers, num_bad = len(usages), 5

    def check(page: Page) -> None:
        assert page.total(HTTP_REQUESTS, route=CHAT) == num_answers + num_bad + 1
        assert page.total(FINISHED, outcome="finished") == num_answers
        assert page.total(HTTP_REQUESTS, route=CHAT, status="200") == num_answers
        assert page.total(HTTP_REQUESTS, route=CHAT, status="499") == 1
        assert page.total(HTTP_REQUESTS, route="/v1/models/{name:path}", status="404") == 1
        assert _num_observed(page, HTTP_DURATION, route=CHAT) == num_answers + num_bad + 1
        assert page.total(CANCELLATIONS, phase="streaming") == 1
        assert page.total(ERRORS, code="model_not_found") == 2
        assert page.total(ERRORS, code="invalid_image") == 1
        assert page.total(ERRORS, code="unsupported_parameter") == 1
        assert page.total(ERRORS) == num_bad + 1
        # The request whose client hung up had begun too.
        assert _num_observed(page, TIME_TO_FIRST_TOKEN, model=service.model) == num_answers + 1
        assert _num_observed(page, CHUNK_GAP, model=service.model) >= 1
        for stage in STAGES:
            # At least once per answer; transfers twice, to the encoder and to the generator.
            assert _num_observed(page, STAGE_DURATION, stage=stage) >= num_answers * (2 if stage == "transfer" else 1)
        assert _num_observed(page, STAGE_DURATION, stage="decode") == num_answers
        assert _num_observed(page, IMAGES) == num_answers + 1
        assert _num_observed(page, QUEUE_WAIT, stage="encode") == num_answers + 1
        assert _num_observed(page, QUEUE_WAIT, stage="generate") == num_answers
        # Two pictures were new once, and an invalid one always is; it is not encoded.
        assert page.total(CACHE_MISSES, cache="tiles") == 3
        assert page.total(CACHE_MISSES, cache="features") == 2
        for cache in ("tiles", "features"):
            assert page.total(CACHE_HITS, cache=cache) == num_answers + 1 - 2
        assert page.total(PROMPT_TOKENS) == sum(usage["prompt_tokens"] for usage in usages)
        assert page.total(IMAGE_TOKENS) == num_answers * TOKENS_OF_A_PICTURE
        assert page.total(GENERATED_TOKENS) >= num_answers * MAX_TOKENS

    service.settled_metrics(check)


def test_no_log_metric_or_trace_contains_request_content(service: Running, usages: list[dict[str, Any]]) -> None:
    until(lambda: "found-again" in service.log_text())
    until(lambda: "replica_handle_request Generator" in _spans(service))
    written = [
        path for path in service.logs.rglob("*") if path.is_file() and path.suffix in (".log", ".json", ".out", ".err")
    ]
    assert len(written) > 10
    page = httpx.get(service.metrics_url, timeout=10, trust_env=False).content
    secrets = [PLANTED.encode(), PLANTED.replace(" ", "%20").encode(), *_picture_fragments()]
    for name, data in [("metrics", page), *((str(path), path.read_bytes()) for path in written)]:
        for secret in secrets:
            assert secret not in data, name


def _picture_fragments() -> Iterator[bytes]:
    for picture in (*map(plain, COLOURS), unusable()["no image"]):
        yield picture[-24:]
        yield base64.b64encode(picture)[-24:]


def test_log_lines_are_json_and_carry_the_request_id(service: Running, usages: list[dict[str, Any]]) -> None:
    until(lambda: service.log_text().count("found-again") >= 5)
    records = [
        json.loads(line)
        for kind in ("replica_llava_*.log", "proxy_*.log", "controller_*.log")
        for path in service.logs.rglob(f"session_2*/logs/serve/{kind}")
        for line in path.read_text().splitlines()
    ]
    lines = [record for record in records if record["message"].startswith(f"POST {CHAT} ") and "status" in record]
    refused = [record for record in lines if record["request_id"] == "found-again"]
    assert len(refused) == 5
    assert {record["error_code"] for record in refused} >= {"model_not_found", "invalid_image", "unsupported_parameter"}
    assert {record["status"] for record in lines} >= {"200", "400", "404"}
    # The stages behind the gateway log the request's id too.
    works = {record.get("deployment") for record in records if record.get("request_id") == "found-again"}
    assert works >= {"llava_Gateway", "llava_Preprocessor", "llava_Generator"}


def _spans(service: Running) -> str:
    return "".join(path.read_text() for path in service.logs.rglob("session_2*/logs/serve/spans/*.json"))


def test_a_trace_spans_all_stages(service: Running, usages: list[dict[str, Any]]) -> None:
    names = ("Gateway", "Preprocessor prepare", "VisionEncoder encode", "Generator generate")
    until(lambda: all(f"replica_handle_request {name}" in _spans(service) for name in names))
    decoder = json.JSONDecoder()
    spans, text = [], _spans(service).strip()
    while text:
        span, end = decoder.raw_decode(text)
        spans.append(span)
        text = text[end:].lstrip()
    traces: dict[str, set[str]] = {}
    for span in spans:
        traces.setdefault(span["context"]["trace_id"], set()).add(span["name"])
    whole = [found for found in traces.values() if all(any(name in span for span in found) for name in names)]
    assert len(whole) >= len(usages), traces


def test_top_shows_the_running_service(service: Running, usages: list[dict[str, Any]]) -> None:
    result = CliRunner().invoke(top, [service.metrics_url, "--once", "--interval", "0.1"])
    assert result.exit_code == 0, result.output
    for stage in ("Gateway", "Preprocessor", "VisionEncoder", "Generator"):
        [line] = [line for line in result.output.splitlines() if line.startswith(f"{stage} ")]
        assert line.split()[1] == "1"
    assert "since the start: " in result.output
