"""Who listens to a call learns from its router whether a replica has it."""

from deployments.sent_calls import SentCalls


def test_a_call_is_sent_when_its_router_says_so_and_no_other() -> None:
    calls = SentCalls()
    with calls.listening("Generator", "1") as is_sent, calls.listening("Generator", "2") as is_other_sent:
        calls.note("VisionEncoder", "1", is_sent=True)
        assert not is_sent()
        calls.note("Generator", "1", is_sent=True)
        assert is_sent()
        assert not is_other_sent()
        # A replica has refused it.
        calls.note("Generator", "1", is_sent=False)
        assert not is_sent()


def test_nothing_is_kept_of_calls_that_nobody_listens_to() -> None:
    calls = SentCalls()
    with calls.listening("Generator", "1"):
        pass
    calls.note("Generator", "1", is_sent=True)
    assert not calls._is_sent
