"""Who may do what: every request needs a valid API key, except to routes that are explicitly open.

A request's route is the one that the router itself would run, found by the same matching and not by parsing a rebuilt
URL, which a Host header could change. Requests that match no route need a key, too. Knows keys and quotas, but not what
the routes do.
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

from deployments.access.api_keys import ApiKey, key_id_of, read_keys
from deployments.access.quotas import Quota
from deployments.errors import AuthenticationError, KeysFileError, PermissionDeniedError
from deployments.http.errors import describe, error_response
from deployments.http.request_context import current_request
from deployments.messages import Item, Rejected, num_tokens
from llava_core.errors import LlavaError

logger = logging.getLogger(__name__)
_POLICY_VIOLATION = 1008


class Caller:
    """The holder of the key that a request came with. One object per key, while its entry in the file is unchanged."""

    def __init__(self, key: ApiKey, clock: Callable[[], float] = time.monotonic) -> None:
        self.key = key
        self.quota = Quota(key, clock)

    def check_route(self, route: BaseRoute | None) -> None:
        """Raise PermissionDeniedError if the key does not cover this route."""
        name = route.name if isinstance(route, Route) else None
        if self.key.routes is not None and name not in self.key.routes:
            raise PermissionDeniedError(f"this key is only for {', '.join(self.key.routes) or 'nothing'}")


class KeyRing:
    """The keys of a file, reloaded when it changes: a revoked key stops working within `max_age_s`.

    While the file cannot be read, every request is refused.
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
        """The caller by `Authorization: Bearer` or, if `takes_passwords`, by `Basic` with the key as password. Raises
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
            # The ctime changes with anything, including permissions.
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
            # Every request is refused, but the callers keep what they have used of their quotas.
            self._problem = str(error)
            return
        self._problem = None
        self._callers = {name: self._caller(key) for name, key in keys.items()}

    def _caller(self, key: ApiKey) -> Caller:
        known = self._callers.get(key.id)
        return known if known is not None and known.key == key else Caller(key, self._clock)


class Access:
    """Middleware in front of `routes`. Sets `caller` in the scope's state. On `password_routes` a key may also come as
    the password of HTTP's basic authentication, for clients that support nothing else."""

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
        """Passes on permitted requests, and answers all others with an error."""
        if scope["type"] == "websocket":
            # No route is a websocket; whoever adds one must decide who may use it.
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
        """The first full match, as the router chooses."""
        return next((route for route in self._routes if route.matches(scope)[0] is Match.FULL), None)


def charged(items: AsyncGenerator[Item, None], request: Request) -> AsyncGenerator[Item, None]:
    """The items of an answer, with their tokens charged to the caller.

    Generated tokens are charged as they come, prompt tokens once the answer is complete: an abandoned answer does not
    pay for its prompt, but counts as a request like any other.
    """
    caller = _caller(request)
    return items if caller is None else _charged(items, caller.quota)


def charge(request: Request, num_tokens: int) -> None:
    """Charges the caller for tokens that did not come as items."""
    caller = _caller(request)
    if caller is not None:
        caller.quota.charge(num_tokens)


def _caller(request: Request) -> Caller | None:
    """The caller, if keys are needed."""
    caller: Caller | None = getattr(request.state, "caller", None)
    return caller


async def _charged(items: AsyncGenerator[Item, None], quota: Quota) -> AsyncGenerator[Item, None]:
    async with aclosing(items):
        async for item in items:
            if not isinstance(item, Rejected):
                # Only the last item reports the prompt, which a request's answers share.
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
        raise AuthenticationError("the basic authorization must be a name and password in base64") from None
