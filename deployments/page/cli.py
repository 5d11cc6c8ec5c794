"""`llava page`: the web page in the foreground until Ctrl-C.

`llava` finds it through the entry-point group `llava.commands`, and imports it only when it is called.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import click

from deployments.page.settings import LogArgs, PageArgs
from deployments.ports import host_and_port
from llava_core.client.exchange import DEFAULT_URL

# Only looked up, not imported: that takes seconds, which `llava --help` would wait for.
if find_spec("gradio") is None:
    raise ModuleNotFoundError("No module named 'gradio'", name="gradio")


@click.command()
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The service to ask.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The interface to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True)
@click.option("--title", default="LLaVA", show_default=True)
@click.option(
    "--log",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep conversations and votes of visitors who agree to it in this folder. [default: nothing is kept]",
)
@click.option("--log-days", type=click.IntRange(min=1), default=30, show_default=True, help="Days to keep them.")
@click.option("--log-pictures", is_flag=True, help="Keep their pictures too.")
@click.option(
    "--consent",
    type=click.File(encoding="utf-8"),
    help="The text that visitors agree to, in place of the page's own.",
)
@click.option(
    "--moderation",
    metavar="MODULE:FUNCTION|URL",
    help="Checks each question first and may refuse it.",
)
@click.option("--allow-anyone", is_flag=True, help="Allow a --host other than 127.0.0.1, for anyone.")
def page(host: str, port: int, **options: Any) -> None:
    """A web page for talking with a running service about pictures.

    The API key in LLAVA_API_KEY is used for all visitors; without one, each may enter their own.
    """
    from deployments.page.web import serve_page

    args = _settings(**options)
    click.echo(f"The page is on http://{host_and_port(host, port)}/ and asks {args.url}. Ctrl-C stops it.")
    serve_page(args, host, port)


def _settings(
    *, log: Path | None, log_days: int, log_pictures: bool, consent: TextIO | None, **options: Any
) -> PageArgs:
    if log is None:
        return PageArgs(**options)
    text = None if consent is None else consent.read()
    return PageArgs(log=LogArgs(folder=log, days=log_days, pictures=log_pictures, consent=text), **options)
