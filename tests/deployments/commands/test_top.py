"""`llava top` on handwritten metrics pages, so that every number on the screen can be checked by eye."""

import contextlib
import http.server
import threading
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from deployments.commands.top import Change, Page, screen, top
from deployments.metrics import STAGE_DURATION, TIME_TO_FIRST_TOKEN, Histogram
from llava_core.cli import main

OTHERS = """# HELP ray_node_cpu_count Total CPUs available on a ray node
# TYPE ray_node_cpu_count gauge
ray_node_cpu_count{NodeAddress="127.0.0.1"} 2.0
# TYPE ray_llava_requests_running gauge
ray_serve_replica_processing_queries{application="llava",deployment="Gateway",replica="a"} 5.0
ray_serve_replica_processing_queries{application="llava",deployment="Generator",replica="b"} 2.0
ray_serve_replica_processing_queries{application="llava",deployment="Generator",replica="c"} 3.0
ray_serve_deployment_queued_queries{application="llava",deployment="Generator",handle="d"} 4.0
ray_llava_requests_running{deployment="Generator",replica="b"} 1.0
ray_llava_requests_running{deployment="Generator",replica="c"} 3.0
ray_llava_requests_waiting{deployment="Generator",replica="c"} 7.0
ray_llava_kv_cache_blocks{replica="b",state="used"} 10.0
ray_llava_kv_cache_blocks{replica="b",state="idle"} 20.0
ray_llava_kv_cache_blocks{replica="b",state="free"} 70.0
"""


def _buckets(histogram: Histogram, counts: dict[float, int], labels: str) -> str:
    """Return a histogram in Prometheus' format; `counts` are the numbers of values up to each bound."""
    lines, total = [], 0
    for bound in (*histogram.buckets, float("inf")):
        total += counts.get(bound, 0)
        le = "+Inf" if bound == float("inf") else bound
        lines.append(f'ray_{histogram.name}_bucket{{{labels},le="{le}"}} {total}.0')
    return "\n".join(lines) + "\n"


def _page(requests: int, tokens: int, hits: int, errors: int, first_tokens: dict[float, int]) -> str:
    return (
        OTHERS
        + f'ray_llava_http_requests_total{{method="POST",route="/v1/chat/completions",status="200"}} {requests}.0\n'
        + f'ray_llava_generation_tokens_total{{replica="b"}} {tokens}.0\n'
        + f'ray_llava_generation_tokens_total{{replica="c"}} {tokens}.0\n'
        + f'ray_llava_engine_steps_total{{replica="b"}} {tokens}.0\n'
        + f'ray_llava_engine_scheduled_requests_total{{replica="b"}} {2 * tokens}.0\n'
        + f'ray_llava_cache_hits_total{{cache="tiles"}} {hits}.0\n'
        + 'ray_llava_cache_misses_total{cache="tiles"} 10.0\n'
        + f'ray_llava_routed_calls_total{{target="Generator",choice="preferred"}} {3 * requests}.0\n'
        + f'ray_llava_routed_calls_total{{target="Generator",choice="fallback"}} {requests}.0\n'
        + f'ray_llava_routed_calls_total{{target="Preprocessor",choice="keyless"}} {requests}.0\n'
        + "ray_llava_prompt_tokens_total 400.0\n"
        + f'ray_llava_errors_total{{code="overloaded"}} {errors}.0\n'
        + f'ray_llava_cancellations_total{{phase="waiting"}} {errors}.0\n'
        + _buckets(TIME_TO_FIRST_TOKEN, first_tokens, 'model="m"')
        + _buckets(STAGE_DURATION, {0.02: 4}, 'stage="encode"')
    )


UPSTREAMS = """ray_llava_upstream_up{model="big",replica="a"} 1.0
ray_llava_upstream_up{model="big",replica="b"} 1.0
ray_llava_upstream_up{model="far",replica="a"} 1.0
ray_llava_upstream_up{model="far",replica="b"} 0.0
ray_llava_upstream_requests_running{model="big",replica="a"} 2.0
ray_llava_upstream_requests_running{model="big",replica="b"} 1.0
"""
TOKENS = """ray_llava_upstream_requests_total{model="big",outcome="answered",replica="a"} 20.0
ray_llava_upstream_tokens_total{model="big",kind="completion",replica="a"} 300.0
ray_llava_upstream_tokens_total{model="big",kind="prompt",replica="a"} 900.0
"""


def test_each_upstream_has_a_line() -> None:
    lines = list(screen(Change(Page.parse(UPSTREAMS, 0.0), Page.parse(UPSTREAMS + TOKENS, 10.0))))
    assert [line.split() for line in lines if line.startswith(("big", "far"))] == [
        ["big", "up", "3", "2.0", "30.0"],
        ["far", "down", "0", "0.0", "0.0"],
    ]
    assert not any("other server" in line for line in screen(Change(Page.parse(OTHERS, 0.0), Page.parse(OTHERS, 1.0))))


BEFORE = _page(10, 100, 0, 0, {0.1: 8})
NOW = _page(30, 400, 20, 3, {0.1: 18, 0.2: 9, 0.5: 1})


def test_the_screen_shows_the_change_between_two_pages() -> None:
    lines = list(screen(Change(Page.parse(BEFORE, 100.0), Page.parse(NOW, 110.0))))
    text = "\n".join(lines)
    assert "last 10 s" in lines[0]
    stages = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("G")}
    assert stages == {"Gateway": ["1", "5", "0"], "Generator": ["2", "5", "4"]}
    # Twenty requests, and 300 tokens from each of two replicas, in ten seconds.
    assert "requests/s 2.0   tokens/s 60.0   running 4   waiting 7   batch 2.0" in text
    assert "tiles 100 %   features -   prefix tokens -" in text
    assert "preferred replicas   Generator 75 %   Preprocessor -" in text
    assert "blocks 10 of 100 in use, 20 kept" in text
    assert "since the start: 30 requests, 800 tokens, 3 hung up, errors: overloaded 3" in text
    # Ten of 20 values are at most 0.1 s, so the median is exactly that; the 99 % quantile is in the last bucket.
    assert "first token 100 ms / 440 ms" in text
    assert "encode - / -" in text


def test_stages_of_several_models_are_listed_in_aligned_rows() -> None:
    page = OTHERS.replace('deployment="Generator",replica="b"', 'deployment="Generator-owner-a-long-name",replica="b"')
    page = page.replace('deployment="Generator",', 'deployment="Generator-short",')
    lines = list(screen(Change(Page.parse(page, 100.0), Page.parse(page, 110.0))))
    stages = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("G")}
    assert stages == {
        "Gateway": ["1", "5", "0"],
        "Generator-owner-a-long-name": ["1", "2", "0"],
        "Generator-short": ["1", "3", "4"],
    }
    table = lines[2:6]
    assert len({len(line) for line in table}) == 1
    # Figures that belong to no single stage cover all models together.
    assert "running 4   waiting 7" in "\n".join(lines)


def test_a_quantile_is_computed_as_in_prometheus() -> None:
    change = Change(Page.parse(BEFORE, 0.0), Page.parse(NOW, 1.0))
    quantile = change.quantile(TIME_TO_FIRST_TOKEN, 0.75, model="m")
    # The 15th of 20 values, five ninths into the bucket from 0.1 to 0.2.
    assert quantile == pytest.approx(0.1 + 0.1 * 5 / 9)
    assert change.quantile(TIME_TO_FIRST_TOKEN, 0.75, model="other") is None
    beyond = Page.parse(_buckets(TIME_TO_FIRST_TOKEN, {float("inf"): 1}, 'model="m"'), 1.0)
    assert Change(Page(0.0), beyond).quantile(TIME_TO_FIRST_TOKEN, 0.5) == 300.0


def test_a_restarted_service_has_no_negative_rates() -> None:
    assert "requests/s 0.0   tokens/s 0.0" in "\n".join(screen(Change(Page.parse(NOW, 0.0), Page.parse(BEFORE, 9.0))))


@contextlib.contextmanager
def _serving(*pages: str) -> Iterator[str]:
    """Yield an address that serves one page after the other, and then always the last."""
    given = iter(pages)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(next(given, pages[-1]).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()


def test_once_prints_one_screen_of_plain_text() -> None:
    with _serving(BEFORE, NOW) as url:
        result = CliRunner().invoke(top, [url, "--once", "--interval", "0.1"])
    assert result.exit_code == 0, result.output
    assert result.output.count("llava top") == 1
    assert "since the start: 30 requests" in result.output
    assert "\x1b" not in result.output


def test_it_refreshes_until_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("deployments.commands.top.time.sleep", sleep)
    with _serving(BEFORE, NOW) as url:
        result = CliRunner().invoke(top, [url])
    assert result.exit_code == 0, result.output
    assert result.output.count("llava top") == 3
    assert waits == [10.0] * 3


def test_an_unreachable_page_is_a_one_line_error() -> None:
    with _serving(BEFORE) as url:
        pass
    result = CliRunner().invoke(main, ["top", url, "--once"])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {url} cannot be read: ")
    assert "llava serve" in result.output
