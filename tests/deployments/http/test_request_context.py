"""Facts about a request stay with it, whichever task records them."""

import asyncio

from deployments.http.request_context import current_request, request_context


def test_tasks_of_one_request_share_a_context_and_other_requests_do_not() -> None:
    async def work(code: str) -> None:
        current_request().error_code = code

    async def request(code: str) -> str | None:
        with request_context() as context:
            await asyncio.gather(asyncio.create_task(work(code)), asyncio.sleep(0))
            return context.error_code

    async def run() -> list[str | None]:
        return await asyncio.gather(request("a"), request("b"))

    assert asyncio.run(run()) == ["a", "b"]


def test_outside_of_a_request_nothing_is_kept() -> None:
    current_request().error_code = "lost"
    assert current_request().error_code is None
    with request_context():
        current_request().key_id = "k"
    assert current_request().key_id is None
