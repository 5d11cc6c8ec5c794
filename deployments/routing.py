"""How Serve finds a replica for a call of a stage: the one that the call's key prefers, unless it is busy.

The key comes in the call's session id; affinity.py has the order. A replica that has lost a request is tried last for a
while (suspects.py), and whoever waits for an answer is told which replica it waits for (sent_calls.py). Every
gateway replica has one such router for each stage, and counts how its choices turned out. Serve does the rest: queues,
limits, replicas that refuse or are dead.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.affinity import Session, by_preference, ranked
from deployments.metrics import ROUTED, RayRecorder, Recorder
from deployments.sent_calls import SentCalls, Whereabouts
from deployments.suspects import Suspects


class AffinityRouter(RequestRouter):
    """Calls without a key go to the less busy of two replicas, as with Serve's own router.

    Not FIFOMixin, which gives the replica that was found for one call to the one that has waited longest; and not
    LocalityMixin, because a replica elsewhere that holds a picture is nearer than one here that does not.
    """

    _recorder: Recorder
    _sent_calls: SentCalls
    _capacity: int | None = None

    def initialize_state(self, *, capacity: int | None = None, **_: Any) -> None:
        """For Serve, when the router begins. A replica itself refuses what is beyond `capacity`, where there is one."""
        # Serve sends this class by value: what its file has imported is a copy, and nobody listens to that.
        from deployments.sent_calls import SENT_CALLS

        self._sent_calls = SENT_CALLS
        self._recorder = RayRecorder().start()
        self._capacity = capacity
        self._suspects = Suspects()

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """For Serve, which asks again itself (`is_retry`) where a replica has refused the call, and not in vain."""
        request, stage = _session(pending_request).request, self._deployment_id.name
        self._sent_calls.note(stage, request, Whereabouts(self._replicas_now))
        if not is_retry:
            self._suspects.asked(request)
        replica: RunningReplica = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        self._sent_calls.note(stage, request, Whereabouts(lambda: [replica], is_sent=True))
        self._suspects.sent(request, _name(replica.replica_id))
        return replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """For Serve, which tries one list after the other, in each of them the least busy replica first, and asks
        again if none has taken the call."""
        if pending_request is None:
            return [candidate_replicas]
        # After a pause, that is.
        pending_request.routing_context.should_backoff = True
        key = _session(pending_request).key
        replicas = {_name(replica.replica_id): replica for replica in candidate_replicas}
        if not key or len(candidate_replicas) == 1:
            sound = [replica for name, replica in replicas.items() if name not in self._suspects]
            return [random.sample(some, min(2, len(some))) for some in (sound, candidate_replicas) if some]
        loads = {name: self._load(replica.replica_id) for name, replica in replicas.items()}
        order = sorted(by_preference(key, loads, capacity=self._capacity), key=self._suspects.__contains__)
        available = {_name(replica.replica_id) for replica in self.select_available_replicas(candidate_replicas)}
        # The others may have got room meanwhile; Serve asks them.
        full = [replica for name, replica in replicas.items() if name not in available]
        return [*([replicas[name]] for name in order if name in available), full]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """For Serve, when a replica has taken the call."""
        names = [_name(each) for each in self.curr_replicas]
        if len(names) < 2:
            return
        key = _session(pending_request).key
        choice = "keyless" if not key else "preferred" if ranked(key, names)[0] == _name(replica_id) else "fallback"
        self._recorder.count(ROUTED, self._deployment_id.name, choice)

    def _replicas_now(self) -> list[RunningReplica]:
        return list(self.curr_replicas.values())

    def _load(self, replica_id: ReplicaID) -> int:
        """What the replica said last, and what was sent since and is not over. Nothing where that is too long ago: the
        first call that it takes then tells anew."""
        return self.replica_queue_len_cache.get(replica_id) or 0


def _session(pending_request: PendingRequest) -> Session:
    return Session.read(pending_request.metadata.session_id or "")


def _name(replica_id: ReplicaID) -> str:
    return replica_id.unique_id
