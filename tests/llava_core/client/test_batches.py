"""Order, concurrency limits and errors of question batches, in threads and as tasks, with a fake service."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from llava_core.client.answers import Choice, Reply
from llava_core.client.batches import Question, Result, ask_in_tasks, ask_in_threads
from llava_core.client.errors import RateLimitError
from llava_core.errors import LlavaError


def reply(text: str) -> Reply:
    return Reply((Choice(text, "stop"),))


QUESTIONS = [Question(str(index)) for index in range(12)]


class Answering:
    """Echoes the question as the answer and counts concurrent questions. Blocks on `gates` by text."""

    def __init__(self, *, refuses: str = "") -> None:
        self.refuses = refuses
        self.num_running = self.most_running = 0
        self.lock = threading.Lock()
        self.gates: dict[str, threading.Event] = {}

    def __call__(self, question: Question) -> Reply:
        with self.lock:
            self.num_running += 1
            self.most_running = max(self.most_running, self.num_running)
        try:
            if question.text in self.gates:
                assert self.gates[question.text].wait(30)
            if question.text == self.refuses:
                raise RateLimitError("full", status=429)
            return reply(question.text)
        finally:
            with self.lock:
                self.num_running -= 1

    async def as_task(self, question: Question) -> Reply:
        return await asyncio.to_thread(self, question)


def in_threads(answering: Answering, questions: Iterator[Question], *, in_order: bool) -> list[Result]:
    return list(ask_in_threads(answering, questions, concurrency=3, in_order=in_order))


def in_tasks(answering: Answering, questions: Iterator[Question], *, in_order: bool) -> list[Result]:
    async def run() -> list[Result]:
        results = ask_in_tasks(answering.as_task, questions, concurrency=3, in_order=in_order)
        return [result async for result in results]

    return asyncio.run(run())


KINDS = pytest.mark.parametrize("ask", [in_threads, in_tasks])
Ask = Callable[..., list[Result]]


@KINDS
@pytest.mark.parametrize("in_order", [True, False])
def test_each_question_has_its_own_result_or_error(ask: Ask, *, in_order: bool) -> None:
    answering = Answering(refuses="5")
    results = ask(answering, iter(QUESTIONS), in_order=in_order)
    if in_order:
        assert [result.index for result in results] == list(range(12))
    results.sort(key=lambda result: result.index)
    assert [result.question for result in results] == QUESTIONS
    assert [result.index for result in results if result.error] == [5]
    assert [result.unwrap().text for result in results if result.reply] == [str(i) for i in range(12) if i != 5]
    assert 1 <= answering.most_running <= 3
    with pytest.raises(RateLimitError, match="full"):
        results[5].unwrap()


def test_unordered_results_come_as_they_are_ready() -> None:
    answering = Answering()
    answering.gates["0"] = threading.Event()
    results = ask_in_threads(answering, QUESTIONS, concurrency=2, in_order=False)
    assert sorted(next(results).index for _ in range(11)) == list(range(1, 12))
    answering.gates["0"].set()
    assert next(results).index == 0


def test_a_slow_first_question_does_not_block_the_others() -> None:
    answering = Answering()
    answering.gates["0"] = threading.Event()
    answering.gates["3"] = threading.Event()

    def ask(question: Question) -> Reply:
        if question.text == "3":
            # This question is asked while the first one is still waiting.
            answering.gates["0"].set()
            answering.gates["3"].set()
        return answering(question)

    results = list(ask_in_threads(ask, QUESTIONS, concurrency=2, in_order=True))
    assert [result.index for result in results] == list(range(12))


@KINDS
def test_questions_are_taken_from_the_source_only_as_needed(ask: Ask) -> None:
    taken = 0

    def source() -> Iterator[Question]:
        nonlocal taken
        for question in QUESTIONS:
            taken += 1
            yield question

    assert len(ask(Answering(), source(), in_order=True)) == 12
    first = ask_in_threads(Answering(), source(), concurrency=2, in_order=True)
    taken = 0
    next(first)
    first.close()  # type: ignore[attr-defined]
    assert taken == 4


def test_programming_errors_are_not_hidden() -> None:
    def broken(_: Question) -> Reply:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(ask_in_threads(broken, QUESTIONS, concurrency=2, in_order=True))
    with pytest.raises(ValueError, match="concurrency must be at least 1"):
        list(ask_in_threads(broken, QUESTIONS, concurrency=0, in_order=True))


def test_unwrapping_an_empty_result_is_an_error() -> None:
    with pytest.raises(LlavaError):
        Result(0, QUESTIONS[0]).unwrap()
