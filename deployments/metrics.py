"""The service's own metrics: each declared here once, and exported to Prometheus through Ray (ray_recorder.py).

Labels have few values, none of which a client chooses: no prompts, keys, names or ids. Ray puts `ray_` before the names
on its page, and Serve adds the labels `application`, `deployment` and `replica`. Of observed values Ray exports only
how many fell into each bucket: a histogram's counts and quantiles are right, its sum is computed from bucket middles.

Every observed value is a call into Ray, which takes about 4 µs, so nothing observes a value per token. Knows no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from llava_core.engine.stats import EngineStats
    from llava_core.lru import LruCache

EXPORTED_PREFIX = "ray_"
# Thirds of a decade, from the fast preparation of a prompt without pictures to an answer that takes minutes.
_DURATIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)
# Readers notice a pause of 0.2 s; the service makes none longer on purpose.
_GAPS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_IMAGES = (1.0, 2.0, 4.0, 8.0, 16.0)
# From no new pictures to eight pictures of many tiles.
_BYTES = tuple(1024.0 * 4**power for power in range(9))


# Compared and hashed by identity, which is cheap: each metric exists once.
@dataclass(frozen=True, eq=False)
class Metric:
    """A metric; each value comes with values for the `labels`, in this order."""

    name: str
    description: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Counter(Metric):
    """A total that only grows."""


@dataclass(frozen=True, eq=False)
class Gauge(Metric):
    """A current value."""


@dataclass(frozen=True, eq=False)
class Histogram(Metric):
    """A distribution of values, in buckets with these upper bounds."""

    buckets: tuple[float, ...] = _DURATIONS


# The gateway's.
HTTP_REQUESTS = Counter(
    "llava_http_requests_total", "Requests by route and status; 499: the client hung up.", ("method", "route", "status")
)
HTTP_DURATION = Histogram("llava_http_request_duration_seconds", "From head to last byte.", ("route",))
ERRORS = Counter("llava_errors_total", "Errors that clients were told, by the code in the body.", ("code",))
REFUSALS = Counter(
    "llava_refusals_total",
    "Requests refused with 429, by exhausted limit: `in_flight`, `bodies`, `queue`, `engine` or `upstream`, or a key's "
    "`requests`, `tokens` or `concurrent_requests`.",
    ("limit",),
)
# `stage` is generator, preprocessor (for requests to it alone), or earlier: preprocessor or encoder.
RETRIES = Counter(
    "llava_retries_total",
    "Requests moved to another replica because theirs died, `waiting` or `streaming`.",
    ("stage", "phase"),
)
QUARANTINED = Gauge("llava_quarantined_contents", "Pictures and prompts that are refused, having killed replicas.")
CANCELLATIONS = Counter("llava_cancellations_total", "Clients that hung up, `waiting` or `streaming`.", ("phase",))
TIME_TO_FIRST_TOKEN = Histogram(
    "llava_time_to_first_token_seconds", "From the request's head to the first piece of its answer.", ("model",)
)
CHUNK_GAP = Histogram("llava_inter_chunk_seconds", "Between two pieces of one answer.", ("model",), _GAPS)
# Not for a stage with one replica. `choice`: the key's own, another because that was busy, or any (graph/routing.py).
ROUTED = Counter(
    "llava_routed_calls_total",
    "Calls of a stage by the replica they went to: `preferred`, `fallback` or `keyless`.",
    ("target", "choice"),
)
REGISTERED_WORKERS = Gauge("llava_registered_workers", "Workers of LLaVA's protocol that requests are sent to.")
WORKER_FAILURES = Counter(
    "llava_worker_failures_total",
    "Registered workers that failed: `unreachable`, `silent`, `garbage`, `cut_off` or `too_long`.",
    ("kind",),
)

# For models that other servers answer for. `outcome`: `answered`, `cancelled`, or the code of the error.
UPSTREAM_REQUESTS = Counter(
    "llava_upstream_requests_total", "Requests to a model's own server by how they ended.", ("model", "outcome")
)
UPSTREAM_TOKENS = Counter("llava_upstream_tokens_total", "Tokens of `prompt` and `completion`.", ("model", "kind"))
UPSTREAM_RUNNING = Gauge("llava_upstream_requests_running", "Requests in flight to that server.", ("model",))
UPSTREAM_UP = Gauge("llava_upstream_up", "1 where the server can be reached and has the model.", ("model",))

# The stages': `stage` is fetch, preprocess, encode, transfer, prefill or decode; stages with queues are preprocess,
# encode and generate.
STAGE_DURATION = Histogram("llava_stage_duration_seconds", "Work on one request, by stage.", ("stage",))
QUEUE_WAIT = Histogram("llava_queue_wait_seconds", "Waiting time of a request in a replica, by stage.", ("stage",))
IMAGES = Histogram("llava_images_per_request", "Pictures of the requests that were encoded.", (), _IMAGES)
QUEUED_TILES = Gauge("llava_queued_tiles", "Tiles of pictures that wait for the tower or are being encoded.")
HANDED_OVER = Counter(
    "llava_handed_over_bytes_total",
    "Tiles and features put into Ray's object store or sent, by route: `preprocess_encode` or `encode_generate`.",
    ("route",),
)
HANDED_OVER_EACH = Histogram("llava_handed_over_bytes_per_request", "The same per request.", ("route",), _BYTES)
CACHE_HITS = Counter("llava_cache_hits_total", "Pictures found in the cache of `tiles` or `features`.", ("cache",))
CACHE_MISSES = Counter("llava_cache_misses_total", "Pictures not found in that cache.", ("cache",))
CACHE_BYTES = Gauge("llava_cache_bytes", "What the cache holds.", ("cache",))

# `phase`: imports, weights, or the engine with its own preparations.
STARTUP = Gauge("llava_startup_seconds", "Time that the start of this replica took, by phase.", ("phase",))

# The generator's. Prompt tokens count when their answers have ended, generated tokens at once.
PROMPT_TOKENS = Counter("llava_prompt_tokens_total", "Tokens of prompts, those of pictures included.")
IMAGE_TOKENS = Counter("llava_image_tokens_total", "Tokens of prompts that stand for pictures.")
PREFIX_HIT_TOKENS = Counter("llava_prefix_cache_hit_tokens_total", "Tokens of prompts found in the prefix cache.")
GENERATED_TOKENS = Counter("llava_generation_tokens_total", "Tokens generated, also for clients that hung up.")
COMPUTED_TOKENS = Counter("llava_engine_computed_tokens_total", "Tokens run through the model, prompts' included.")
CACHED_TOKENS = Counter("llava_engine_cached_tokens_total", "Tokens not run, also of preempted answers.")
STEPS = Counter("llava_engine_steps_total", "Steps of the engine.")
STEP_SECONDS = Counter("llava_engine_step_seconds_total", "Time spent in steps.")
SCHEDULED = Counter("llava_engine_scheduled_requests_total", "Sum of all steps' batch sizes.")
BATCH_SIZE = Gauge("llava_engine_batch_size", "Requests in the last step.")
PREEMPTIONS = Counter("llava_engine_preemptions_total", "Answers preempted for lack of blocks.")
FINISHED = Counter("llava_engine_finished_total", "Answers by how they ended, `finished` or `failed`.", ("outcome",))
RUNNING = Gauge("llava_requests_running", "Answers that are being generated.")
WAITING = Gauge("llava_requests_waiting", "Answers that wait for the engine.")
QUEUED_PREFILL_TOKENS = Gauge("llava_queued_prefill_tokens", "Tokens of prompts that wait for prefill.")
BLOCKS = Gauge("llava_kv_cache_blocks", "Blocks of keys and values: `used`, `idle` (kept) or `free`.", ("state",))

METRICS: tuple[Metric, ...] = tuple(value for value in globals().values() if isinstance(value, Metric))

# A metric, its total or present value, and its labels' values.
Reading = tuple[Counter | Gauge, float, tuple[str, ...]]


class Recorder(Protocol):
    """Where values go. Labels' values come in the order of the metric's labels. Safe to use from several threads."""

    def count(self, counter: Counter, *labels: str, by: float = 1) -> None:
        """Adds `by` to a total."""
        ...

    def observe(self, histogram: Histogram, value: float, *labels: str) -> None:
        """Records one value."""
        ...

    def watch(self, read: Callable[[], Iterable[Reading]]) -> None:
        """Calls `read` once a second from now on. For a counter, `read` gives its total since the start."""
        ...


class Unrecorded:
    """Discards all values: for use without a service."""

    def count(self, counter: Counter, *labels: str, by: float = 1) -> None:
        """See Recorder."""

    def observe(self, histogram: Histogram, value: float, *labels: str) -> None:
        """See Recorder."""

    def watch(self, read: Callable[[], Iterable[Reading]]) -> None:
        """See Recorder."""


def engine_readings(stats: EngineStats) -> list[Reading]:
    """An engine's counts. Its thread may be running meanwhile: each number is right, but not all are of one moment."""
    free = stats.num_blocks - stats.used_blocks - stats.idle_blocks
    return [
        (GENERATED_TOKENS, stats.output_tokens, ()),
        (COMPUTED_TOKENS, stats.computed_tokens, ()),
        (CACHED_TOKENS, stats.cached_tokens, ()),
        (STEPS, stats.num_steps, ()),
        (STEP_SECONDS, stats.step_seconds, ()),
        (SCHEDULED, stats.scheduled_requests, ()),
        (BATCH_SIZE, stats.batch_size, ()),
        (PREEMPTIONS, stats.num_preemptions, ()),
        (FINISHED, stats.num_finished, ("finished",)),
        (FINISHED, stats.num_failed, ("failed",)),
        (RUNNING, stats.num_running, ()),
        (WAITING, stats.num_waiting, ()),
        (QUEUED_PREFILL_TOKENS, stats.num_unread, ()),
        (BLOCKS, stats.used_blocks, ("used",)),
        (BLOCKS, stats.idle_blocks, ("idle",)),
        (BLOCKS, free, ("free",)),
    ]


def cache_readings(cache: LruCache[Any], name: str) -> list[Reading]:
    """The counts of a cache of pictures."""
    return [
        (CACHE_HITS, cache.num_hits, (name,)),
        (CACHE_MISSES, cache.num_misses, (name,)),
        (CACHE_BYTES, cache.num_bytes, (name,)),
    ]


def record_handed_over(recorder: Recorder, route: str, num_bytes: int) -> None:
    """Records the bytes that one request with pictures puts into the store, or sends, on its way to the next stage."""
    recorder.count(HANDED_OVER, route, by=num_bytes)
    recorder.observe(HANDED_OVER_EACH, num_bytes, route)
