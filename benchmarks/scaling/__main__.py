"""Replicas and nodes that follow a rising and falling load, and the cold start of one more generator replica.

    python -m benchmarks.scaling [--scale 1] [--json FILE] [--picture FILE.svg]

Runs the default model on a cluster on this machine whose nodes are processes: each replica claims a CPU and computes
little. Fails when a request fails, or when replicas or nodes do not follow the load. `--scale` lengthens all periods.
Talks to 127.0.0.1 only, and ends everything that it started. Needs the packages of the `serve` and `train` extras.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import describe_machine
from benchmarks.peers.load import Answer, percentile
from benchmarks.ports import free_port
from benchmarks.scaling.cluster import Cluster, autoscaling_cluster
from benchmarks.scaling.load import Clients, Period, run_load

if TYPE_CHECKING:
    from benchmarks.scaling.watch import Sample, Watch

PERIODS = (Period(30, 1), Period(30, 3), Period(60, 6), Period(30, 3), Period(40, 1))
DELAYS = {"look_back_s": 5, "upscale_delay_s": 5, "downscale_delay_s": 15, "downscale_to_zero_delay_s": 15}
NETWORK = {"num_cpus": 1, "threads": 1, "min_replicas": 0}
ARGS: dict[str, Any] = {
    "engine": {"max_running": 4},
    "gateway": {"num_cpus": 0.5},
    "preprocessor": {"num_cpus": 0.5},
    "vision_encoder": {**NETWORK, "max_replicas": 2, "autoscaling": DELAYS},
    # Two answers at a time for each.
    "generator": {**NETWORK, "max_replicas": 3, "autoscaling": {**DELAYS, "target_slot_use": 0.5}},
}
# Gateway and preprocessor are on the head node; a worker has room for an encoder and a generator, or for two of one.
HEAD, WORKER, MAX_WORKERS = {"CPU": 1.0}, {"CPU": 2.0}, 3
_IDLE_S, _DEADLINE_S = 10.0, 240.0
_LOOK_S = 0.2


@dataclass(frozen=True)
class Outcome:
    """The samples and answers. Answers are timed by time.perf_counter, which was `offset` behind time.time."""

    samples: Sequence[Sample]
    answers: Sequence[Answer]
    offset: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the length of each period")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--picture", type=Path, help="draw the run, as SVG or PNG")
    options = parser.parse_args()
    _end_on_sigterm()
    periods = [Period(period.seconds * options.scale, period.clients) for period in PERIODS]
    results: dict[str, Any] = {"machine": describe_machine(), "periods": [vars(each) for each in periods], "args": ARGS}
    port, clients = free_port(), Clients()
    with autoscaling_cluster(HEAD, WORKER, max_workers=MAX_WORKERS, idle_s=_IDLE_S) as cluster, serving(cluster, port):
        from benchmarks.scaling.picture import draw
        from benchmarks.scaling.watch import Watch

        with Watch(lambda: clients.number, _LOOK_S) as watch:
            outcome = follow(port, periods, clients, watch)
            results |= summarize(outcome)
            if options.picture:
                draw(options.picture, outcome.samples, _firsts(outcome))
            print(json.dumps(results, indent=2), flush=True)
            results["cold_start_s"] = measure_cold_starts(port, cluster, watch)
    print(json.dumps(results["cold_start_s"], indent=2))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    check(outcome)


def follow(port: int, periods: Sequence[Period], clients: Clients, watch: Watch) -> Outcome:
    """Run the load, and wait until everything that it scaled up is gone again."""
    answers = asyncio.run(run_load(port, periods, clients))
    clients.number = 0
    watch.wait_for(lambda seen: not any(_networks(seen)) and seen.nodes == 1, deadline_s=_DEADLINE_S)
    return Outcome([*watch.samples], answers, time.time() - time.perf_counter())


def measure_cold_starts(port: int, cluster: Cluster, watch: Watch) -> dict[str, dict[str, float]]:
    """Measure the generator's cold start twice: the second time on the node that outlives its first replica."""
    from benchmarks.scaling.cold_start import measure

    cold = {"with a new node": measure(port, cluster.logs, watch, needs_node=True)}
    watch.wait_for(lambda seen: not any(_networks(seen)) and seen.nodes > 1, deadline_s=_DEADLINE_S)
    return {**cold, "on a node that is there": measure(port, cluster.logs, watch, needs_node=False)}


@contextmanager
def serving(cluster: Cluster, port: int) -> Iterator[None]:
    """Serve exactly the application of `serve_config.yaml`, with these settings, behind Serve's own proxy."""
    # Imported only now: Ray reads its environment on import.
    import ray
    from ray import serve

    from deployments.launch.config_file import DEFAULT_CONFIG
    from deployments.launch.deploying import deploy, serve_schema, watch

    (application,) = DEFAULT_CONFIG["applications"]
    config = {**DEFAULT_CONFIG, "applications": [{**application, "args": ARGS}]}
    schema = serve_schema(config, "127.0.0.1", port)
    ray.init(cluster.address, namespace="serve", log_to_driver=False)
    # Ray has replaced the handler by its own.
    _end_on_sigterm()
    try:
        http = schema.http_options.model_dump()
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config=schema.logging_config)
        deploy(schema)
        for stage in watch("llava"):
            print(f"{stage} is ready", file=sys.stderr)
        yield
    finally:
        ray.shutdown()


def summarize(outcome: Outcome) -> dict[str, Any]:
    """Return times to the first token by number of clients, failures, and the peak numbers of replicas and nodes."""
    by_clients: dict[int, list[float]] = {}
    for began, seconds in _firsts(outcome):
        # A request that began before the first sample counts to that one.
        place = bisect_right(outcome.samples, began, key=lambda sample: sample.when)
        by_clients.setdefault(outcome.samples[max(0, place - 1)].clients, []).append(seconds)
    stages = outcome.samples[0].running
    return {
        "requests": len(outcome.answers),
        "failed": sum(bool(answer.error) for answer in outcome.answers),
        "first_token_ms_by_clients": {
            clients: {"requests": len(each), "p50": percentile(each, 0.5), "p99": percentile(each, 0.99)}
            for clients, each in sorted(by_clients.items())
        },
        "most_replicas": {stage: max(each.running.get(stage, 0) for each in outcome.samples) for stage in stages},
        "most_nodes": max(each.nodes for each in outcome.samples),
    }


def check(outcome: Outcome) -> None:
    """Exit with an error if a request failed, or if replicas or nodes did not follow the load."""
    errors = [answer.error for answer in outcome.answers if answer.error]
    if errors:
        raise SystemExit(f"{len(errors)} of {len(outcome.answers)} requests failed, the first with: {errors[0]}")
    generators = [each.running["Generator"] for each in outcome.samples]
    nodes = [each.nodes for each in outcome.samples]
    if max(generators) < 2 or generators[-1] or max(nodes) < 3 or nodes[-1] != 1:
        raise SystemExit(f"replicas or nodes did not follow: at most {max(generators)} and {max(nodes)}")


def _end_on_sigterm() -> None:
    """Exit on SIGTERM, so that the cluster is ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))


def _networks(sample: Sample) -> list[int]:
    names = ("VisionEncoder", "Generator")
    return [states.get(name, 0) for name in names for states in (sample.running, sample.starting)]


def _firsts(outcome: Outcome) -> list[tuple[float, float]]:
    return [(each.began + outcome.offset, each.texts[0] - each.began) for each in outcome.answers if not each.error]


if __name__ == "__main__":
    main()
