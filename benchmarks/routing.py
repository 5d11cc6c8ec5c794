"""Cache hit rates of the replicas, with the router that prefers a replica and with Serve's own.

    python -m benchmarks.routing [--replicas 2] [--pictures 20] [--rounds 5] [--clients 4] [--json FILE]

Uses the default model, and the same requests in the same order for both. It counts hits and measures no times. Talks to
127.0.0.1 only, and ends by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.__main__ import make_picture
from benchmarks.machine import describe_machine
from benchmarks.ports import free_port
from deployments.commands.top import Page, read_page
from deployments.metrics import CACHE_HITS, CACHE_MISSES, FINISHED, PREFIX_HIT_TOKENS, PROMPT_TOKENS, ROUTED
from llava_core.client import Client

NUM_TOKENS = 16
STAGES = {"preprocessor": "Preprocessor", "vision_encoder": "VisionEncoder", "generator": "Generator"}
ROUTERS = {
    "prefers a replica": "deployments.graph.routing.AffinityRouter",
    "Serve's own": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2, help="of each stage")
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="of one question about each picture")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    asked = {name: getattr(options, name) for name in ("replicas", "pictures", "rounds", "clients")}
    results: dict[str, Any] = {"machine": describe_machine(), **asked}
    for name, router in ROUTERS.items():
        with serving(router, options.replicas) as addresses:
            results[name] = measure(*addresses, options.pictures, options.rounds, options.clients)
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


@contextlib.contextmanager
def serving(router: str, num_replicas: int) -> Iterator[tuple[str, str]]:
    """Yield the addresses of a service whose stages use this router, and of its metrics."""
    stage = {"min_replicas": num_replicas, "max_replicas": num_replicas, "num_cpus": 0.1}
    config = {"request_router_config": {"request_router_class": router}}
    application = {
        "name": "llava",
        "route_prefix": "/",
        "import_path": "deployments.app:build_app",
        "args": {name: dict(stage) for name in STAGES},
        "deployments": [{"name": name, **config} for name in STAGES.values()],
    }
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump({"applications": [application]}))
        metrics_port = free_port()
        command = [str(Path(sys.executable).parent / "llava"), "serve", "--config", str(path)]
        ports = ["--port", str(port), "--metrics-port", str(metrics_port)]
        environment = {**os.environ, "RAY_metrics_report_interval_ms": "1000"}
        with subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, text=True, env=environment) as service:
            try:
                wait_until_ready(service)
                yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics"
            finally:
                service.terminate()
                service.wait(timeout=120)


def wait_until_ready(service: subprocess.Popen[str]) -> None:
    """Wait until it has printed its addresses, the last of which is that of its logs."""
    assert service.stdout is not None
    if not any(line.startswith("  logs ") for line in iter(service.stdout.readline, "")):
        raise SystemExit("the service did not become ready")


def measure(url: str, metrics_url: str, num_pictures: int, num_rounds: int, num_clients: int) -> dict[str, Any]:
    pictures = [make_picture(index) for index in range(num_pictures)]
    # Each round has a different order; the next free client asks.
    turns = [random.Random(turn).sample(pictures, num_pictures) for turn in range(num_rounds)]
    jobs = [(picture, turn) for turn, each in enumerate(turns) for picture in each]

    def ask(job: tuple[bytes, int]) -> None:
        picture, turn = job
        client.ask(f"Question {turn}: what is there?", picture, max_tokens=NUM_TOKENS)

    with Client(url) as client, ThreadPoolExecutor(num_clients) as clients:
        list(clients.map(ask, jobs))
    page = counted(metrics_url, len(jobs))
    caches = {
        cache: page.total(CACHE_HITS, cache=cache)
        / (page.total(CACHE_HITS, cache=cache) + page.total(CACHE_MISSES, cache=cache))
        for cache in ("tiles", "features")
    }
    caches["prefix tokens"] = page.total(PREFIX_HIT_TOKENS) / page.total(PROMPT_TOKENS)
    calls = {each: int(page.total(ROUTED, choice=each)) for each in ("preferred", "fallback")}
    return {"hit_rates": {name: round(rate, 3) for name, rate in caches.items()}, **calls}


def counted(metrics_url: str, num_requests: int) -> Page:
    """Return the metrics page once it covers all requests."""
    while True:
        page = read_page(metrics_url)
        pictures = page.total(CACHE_HITS) + page.total(CACHE_MISSES)
        if page.total(FINISHED) == num_requests and pictures == 2 * num_requests:
            return page
        time.sleep(0.5)


if __name__ == "__main__":
    main()
