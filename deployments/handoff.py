"""How stages call each other and hand big results over: by reference, never through the gateway.

Pictures, tiles and features stay in Ray's object store; what the gateway passes on is a reference of a few hundred
bytes. Token chunks go by gRPC, which costs half the CPU per chunk. The only file that knows how Serve does either, and
the only one that uses names Ray does not document; `docs/decisions` says why.
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
from deployments.ray_errors import ray_errors_as_ours
from deployments.signs_of_life import SILENCE_S
from deployments.waiting import abandon
from llava_core.types import AnyRequest

# What a result holds up to so many bytes of, Ray sends with it; an object of its own would cost more than it spares.
_INLINE_BYTES = 100 * 1024


class Handoff(Protocol):
    """Two ways to compose stages: RayHandoff for a cluster, LocalHandoff for Serve's local testing mode and fakes."""

    def calling(self, handle: DeploymentHandle[Any], method: str) -> DeploymentHandle[Any]:
        """A handle for a method that returns once."""
        ...

    def streaming(self, handle: DeploymentHandle[Any], method: str) -> DeploymentHandle[Any]:
        """A handle for a method that yields."""
        ...

    def keep(self, request: AnyRequest) -> object:
        """What to pass to a stage in place of a request that may have to be passed again."""
        ...

    async def kept(self, given: object) -> AnyRequest:
        """The request again, out of what `keep` made."""
        ...

    def share(self, data: npt.NDArray[np.uint8]) -> object:
        """What to put into results in place of bytes that many may have. They last as long as it, or such a result."""
        ...

    async def shared(self, given: object) -> npt.NDArray[np.uint8]:
        """In the stage that got a result: the bytes again, which may be read only, out of what `share` made."""
        ...

    async def give(self, response: DeploymentResponse[Any]) -> object:
        """What to pass to a streaming handle in place of an un-awaited response, which must outlive the stream."""
        ...

    def is_made(self, given: object) -> bool:
        """Where a response was given: whether it has come to a result, or an error, wherever that is."""
        ...

    async def take(self, given: object) -> object:
        """In the stage that was called: the value of what `give` made."""
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
        """Pictures go into the store, where Ray would put them on their way to a stage anyway."""
        return ray.put(request) if request.num_images else request

    async def kept(self, given: object) -> AnyRequest:
        """See Handoff."""
        request = await given if isinstance(given, ray.ObjectRef) else given
        assert isinstance(request, AnyRequest), type(request)
        return request

    def share(self, data: npt.NDArray[np.uint8]) -> object:
        """An object of this process's own, which lies once on every node that has asked for it."""
        return ray.put(data) if data.nbytes > _INLINE_BYTES else data

    async def shared(self, given: object) -> npt.NDArray[np.uint8]:
        """Raises StageLostError where the process that has shared them is gone or its host cannot be reached."""
        data = await _arrived(given) if isinstance(given, ray.ObjectRef) else given
        assert isinstance(data, np.ndarray), type(data)
        return data

    async def give(self, response: DeploymentResponse[Any]) -> object:
        """Waits until a replica was found for the call, not for its result."""
        return Reference(await response._to_object_ref())

    def is_made(self, given: object) -> bool:
        """The gateway owns what its calls return, so it need not ask anybody."""
        assert isinstance(given, Reference), type(given)
        return _is_made(given.ref)

    async def take(self, given: object) -> object:
        """Waits for the result; raises what the stage that makes it has raised, StageLostError if it is gone or lies
        on a host that cannot be reached."""
        return await _arrived(given.ref) if isinstance(given, Reference) else given


async def _arrived(ref: ray.ObjectRef[Any]) -> Any:
    """The value, once it is made and here. Raises what ray_errors.py makes of Ray's errors, and StageSilentError where
    it is made and does not come: Ray asks for it again and again, of a host that may be alive and out of reach."""
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
    """Everything in one process: responses are passed as they are."""

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
        """What is lost here is lost with who waits for it."""
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
