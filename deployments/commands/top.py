"""`llava top`: shows in a terminal what the service is doing, solely from the Prometheus page of its metrics.

`Page` parses one page; two pages make a screen. `llava` finds this module through the entry-point group
`llava.commands`, and imports it only when the command is called. Does not import Ray.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import click
import httpx
from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics import (
    BLOCKS,
    CACHE_HITS,
    CACHE_MISSES,
    CANCELLATIONS,
    CHUNK_GAP,
    ERRORS,
    EXPORTED_PREFIX,
    GENERATED_TOKENS,
    HTTP_REQUESTS,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    ROUTED,
    RUNNING,
    SCHEDULED,
    STAGE_DURATION,
    STEPS,
    TIME_TO_FIRST_TOKEN,
    UPSTREAM_REQUESTS,
    UPSTREAM_RUNNING,
    UPSTREAM_TOKENS,
    UPSTREAM_UP,
    WAITING,
    Counter,
    Gauge,
    Histogram,
    Metric,
)
from llava_core.errors import LlavaError

DEFAULT_URL = "http://127.0.0.1:8001/metrics"
# Serve's own metrics. All living replicas report the first, and no others do.
ONGOING = Gauge("serve_replica_processing_queries", "Requests in a replica.", ("deployment", "replica"))
QUEUED = Gauge("serve_deployment_queued_queries", "Requests that wait for a replica.", ("deployment",))
# Ray's own.
STORED = Gauge("object_store_memory", "Bytes of objects, by where they are.", ("Location",))
_STAGES = ("preprocess", "encode", "transfer", "prefill", "decode")
# Ray's processes report their numbers every 10 s: over a shorter window rates would alternate between 0 and too much.
_WINDOW_S = 60.0
_CLEAR = "\x1b[H\x1b[2J"


class MetricsPageError(LlavaError):
    """The page of metrics cannot be read."""


@dataclass
class Page:
    """The samples of one page by name: labels and value. `at` is when it was read, in seconds."""

    at: float
    samples: dict[str, list[tuple[dict[str, str], float]]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, at: float) -> Page:
        """Parses those of Ray's thousands of lines that `llava top` shows, and what is in its object store."""
        wanted = tuple(EXPORTED_PREFIX + prefix for prefix in ("llava_", ONGOING.name, QUEUED.name, STORED.name))
        lines = (line for line in text.splitlines() if line.startswith(wanted))
        page = cls(at)
        for family in text_string_to_metric_families("\n".join(lines)):
            for sample in family.samples:
                name = sample.name.removeprefix(EXPORTED_PREFIX)
                page.samples.setdefault(name, []).append((sample.labels, sample.value))
        return page

    def total(self, metric: Metric, **labels: str) -> float:
        """The sum over all processes, and over the labels that are not given."""
        return self._sum(metric.name, labels)

    def buckets(self, histogram: Histogram, **labels: str) -> list[float]:
        """The number of values up to each bound, followed by the number of all values."""
        name = f"{histogram.name}_bucket"
        bounds = [*(str(bound) for bound in histogram.buckets), "+Inf"]
        return [self._sum(name, {**labels, "le": bound}) for bound in bounds]

    def values(self, metric: Metric, label: str, **labels: str) -> list[str]:
        """The values of `label` in the samples that have the other labels given."""
        samples = self.samples.get(metric.name, ())
        return sorted({found[label] for found, _ in samples if labels.items() <= found.items()})

    def _sum(self, name: str, labels: dict[str, str]) -> float:
        return sum(value for found, value in self.samples.get(name, ()) if labels.items() <= found.items())


@dataclass(frozen=True)
class Change:
    """What happened between two pages of one service."""

    before: Page
    now: Page

    def count(self, counter: Counter, **labels: str) -> float:
        """The increase of a counter; 0 if the service was restarted and has counted less since."""
        return max(0.0, self.now.total(counter, **labels) - self.before.total(counter, **labels))

    def rate(self, counter: Counter, **labels: str) -> float:
        """The increase per second."""
        seconds = self.now.at - self.before.at
        return self.count(counter, **labels) / seconds if seconds > 0 else 0.0

    def quantile(self, histogram: Histogram, share: float, **labels: str) -> float | None:
        """A quantile of the values since the first page; None if there were none. As in Prometheus, values are taken to
        be spread evenly within a bucket."""
        now, before = self.now.buckets(histogram, **labels), self.before.buckets(histogram, **labels)
        counts = [max(0.0, late - early) for late, early in zip(now, before, strict=True)]
        wanted, below, lower = share * counts[-1], 0.0, 0.0
        if not wanted:
            return None
        for bound, count in zip(histogram.buckets, counts, strict=False):
            if count >= wanted:
                return lower + (bound - lower) * (wanted - below) / (count - below)
            below, lower = count, bound
        return lower


def screen(change: Change) -> Iterator[str]:
    """Yields the lines to show."""
    now = change.now
    yield f"llava top · last {now.at - change.before.at:.0f} s"
    yield ""
    names = now.values(ONGOING, "deployment")
    # With several models, these include the models' names.
    width = max(15, *map(len, names)) + 1 if names else 16
    yield f"{'stage':{width}}{'replicas':>9}{'running':>9}{'queued':>9}"
    for name in names:
        num_replicas = len(now.values(ONGOING, "replica", deployment=name))
        ongoing, queued = (now.total(gauge, deployment=name) for gauge in (ONGOING, QUEUED))
        yield f"{name:{width}}{num_replicas:9}{ongoing:9.0f}{queued:9.0f}"
    yield from _upstreams(change)
    yield ""
    yield (
        f"requests/s {change.rate(HTTP_REQUESTS):.1f}   tokens/s {change.rate(GENERATED_TOKENS):.1f}   "
        f"running {now.total(RUNNING):.0f}   waiting {now.total(WAITING):.0f}   batch {_batch(change)}"
    )
    yield (
        f"first token {_percentiles(change, TIME_TO_FIRST_TOKEN)}   between chunks {_percentiles(change, CHUNK_GAP)}"
        "   (median / 99 %)"
    )
    yield "   ".join(f"{stage} {_percentiles(change, STAGE_DURATION, stage=stage)}" for stage in _STAGES)
    yield f"hits   {'   '.join(_hits(change))}"
    yield f"preferred replicas   {'   '.join(_preferred(change)) or '-'}"
    used, blocks = now.total(BLOCKS, state="used"), now.total(BLOCKS)
    yield f"blocks {used:.0f} of {blocks:.0f} in use, {now.total(BLOCKS, state='idle'):.0f} kept"
    codes = ", ".join(f"{code} {now.total(ERRORS, code=code):.0f}" for code in now.values(ERRORS, "code"))
    yield f"since the start: {now.total(HTTP_REQUESTS):.0f} requests, {now.total(GENERATED_TOKENS):.0f} tokens, " + (
        f"{now.total(CANCELLATIONS):.0f} hung up, errors: {codes or 'none'}"
    )


def _upstreams(change: Change) -> Iterator[str]:
    """Yields a line for each model that another server answers for; the server is up if all gateways say so."""
    now = change.now
    models = now.values(UPSTREAM_UP, "model")
    if not models:
        return
    width = max(15, *map(len, models)) + 1
    yield ""
    yield f"{'other server':{width}}{'state':>9}{'running':>9}{'req/s':>9}{'tokens/s':>9}"
    for model in models:
        is_up = now.total(UPSTREAM_UP, model=model) == len(now.values(UPSTREAM_UP, "replica", model=model))
        rates = (
            change.rate(UPSTREAM_REQUESTS, model=model),
            change.rate(UPSTREAM_TOKENS, model=model, kind="completion"),
        )
        running = now.total(UPSTREAM_RUNNING, model=model)
        yield f"{model:{width}}{'up' if is_up else 'down':>9}{running:9.0f}{rates[0]:9.1f}{rates[1]:9.1f}"


def _batch(change: Change) -> str:
    steps = change.count(STEPS)
    return f"{change.count(SCHEDULED) / steps:.1f}" if steps else "-"


def _percentiles(change: Change, histogram: Histogram, **labels: str) -> str:
    return " / ".join(_duration(change.quantile(histogram, share, **labels)) for share in (0.5, 0.99))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def _hits(change: Change) -> Iterator[str]:
    for cache in ("tiles", "features"):
        hits, misses = change.count(CACHE_HITS, cache=cache), change.count(CACHE_MISSES, cache=cache)
        yield f"{cache} {_percent(hits, hits + misses)}"
    yield f"prefix tokens {_percent(change.count(PREFIX_HIT_TOKENS), change.count(PROMPT_TOKENS))}"


def _preferred(change: Change) -> Iterator[str]:
    """Yields, for each stage with several replicas, the share of calls that went to the replica they prefer."""
    for target in change.now.values(ROUTED, "target"):
        preferred, fallback = (change.count(ROUTED, target=target, choice=each) for each in ("preferred", "fallback"))
        yield f"{target} {_percent(preferred, preferred + fallback)}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


@click.command()
@click.argument("url", default=DEFAULT_URL)
@click.option("--interval", type=click.FloatRange(0.1), default=10.0, show_default=True, help="Seconds between reads.")
@click.option("--once", is_flag=True, help="Read the metrics twice, show the difference, and exit.")
def top(url: str, interval: float, *, once: bool) -> None:
    """Replicas, queues, tokens per second and hit rates of a running service.

    URL is the page of metrics that `llava serve` has printed. Rates and times are of the last minute; Ray's processes
    report their numbers every 10 seconds.
    """
    with contextlib.suppress(KeyboardInterrupt):
        pages = deque([read_page(url)])
        while not once:
            _show(screen(Change(pages[0], pages[-1])), clear=sys.stdout.isatty())
            time.sleep(interval)
            pages.append(read_page(url))
            while pages[-1].at - pages[1].at >= _WINDOW_S:
                pages.popleft()
        time.sleep(interval)
        _show(screen(Change(pages[0], read_page(url))))


def read_page(url: str, *, timeout_s: float = 10.0) -> Page:
    """Fetches and parses the page. Raises MetricsPageError."""
    # Not through a proxy: the page is on this machine, or on one nearby.
    try:
        response = httpx.get(url, timeout=timeout_s, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        raise MetricsPageError(
            f"{url} cannot be read: {error}; `llava serve` prints the address of its metrics when it is ready"
        ) from None
    return Page.parse(response.text, time.monotonic())


def _show(lines: Iterable[str], *, clear: bool = False) -> None:
    click.echo((_CLEAR if clear else "") + "\n".join(lines))
