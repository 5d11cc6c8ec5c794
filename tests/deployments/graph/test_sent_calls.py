"""A watcher of a call learns from its router where the call is."""

from typing import Any

from deployments.graph.sent_calls import SentCalls, Whereabouts


def test_a_call_is_located_where_its_own_router_says() -> None:
    calls = SentCalls()
    calls.watch("Generator", "1")
    calls.watch("Generator", "2")
    calls.note("VisionEncoder", "1", Whereabouts(is_sent=True))
    assert not calls.where("Generator", "1").is_sent
    replica: Any = object()
    calls.note("Generator", "1", Whereabouts(lambda: [replica], is_sent=True))
    where = calls.where("Generator", "1")
    assert where.is_sent
    assert where.replicas() == [replica]
    assert not calls.where("Generator", "2").is_sent
    assert not calls.where("Generator", "2").replicas()
    # The replica has refused the call.
    calls.note("Generator", "1", Whereabouts())
    assert not calls.where("Generator", "1").is_sent


def test_nothing_is_kept_about_unwatched_calls() -> None:
    calls = SentCalls()
    calls.watch("Generator", "1")
    calls.forget("Generator", "1")
    calls.note("Generator", "1", Whereabouts(is_sent=True))
    assert not calls._watched
