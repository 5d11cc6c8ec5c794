"""Many questions with bounded concurrency, on threads or as tasks; each yields a Result, so no error loses the others.

The function that answers a question is passed in. Questions are taken from their source only as capacity frees up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice

from llava_core.client.answers import Reply
from llava_core.client.messages import Picture
from llava_core.client.requests import Options
from llava_core.errors import LlavaError


@dataclass(frozen=True)
class Question:
    """One question of a batch, with its own pictures and options."""

    text: str
    images: tuple[Picture, ...] = ()
    system: str | None = None
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Result:
    """The outcome of the question at `index`: a reply or an error."""

    index: int
    question: Question
    reply: Reply | None = None
    error: LlavaError | None = None

    def unwrap(self) -> Reply:
        """The reply. Raises the error where there is none."""
        if self.reply is None:
            raise self.error or LlavaError("the question has neither a reply nor an error")
        return self.reply


def ask_in_threads(
    ask: Callable[[Question], Reply], questions: Iterable[Question], *, concurrency: int, in_order: bool
) -> Iterator[Result]:
    """Yield results from a pool of threads. Leaving early waits for the questions in flight."""
    _check(concurrency)

    def answer(index: int, question: Question) -> Result:
        try:
            return Result(index, question, ask(question))
        except LlavaError as error:
            return Result(index, question, error=error)

    source = enumerate(questions)
    with ThreadPoolExecutor(concurrency, "batch") as pool:
        # In the order of the questions.
        running: list[Future[Result]] = []
        try:
            while True:
                # In order, the first question may be slow: a second set of questions keeps the other threads busy.
                room = (2 if in_order else 1) * concurrency - len(running)
                running += [pool.submit(answer, *numbered) for numbered in islice(source, room)]
                if not running:
                    return
                ready = running[:1] if in_order else wait(running, return_when=FIRST_COMPLETED).done
                for future in list(ready):
                    running.remove(future)
                    yield future.result()
        finally:
            for future in running:
                future.cancel()


async def ask_in_tasks(
    ask: Callable[[Question], Awaitable[Reply]], questions: Iterable[Question], *, concurrency: int, in_order: bool
) -> AsyncGenerator[Result, None]:
    """Yield results from tasks. Leaving early cancels those that are running."""
    _check(concurrency)
    free = asyncio.Semaphore(concurrency)

    async def answer(index: int, question: Question) -> Result:
        async with free:
            try:
                return Result(index, question, await ask(question))
            except LlavaError as error:
                return Result(index, question, error=error)

    source = enumerate(questions)
    running: list[asyncio.Task[Result]] = []
    try:
        while True:
            room = (2 if in_order else 1) * concurrency - len(running)
            running += [asyncio.ensure_future(answer(*numbered)) for numbered in islice(source, room)]
            if not running:
                return
            ready = running[:1] if in_order else (await asyncio.wait(running, return_when=FIRST_COMPLETED))[0]
            for task in list(ready):
                result = await task
                running.remove(task)
                yield result
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _check(concurrency: int) -> None:
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, not {concurrency}")
