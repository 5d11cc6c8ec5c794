"""The same question to a model in this process and to a service; after an interrupt both can answer the next one."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_core.chat.backends import Backend, LocalBackend, ServiceBackend
from llava_core.client import AnswerInterruptedError, Client
from llava_core.client.messages import user_message
from llava_core.errors import EngineError, LlavaError, RequestError
from llava_core.inference import LocalModel
from llava_core.types import GenerationRequest, Message, TextPart
from tests.deployments.fakes import ScriptedEngine, answer
from tests.deployments.pictures import plain
from tests.deployments.service import until
from tests.sockets import scripted, serving_engine, whole

QUESTION = user_message("What?", [plain()])
HELLO = Message("assistant", (TextPart("Hello"),))


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> LocalModel:
    return LocalModel(tiny_checkpoint)


def local(model: LocalModel, **sampling: object) -> LocalBackend:
    return LocalBackend("tiny", model.preparer, model, sampling)


def answer_text(backend: Backend, question: Message = QUESTION, history: tuple[Message, ...] = ()) -> str:
    return "".join(delta.text for delta in backend.answer(history, question, None))


def test_the_model_answers_the_same_without_a_chat(model: LocalModel) -> None:
    history = (QUESTION, HELLO)
    backend = local(model, max_tokens=8)
    request = GenerationRequest("x", (*history, QUESTION), backend._sampling)
    assert answer_text(backend, history=history) == "".join(delta.text for delta in model.stream(request))
    assert [delta.finish_reason for delta in backend.answer((), QUESTION, "Be brief.")][-1] in ("stop", "length")


def test_an_interrupt_ends_an_answer_but_not_the_next(model: LocalModel) -> None:
    backend = local(model, max_tokens=60, temperature=1.0, seed=5)
    expected = answer_text(backend)
    before = signal.getsignal(signal.SIGINT)
    deltas = backend.answer((), QUESTION, None)
    first = next(deltas)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        next(deltas)
    assert expected.startswith(first.text)
    assert not model.engine.has_work
    assert signal.getsignal(signal.SIGINT) is before
    assert answer_text(backend) == expected


def test_closing_an_answer_restores_signal_handlers(model: LocalModel) -> None:
    before = signal.getsignal(signal.SIGINT)
    deltas = local(model).answer((), QUESTION, None)
    next(deltas)
    assert signal.getsignal(signal.SIGINT) is not before
    deltas.close()
    assert signal.getsignal(signal.SIGINT) is before
    assert not model.engine.has_work


def test_a_thread_answers_without_signal_handlers(model: LocalModel) -> None:
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(answer_text(local(model, max_tokens=3))))
    thread.start()
    thread.join(60)
    assert texts == [answer_text(local(model, max_tokens=3))]


def test_bad_input_raises_to_the_caller(model: LocalModel) -> None:
    with pytest.raises(RequestError):
        answer_text(local(model), user_message("?", [b"no picture"]))
    with pytest.raises(ValueError, match="temperature"):
        local(model, temperature=9)


@pytest.fixture
def served() -> Iterator[tuple[ScriptedEngine, ServiceBackend]]:
    engine = ScriptedEngine(answer("Hel", "lo"))
    with serving_engine(engine) as url, Client(url) as client:
        yield engine, ServiceBackend(client, None, {"temperature": 0.5})


def test_a_service_is_asked_with_history_and_options(served: tuple[ScriptedEngine, ServiceBackend]) -> None:
    engine, backend = served
    assert backend.name == "m"
    assert answer_text(backend, history=(QUESTION, HELLO)) == "Hello"
    request = engine.requests[-1]
    assert isinstance(request, GenerationRequest)
    assert request.messages == (QUESTION, HELLO, QUESTION)
    assert request.sampling.temperature == 0.5
    assert "stop" in [delta.finish_reason for delta in backend.answer((), QUESTION, "s")]
    assert engine.requests[-1].system == "s"  # type: ignore[union-attr]


def test_closing_an_answer_frees_it_on_the_service(served: tuple[ScriptedEngine, ServiceBackend]) -> None:
    engine, backend = served
    engine.items, engine.hangs = answer("Hel", "lo")[:1], True
    deltas = backend.answer((), QUESTION, None)
    next(deltas)
    assert engine.num_open == 1
    deltas.close()
    until(lambda: engine.num_open == 0)


def test_an_interrupted_answer_is_an_error(served: tuple[ScriptedEngine, ServiceBackend]) -> None:
    engine, backend = served
    engine.items = [*answer("Hel", "lo")[:1], EngineError("broken")]
    with pytest.raises(AnswerInterruptedError, match="could not be generated"):
        answer_text(backend)


def test_a_service_without_models_is_an_error() -> None:
    with (
        scripted(whole("200 OK", b'{"data": []}')) as server,
        Client(server.url) as client,
        pytest.raises(LlavaError, match="serves no model"),
    ):
        ServiceBackend(client, None, {})
