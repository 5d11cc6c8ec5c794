"""Fetches the pictures that a request names by address into the request.

connections.py decides where they may come from, for every redirect as well. Knows no picture formats.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import replace
from typing import TYPE_CHECKING

import httpx

from deployments.outgoing.addresses import parse_address
from deployments.outgoing.bounded import read_up_to
from deployments.outgoing.connections import NoAddressError, Outgoing, Resolve, resolve_host
from llava_core.errors import ImageError
from llava_core.types import GenerationRequest, ImagePart, ImageUrl, Message, TextPart

if TYPE_CHECKING:
    from deployments.settings.app import FetchArgs

_REDIRECTS = (301, 302, 303, 307, 308)
# Some file stores only send the last two types; the first bytes will tell what the file really is.
_MEDIA_TYPES = ("image/", "application/dicom", "application/octet-stream", "binary/octet-stream")
# No compression: it would save nothing on pictures, and a few bytes could decompress to any number.
_HEADERS = {"accept": "image/*, application/dicom", "accept-encoding": "identity", "user-agent": "llava-serve"}


class Fetcher:
    """Fetches for any number of requests at once, and keeps nothing between them."""

    def __init__(self, args: FetchArgs, *, resolve: Resolve = resolve_host, tls: ssl.SSLContext | None = None) -> None:
        self._args = args
        self._outgoing = Outgoing(args, resolve=resolve, tls=tls)

    async def fetch_images(self, request: GenerationRequest) -> GenerationRequest:
        """The request with its pictures in place of their addresses. Raises ImageError for the first that fails, and
        cancels the others then."""
        places: dict[ImageUrl, str] = {}
        for index, message in enumerate(request.messages):
            for position, part in enumerate(message.parts):
                if isinstance(part, ImageUrl):
                    places.setdefault(part, f"messages[{index}].content[{position}].image_url")
        tasks = [asyncio.create_task(self.fetch(part.url, param)) for part, param in places.items()]
        try:
            pictures = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        fetched = {
            part: ImagePart(picture, part.low_detail, part.dicom)
            for part, picture in zip(places, pictures, strict=True)
        }
        return replace(request, messages=tuple(_with_pictures(message, fetched) for message in request.messages))

    async def fetch(self, address: str, param: str) -> bytes:
        """The content at the address. Raises ImageError, which reveals nothing about what is behind the address."""
        if self._outgoing.is_off:
            raise ImageError(
                "this service does not fetch addresses; send the picture itself, as a data: URL with base64",
                param=param,
                code="image_url_not_allowed",
            )
        try:
            async with asyncio.timeout(self._args.timeout_s):
                return await self._follow(address, param)
        except TimeoutError:
            raise ImageError(
                f"the image did not arrive within {self._args.timeout_s:g} seconds, which is the limit",
                param=param,
                code="image_fetch_timeout",
            ) from None
        except httpx.HTTPError:
            raise _failed("its host cannot be reached or does not answer correctly", param) from None

    async def _follow(self, address: str, param: str) -> bytes:
        url = parse_address(address, param=param)
        for _ in range(self._args.max_redirects + 1):
            response = await self._ask(url, param)
            try:
                if response.status_code not in _REDIRECTS:
                    return await self._read(response, param)
                url = parse_address(response.headers.get("location", ""), param=param, base=url)
            finally:
                await response.aclose()
        raise _failed(f"its host redirects more than {self._args.max_redirects} times", param)

    async def _ask(self, url: httpx.URL, param: str) -> httpx.Response:
        """The head of the answer; the body is still to be read."""
        self._check(url, param)
        try:
            return await self._outgoing.send("GET", url, _HEADERS)
        except NoAddressError as error:
            raise _failed(str(error), param) from None

    def _check(self, url: httpx.URL, param: str) -> None:
        if not self._outgoing.allows(url):
            raise ImageError(
                "the image's address is not one that this service may fetch from: hosts, ports and schemes are limited",
                param=param,
                code="image_url_not_allowed",
            )

    async def _read(self, response: httpx.Response, param: str) -> bytes:
        if response.status_code != httpx.codes.OK:
            raise _failed(f"its host answers {response.status_code}", param)
        media_type = response.headers.get("content-type", "image/")
        if not media_type.lower().startswith(_MEDIA_TYPES) or "content-encoding" in response.headers:
            raise _failed("its host answers with something that is not a picture", param)
        most = self._args.max_bytes
        announced = response.headers.get("content-length", "")
        is_too_large = announced.isdigit() and int(announced) > most
        picture = None if is_too_large else await read_up_to(response.aiter_raw(), most)
        if picture is None:
            raise ImageError(
                f"the image has more than {most} bytes, which is the limit", param=param, code="image_too_large"
            )
        return picture


def _failed(why: str, param: str) -> ImageError:
    return ImageError(f"the image cannot be fetched: {why}", param=param, code="image_fetch_failed")


def _with_pictures(message: Message, fetched: dict[ImageUrl, ImagePart]) -> Message:
    parts: list[TextPart | ImagePart | ImageUrl] = [
        fetched[part] if isinstance(part, ImageUrl) else part for part in message.parts
    ]
    return replace(message, parts=tuple(parts))
