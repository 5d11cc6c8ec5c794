"""Faults on a cluster: what its clients see of them, and how long recovery takes.

    python -m benchmarks.hosts [--json FILE] [--only NAME ...] [--head [--redis]]

A head, three workers and a client host on this machine (network.py), two replicas of each stage on different hosts, and
four clients that send requests without pause. `--head` measures the loss of the head instead, `--redis` the same with
the head's state in Redis (Debian's redis-server). Needs root, or a user who may create namespaces.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.hosts.cluster import ROOT, HostCluster, application, spread
from benchmarks.hosts.faults import FAULTS, Seen, measure
from benchmarks.hosts.head import measure_head_loss
from benchmarks.hosts.network import HostNetwork, why_not
from benchmarks.machine import describe_machine

_COMPUTE = {"num_cpus": 0.1, "dtype": "float32", "threads": 1}
CONFIG = application(stages=spread(), vision_encoder=_COMPUTE, generator=_COMPUTE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also merge the figures into this file")
    parser.add_argument("--only", nargs="+", choices=[*FAULTS], metavar="NAME", default=[*FAULTS], help="these faults")
    parser.add_argument("--head", action="store_true", help="measure the loss of the head")
    parser.add_argument("--redis", action="store_true", help="keep the head's state in Redis")
    options = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    results = _read(options.json)
    with deployed(has_redis=options.redis) as cluster:
        if options.head:
            lost = measure_head_loss(cluster, CONFIG)
            results["head with Redis" if options.redis else "head"] = asdict(lost)
            print(json.dumps(asdict(lost), indent=2))
            _write(results, options.json)
            return
        for name in options.only:
            seen = measure(cluster, FAULTS[name])
            results["faults"][name] = asdict(seen)
            print(describe(name, seen), flush=True)
            # Written each time, as the next fault may end the run.
            _write(results, options.json)


def _read(file: Path | None) -> dict[str, Any]:
    """Read this machine's earlier figures."""
    before = json.loads(file.read_text()) if file is not None and file.exists() else {}
    machine = describe_machine()
    return before if before.get("machine") == machine else {"machine": machine, "faults": {}}


def _write(results: Mapping[str, Any], file: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps(results, indent=2) + "\n")


@contextmanager
def deployed(*, num_workers: int = 3, has_redis: bool = False) -> Iterator[HostCluster]:
    """Yield a cluster that runs the service with two replicas of each stage, no two of them on one host."""
    with (
        tempfile.TemporaryDirectory(prefix="hosts-") as folder,
        HostNetwork(Path(folder), kept=[ROOT]) as network,
    ):
        cluster = HostCluster(network, num_workers=num_workers, has_redis=has_redis)
        cluster.start()
        cluster.deploy(CONFIG)
        yield cluster


def describe(name: str, seen: Seen) -> str:
    """Describe the result in one line for people."""
    failed = ", ".join(f"{count} x {error}" for error, count in seen.failed.items()) or "none failed"
    return (
        f"{name}: of {seen.requests} requests {failed}; {seen.wrong} wrong; longest silence {seen.longest_gap_s} s, "
        f"longest wait {seen.longest_wait_s} s; clients content after {seen.recovered_s} s, complete after "
        f"{seen.complete_s} s"
    )


if __name__ == "__main__":
    main()
