"""The page as an ASGI app, and the server for it. Nothing outside is ever asked for, by the page or by its browser."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before Gradio is imported, which would ask its makers for news and tell them of this machine.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.page.answering import Asker
from deployments.page.handlers import Handlers
from deployments.page.layout import build_blocks
from deployments.page.log import ConversationLog
from deployments.page.moderation import load_moderation
from deployments.page.settings import PageArgs
from llava_core.client.exchange import API_KEY_VARIABLE, is_loopback
from llava_core.errors import LlavaError

_HERE = Path(__file__).parent
# An upload; what the service takes of it is its own business.
_MAX_UPLOAD = "64mb"
# After Ctrl-C. Every open page holds a connection that never ends by itself.
_LAST_S = 2
# Gradio runs scripts and styles of its own that are part of the page, and shows pictures from memory.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; frame-ancestors 'self'; "
    "form-action 'self'; base-uri 'self'; object-src 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class ExposedPageError(LlavaError):
    """The page would let strangers ask the service."""


class _SafeHeaders:
    """Tells browsers to ask nobody else, whatever an answer of the model holds."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def check_reach(host: str, args: PageArgs) -> None:
    """Raise ExposedPageError for a host that others reach, unless anyone may ask."""
    if not args.allow_anyone and not is_loopback(host):
        raise ExposedPageError(
            f"the page would listen on {host}, where others reach it, and lets whoever comes ask the service; listen "
            "on 127.0.0.1, or allow anyone (--allow-anyone) where something in front of it knows who may "
            "come"
        )


def page_app(args: PageArgs) -> Starlette:
    """The page. Raises LlavaError for what cannot be as it is set."""
    # Uploads are this page's alone.
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="llava-page-")
    log = None if args.log is None else ConversationLog(args.log)
    handlers = Handlers(Asker(args.url, load_moderation(args.moderation), log))
    blocks = build_blocks(args, handlers, has_own_key=bool(os.environ.get(API_KEY_VARIABLE)))
    app = Starlette(middleware=[Middleware(_SafeHeaders)])
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        # Of the visitor's own machine.
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    gr.mount_gradio_app(
        app,
        blocks,
        "/",
        footer_links=[],
        # A browser would keep every question, and offer to send them elsewhere.
        run_history=False,
        max_file_size=_MAX_UPLOAD,
        theme=theme,
        css_paths=_HERE / "page.css",
        js=(_HERE / "page.js").read_text(encoding="utf-8"),
        ssr_mode=False,
        mcp_server=False,
    )
    return app


def serve_page(args: PageArgs, host: str, port: int) -> None:
    """Until Ctrl-C. Raises LlavaError where it may not be there."""
    check_reach(host, args)
    uvicorn.run(page_app(args), host=host, port=port, log_level="warning", timeout_graceful_shutdown=_LAST_S)
