"""What a visitor sees of an answer, over the real gateway: every state, explained errors, and what is logged."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.errors import StageUnavailableError
from deployments.page.answering import Asker
from deployments.page.log import ConversationLog
from deployments.page.settings import LogArgs
from deployments.page.talk import Choices, Turn
from llava_core.client import ServiceError
from llava_core.errors import EngineError, OverloadedError
from llava_core.types import GenerationRequest
from tests.deployments.fakes import ScriptedEngine, answer
from tests.deployments.pictures import plain
from tests.sockets import serving_engine


def _ask(
    url: str, turn: Turn, *before: Turn, choices: Choices | None = None, keep: bool = False, **asker: object
) -> list[Turn]:
    async def states() -> list[Turn]:
        answered = Asker(url, **asker).answer(before, turn.begun(), choices or Choices("m"), key=None, keep=keep)  # type: ignore[arg-type]
        return [state async for state in answered]

    return asyncio.run(states())


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_an_answer_grows_and_ends_with_its_statistics(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(plain())
    engine = ScriptedEngine(answer("Hel", "lo", stage_ms={"prefill": 2.0, "decode": 10.0}))
    with serving_engine(engine) as url:
        states = _ask(
            url,
            Turn("Two?", (str(tmp_path / "red.png"),)),
            Turn("One?", (), "1"),
            choices=Choices("m", "llava_v1", "Be brief.", 0.5, 0.9, 64, 7),
        )
    assert [state.is_open for state in states] == [True] * (len(states) - 1) + [False]
    assert all("Hello".startswith(state.answer) for state in states)
    assert states[-1].answer == "Hello"
    assert states[-1].figures.startswith("2 tokens · 100 tokens/s")
    [request] = engine.requests
    assert isinstance(request, GenerationRequest)
    assert (request.system, request.template) == ("Be brief.", "llava_v1")
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed) == (0.5, 0.9, 64, 7)
    assert [message.role for message in request.messages] == ["user", "assistant", "user"]
    assert request.num_images == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OverloadedError("the engine is full", limit="engine", retry_after_s=4), "Try again in 4 seconds."),
        (StageUnavailableError("Generator"), "loading its model"),
    ],
)
def test_a_refusal_is_explained_at_once(error: Exception, expected: str) -> None:
    with serving_engine(ScriptedEngine([error])) as url:
        states = _ask(url, Turn("What?"))
    assert expected in states[-1].problem
    assert (states[-1].answer, states[-1].is_open) == ("", False)


def test_the_beginning_of_an_interrupted_answer_is_kept() -> None:
    with serving_engine(ScriptedEngine([*answer("Hel", "lo")[:1], EngineError("broken")])) as url:
        last = _ask(url, Turn("What?"))[-1]
    assert last.answer == "Hel"
    assert last.problem.startswith("The answer broke off.")
    assert not last.is_open


def test_an_unreachable_service_is_explained_and_raises_when_listing_models() -> None:
    url = "http://127.0.0.1:9"
    assert "may still be starting" in _ask(url, Turn("What?"))[-1].problem
    with pytest.raises(ServiceError):
        asyncio.run(Asker(url).models(None))


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_visitor_who_leaves_cancels_the_request_on_the_service(*, is_cancelled: bool) -> None:
    """This holds whether Gradio closes the generator or cancels the task that waits for the next state."""
    engine = ScriptedEngine(answer("a", "b")[:1], hangs=True)

    async def leave(url: str) -> None:
        states = Asker(url).answer((), Turn("What?").begun(), Choices("m"), key=None, keep=False)
        async for state in states:
            if state.answer:
                break
        if is_cancelled:
            waiting = asyncio.ensure_future(anext(states))
            await asyncio.sleep(0)
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
        else:
            await states.aclose()
        await _until(lambda: engine.num_open == 0)

    with serving_engine(engine) as url:
        asyncio.run(leave(url))
    assert engine.num_left_early == 1


def test_the_state_is_repeated_while_nothing_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio detects a closed browser only when there is something to show."""
    monkeypatch.setattr("deployments.page.answering._STANDSTILL_S", 0.01)
    engine = ScriptedEngine(hangs=True)

    async def wait(url: str) -> None:
        async with contextlib.aclosing(
            Asker(url).answer((), Turn("What?").begun(), Choices("m"), key=None, keep=False)
        ) as states:
            shown = [await anext(states) for _ in range(4)]
        assert {state.answer for state in shown} == {""}
        await _until(lambda: engine.num_open == 0)

    with serving_engine(engine) as url:
        asyncio.run(wait(url))


def test_a_question_refused_by_moderation_does_not_reach_the_service() -> None:
    async def refuse(text: str) -> str | None:
        return "it is rude" if "rude" in text else None

    engine = ScriptedEngine(answer("fine"))
    with serving_engine(engine) as url:
        refused = _ask(url, Turn("Something rude"), moderate=refuse)[-1]
        by_system = _ask(url, Turn("Hello"), choices=Choices("m", system="Be rude."), moderate=refuse)[-1]
        assert engine.requests == []
        assert _ask(url, Turn("Hello"), moderate=refuse)[-1].answer == "fine"
    assert refused.problem == by_system.problem == "This question was not sent: it is rude. Edit it and try again."


def test_conversations_are_not_kept_without_consent(tmp_path: Path) -> None:
    log = ConversationLog(LogArgs(folder=tmp_path / "log"))
    with serving_engine(ScriptedEngine(answer("Hel", "lo"))) as url:
        _ask(url, Turn("Secret?"), log=log)
        assert list((tmp_path / "log").iterdir()) == []
        _ask(url, Turn("Two?"), Turn("One?", (), "1"), log=log, keep=True)
    [path] = (tmp_path / "log").iterdir()
    [line] = path.read_text().splitlines()
    texts = [text for _, text in json.loads(line)["state"]["messages"]]
    assert texts == ["One?", "1", "Two?", "Hello"]


def test_a_log_that_cannot_be_written_does_not_prevent_an_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = ConversationLog(LogArgs(folder=tmp_path / "log"))
    (tmp_path / "log").rmdir()
    with serving_engine(ScriptedEngine(answer("Hel", "lo"))) as url:
        assert _ask(url, Turn("Two?"), log=log, keep=True)[-1].answer == "Hello"
    assert "could not be kept" in caplog.text
