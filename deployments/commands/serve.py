"""`llava serve` and `llava demo`: the service in the foreground, and one question to it from start to finish.

All output is printed here; Ray's own output is dropped, and can be found in its logs. `llava` finds this module through
the entry-point group `llava.commands`, and imports it only when one of the two commands is called.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import click

from deployments.launch.config_file import CONFIG_FILE
from deployments.launch.launcher import LocalService
from deployments.launch.plan import LaunchPlan, plan_launch
from llava_core.client import Client, Reply
from llava_core.client.messages import media_type, user_message
from llava_core.client.requests import CHAT, chat_body
from llava_core.errors import LlavaError

SCENE = Path(__file__).parents[1] / "scene.png"
QUESTION = "Describe the picture."

# Seconds between two checks that the service still has all its processes.
_CHECK_S = 1.0
_TIME = "%Y-%m-%d %H:%M:%S"

_config = click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"A Serve configuration. [default: ./{CONFIG_FILE} if there is one]",
)
_model = click.option(
    "--model",
    help="A checkpoint folder or hub id, in place of the configuration's models. [default: those, or the default "
    "model]",
)
_base = click.option("--base", help="The base of the only model, if that is an adapter or projector.")
_offline = click.option("--offline", is_flag=True, help="Download nothing; list missing files.")
_port = click.option("--port", type=click.IntRange(1, 65535), envvar="PORT", help="[default: 8000]")


@click.command()
@_config
@_model
@_base
@_offline
@click.option("--host", help="The interface to listen on; any but 127.0.0.1 needs API keys. [default: 127.0.0.1]")
@_port
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    help="The port of the metrics for Prometheus, on 127.0.0.1; 0 is any free one. [default: the one after --port]",
)
@click.option(
    "--drain-seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="How long running requests may take to finish after Ctrl-C or SIGTERM; a second signal cuts them off.",
)
def serve(config: Path | None, drain_seconds: float, **options: Any) -> None:
    """Serve models over HTTP on this machine until Ctrl-C: those of the configuration, or the one given.

    SIGHUP reloads the configuration: new replicas take over, old ones finish their requests before they stop.
    """
    with _failing_in_one_line():
        plan = plan_launch(config, **options)
        with _terminal() as terminal, _running(plan, terminal) as service:
            _say(terminal, f"\nServing {_names(plan)}. Ctrl-C stops it.")
            for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/health")):
                _say(terminal, f"  {method:4} {plan.url}{path}")
            _say(terminal, f"  metrics {service.metrics_url}")
            _say(terminal, f"  logs {service.logs}")
            with contextlib.suppress(KeyboardInterrupt), _told_to_update() as is_told:
                while True:
                    service.check()
                    for sentence in service.news():
                        _say(terminal, f"{time.strftime(_TIME)} {sentence}")
                    time.sleep(_CHECK_S)
                    if is_told():
                        _update(service, config, options, terminal)
            _drain(service, drain_seconds, terminal)
            _say(terminal, "\nStopping ...")


@click.command()
@_config
@_model
@_base
@_offline
@_port
@click.option(
    "--image",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=SCENE,
    help="[default: a drawn scene that comes with this project]",
)
@click.option("--question", default=QUESTION, show_default=True)
@click.option("--api-key", envvar="LLAVA_API_KEY", help="Needed if the configuration requires keys.")
def demo(config: Path | None, image: Path, question: str, api_key: str | None, **options: Any) -> None:
    """Start the service, ask its first model a question about a picture, show the answer as it streams, and stop."""
    with _failing_in_one_line():
        plan = plan_launch(config, metrics_port=0, **options)
        with _terminal() as terminal, _running(plan, terminal):
            _say(terminal, f"\n{image.name}: {question}")
            reply = _ask(plan, image, question, api_key, terminal)
            _say(terminal, "\n\nWhere the time went:")
            for stage, milliseconds in reply.stage_ms.items():
                _say(terminal, f"  {stage:11}{milliseconds:9.1f} ms")
            _say(terminal, "\nThe same by hand, while `llava serve` (or `make serve`) runs:\n")
            _say(terminal, curl_line(plan.url, image, question, plan.args.models[0].served_name))
            _say(terminal, "\nStopping ...")


def _ask(plan: LaunchPlan, image: Path, question: str, key: str | None, terminal: TextIO) -> Reply:
    """Print the answer as it comes."""
    model = plan.args.models[0].served_name
    with Client(plan.url, api_key=key, model=model) as client, client.stream(question, image) as answer:
        for delta in answer:
            terminal.write(delta.text)
            terminal.flush()
    return answer.reply


def curl_line(url: str, image: Path, question: str, model: str) -> str:
    """A command to paste: the picture goes through a pipe, because it may be too long for an argument."""
    message = user_message(question, [f"data:{media_type(image.read_bytes()) or 'image/png'};base64,"])
    body = json.dumps(chat_body([message], model=model, stream=True))
    # For printf: the picture replaces the first %s, and nothing else may look like a placeholder.
    pattern = body.replace("\\", "\\\\").replace("%", "%%").replace(";base64,", ";base64,%s", 1)
    picture = shlex.quote(os.path.relpath(image))
    return (
        f"printf {shlex.quote(pattern)} \"$(base64 < {picture} | tr -d '\\n')\" \\\n"
        f"  | curl -sN {url}{CHAT} -H 'content-type: application/json' -d @-"
    )


@contextlib.contextmanager
def _running(plan: LaunchPlan, terminal: TextIO) -> Iterator[LocalService]:
    """The service while the block runs; SIGTERM ends it as Ctrl-C does."""
    service = LocalService(plan)
    _say(terminal, f"Starting {_names(plan)} on {plan.url} ...")
    try:
        # A process that a shell starts in the background ignores Ctrl-C.
        _end_on_signals()
        service.start(lambda line: _say(terminal, f"  {line}"))
        # Ray has installed a handler of its own by now.
        _end_on_signals()
        yield service
    finally:
        service.stop()


def _end_on_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


@contextlib.contextmanager
def _told_to_update() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGHUP, the usual signal for reloading, has arrived since its last call."""
    times = {"told": 0, "asked": 0}

    def note(_number: int, _frame: FrameType | None) -> None:
        times["told"] += 1

    def is_told() -> bool:
        told, asked = times["told"], times["asked"]
        times["asked"] = told
        return told > asked

    before = signal.signal(signal.SIGHUP, note)
    try:
        yield is_told
    finally:
        signal.signal(signal.SIGHUP, before)


def _update(service: LocalService, config: Path | None, options: dict[str, Any], terminal: TextIO) -> None:
    """Reloads the configuration. Whatever is wrong with it, the command keeps running, so that it can be corrected."""
    _say(terminal, "\nReading the configuration again ...")
    try:
        plan = plan_launch(config, **options, running=service.plan)
    except LlavaError as error:
        _say(terminal, f"The service stays as it is: {error}")
        return
    try:
        service.update(plan)
    except LlavaError as error:
        _say(terminal, f"The new configuration does not start: {error}\nCorrect it and send SIGHUP again.")
        return
    _say(terminal, f"Serving {_names(plan)} with the new configuration.")


def _drain(service: LocalService, seconds: float, terminal: TextIO) -> None:
    assert service.balancer is not None, "it has been started"
    _say(terminal, f"\nWaiting up to {seconds:g} s for requests to finish. Ctrl-C cuts them off.")
    with contextlib.suppress(KeyboardInterrupt):
        if not service.balancer.drain(seconds):
            _say(terminal, "Some are unfinished.")


def _names(plan: LaunchPlan) -> str:
    return ", ".join(model.served_name for model in plan.args.models)


def _say(terminal: TextIO, text: str) -> None:
    # Whoever read the output may be gone, or the disk full: requests are answered all the same.
    with contextlib.suppress(OSError):
        click.echo(text, file=terminal)


@contextlib.contextmanager
def _failing_in_one_line() -> Iterator[None]:
    try:
        yield
    except LlavaError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None


@contextlib.contextmanager
def _terminal() -> Iterator[TextIO]:
    """Yields the stream to print to. Meanwhile file descriptors 1 and 2 lead nowhere: Ray's processes write to them."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    terminal = os.fdopen(os.dup(saved[0]), "w", buffering=1, encoding="utf-8")
    with tempfile.TemporaryFile() as noise:
        try:
            os.dup2(noise.fileno(), 1)
            os.dup2(noise.fileno(), 2)
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(saved, start=1):
                os.dup2(copy, number)
                os.close(copy)
            with contextlib.suppress(OSError):
                terminal.close()
