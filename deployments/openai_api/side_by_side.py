"""Several prompts of one request: merges their streams of items into one, whose answers are told apart by index.

Knows what items are, but neither who makes them nor how they look to a client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from deployments.messages import Item, Rejected
from llava_core.types import Usage


async def side_by_side(streams: Sequence[AsyncGenerator[Item, None]], num_answers: int) -> AsyncGenerator[Item, None]:
    """Yields items as they come; each stream's `num_answers` answers get indices of their own. The last stream to end
    carries the usage of all, and its own times. The first rejection or error ends the others; so does closing early."""
    # None at the end: in a task, StopAsyncIteration would refer to itself through its traceback.
    waiting = {asyncio.ensure_future(anext(stream, None)): place for place, stream in enumerate(streams)}
    ended: list[Usage] = []
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                place, item = waiting.pop(each), each.result()
                if item is None:
                    continue
                if isinstance(item, Rejected):
                    yield item
                    return
                waiting[asyncio.ensure_future(anext(streams[place], None))] = place
                item = replace(item, index=place * num_answers + item.index)
                if item.usage is not None:
                    ended.append(item.usage)
                    is_last = len(ended) == len(streams)
                    item = replace(item, usage=_sum(ended)) if is_last else replace(item, usage=None, stage_ms={})
                yield item
    finally:
        for each in waiting:
            each.cancel()
        # Failures from here on no longer matter.
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


def _sum(usages: Sequence[Usage]) -> Usage:
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.image_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
    )
