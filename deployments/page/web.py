"""The page as an ASGI app, and its server. Neither the page nor its browser ever contacts an outside host."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Set before Gradio is imported, which would otherwise check for updates and send usage data to its makers.
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
# Limit for an upload; the service has limits of its own.
_MAX_UPLOAD = "64mb"
# Grace period after Ctrl-C, because every open page holds a connection that never ends by itself.
_LAST_S = 2
# Gradio's scripts and styles are inline, and it shows pictures from memory.
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
    """Tells browsers to contact no other host, whatever the model's answer contains."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def check_reach(host: str, args: PageArgs) -> None:
    """Raise ExposedPageError for a host that is reachable from other machines, unless anyone may ask."""
    if not args.allow_anyone and not is_loopback(host):
        raise ExposedPageError(
            f"the page would listen on {host}, where others can reach it, and would let anyone ask the service; "
            "listen on 127.0.0.1, or allow anyone (--allow-anyone) if something in front of it checks who may come"
        )


def page_app(args: PageArgs) -> Starlette:
    """Build the page. Raises LlavaError for invalid settings."""
    # A private folder for this page's uploads.
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="llava-page-")
    log = None if args.log is None else ConversationLog(args.log)
    handlers = Handlers(Asker(args.url, load_moderation(args.moderation), log))
    blocks = build_blocks(args, handlers, has_own_key=bool(os.environ.get(API_KEY_VARIABLE)))
    app = Starlette(middleware=[Middleware(_SafeHeaders)])
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        # Fonts of the visitor's own machine.
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    gr.mount_gradio_app(
        app,
        blocks,
        "/",
        footer_links=[],
        # The browser would keep every question, and offer to send it elsewhere.
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
    """Serve the page until Ctrl-C. Raises LlavaError where it may not listen on `host`, or for invalid settings."""
    check_reach(host, args)
    uvicorn.run(page_app(args), host=host, port=port, log_level="warning", timeout_graceful_shutdown=_LAST_S)
