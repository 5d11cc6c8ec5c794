"""How soon the engine's slots are free again after their clients have hung up, seen from outside.

Every slot of the engine is taken by a client with a long answer, half of them streaming, half waiting for the whole
answer; a refused request proves that no slot is left. All hang up at once, and from then on a request for as many
answers as there are slots is repeated: it is accepted only once every slot is free. The time from the hang-ups to its
answer, which includes its own duration, is therefore an upper bound for each slot. Gauges would not do: they are
reported every ten seconds. Needs a service without a queue behind its slots.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from benchmarks.exchange import exchange, post_json, read_response

_PATIENCE_S = 30.0
_OK, _OVERLOADED = 200, 429


class HangUpError(Exception):
    """The service answered in a way that makes the measurement impossible, or never freed its slots."""


async def seconds_to_free(port: int, places: int, messages: Sequence[bytes]) -> float:
    """Measure the time to free all slots. `messages`, one for each slot, ask for long answers."""
    assert len(messages) == places
    holding = [asyncio.ensure_future(_hold(port, message)) for message in messages]
    try:
        await _until(port, num_answers=1, status=_OVERLOADED)
        ended = [held for held in holding if held.done()]
        if ended:
            raise HangUpError(f"{len(ended)} of the long answers ended before their clients could hang up")
    finally:
        began = time.perf_counter()
        for held in holding:
            held.cancel()
        await asyncio.gather(*holding, return_exceptions=True)
    await _until(port, num_answers=places, status=_OK)
    return time.perf_counter() - began


async def all_are_free(port: int, places: int) -> bool:
    """Whether the engine is empty now."""
    return await _probe(port, places) == _OK


async def _hold(port: int, message: bytes) -> None:
    """Hold a slot until cancelled. It may have to wait until a probe frees its slot."""
    while True:
        response = read_response(await exchange(port, message))
        if response.status != _OVERLOADED:
            raise HangUpError(f"status {response.status}: {response.body[:200].decode(errors='replace')}")


async def _until(port: int, *, num_answers: int, status: int) -> None:
    deadline = time.perf_counter() + _PATIENCE_S
    while await _probe(port, num_answers) != status:
        if time.perf_counter() > deadline:
            raise HangUpError(f"a request for {num_answers} answers did not get {status} within {_PATIENCE_S:g} s")


async def _probe(port: int, num_answers: int) -> int:
    body = {"messages": [{"role": "user", "content": "How are you?"}], "n": num_answers, "max_tokens": 1}
    response = read_response(await exchange(port, post_json(port, body)))
    if response.status not in (_OK, _OVERLOADED):
        raise HangUpError(f"status {response.status}: {response.body[:200].decode(errors='replace')}")
    return response.status
