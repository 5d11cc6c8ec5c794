"""Hang-ups against a server that frees its slots when the test says so: the measurement must find out when."""

import asyncio
import contextlib
import json

import pytest

from benchmarks.exchange import post_json
from benchmarks.service.hangups import HangUpError, all_are_free, seconds_to_free

SLOTS = 4
BUSY = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n"
DONE = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class SlotServer:
    """Frees the slot of a disconnected client after `delay_s`, and never those of the first `num_stuck`."""

    def __init__(self, *, delay_s: float = 0.0, num_stuck: int = 0, status: bytes = b"") -> None:
        self.delay_s, self.num_stuck, self.status = delay_s, num_stuck, status
        self.taken = 0
        self.most = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        body = json.loads(await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0])))
        n = body.get("n", 1)
        if self.status or self.taken + n > SLOTS:
            writer.write(self.status or BUSY)
        elif body["max_tokens"] == 1:
            writer.write(DONE)
        else:
            self.taken += 1
            self.most = max(self.most, self.taken)
            await self._hold(reader)
        writer.close()

    async def _hold(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
        if self.num_stuck:
            self.num_stuck -= 1
            return
        await asyncio.sleep(self.delay_s)
        self.taken -= 1


def measured(slots: SlotServer) -> tuple[float, bool]:
    """Return the seconds until all slots were free, and whether they are free afterwards."""

    async def measure() -> tuple[float, bool]:
        server = await asyncio.start_server(slots.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        messages = [post_json(port, {"max_tokens": 1000})] * SLOTS
        try:
            return await seconds_to_free(port, SLOTS, messages), await all_are_free(port, SLOTS)
        finally:
            server.close()

    return asyncio.run(measure())


@pytest.mark.parametrize("delay_s", [0.0, 0.4])
def test_the_measured_time_is_that_of_the_last_slot(delay_s: float) -> None:
    slots = SlotServer(delay_s=delay_s)
    seconds, are_free = measured(slots)
    assert slots.most == SLOTS
    assert delay_s <= seconds < delay_s + 0.3
    assert are_free


def test_a_slot_that_is_never_freed_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.service.hangups._PATIENCE_S", 0.3)
    with pytest.raises(HangUpError, match="for 4 answers did not get 200"):
        measured(SlotServer(num_stuck=1))


def test_a_service_that_fails_is_not_measured() -> None:
    with pytest.raises(HangUpError, match="status 500"):
        measured(SlotServer(status=b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n"))
