"""A service that is told to stop, or to load another configuration, while it answers. A real Ray."""

import os
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml

from benchmarks.ports import free_port
from deployments.launch.processes import descendants, name_of
from tests.deployments.pictures import plain
from tests.deployments.service import (
    alive,
    content,
    events,
    llava,
    long_checkpoint,
    messages,
    read_until,
    started,
    until,
    write_config,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

AGENTS = ("ray::RuntimeEnv", "ray::Dashboard")
COMPUTE = {"num_cpus": 0.05, "dtype": "float32", "threads": 1}
STAGES = {"vision_encoder": COMPUTE, "generator": COMPUTE}


def _serve(config: Path, port: int) -> list[str]:
    return llava("serve", "--config", str(config), "--port", str(port), "--drain-seconds", "120")


class _Stream:
    """A long answer that has begun, read in a thread as it arrives: unread, it might already be complete."""

    def __init__(self, url: str, *, max_tokens: int) -> None:
        self.events: list[Any] = []
        self._url = url
        self._body = {"messages": messages("hi"), "stream": True, "max_tokens": max_tokens, "ignore_eos": True}
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._thread.start()
        until(lambda: bool(self.events))
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def assert_ends_well(self) -> None:
        self._thread.join()
        *_, last, done = self.events
        assert last["choices"][0]["finish_reason"] == "length"
        assert done == "[DONE]"

    def _read(self) -> None:
        with httpx.stream("POST", f"{self._url}/v1/chat/completions", json=self._body, timeout=150) as response:
            for event in events(response):
                self.events.append(event)


class _Asking:
    """Asks one question after another, every second one about a new picture, until the block ends."""

    def __init__(self, url: str) -> None:
        self.statuses: Counter[int] = Counter()
        self.unexpected: list[str] = []
        self._url = url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _ask(self) -> None:
        number = 0
        while not self._is_over.is_set():
            number += 1
            parts = content(plain((number % 256, number // 256, 0)), "What?") if number % 2 else "hi"
            body = {"messages": messages(parts), "max_tokens": 2}
            response = httpx.post(f"{self._url}/v1/chat/completions", json=body, timeout=150)
            self.statuses[response.status_code] += 1
            if response.status_code != 200:
                self.unexpected.append(response.text)


def _reload_with_limits(process: subprocess.Popen[bytes], config: Path, limits: dict[str, Any]) -> None:
    described = yaml.safe_load(config.read_text())
    described["applications"][0]["args"]["limits"] = limits
    config.write_text(yaml.safe_dump(described))
    process.send_signal(signal.SIGHUP)


def _add_second_application(config: Path) -> None:
    """Add a second application: then Serve's proxy is in front of both, and gateways do not listen themselves."""
    described = yaml.safe_load(config.read_text())
    other = {"name": "other", "route_prefix": "/other", "import_path": "tests.deployments.other_application:app"}
    described["applications"].append(other)
    config.write_text(yaml.safe_dump(described))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["gateways, Ctrl-C", "proxy, SIGTERM"])
def test_streams_finish_across_a_new_configuration_and_before_shutdown(
    number: signal.Signals, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = long_checkpoint(tiny_checkpoint, tmp_path, num_tokens=20_000)
    config = write_config(checkpoint, tmp_path, engine={"cache_tokens": 40_000}, **STAGES)
    is_alone = number == signal.SIGINT
    if not is_alone:
        _add_second_application(config)
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    def is_taken() -> bool:
        """Whether a request for more answers than the new limits allow is accepted."""
        body = {"messages": messages("hi"), "n": 2, "max_tokens": 1}
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=150)
        assert response.status_code in (200, 400), response.text
        return response.status_code == 200

    with started(_serve(config, port)) as (process, _):
        read_until(process, "  logs ")
        assert is_taken()
        _reload_with_limits(process, config, {"max_n": 0})
        read_until(process, "The service stays as it is: the configuration is wrong at args.limits.max_n")
        # The stream lasts twice as long as starting new replicas of all stages.
        with _Stream(url, max_tokens=19_000) as stream, _Asking(url) as asking:
            _reload_with_limits(process, config, {"max_n": 1})
            until(lambda: not is_taken(), deadline_s=120)
            assert not stream.is_over, "it has ended too soon to tell anything"
            stream.assert_ends_well()
            # This is printed only when the last of the old replicas has ended.
            read_until(process, "Serving long-llava with the new configuration")
            until(lambda: not is_taken())
        # No request was refused meanwhile.
        assert set(asking.statuses) == {200}, asking.unexpected
        if not is_alone:
            assert httpx.get(f"{url}/other", timeout=60).text == "other"
        # Once it has ended, nothing is left that could refuse a request.
        with _Stream(url, max_tokens=4000) as stream:
            _stop(process, number)
            read_until(process, "for requests to finish")
            until(lambda: httpx.get(f"{url}/health", timeout=10).status_code == 503)
            refused = httpx.post(f"{url}/v1/chat/completions", json={"messages": messages("hi")}, timeout=10)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "unavailable"
            stream.assert_ends_well()
        assert process.wait(60) == 0


def _stop(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if number == signal.SIGINT:
        # To every process of the terminal, as Ctrl-C does.
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def test_a_killed_launcher_leaves_no_serving_or_computing_process(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = write_config(tiny_checkpoint, tmp_path, **STAGES)
    with started(_serve(config, free_port())) as (process, _):
        read_until(process, "  logs ")
        # Ray's agents need a minute to detect it.
        begun = {each for each in descendants(process.pid) if not name_of(each).startswith(AGENTS)}
        assert len(begun) > 8
        process.kill()
        process.wait()
        until(lambda: not alive(begun))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_service_can_be_stopped_while_it_starts(number: signal.Signals) -> None:
    """This holds even if SIGINT is ignored from the beginning, as in a shell's background jobs."""
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *llava("serve", "--port", str(free_port()))]
    with started(command) as (process, _):
        read_until(process, "Ray")
        below = descendants(process.pid)
        process.send_signal(number)
        rest = process.communicate(timeout=120)[0]
        assert b"Serving" not in rest
        assert below, "Ray was there"
        until(lambda: not alive(below), deadline_s=90)
