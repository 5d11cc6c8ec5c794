"""The form an answer should have, and the client's own names for the fields that later stages may reject.

Outlives the request it was read from, which holds the pictures. Knows nothing about HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_core.types import AnyRequest


@dataclass(frozen=True)
class ReplyForm:
    """`num_leading` system messages preceded those that the stages get. The fields that stages call `messages` and
    `max_tokens` are `prompt_field` and `limit_field` to the client."""

    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    timings: bool = False
    image_transforms: bool = False
    num_answers: int = 1
    num_leading: int = 0
    prompt_field: str = "messages"
    limit_field: str = "max_tokens"

    def locate(self, param: str | None) -> str | None:
        """Translates a field's name from the later stages' terms into the client's."""
        if param == "max_tokens":
            return self.limit_field
        if param == "messages":
            return self.prompt_field
        prefix = "messages["
        if param is None or not param.startswith(prefix):
            return param
        index, bracket, rest = param.removeprefix(prefix).partition("]")
        return f"{prefix}{int(index) + self.num_leading}{bracket}{rest}"


@dataclass(frozen=True)
class ReadRequest:
    """A request as the service understands it, and the form of its answer. `others` are its further prompts, each with
    as many answers, whose indices continue those of the prompt before."""

    generation: AnyRequest
    form: ReplyForm
    others: tuple[AnyRequest, ...] = ()
