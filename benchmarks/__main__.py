"""Start-up, time to first token, tokens per second, and what the graph costs over the same engine in one process.

    python -m benchmarks [--port 8000] [--requests 24] [--starts 3] [--json FILE]

The service, the empty graph and the in-process engine take turns in one run, so their ratios hold on a noisy machine.
Talks to 127.0.0.1 only, and ends by itself.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.ports import free_port
from deployments.launch.launcher import LocalService
from deployments.launch.load_balancer import LoadBalancer
from deployments.launch.plan import plan_launch
from llava_core.client import Client
from llava_core.client.messages import user_message
from llava_core.client.requests import chat_body
from llava_core.scenes.samples import encode_picture
from llava_core.scenes.scene import sample_scene

QUESTION = "Describe the picture."
NUM_TOKENS = 64


@dataclass(frozen=True)
class Timing:
    """One answer: seconds to its first text, total seconds, tokens."""

    first: float
    total: float
    tokens: int


# From an encoded picture to the timing of its answer.
Ask = Callable[[bytes], Timing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--requests", type=int, default=24, help="of one client; eight clients send twice as many")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": describe_machine()}
    results["start_s"] = [round(measure_start(options.port), 1) for _ in range(options.starts)]
    results |= measure_answers(options.port, options.requests)
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def measure_start(port: int) -> float:
    """Return the seconds from starting `llava serve` until /health reports that every stage can serve."""
    url = plan_launch(port=port).url
    begun = time.perf_counter()
    command = [str(Path(sys.executable).parent / "llava"), "serve", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as service:
        try:
            wait_until_healthy(url, service)
            return time.perf_counter() - begun
        finally:
            service.send_signal(signal.SIGINT)
            service.wait(timeout=60)


def wait_until_healthy(
    url: str, service: subprocess.Popen[bytes], *, name: str = "the service", timeout_s: float = 180
) -> None:
    deadline = time.monotonic() + timeout_s
    with Client(url, timeout_s=5) as client:
        while time.monotonic() < deadline and service.poll() is None:
            if client.is_healthy():
                return
            time.sleep(0.05)
    raise SystemExit(f"{name} did not become ready")


def measure_answers(port: int, num_requests: int) -> dict[str, Any]:
    """Ask the service, the empty graph and the engine in this process about each picture in turn."""
    plan = plan_launch(port=port)
    service = LocalService(plan)
    service.start(lambda line: print(line, file=sys.stderr))
    try:
        balancer = start_empty_graph(service)
        empty_port = balancer.address[1]
        pictures = [make_picture(index) for index in range(3 * num_requests + 4)]
        client = Client(plan.url)
        ask: list[Ask] = [lambda p: ask_service(client, p), lambda p: ask_empty(empty_port, p), build_local()]
        warm_up, measured = pictures[-4:], pictures[:num_requests]
        turns = [[one(picture) for one in ask] for picture in [*warm_up, *measured]][len(warm_up) :]
        served, empty, local = ([turn[i] for turn in turns] for i in range(3))
        with ThreadPoolExecutor(8) as pool:
            begun = time.perf_counter()
            together = list(pool.map(ask[0], pictures[num_requests : 3 * num_requests]))
            wall = time.perf_counter() - begun
        balancer.stop()
        client.close()
    finally:
        service.stop()
    return {
        "service, 1 client": summary(served),
        "service, 8 clients": {**summary(together), "tokens_per_s": round(sum(t.tokens for t in together) / wall, 1)},
        "engine in process, 1 client": summary(local),
        "empty graph, 1 client": {"first_ms": milliseconds([t.first for t in empty])},
        "graph": compare(served, empty, local),
    }


def compare(served: list[Timing], empty: list[Timing], local: list[Timing]) -> dict[str, float]:
    """Return what the graph adds to the time to first token, also as a ratio to the empty graph's, by request."""
    added = [one.first - other.first for one, other in zip(served, local, strict=True)]
    ratios = [more / yardstick.first for more, yardstick in zip(added, empty, strict=True)]
    return {"added_first_ms": milliseconds(added), "added_over_empty": round(statistics.median(ratios), 2)}


def make_picture(index: int) -> bytes:
    """Draw a new scene for every request, so that nothing can be cached."""
    return encode_picture(sample_scene(random.Random(f"bench:{index}"), longest_side=(336, 336)), "png")


def ask_service(client: Client, picture: bytes) -> Timing:
    def pieces() -> Iterator[str]:
        with client.stream(QUESTION, picture, max_tokens=NUM_TOKENS, ignore_eos=True) as answer:
            yield from (delta.text for delta in answer)

    return clock(pieces())


def start_empty_graph(service: LocalService) -> LoadBalancer:
    """Start the empty graph in the service's Ray, at `/empty` behind its own HAProxy, which the caller stops."""
    # Imported only now: Ray reads its environment, which the service sets, on import.
    from ray import serve

    from benchmarks.empty_graph import build_empty_graph

    serve.run(build_empty_graph(), name="empty", route_prefix="/empty")
    assert service.balancer is not None, "the service is measured with HAProxy in front"
    # The service's HAProxy forwards nothing to other applications.
    balancer = replace(service.balancer, address=("127.0.0.1", free_port()), application="empty")
    balancer.start()
    return balancer


def ask_empty(port: int, picture: bytes) -> Timing:
    body = json.dumps(chat_body([user_message(QUESTION, [picture])]))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:

        def pieces() -> Iterator[str]:
            connection.request("POST", "/empty", body)
            yield from (line.decode() for line in connection.getresponse())

        return clock(pieces())
    finally:
        connection.close()


def build_local() -> Ask:
    from llava_core.inference import LocalModel
    from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart

    model = LocalModel()
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)

    def ask(picture: bytes) -> Timing:
        message = Message("user", (ImagePart(picture), TextPart(QUESTION)))
        return clock(delta.text for delta in model.stream(GenerationRequest("1", (message,), sampling)))

    return ask


def clock(texts: Iterator[str]) -> Timing:
    begun = time.perf_counter()
    first = None
    for text in texts:
        if text and first is None:
            first = time.perf_counter() - begun
    assert first is not None, "the answer was empty"
    return Timing(first, time.perf_counter() - begun, NUM_TOKENS)


def summary(timings: list[Timing]) -> dict[str, Any]:
    return {
        "first_ms": milliseconds([t.first for t in timings]),
        "tokens_per_s": round(statistics.median(t.tokens / t.total for t in timings), 1),
        "requests": len(timings),
    }


def milliseconds(seconds: list[float]) -> float:
    """Return the median."""
    return round(statistics.median(seconds) * 1e3, 1)


if __name__ == "__main__":
    main()
