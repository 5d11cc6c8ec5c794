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
    """A request that ended: later stages pass it on, and no stage logs it as a failure of its own."""

    error: Exception


@dataclass(frozen=True)
class Elapsed:
    """Milliseconds by stage so far, and when the last of them ended by the wall clock.

    Clocks of different machines differ; a hand-over that seems to end before it began counts as 0.
    """

    stage_ms: StageTimes = field(default_factory=dict)
    left_at: float = field(default_factory=time.time)

    def arrived(self) -> Elapsed:
        """At the next stage: the time since the last one is `transfer`."""
        now = time.time()
        transfer = self.stage_ms.get("transfer", 0.0) + max(0.0, now - self.left_at) * 1e3
        return Elapsed({**self.stage_ms, "transfer": transfer}, now)

    def transfer_s(self, before: Elapsed) -> float:
        """Seconds that the last hand-over took, of one that had `arrived` after `before`."""
        return (self.stage_ms["transfer"] - before.stage_ms.get("transfer", 0.0)) / 1e3

    def finished(self, stage: str) -> Elapsed:
        """The stage that began with `arrived`, or with this object, is over."""
        now = time.time()
        return Elapsed({**self.stage_ms, stage: max(0.0, now - self.left_at) * 1e3}, now)


@dataclass(frozen=True)
class Prepared:
    """From the preprocessor: token ids and tiles."""

    request: PreparedRequest
    elapsed: Elapsed


@dataclass(frozen=True)
class PackedFeatures:
    """Tower features of one picture as bytes: uint8 (rows of its tiles, vision_hidden * bytes of `dtype`), or, on their
    way, what handoff.py has made of these."""

    digest: str
    dtype: str
    data: Any = field(repr=False)
    size: Size | None = None


@dataclass(frozen=True)
class Encoded:
    """From the vision encoder: the request without its tiles, with features in their place."""

    request: PreparedRequest
    features: tuple[PackedFeatures, ...]
    elapsed: Elapsed


# What the generator yields. Of its deltas the request's last has `usage` and `stage_ms`, for all answers together.
Item = TokenDelta | Rejected


def is_last(item: Item) -> bool:
    """Whether nothing follows this one."""
    return isinstance(item, Rejected) or item.usage is not None


@dataclass(frozen=True)
class UpstreamDelta(TokenDelta):
    """An item of another server's answer: `body` as the client gets it, None where there is nothing for it.

    How many tokens it has is known at the end. Before, each piece of each choice counts as one: at least so many it is.
    """

    body: dict[str, Any] | None = None
    num_tokens: int = 0


def num_tokens(delta: TokenDelta) -> int:
    """How many tokens an item has brought, as far as that is known by then."""
    return delta.num_tokens if isinstance(delta, UpstreamDelta) else len(delta.token_ids)


@dataclass(frozen=True)
class StageHealth:
    """Whether a stage could take a request now; without a replica, as soon as one has started."""

    name: str
    is_ready: bool
    has_replicas: bool = True


def pack(features: ImageFeatures) -> PackedFeatures:
    """A tensor of any float dtype as read-only bytes, which may be its own; numpy has no bfloat16."""
    import torch

    rows = features.features.detach().cpu().contiguous()
    dtype = str(rows.dtype).removeprefix("torch.")
    data = rows.view(torch.uint8).numpy()
    data.flags.writeable = False
    return PackedFeatures(features.digest, dtype, data, features.size)


def unpack(packed: PackedFeatures) -> ImageFeatures:
    """The tensor again, in memory of its own: the array may be a view into a store that is shared and read-only."""
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
