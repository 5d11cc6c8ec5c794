"""What travels from stage to stage: small frozen dataclasses, errors among them, so that a client's mistake is a value.

Dense arrays travel as numpy with a named dtype. Knows nothing about Ray; torch is imported only where a tensor is made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llava_core.types import BegunAnswer, EngineRequest, ImageFeatures, PreparedRequest, Size, StageTimes, TokenDelta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rejected:
    """A request that a stage refused: later stages pass it on, and none logs it as its own failure.

    Takes the error's traceback and causes away. Their frames refer to futures that refer to the error, so only the
    garbage collector, minutes later, would free them, with the body of the request.
    """

    error: Exception

    def __post_init__(self) -> None:
        self.error.__traceback__ = self.error.__cause__ = self.error.__context__ = None


@dataclass(frozen=True)
class Elapsed:
    """Milliseconds by stage so far, and when the last of them ended by the wall clock.

    Clocks of different machines differ; a transfer that seems to end before it began counts as 0.
    """

    stage_ms: StageTimes = field(default_factory=dict)
    left_at: float = field(default_factory=time.time)

    def arrived(self) -> Elapsed:
        """Called on arrival at the next stage: the time since the last stage ended is added to `transfer`."""
        now = time.time()
        transfer = self.stage_ms.get("transfer", 0.0) + max(0.0, now - self.left_at) * 1e3
        return Elapsed({**self.stage_ms, "transfer": transfer}, now)

    def transfer_s(self, before: Elapsed) -> float:
        """Seconds that the transfer took which ended with this `arrived`, given the value from `before` it."""
        return (self.stage_ms["transfer"] - before.stage_ms.get("transfer", 0.0)) / 1e3

    def finished(self, stage: str) -> Elapsed:
        """Called at the end of the stage that began with `arrived`, or with this object."""
        now = time.time()
        return Elapsed({**self.stage_ms, stage: max(0.0, now - self.left_at) * 1e3}, now)


@dataclass(frozen=True)
class Prepared:
    """From the preprocessor: token ids and tiles."""

    request: PreparedRequest
    elapsed: Elapsed


@dataclass(frozen=True)
class PackedFeatures:
    """Tower features of one picture. `data` is uint8 (rows of its tiles, vision_hidden * bytes of `dtype`), or, in
    transit, what Handoff.share returned for it."""

    digest: str
    dtype: str
    data: Any = field(repr=False)
    size: Size | None = None


@dataclass(frozen=True)
class Encoded:
    """From the vision encoder: the request with features instead of tiles."""

    request: PreparedRequest
    features: tuple[PackedFeatures, ...]
    elapsed: Elapsed


# What the generator yields. The request's last delta carries `usage` and `stage_ms`, for all its answers together.
Item = TokenDelta | Rejected


def is_last(item: Item) -> bool:
    """Whether this is the last item of a request."""
    return isinstance(item, Rejected) or item.usage is not None


@dataclass(frozen=True)
class UpstreamDelta(TokenDelta):
    """An item of an upstream server's answer: `body` as the client gets it, None where there is nothing to send.

    The exact number of tokens is known only at the end. Until then each piece of each choice counts as one, which is a
    lower bound.
    """

    body: dict[str, Any] | None = None
    num_tokens: int = 0


def num_tokens(delta: TokenDelta) -> int:
    """How many tokens an item carries, as far as is known when it arrives."""
    return delta.num_tokens if isinstance(delta, UpstreamDelta) else len(delta.token_ids)


@dataclass(frozen=True)
class StageHealth:
    """Whether a stage can take requests. One that is ready without a replica starts one for the next request."""

    name: str
    is_ready: bool
    has_replicas: bool = True


def pack(features: ImageFeatures) -> PackedFeatures:
    """The features as read-only bytes, perhaps sharing the tensor's memory; bytes because numpy has no bfloat16."""
    import torch

    rows = features.features.detach().cpu().contiguous()
    dtype = str(rows.dtype).removeprefix("torch.")
    data = rows.view(torch.uint8).numpy()
    data.flags.writeable = False
    return PackedFeatures(features.digest, dtype, data, features.size)


def unpack(packed: PackedFeatures) -> ImageFeatures:
    """The tensor, copied: the array may be a read-only view into the shared object store."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    rows: Tensor = torch.from_numpy(packed.data.copy()).view(dtypes[packed.dtype])
    return ImageFeatures(packed.digest, rows, packed.size)


def without_tiles(request: PreparedRequest) -> PreparedRequest:
    """The request once the tower has seen its pictures."""
    return replace(request, images=())


def engine_request(
    request: PreparedRequest, features: Sequence[PackedFeatures], begun: Sequence[BegunAnswer] = ()
) -> EngineRequest:
    """What the engine runs. Answers that were begun elsewhere come first: their readers wait in mid-sentence."""
    return EngineRequest(
        request.request_id,
        request.prompt_ids,
        [unpack(each) for each in features],
        request.sampling,
        priority=-1 if begun else 0,
        begun=begun,
        goes_on=request.goes_on,
    )
