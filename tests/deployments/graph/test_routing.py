"""The router in Serve's own loop, on fake replicas: which one gets a call, and what is counted."""

import asyncio
import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID

from deployments.graph.affinity import Session, ranked
from deployments.graph.routing import AffinityRouter
from deployments.graph.suspects import Suspects
from deployments.metrics import ROUTED
from tests.deployments.fakes import FakeRecorder

STAGE = DeploymentID("VisionEncoder", "llava")
_ids = itertools.count()


@dataclass
class _Replica:
    """A replica as a router sees it."""

    name: str
    max_ongoing_requests: int = 100
    ongoing: int = 0
    is_dead: bool = False
    num_asked: int = 0
    multiplexed_model_ids: frozenset[str] = field(default_factory=frozenset)

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(self.name, STAGE)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.num_asked += 1
        if self.is_dead:
            raise ActorDiedError
        return self.ongoing


class _Stage:
    """A router and its replicas; acts as Serve's caller of both."""

    def __init__(self, *replicas: _Replica) -> None:
        self.recorder = FakeRecorder()
        self.router = AffinityRouter(STAGE, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
        self.router.initialize_state()
        self.router._recorder = self.recorder
        self.replicas = {replica.name: replica for replica in replicas}
        self.update()

    def update(self) -> None:
        played: Any = list(self.replicas.values())
        self.router.update_replicas(played)

    def preferred(self, key: str) -> _Replica:
        return self.replicas[ranked(key, self.replicas)[0]]

    def key_of(self, replica: _Replica) -> str:
        """Return a key that prefers this replica."""
        return next(key for key in map(str, itertools.count()) if self.preferred(key) is replica)

    async def send(self, key: str, *, request: int | None = None, http_request: str | None = None) -> _Replica:
        """Send a call that does not end, for a new request unless one is given; returns the chosen replica."""
        number = next(_ids)
        session = Session(key, str(number if request is None else request))
        metadata = RequestMetadata(str(number), http_request or f"internal-{number}", session_id=str(session))
        pending = PendingRequest([], {}, metadata)
        replica = await self.router._choose_replica_for_request(pending)
        self.router.on_send_request(replica.replica_id)
        chosen = self.replicas[replica.replica_id.unique_id]
        chosen.ongoing += 1
        self.router.on_new_queue_len_info(replica.replica_id, chosen.ongoing)
        result: Any = None
        self.router.on_request_routed(pending, replica.replica_id, result)
        return chosen

    def end(self, replica: _Replica) -> None:
        replica.ongoing -= 1
        self.router.decrement_queue_len_cache(replica.replica_id)

    @property
    def counted(self) -> dict[str, int]:
        # Compared by name: reading back a deployment's router, as other tests do, gives the class a copy of the metric.
        assert {(counter.name, stage) for counter, (stage, _) in self.recorder.counted} <= {(ROUTED.name, STAGE.name)}
        return {choice: by for (_, (_, choice)), by in self.recorder.counted.items()}


def _run(test: Callable[[], Awaitable[None]]) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(within_time())


def _replicas(number: int, **options: int) -> list[_Replica]:
    return [_Replica(f"r{index}", **options) for index in range(number)]


def test_a_key_always_goes_to_its_preferred_replica() -> None:
    async def test() -> None:
        stage = _Stage(*_replicas(3))
        for key in map(str, range(60)):
            for _ in range(2):
                replica = await stage.send(key)
                assert replica is stage.preferred(key)
                stage.end(replica)
        assert stage.counted == {"preferred": 120}

    _run(test)


def test_concurrent_calls_each_go_to_their_keys_preferred_replica() -> None:
    async def test() -> None:
        stage = _Stage(*_replicas(4))
        keys = [stage.key_of(replica) for replica in stage.replicas.values()]
        assert await asyncio.gather(*(stage.send(key) for key in keys)) == [*stage.replicas.values()]

    _run(test)


def test_calls_of_one_http_request_are_each_sent() -> None:
    """Serve knows them by the same id."""

    async def test() -> None:
        stage = _Stage(*_replicas(3))
        keys = ["", "", *(stage.key_of(replica) for replica in stage.replicas.values())]
        chosen = await asyncio.gather(*(stage.send(key, http_request="one") for key in keys))
        assert chosen[2:] == [*stage.replicas.values()]

    _run(test)


def test_a_popular_key_is_shared_by_all_replicas() -> None:
    async def test() -> None:
        stage = _Stage(*_replicas(4))
        for _ in range(80):
            await stage.send("popular")
        ongoing = sorted(replica.ongoing for replica in stage.replicas.values())
        assert ongoing[-1] == stage.preferred("popular").ongoing == 30
        assert ongoing[:-1] == [10, 20, 20]
        assert stage.counted == {"preferred": 30, "fallback": 50}

    _run(test)


def test_full_replicas_are_skipped_and_waited_for_only_if_all_are_full() -> None:
    async def test() -> None:
        stage = _Stage(*_replicas(2, max_ongoing_requests=2))
        first, second = (stage.replicas[name] for name in ranked("key", stage.replicas))
        got = [await stage.send("key") for _ in range(4)]
        assert Counter(replica.name for replica in got) == {first.name: 2, second.name: 2}
        waiting = asyncio.create_task(stage.send("key"))
        # Both have been probed in vain.
        while not (first.num_asked and second.num_asked):
            await asyncio.sleep(0)
        assert not waiting.done()
        stage.end(second)
        assert await waiting is second

    _run(test)


def test_a_dead_replica_of_unknown_load_is_probed_and_skipped() -> None:
    async def test() -> None:
        stage = _Stage(*_replicas(2))
        first, second = (stage.replicas[name] for name in ranked("key", stage.replicas))
        stage.end(await stage.send("key"))
        first.is_dead = True
        # Serve does this when a call to the replica fails.
        stage.router.on_replica_actor_unavailable(first.replica_id)
        assert await stage.send("key") is second
        assert await stage.send("key") is second
        # It is the key's preferred one of the live replicas; and the only one, so there was no choice.
        assert stage.counted == {"preferred": 1}

    _run(test)


def test_a_new_replica_takes_over_only_keys_that_now_prefer_it() -> None:
    async def test() -> None:
        stage = _Stage(*_replicas(2))
        before = {key: stage.preferred(key) for key in map(str, range(40))}
        new = stage.replicas["new"] = _Replica("new")
        stage.update()
        for key, old in before.items():
            replica = await stage.send(key)
            assert replica in (old, new)
            assert replica is stage.preferred(key)
            stage.end(replica)

    _run(test)


@pytest.mark.parametrize("key", ["", "key"])
def test_routing_to_the_only_replica_is_not_counted_as_a_choice(key: str) -> None:
    async def test() -> None:
        (only,) = replicas = _replicas(1)
        stage = _Stage(*replicas)
        assert await stage.send(key) is only
        assert stage.counted == {}

    _run(test)


def test_calls_without_a_key_go_to_the_less_busy_replica() -> None:
    async def test() -> None:
        stage = _Stage(*_replicas(2))
        for _ in range(20):
            await stage.send("")
        assert [replica.ongoing for replica in stage.replicas.values()] == [10, 10]
        assert stage.counted == {"keyless": 20}

    _run(test)


@pytest.mark.parametrize("key", ["", "key"])
def test_a_retry_and_later_calls_avoid_the_suspected_replica_for_a_while(key: str) -> None:
    async def test() -> None:
        now = [0.0]
        stage = _Stage(*_replicas(2))
        stage.router._suspects = Suspects(15, clock=lambda: now[0])
        lost = await stage.send(key, request=-1)
        assert await stage.send(key, request=-1) is not lost
        for _ in range(8):
            assert await stage.send(key) is not lost
        now[0] = 15.0
        # That is by far the less busy one.
        assert await stage.send(key) is lost

    _run(test)


def test_the_only_replica_is_used_even_though_it_lost_the_request() -> None:
    async def test() -> None:
        (only,) = replicas = _replicas(1)
        stage = _Stage(*replicas)
        assert [await stage.send(key, request=-1) for key in ("key", "key", "", "")] == [only] * 4

    _run(test)


def test_a_refusal_by_a_replica_is_not_a_loss() -> None:
    async def test() -> None:
        stage = _Stage(*_replicas(2))
        metadata = RequestMetadata("1", "internal-1", session_id=str(Session("key", "1")))
        pending = PendingRequest([], {}, metadata)
        for is_retry in (False, True):
            replica: Any = await stage.router._choose_replica_for_request(pending, is_retry=is_retry)
            assert replica is stage.preferred("key")

    _run(test)


def test_a_router_pickled_by_value_uses_its_processs_own_sent_calls(tmp_path: Path) -> None:
    config = RequestRouterConfig(request_router_class="deployments.graph.routing.AffinityRouter")
    sent = tmp_path / "router"
    sent.write_bytes(config.get_serialized_request_router_cls() or b"")
    program = (
        "import sys, pathlib, ray.cloudpickle\n"
        "from deployments.graph.sent_calls import SENT_CALLS\n"
        "router = object.__new__(ray.cloudpickle.loads(pathlib.Path(sys.argv[1]).read_bytes()))\n"
        "router.initialize_state()\n"
        "assert router._sent_calls is SENT_CALLS\n"
    )
    subprocess.run([sys.executable, "-c", program, str(sent)], check=True)
