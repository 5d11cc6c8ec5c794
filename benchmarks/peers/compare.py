"""The contenders in turns over the same workloads, and their ratios round by round.

Every round sends everybody the same new requests, workload by workload, in a rotating order: a temporary disturbance of
the machine affects all. Knows the servers' abilities, but not their commands.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from benchmarks.peers.checkpoints import SHAPES
from benchmarks.peers.contenders import OURS, Server
from benchmarks.peers.floors import Rates, encode_flop, floor, measure_rates, prefill_flop, weight_bytes
from benchmarks.peers.load import NUM_TOKENS, Answer, Figures, make_requests, run_load, summarize

# The figures that ratios are formed of; below 1 is better for milliseconds, above 1 for tokens per second.
COMPARED = ("first_ms_p50", "token_ms_p50", "gap_ms_p50", "gap_ms_p99", "tokens_per_s")
# How many tokens the same request's prompt may differ by between servers.
_SLACK = 2
Rounds = Mapping[str, Sequence[Figures]]


@dataclass(frozen=True)
class Work:
    """Clients in a closed loop, and how many pictures they ask about; None means a new one for every request."""

    name: str
    clients: int
    pictures: int | None = None


WORKS = {
    "tiny": (
        Work("1 client, new pictures", 1),
        Work("8 clients, new pictures", 8),
        Work("32 clients, new pictures", 32),
    ),
    "mid": (
        Work("1 client, new pictures", 1),
        Work("8 clients, new pictures", 8),
        Work("8 clients, 2 pictures", 8, 2),
    ),
}


@dataclass(frozen=True)
class Amounts:
    """The number of rounds, the requests of each workload per round, and the most requests with several clients for a
    server that answers one request after the other."""

    rounds: int
    requests: tuple[int, ...]
    one_at_a_time: int

    def of(self, server: Server, work: Work, requests: int) -> int:
        is_short = server.contender.one_at_a_time and work.clients > 1
        return min(requests, self.one_at_a_time) if is_short else requests


def compare(size: str, servers: Sequence[Server], amounts: Amounts) -> dict[str, Any]:
    """Run all rounds of one checkpoint's workloads on running servers."""
    works = WORKS[size]
    found: dict[str, dict[str, list[Figures]]] = {
        work.name: {server.contender.name: [] for server in servers} for work in works
    }
    for server in servers:
        server.pause()
    warm_up(servers, works)
    rates = [measure_rates()]
    for turn in range(amounts.rounds):
        for work, requests in zip(works, amounts.requests, strict=True):
            bodies = make_requests(f"{size}:{turn}:{work.name}", requests, work.pictures or requests)
            for server in rotated(servers, turn):
                mine = bodies[: amounts.of(server, work, requests)]
                figures = measure(server, servers, mine, work.clients)
                found[work.name][server.contender.name].append(figures)
                _tell(size, turn, work, server, figures)
        rates.append(measure_rates())
    best, usual = (
        Rates(pick(rate.flop_per_s for rate in rates), pick(rate.bytes_per_s for rate in rates))
        for pick in (max, statistics.median)
    )
    return {
        **_arithmetic(size),
        "giga_per_s_best": _giga(best),
        "giga_per_s_median": _giga(usual),
        "start_s": {server.contender.name: server.start_s for server in servers},
        "memory_mib": {server.contender.name: server.memory_mib() for server in servers},
        "works": {
            work.name: {
                "clients": work.clients,
                "pictures": work.pictures or "new",
                **_floor(size, best, work, found[work.name]),
                **summary(found[work.name]),
            }
            for work in works
        },
    }


def warm_up(servers: Sequence[Server], works: Sequence[Work]) -> None:
    """Warm up with one client, then with as many as there will be. Also checks that all servers read the same prompts
    and write equally long answers."""
    alone = make_requests("warm-up", 2, 2)
    most = max(work.clients for work in works)
    together = make_requests("warm-up together", most, most)
    seen: dict[str, list[Answer]] = {}
    for server in servers:
        server.resume()
        seen[server.contender.name], _ = run_load(server.port, _named(alone, server), 1)
        if not server.contender.one_at_a_time:
            run_load(server.port, _named(together, server), most)
        server.pause()
    check_alike(seen)


def check_alike(answers: Mapping[str, Sequence[Answer]]) -> None:
    """Raises SystemExit unless every server has answered in full and has read prompts of the same length."""
    for name, each in answers.items():
        for answer in each:
            if answer.error or answer.tokens != NUM_TOKENS:
                raise SystemExit(f"{name} wrote {answer.tokens} tokens instead of {NUM_TOKENS}. {answer.error}")
    for same in zip(*answers.values(), strict=True):
        lengths = [answer.prompt_tokens for answer in same]
        if max(lengths) - min(lengths) > _SLACK:
            raise SystemExit(f"the same request has {dict(zip(answers, lengths, strict=True))} prompt tokens")


def measure(
    server: Server, all_servers: Iterable[Server], bodies: Sequence[dict[str, object]], clients: int
) -> Figures:
    """Run one load on one server, and measure who used the processor meanwhile, as shares of all cores."""
    idle = [other for other in all_servers if other is not server]
    named = _named(bodies, server)
    server.resume()
    parts = server.cpu_of_parts_s()
    began, before = time.perf_counter(), _processor_s(server, idle)
    answers, wall = run_load(server.port, named, clients)
    after, lasted = _processor_s(server, idle), time.perf_counter() - began
    parts = {name: seconds - parts.get(name, 0.0) for name, seconds in server.cpu_of_parts_s().items()}
    server.pause()
    for answer in answers:
        if answer.error:
            print(f"{server.contender.name}: {answer.error}", file=sys.stderr)
    spent = {name: after[name] - before[name] for name in before}
    spent["cpu_elsewhere"] = max(0.0, spent.pop("all") - sum(spent.values()))
    available = lasted * (os.cpu_count() or 1)
    shares = {name: round(seconds / available, 4) for name, seconds in spent.items()}
    each = {f"cpu_ms_per_request_{name}": round(s * 1e3 / len(bodies), 2) for name, s in sorted(parts.items())}
    return summarize(answers, wall) | shares | each


def _processor_s(server: Server, idle: Iterable[Server]) -> dict[str, float]:
    times = psutil.cpu_times()
    own = os.times()
    return {
        "cpu_server": server.cpu_s(),
        "cpu_idle_servers": sum(other.cpu_s() for other in idle),
        "cpu_client": own.user + own.system,
        "all": sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal")),
    }


def summary(by_name: Rounds) -> dict[str, Any]:
    """Return every server's medians over the rounds, and the ratios of ours to theirs."""
    medians = {name: median(rounds) for name, rounds in by_name.items()}
    theirs = [name for name in by_name if name != OURS]
    return {**medians, "ours_over": {name: ratios(by_name[OURS], by_name[name]) for name in theirs}}


def median(rounds: Sequence[Figures]) -> Figures:
    return {name: round(statistics.median(figures[name] for figures in rounds), 4) for name in rounds[0]}


def ratios(ours: Sequence[Figures], theirs: Sequence[Figures]) -> dict[str, Figures]:
    """Form the ratios per round, so that a slow round cancels out; return their median and range."""
    found = {}
    for name in COMPARED:
        pairs = [(mine[name], other[name]) for mine, other in zip(ours, theirs, strict=True)]
        each = [mine / other for mine, other in pairs if other]
        if each:
            found[name] = {
                "median": round(statistics.median(each), 3),
                "lowest": round(min(each), 3),
                "highest": round(max(each), 3),
            }
    return found


def rotated(servers: Sequence[Server], turn: int) -> list[Server]:
    first = turn % len(servers)
    return [*servers[first:], *servers[:first]]


def _named(bodies: Iterable[dict[str, object]], server: Server) -> list[dict[str, object]]:
    return [{**body, "model": server.model} for body in bodies]


def _giga(rates: Rates) -> Figures:
    return {name.removesuffix("_per_s"): round(value / 1e9, 1) for name, value in asdict(rates).items()}


def _arithmetic(size: str) -> dict[str, Any]:
    shape = SHAPES[size]
    prompt = shape.image_tokens
    return {
        "image_tokens": prompt,
        "encode_gflop": round(encode_flop(shape) / 1e9, 2),
        "prefill_gflop_of_a_picture": round(prefill_flop(shape, prompt, prompt) / 1e9, 2),
        "weight_mb_per_step": round(weight_bytes(shape) / 1e6, 1),
    }


def _floor(size: str, rates: Rates, work: Work, by_name: Rounds) -> dict[str, Figures]:
    """Return no floor for a model that fits the processor's caches: the time to read it cannot be predicted."""
    if size == "tiny":
        return {}
    prompt_tokens = int(by_name[OURS][0]["prompt_tokens"])
    limits = floor(
        SHAPES[size],
        rates,
        clients=work.clients,
        prompt_tokens=prompt_tokens,
        tokens=NUM_TOKENS,
        has_seen=work.pictures is not None,
    )
    return {"floor": limits}


def _tell(size: str, turn: int, work: Work, server: Server, figures: Figures) -> None:
    told = ", ".join(f"{name} {figures[name]:g}" for name in (*COMPARED, "errors", "cpu_idle_servers", "cpu_elsewhere"))
    print(f"{size}, round {turn + 1}, {work.name}, {server.contender.name}: {told}", file=sys.stderr)
