"""The models of a gateway by their names: those with engines of this service, and those that other servers answer for.

Knows what either kind can do, but neither HTTP nor how requests are answered.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Protocol

from deployments.http.intake import Reader
from deployments.messages import Item, Rejected
from deployments.openai_api.reply_form import ReadRequest
from deployments.openai_api.response_parts import Answer
from deployments.openai_api.schema import parse_body
from deployments.upstreams.request import ModelName
from deployments.upstreams.upstream import Forwarding, Upstream
from llava_core.errors import RequestError, UnknownNameError
from llava_core.prompts.tokenize import Tokenized
from llava_core.request_limits import RequestLimits
from llava_core.types import AnyRequest


class EngineClient(Protocol):
    """What the gateway needs from the graph, for one model."""

    def stream(self, request: AnyRequest, on_sent: Callable[[], None]) -> AsyncGenerator[Item, None]:
        """Yields items up to the last one; closing it earlier ends the request. Calls `on_sent` once the request has
        been sent and is no longer held."""
        ...

    async def tokenize(self, request: AnyRequest) -> Tokenized | Rejected:
        """The request's prompt as the model's tokens, or what is wrong with it."""
        ...

    async def detokenize(self, ids: Sequence[int]) -> str | Rejected:
        """The text of these ids."""
        ...


class ServedModels:
    """The models by name, and who answers for each. `engines` are this service's own."""

    def __init__(self, models: Mapping[str, EngineClient | Upstream]) -> None:
        self.names = tuple(models)
        self.engines = {name: each for name, each in models.items() if not isinstance(each, Upstream)}
        self._upstreams = {name: each for name, each in models.items() if isinstance(each, Upstream)}

    def chosen(self, name: str | None) -> str:
        """The name of the requested model, or of the only one if none is named. Raises RequestError."""
        if name is None and len(self.names) == 1:
            return self.names[0]
        if name is None:
            known = ", ".join(sorted(self.names))
            raise RequestError(
                f"model is missing; it must be one of: {known}", param="model", code="missing_required_parameter"
            )
        if name not in self.names:
            raise UnknownNameError("model", name, self.names)
        return name

    def engine(self, name: str | None) -> EngineClient:
        """The engine of the chosen model. Raises RequestError if another server answers for that model."""
        chosen = self.chosen(name)
        if chosen in self._upstreams:
            raise RequestError(
                f"another server answers for {chosen!r}, which supports only chats and completions",
                param="model",
                code="model_not_here",
            )
        return self.engines[chosen]

    def reader(self, read: Reader[ReadRequest], kind: type[Answer]) -> Callable[..., ReadRequest | Forwarding]:
        """Reads each body for the upstream server of its model, or with `read` if the model is one of ours."""
        if not self._upstreams:
            return read

        def read_either(body: bytes, completion_id: str, limits: RequestLimits) -> ReadRequest | Forwarding:
            named = parse_body(body, ModelName, max_text=limits.max_text)
            upstream = self._upstreams.get(self.chosen(named.model))
            if upstream is not None:
                return upstream.read(body, kind, completion_id, limits)
            return read(body, completion_id, limits)

        return read_either

    @property
    def upstream_states(self) -> dict[str, str]:
        """The states of the other servers, by model name."""
        return {name: upstream.state for name, upstream in self._upstreams.items()}
