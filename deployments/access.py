"""Who may do what: every request needs a good API key, those to routes that are named open excepted.

A route is what the router itself would run for the request, found by the same matching; no URL is put together and
taken apart again, which a Host header could change. What matches no route needs a key as well. Knows keys and quotas,
and not what the routes do.
"""

from __future__ import annotations

import base64
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.api_keys import ApiKey, key_id_of, read_keys
from deployments.errors import AuthenticationError, KeysFileError, PermissionDeniedError
from deployments.http_errors import describe, error_response
from deployments.messages import Item, Rejected, num_tokens
from deployments.quotas import Quota
from deployments.request_context import current_request
from llava_core.errors import LlavaError

logger = logging.getLogger(__name__)
_POLICY_VIOLATION = 1008


class Caller:
    """Whose key a request came with. One object per key, for as long as its entry in the file is the same."""

    def __init__(self, key: ApiKey, clock: Callable[[], float] = time.monotonic) -> None:
        self.key = key
        self.quota = Quota(key, clock)

    def check_route(self, route: BaseRoute | None) -> None:
        """Raise PermissionDeniedError where the key is not for this route."""
        name = route.name if isinstance(route, Route) else None
        if self.key.routes is not None and name not in self.key.routes:
            raise PermissionDeniedError(f"this key is only for {', '.join(self.key.routes) or 'nothing'}")


class KeyRing:
    """The keys of a file, read again when it changes: a key that was revoked is no good within `max_age_s`.

    While the file cannot be read, nobody gets in.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_age_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._path = path
        self._max_age_s = max_age_s
        self._clock = clock
        self._now = now
        self._callers: dict[str, Caller] = {}
        self._problem: str | None = None
        self._version: object = None
        self._looked_at = -float("inf")
        self._refresh()
        self._check()

    def find(self, headers: Headers, *, takes_passwords: bool = False) -> Caller:
        """Whose `Authorization: Bearer` this is, or `Basic` with the key for a password, where that counts. Raises
        AuthenticationError, or KeysFileError."""
        self._refresh()
        self._check()
        key = _given_key(headers, takes_passwords=takes_passwords)
        caller = self._callers.get(key_id_of(key) or "")
        if caller is None or not caller.key.is_hash_of(key):
            raise AuthenticationError("the API key is not known here")
        if caller.key.has_expired(self._now()):
            raise AuthenticationError("the API key has expired", code="expired_api_key")
        return caller

    def _check(self) -> None:
        if self._problem is not None:
            raise KeysFileError(self._problem)

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._looked_at < self._max_age_s:
            return
        self._looked_at = now
        try:
            status = os.stat(self._path)
            # The time of the last change of anything, permissions included.
            version: object = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        except OSError as error:
            version = error.errno
        if version == self._version:
            return
        self._version = version
        try:
            keys = read_keys(self._path)
        except KeysFileError as error:
            logger.error("%s; no key is accepted until it can be used", error)
            # Nobody is let in, but what each has used of its limits is not forgotten.
            self._problem = str(error)
            return
        self._problem = None
        self._callers = {name: self._caller(key) for name, key in keys.items()}

    def _caller(self, key: ApiKey) -> Caller:
        known = self._callers.get(key.id)
        return known if known is not None and known.key == key else Caller(key, self._clock)


class Access:
    """Middleware in front of `routes`. Sets `caller` in the scope's state. On `password_routes` a key may also come as
    the password of HTTP's basic authentication, for clients that know no other."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        routes: Sequence[BaseRoute],
        open_routes: Collection[BaseRoute],
        password_routes: Collection[BaseRoute] = (),
    ) -> None:
        self._app = app
        self._keys = keys
        self._routes = routes
        self._open_routes = open_routes
        self._password_routes = password_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what may pass, and answers everything else."""
        if scope["type"] == "websocket":
            # There are none, and whoever adds one has to say who may use it.
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        route = self._route(scope) if scope["type"] == "http" else None
        if scope["type"] == "lifespan" or (route is not None and route in self._open_routes):
            await self._app(scope, receive, send)
            return
        try:
            caller = self._keys.find(Headers(scope=scope), takes_passwords=route in self._password_routes)
            caller.check_route(route)
            caller.quota.enter()
        except LlavaError as error:
            response = error_response(describe(error), scope["state"]["request_id"])
            await response(scope, receive, send)
            return
        scope["state"]["caller"] = caller
        current_request().key_id = caller.key.id
        try:
            await self._app(scope, receive, send)
        finally:
            caller.quota.leave()

    def _route(self, scope: Scope) -> BaseRoute | None:
        """The first that fits whole, as the router chooses."""
        return next((route for route in self._routes if route.matches(scope)[0] is Match.FULL), None)


def charged(items: AsyncGenerator[Item, None], request: Request) -> AsyncGenerator[Item, None]:
    """The items of an answer, their tokens charged to whoever asked.

    What is written counts as it is written, what was read once the answer is complete: an answer that is given up pays
    for no prompt, but is a request like any other.
    """
    caller = _caller(request)
    return items if caller is None else _charged(items, caller.quota)


def charge(request: Request, num_tokens: int) -> None:
    """Tokens that did not come as items, to whoever asked."""
    caller = _caller(request)
    if caller is not None:
        caller.quota.charge(num_tokens)


def _caller(request: Request) -> Caller | None:
    """Who asks, where keys are needed."""
    caller: Caller | None = getattr(request.state, "caller", None)
    return caller


async def _charged(items: AsyncGenerator[Item, None], quota: Quota) -> AsyncGenerator[Item, None]:
    async with aclosing(items):
        async for item in items:
            if not isinstance(item, Rejected):
                # The last of them tells of the prompt, which several answers have read once.
                num_read = 0 if item.usage is None else item.usage.prompt_tokens
                quota.charge(num_tokens(item) + num_read)
            yield item


def _given_key(headers: Headers, *, takes_passwords: bool) -> str:
    given = headers.getlist("authorization")
    if not given:
        raise AuthenticationError("an API key is needed: Authorization: Bearer <key>", code="missing_api_key")
    scheme, _, key = given[0].partition(" ")
    if takes_passwords and len(given) == 1 and scheme.lower() == "basic":
        return _password(key.strip())
    if len(given) > 1 or scheme.lower() != "bearer":
        raise AuthenticationError("the authorization must be one header: Authorization: Bearer <key>")
    return key.strip()


def _password(credentials: str) -> str:
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        raise AuthenticationError("the basic authorization is no name and password in base64") from None
