"""Which replicas have lost a request, and for how long that is held against them."""

from deployments.graph.suspects import Suspects


def test_a_replica_is_suspected_for_a_while_once_its_request_is_retried() -> None:
    now = [0.0]
    suspects = Suspects(15, clock=lambda: now[0])
    suspects.asked("1")
    suspects.sent("1", "a")
    suspects.sent("2", "b")
    assert not {"a", "b"} & {name for name in "ab" if name in suspects}
    now[0] = 1.0
    suspects.asked("1")
    assert [name for name in "ab" if name in suspects] == ["a"]
    now[0] = 15.9
    assert "a" in suspects
    now[0] = 16.0
    assert "a" not in suspects


def test_a_replica_that_refused_the_request_is_not_suspected() -> None:
    suspects = Suspects()
    for replica in "ab":
        suspects.sent("1", replica)
    suspects.asked("1")
    assert "a" not in suspects
    assert "b" in suspects


def test_the_oldest_requests_are_forgotten() -> None:
    suspects = Suspects(max_requests=2)
    for request, replica in zip("123", "abc", strict=True):
        suspects.sent(request, replica)
    for request in "123":
        suspects.asked(request)
    assert [name for name in "abc" if name in suspects] == ["b", "c"]


def test_a_call_without_a_request_causes_no_suspicion() -> None:
    suspects = Suspects()
    suspects.sent("", "a")
    suspects.asked("")
    assert "a" not in suspects
