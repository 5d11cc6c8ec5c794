"""A server's messages without what clients must not see: addresses, the key for the server, its own name of the model.

Knows only text, and nothing of what it says.
"""

from __future__ import annotations

import re

import httpx

from deployments.settings.upstreams import UpstreamArgs

# Any URL and any IPv4 address: a server that distributes requests also names the servers behind it. The scheme is
# matched from its first character on, which keeps the search linear; the rest of a URL ends where quotes do.
_REST = r"[^\s\"'`<>]*"
_ADDRESS = re.compile(
    rf"(?<![a-z0-9+.-])[a-z0-9+.-]+://{_REST}[\w/]|(?<![\w.])\d{{1,3}}(?:\.\d{{1,3}}){{3}}(?::\d+)?(?!\.?\w)",
    re.IGNORECASE,
)


class Redaction:
    """What to replace in messages of the server behind the model that is called `name` here; `key` is its key."""

    def __init__(self, name: str, args: UpstreamArgs, key: str | None) -> None:
        self._name = name
        self._key = key
        self._host = _host(httpx.URL(args.url))
        self._model = _model(args.model)

    def __call__(self, text: str) -> str:
        """The text as clients may see it."""
        if self._key is not None:
            text = text.replace(self._key, "***")
        text = _ADDRESS.sub("an address", text)
        text = self._host.sub("the server", text)
        return self._model.sub(lambda _: self._name, text)


def _host(url: httpx.URL) -> re.Pattern[str]:
    """Matches the host by itself or within a longer name, with a port and a path after it."""
    name = "|".join(map(re.escape, {url.host, url.raw_host.decode("ascii")}))
    longer = rf"(?:[\w-]+\.)*\[?(?:{name})\]?(?:\.[\w-]+)*"
    return re.compile(rf"(?<![\w.-]){longer}(?::\d+)?(?![\w-])(?:/(?:{_REST}\w)?)?", re.IGNORECASE)


def _model(name: str) -> re.Pattern[str]:
    """Matches the name by itself and every path with it, also as a folder of the hub's cache, `models--org--name`.

    Only whole words or whole parts of a path count: a name may be as short as a letter.
    """
    written = re.escape(name.strip("/") or name).replace("/", "(?:/|--)")
    return re.compile(rf"(?<![\w./-])(?:[\w.-]*/)*(?:models--)?{written}(?![\w-])(?:/(?:[\w./-]*\w)?)?")
