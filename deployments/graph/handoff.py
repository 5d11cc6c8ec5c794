"""How stages call each other and pass large results: by reference, never through the gateway.

Pictures, tiles and features stay in Ray's object store, and the gateway passes on references of a few hundred bytes.
Token chunks go by gRPC, which costs half the CPU per chunk. The only file that knows how Serve does either. Like
routing.py it uses undocumented names of Ray (docs/decisions/003-handing-results-over.md says why).
"""

from __future__ import annotations

import asyncio
import importlib
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import ray
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from deployments.errors import EARLIER, StageSilentError
from deployments.graph.ray_errors import ray_errors_as_ours
from deployments.graph.signs_of_life import SILENCE_S
from deployments.waiting import abandon
from llava_core.types import AnyRequest

# Ray sends values up to this size inline with a result; an object of their own would cost more than it saves.
_INLINE_BYTES = 100 * 1024


class Handoff(Protocol):
    """How stages are composed: RayHandoff on a cluster, LocalHandoff in Serve's local testing mode and with fakes."""

    def calling(self, handle: DeploymentHandle[Any], method: str) -> DeploymentHandle[Any]:
        """A handle for a method that returns once."""
        ...

    def streaming(self, handle: DeploymentHandle[Any], method: str) -> DeploymentHandle[Any]:
        """A handle for a method that yields."""
        ...

    def keep(self, request: AnyRequest) -> object:
        """What to pass to a stage instead of a request, so that it can be passed again after a loss."""
        ...

    async def kept(self, given: object) -> AnyRequest:
        """The request back from what `keep` returned."""
        ...

    def share(self, data: npt.NDArray[np.uint8]) -> object:
        """What to put into results instead of bytes that many requests share. The bytes live as long as this object, or
        any such result."""
        ...

    async def shared(self, given: object) -> npt.NDArray[np.uint8]:
        """In the stage that received a result: the bytes, perhaps read-only, back from what `share` returned."""
        ...

    async def give(self, response: DeploymentResponse[Any]) -> object:
        """What to pass to a streaming handle instead of an un-awaited response, which must outlive the stream."""
        ...

    def is_made(self, given: object) -> bool:
        """In the process that called `give`: whether the response has a result or an error, on whichever node."""
        ...

    async def take(self, given: object) -> object:
        """In the stage that was called: the value behind what `give` returned."""
        ...


class RayHandoff:
    """Results stay where they were made until the next stage fetches them; the gateway owns them until then."""

    def calling(self, handle: DeploymentHandle[Any], method: str) -> DeploymentHandle[Any]:
        """By reference: throughput mode would otherwise send pictures and features inline, at most 4 MiB of them."""
        return handle.options(method_name=method, _by_reference=True)

    def streaming(self, handle: DeploymentHandle[Any], method: str) -> DeploymentHandle[Any]:
        """By value: chunks are small, and an object in the store for each of them would cost more than it holds."""
        return handle.options(method_name=method, stream=True, _by_reference=False)

    def keep(self, request: AnyRequest) -> object:
        """Puts requests with pictures into the object store, where Ray would put them on the way to a stage anyway."""
        return ray.put(request) if request.num_images else request

    async def kept(self, given: object) -> AnyRequest:
        """See Handoff."""
        request = await given if isinstance(given, ray.ObjectRef) else given
        assert isinstance(request, AnyRequest), type(request)
        return request

    def share(self, data: npt.NDArray[np.uint8]) -> object:
        """An object owned by this process, of which each node that reads it holds one copy."""
        return ray.put(data) if data.nbytes > _INLINE_BYTES else data

    async def shared(self, given: object) -> npt.NDArray[np.uint8]:
        """Raises StageLostError when the process that shared the bytes is dead or its host is unreachable."""
        data = await _arrived(given) if isinstance(given, ray.ObjectRef) else given
        assert isinstance(data, np.ndarray), type(data)
        return data

    async def give(self, response: DeploymentResponse[Any]) -> object:
        """Waits until a replica has accepted the call, not for its result."""
        return Reference(await response._to_object_ref())

    def is_made(self, given: object) -> bool:
        """A local lookup: the gateway owns what its calls return."""
        assert isinstance(given, Reference), type(given)
        return _is_made(given.ref)

    async def take(self, given: object) -> object:
        """Waits for the result. Raises what the stage that makes it raised, and StageLostError when it was lost or its
        host is unreachable."""
        return await _arrived(given.ref) if isinstance(given, Reference) else given


async def _arrived(ref: ray.ObjectRef[Any]) -> Any:
    """The value, once it has been made and transferred.

    Raises Ray's errors as ours (ray_errors.py), and StageSilentError when the value exists but does not arrive: Ray
    would retry the transfer for ever from a host that is alive but unreachable from here.
    """
    with ray_errors_as_ours(EARLIER):
        coming = asyncio.ensure_future(ref)
        was_made = False
        try:
            while not (await asyncio.wait([coming], timeout=SILENCE_S / 2))[0]:
                if was_made:
                    raise StageSilentError
                was_made = _is_made(ref)
            return coming.result()
        finally:
            await abandon(coming)


def _is_made(ref: ray.ObjectRef[Any]) -> bool:
    return bool(ray.wait([ref], timeout=0, fetch_local=False)[0])


class LocalHandoff:
    """For stages in one process: responses and values are passed as they are."""

    def calling(self, handle: DeploymentHandle[Any], method: str) -> DeploymentHandle[Any]:
        """See Handoff."""
        return handle.options(method_name=method)

    def streaming(self, handle: DeploymentHandle[Any], method: str) -> DeploymentHandle[Any]:
        """See Handoff."""
        return handle.options(method_name=method, stream=True)

    def keep(self, request: AnyRequest) -> object:
        """See Handoff."""
        return request

    async def kept(self, given: object) -> AnyRequest:
        """See Handoff."""
        assert isinstance(given, AnyRequest), type(given)
        return given

    def share(self, data: npt.NDArray[np.uint8]) -> object:
        """See Handoff."""
        return data

    async def shared(self, given: object) -> npt.NDArray[np.uint8]:
        """See Handoff."""
        assert isinstance(given, np.ndarray), type(given)
        return given

    async def give(self, response: DeploymentResponse[Any]) -> object:
        """See Handoff."""
        return response

    def is_made(self, given: object) -> bool:
        """True: in one process nothing can be lost separately from its reader."""
        return True

    async def take(self, given: object) -> object:
        """See Handoff."""
        return given


class Reference:
    """An ObjectRef that may travel inside a gRPC payload.

    Pickling a bare ObjectRef outside of a Ray call pins its object for the life of the process: every request would
    leave its features in the store. The sender keeps the object alive anyway, so this sends the address and no pin.
    """

    def __init__(self, ref: ray.ObjectRef[Any]) -> None:
        self.ref = ref

    def __reduce__(self) -> tuple[Any, ...]:
        worker: Any = ray._private.worker.global_worker
        ref, owner, status = worker.core_worker.serialize_object_ref(self.ref)
        return _attach, (ref.binary(), owner, status, ref.tensor_transport())


def _attach(ref_id: bytes, owner: bytes, status: bytes, transport: str | None) -> Reference:
    serialization: Any = importlib.import_module("ray._private.serialization")
    return Reference(serialization._object_ref_deserializer(ref_id, "", owner, status, transport))
