"""How Serve chooses a replica for a call of a stage: the one that the call's key prefers, unless it is busy.

The key comes in the call's session id; affinity.py computes the order. A replica that has lost a request is
deprioritised for a while (suspects.py), and callers can look up which replica has their call (sent_calls.py). Every
gateway replica has one such router for each stage, which counts the outcomes of its choices. Serve does the rest:
queues, limits, replicas that refuse or are dead.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.graph.affinity import Session, by_preference, ranked
from deployments.graph.sent_calls import SentCalls, Whereabouts
from deployments.graph.suspects import Suspects
from deployments.metrics import ROUTED, Recorder
from deployments.ray_recorder import RayRecorder


class AffinityRouter(RequestRouter):
    """Calls without a key go to the less busy of two replicas, as with Serve's own router.

    Does not use FIFOMixin, which gives the replica found for one call to the call that has waited longest; nor
    LocalityMixin, because a replica on another node that holds a picture is nearer than a local one that does not.
    """

    _recorder: Recorder
    _sent_calls: SentCalls
    _capacity: int | None = None

    def initialize_state(self, *, capacity: int | None = None, **_: Any) -> None:
        """Called by Serve when the router starts. A replica itself refuses calls beyond `capacity`, if one is given."""
        # Serve pickles this class by value: a SENT_CALLS imported by the module would be a copy that nobody reads.
        from deployments.graph.sent_calls import SENT_CALLS

        self._sent_calls = SENT_CALLS
        self._recorder = RayRecorder().start()
        self._capacity = capacity
        self._suspects = Suspects()

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Called by Serve, which itself calls again (`is_retry`) when a replica has refused the call."""
        request, stage = _session(pending_request).request, self._deployment_id.name
        self._sent_calls.note(stage, request, Whereabouts(self._replicas_now))
        if not is_retry:
            self._suspects.asked(request)
        replica: RunningReplica = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        self._sent_calls.note(stage, request, Whereabouts(lambda: [replica], is_sent=True))
        self._suspects.sent(request, _name(replica.replica_id))
        return replica

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        """Called by Serve to find the call that it has found a replica for.

        Serve itself looks it up by the id of the HTTP request. All calls made for one HTTP request share that id, so of
        several prompts, which are prepared side by side, only one would ever be sent. The metadata is each call's own.
        """
        pending = (each for each in self._pending_requests_to_fulfill if each.metadata is request_metadata)
        return next((each for each in pending if not each.future.done()), None)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Called by Serve, which tries one list after the other, the least busy replica of each first, and calls again
        if no replica has taken the call."""
        if pending_request is None:
            return [candidate_replicas]
        # Makes Serve back off before it calls again.
        pending_request.routing_context.should_backoff = True
        key = _session(pending_request).key
        replicas = {_name(replica.replica_id): replica for replica in candidate_replicas}
        if not key or len(candidate_replicas) == 1:
            sound = [replica for name, replica in replicas.items() if name not in self._suspects]
            return [random.sample(some, min(2, len(some))) for some in (sound, candidate_replicas) if some]
        loads = {name: self._load(replica.replica_id) for name, replica in replicas.items()}
        order = sorted(by_preference(key, loads, capacity=self._capacity), key=self._suspects.__contains__)
        available = {_name(replica.replica_id) for replica in self.select_available_replicas(candidate_replicas)}
        # The full ones may have room by now; Serve asks them.
        full = [replica for name, replica in replicas.items() if name not in available]
        return [*([replicas[name]] for name in order if name in available), full]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when a replica has taken the call."""
        names = [_name(each) for each in self.curr_replicas]
        if len(names) < 2:
            return
        key = _session(pending_request).key
        choice = "keyless" if not key else "preferred" if ranked(key, names)[0] == _name(replica_id) else "fallback"
        self._recorder.count(ROUTED, self._deployment_id.name, choice)

    def _replicas_now(self) -> list[RunningReplica]:
        return list(self.curr_replicas.values())

    def _load(self, replica_id: ReplicaID) -> int:
        """The queue length that the replica last reported, adjusted for calls sent and finished since. 0 where the
        report is too old; the first call that the replica takes then refreshes it."""
        return self.replica_queue_len_cache.get(replica_id) or 0


def _session(pending_request: PendingRequest) -> Session:
    return Session.read(pending_request.metadata.session_id or "")


def _name(replica_id: ReplicaID) -> str:
    return replica_id.unique_id
