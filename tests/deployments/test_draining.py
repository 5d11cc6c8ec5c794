"""A service that is told to stop while it answers. A real Ray."""

import os
import signal
from pathlib import Path

import httpx
import pytest

from tests.deployments.service import (
    events,
    free_port,
    llava,
    long_checkpoint,
    messages,
    read_until,
    started,
    until,
    write_config,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_running_streams_end_and_new_requests_are_refused_before_it_stops(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    compute = {"num_cpus": 0.05, "dtype": "float32", "threads": 1}
    checkpoint = long_checkpoint(tiny_checkpoint, tmp_path)
    config = write_config(checkpoint, tmp_path, vision_encoder=compute, generator=compute)
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    command = llava("serve", "--config", str(config), "--port", str(port), "--drain-seconds", "120")
    with started(command) as (process, _):
        read_until(process, "  logs ")
        body = {"messages": messages("hi"), "stream": True, "max_tokens": 1000, "ignore_eos": True}
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            seen = events(response)
            next(seen)
            # To every process of the terminal, as Ctrl-C does.
            os.killpg(process.pid, signal.SIGINT)
            read_until(process, "Letting requests end")
            until(lambda: httpx.get(f"http://127.0.0.1:{port}/health", timeout=10).status_code == 503)
            refused = httpx.post(url, json={"messages": messages("hi")}, timeout=10)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "unavailable"
            *_, last, done = seen
        assert last["choices"][0]["finish_reason"] == "length"
        assert done == "[DONE]"
        assert process.wait(60) == 0
