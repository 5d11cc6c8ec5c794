"""The requests of a mixed load, and whether each was answered correctly.

Good requests about text, several prompts, and pictures, new and seen before; bad ones, whose fault the service must
name; and clients that hang up. Knows OpenAI's wire format; sends nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.exchange import Piece, Response, post, post_json, read_response
from benchmarks.service.pictures import Picture, PictureMaker

# Shares in percent.
SHARES = {
    "text": 12,
    "prompts": 5,
    "new pictures": 36,
    "repeated": 32,
    "hang-up, waiting": 5,
    "hang-up, streaming": 5,
    "bad": 5,
}
# The most answers that one request may ask for.
MOST_ANSWERS = 2
QUESTIONS = (
    "Describe the picture.",
    "How many shapes are there?",
    "What does the text say?",
    "What is in the middle, and which colour does it have?",
)
_EARLIER: tuple[dict[str, object], ...] = (
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "There is a picture."},
)
_NUM_REPEATED = 12
# Tokens of answers whose end nobody waits for.
LONG = 1200
_HUGE = 10**9


@dataclass(frozen=True)
class Ask:
    """A request, and its expected result: the `status`, and for an error the `code`.

    A client that hangs up does so after `leave_after_s` or after so many `pieces` of the answer. `same` names the
    question of each answer, by index, where all answers to equal questions must be equal.
    """

    kind: str
    message: bytes
    status: int = 200
    code: str | None = None
    num_answers: int = 1
    same: Sequence[str] = ()
    leave_after_s: float | None = None
    pieces: int | None = None

    @property
    def hangs_up(self) -> bool:
        return self.leave_after_s is not None or self.pieces is not None


@dataclass(frozen=True)
class Outcome:
    """The answers' texts, or what was wrong; and the seconds to the first byte and in all."""

    ask: Ask
    error: str = ""
    texts: tuple[str, ...] = ()
    first_s: float = 0.0
    total_s: float = 0.0


class Mix:
    """Draws random requests to the service on `port`; the same ones for the same seed."""

    def __init__(self, port: int, seed: object) -> None:
        self._port = port
        self._chance = random.Random(f"mix:{seed}")
        self.pictures = PictureMaker(seed)
        self._repeated = [self._messages([self.pictures.make()] * (index > 1)) for index in range(_NUM_REPEATED)]

    def next(self) -> Ask:
        """Draw the next request. Takes milliseconds, for a large picture tens of them."""
        chance = self._chance
        (kind,) = chance.choices([*SHARES], [*SHARES.values()])
        if kind == "bad":
            return chance.choice(bad_requests(self._port, self.pictures))
        if kind == "repeated":
            index = chance.randrange(_NUM_REPEATED)
            return self._ask(kind, self._repeated[index], same=f"{index}", temperature=0, max_tokens=40)
        if kind == "prompts":
            return self._prompts()
        if kind.startswith("hang-up"):
            return self.hang_up(kind)
        several = chance.choices((1, 2, 3), (80, 15, 5))[0] if kind == "new pictures" else 0
        messages = self._messages([self.pictures.make() for _ in range(several)])
        return self._ask(kind, messages, temperature=chance.choice((0, 0.8)), max_tokens=chance.randrange(8, 65))

    def hang_up(self, kind: str) -> Ask:
        """Make a client that abandons a long answer: while it is streamed, or before anything has arrived."""
        messages = self._messages([self.pictures.make()])
        stream = kind == "hang-up, streaming"
        body = {"messages": messages, "max_tokens": LONG, "ignore_eos": True, "stream": stream}
        message = post_json(self._port, body)
        if stream:
            # The first piece is the head.
            return Ask(kind, message, pieces=self._chance.randrange(2, 6))
        return Ask(kind, message, leave_after_s=self._chance.uniform(0.0, 0.4))

    def _prompts(self) -> Ask:
        """Make a request for completions of several prompts."""
        prompts = self._chance.sample(QUESTIONS, MOST_ANSWERS)
        body = {"prompt": prompts, "max_tokens": 24, "temperature": 0, "stream": self._chance.random() < 0.6}
        message = post_json(self._port, body, path="/v1/completions")
        return Ask("prompts", message, num_answers=len(prompts), same=prompts)

    def _messages(self, pictures: Sequence[Picture]) -> list[dict[str, object]]:
        content = [*(picture.part for picture in pictures), {"type": "text", "text": self._chance.choice(QUESTIONS)}]
        asked: dict[str, object] = {"role": "user", "content": content}
        if self._chance.random() < 0.8:
            return [asked]
        return [*_EARLIER, asked]

    def _ask(self, kind: str, messages: object, *, same: str = "", **options: object) -> Ask:
        chance = self._chance
        n, stream = chance.choices((1, MOST_ANSWERS), (85, 15))[0], chance.random() < 0.6
        body = {"messages": messages, "n": n, "stream": stream, **options}
        return Ask(kind, post_json(self._port, body), num_answers=n, same=(same,) * n if same else ())


def bad_requests(port: int, pictures: PictureMaker) -> list[Ask]:
    """Return one request of each kind of client error."""
    good = pictures.make()

    def about(*parts: object, **options: object) -> bytes:
        content = [*parts, {"type": "text", "text": QUESTIONS[0]}]
        return post_json(port, {"messages": [{"role": "user", "content": content}], **options})

    def image(url: str) -> dict[str, object]:
        return {"type": "image_url", "image_url": {"url": url}}

    broken = Picture(good.data[: len(good.data) // 3], good.format)
    return [
        Ask("broken JSON", post(port, b'{"messages": [{"role": "user", "content": "Who'), 400, "invalid_json"),
        Ask("no messages", post_json(port, {"messages": []}), 400, "invalid_value"),
        Ask("unknown model", about(model="another"), 404, "model_not_found"),
        Ask("unsupported field", about(response_format={"type": "json_object"}), 400, "unsupported_parameter"),
        Ask("value out of range", about(temperature=-1), 400, "invalid_value"),
        Ask("half a picture", about(broken.part), 400, "invalid_image"),
        Ask("no picture", about(Picture(b"%PDF-1.7", "PNG").part), 400, "invalid_image"),
        Ask("picture by address", about(image("http://127.0.0.1/picture.png")), 400, "image_url_not_allowed"),
        # Small ones: a body of nine large pictures would be refused for its size.
        Ask("too many pictures", about(*[pictures.make(side=64).part] * 9), 400, "too_many_images"),
        Ask("too long a text", about({"type": "text", "text": "a " * 4000}), 400, "context_length_exceeded"),
        # The body is never sent: the service must not wait for it.
        Ask("too large a body", post(port, b"{", length=_HUGE), 413, "request_too_large"),
        Ask("no such route", post_json(port, {}, path="/v1/images"), 404, "not_found"),
    ]


def judge(ask: Ask, began: float, pieces: Sequence[Piece]) -> Outcome:
    """Compare a whole response with the expected one."""
    response = read_response(pieces)
    error, texts = _read(ask, response)
    first = pieces[0][0] - began if pieces else 0.0
    return Outcome(ask, error, texts, first, pieces[-1][0] - began if pieces else 0.0)


def _read(ask: Ask, response: Response) -> tuple[str, tuple[str, ...]]:
    if response.status != ask.status:
        return f"status {response.status} instead of {ask.status}: {_start(response.body)}", ()
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        return _read_stream(ask, response)
    try:
        body: Any = json.loads(response.body)
    except ValueError:
        return f"the body is no JSON: {_start(response.body)}", ()
    if ask.code is not None:
        code = body.get("error", {}).get("code")
        return ("" if code == ask.code else f"code {code} instead of {ask.code}"), ()
    choices = sorted(body["choices"], key=lambda choice: int(choice["index"]))
    texts = tuple(choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices)
    return _complaint(ask, len(choices), {choice["finish_reason"] for choice in choices}), texts


def _read_stream(ask: Ask, response: Response) -> tuple[str, tuple[str, ...]]:
    *events, last = (content for _, content in response.events()) if response.pieces else (b"",)
    if last != b"[DONE]":
        return f"the stream ended with {_start(last)}", ()
    texts = [""] * ask.num_answers
    reasons = {}
    for choice in (choice for event in events for choice in json.loads(event)["choices"]):
        texts[choice["index"]] += (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""
        if choice["finish_reason"] is not None:
            reasons[choice["index"]] = choice["finish_reason"]
    return _complaint(ask, len(reasons), set(reasons.values())), tuple(texts)


def _complaint(ask: Ask, num_answers: int, reasons: set[str]) -> str:
    if num_answers != ask.num_answers:
        return f"{num_answers} answers instead of {ask.num_answers}"
    return "" if reasons <= {"stop", "length"} else f"answers ended with {sorted(reasons)}"


def _start(content: bytes) -> str:
    return content[:200].decode(errors="replace")
