"""The `llava` command. Commands that need only this package are here; other packages add theirs through entry points.

Modules with commands import nothing heavy before a command runs, so `--help` answers at once. Knows nothing about Ray,
HTTP servers or training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from llava_core.checkpoints.tools.cli import TOOLS
from llava_core.errors import LlavaError
from llava_core.views import DicomView, read_window

COMMAND_GROUP = "llava.commands"
OWN_PACKAGES = ("llava_core", "deployments", "cluster")


class CommandGroup(click.Group):
    """The core's own commands and those that installed packages register under COMMAND_GROUP, imported when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, without importing any."""
        return sorted({*super().list_commands(ctx), *(point.name for point in entry_points(group=COMMAND_GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command with this name; one from an entry point is imported now."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for point in entry_points(group=COMMAND_GROUP, name=cmd_name):
            return _import_command(point)
        return None

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; deliberate errors become one line and exit status 1 instead of a traceback."""
        try:
            return super().invoke(ctx)
        except LlavaError as error:
            raise click.ClickException(str(error)) from error


def _import_command(point: EntryPoint) -> click.Command:
    """The entry point's command, or a stand-in that names the missing dependency when it is run."""
    try:
        command: click.Command = point.load()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OWN_PACKAGES:
            raise
        missing = error.name

        def explain(**_: object) -> None:
            raise click.ClickException(
                f"`llava {point.name}` needs {missing}, which is not installed: "
                "pip install 'llava-serve[serve,batch,train,page]'"
            )

        settings: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True}
        return click.Command(
            point.name, callback=explain, context_settings=settings, short_help=f"(not available: {missing} is missing)"
        )
    return command


@click.group(cls=CommandGroup)
@click.version_option(package_name="llava-serve")
def main() -> None:
    """LLaVA-family vision-language models."""
    logger = logging.getLogger("llava_core.checkpoints.hub")
    logger.setLevel(logging.INFO)
    logger.handlers = [_ToStandardError()]


class _ToStandardError(logging.Handler):
    """Reports downloads from the hub: nobody should have to guess why a command takes an hour."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print only the message."""
        click.echo(record.getMessage(), err=True)


for tool in TOOLS:
    main.add_command(tool)


_DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])
_MODEL_OPTIONS = (
    click.option("--model", help="Checkpoint folder or hub id (default: the small model of this project)."),
    click.option("--base", help="The model that an adapter or projector was trained on."),
    click.option("--template", help="Prompt template (default: the one the checkpoint declares)."),
    click.option("--dtype", type=_DTYPES, default="auto", help="[auto]"),
    click.option("--quantization", type=click.Choice(["8bit", "4bit"]), help="Quantize the decoder's linear layers."),
    click.option("--device", default="cpu", show_default=True),
    click.option("--offline", is_flag=True, help="Download nothing; list missing files."),
    click.option("--padding-jitter", is_flag=True, help="Move padding by up to a pixel, as LLaVA-Med did."),
)


def _model_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that loads a model."""
    for option in reversed(_MODEL_OPTIONS):
        function = option(function)
    return function


def _check_window(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[float, float] | int | None:
    try:
        return None if value is None else read_window(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


FRAME = click.option("--frame", type=click.IntRange(1), help="Frame of a DICOM file, counted from 1.")
WINDOW = click.option(
    "--window", callback=_check_window, help="DICOM window: CENTRE,WIDTH, or the number of one in the file."
)


def take_view(given: dict[str, Any]) -> DicomView | None:
    """Remove --frame and --window from the options and return the view they choose, None where neither is given."""
    frame, window = given.pop("frame"), given.pop("window")
    return None if frame is None and window is None else DicomView(frame or 1, window)


@main.command()
@click.argument("question", required=False)
@_model_options
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="Picture file; repeatable.")
@FRAME
@WINDOW
@click.option("--questions", type=click.Path(path_type=Path), help="Many questions, one JSON object per line.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--max-tokens", type=click.IntRange(1), default=None, help="Longest answer (default: the context).")
@click.option("--seed", type=int, default=None, help="Makes a sampled answer repeatable.")
@click.option("--format", "output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def ask(question: str | None, **given: Any) -> None:
    """Answer QUESTION, about pictures if there are any, in this process.

    Each line of a --questions file holds `question` or `text`, and may hold `image` or `images` (paths relative to the
    file's folder) and `question_id` or `id`, which is returned with the answer. Answers are one JSON object per line.
    """
    from llava_core.asking import AskOptions, ask_all, ask_one

    options = AskOptions(view=take_view(given), **given)
    if (question is None) == (options.questions is None):
        raise click.UsageError("give either a QUESTION or --questions FILE")
    if options.questions is not None:
        if options.images:
            raise click.UsageError("with --questions the pictures are named in its lines, not by --image")
        ask_all(options, options.questions)
    else:
        ask_one(options, question or "")


@main.command()
@_model_options
@click.option("--url", help="Ask a running service, such as http://127.0.0.1:8000; --model names one of its models.")
@click.option("--api-key", envvar="LLAVA_API_KEY", help="For a service that requires one.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 is greedy.  [default: 0]")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from this share of the probability.")
@click.option("--top-k", type=click.IntRange(1), help="Sample from this many tokens.")
@click.option("--repetition-penalty", type=click.FloatRange(0.01, 100), help="Above 1, repeating becomes unlikelier.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer (default: the context).")
@click.option("--seed", type=int, help="Makes sampled answers repeatable.")
@click.option("--system", help="Replaces the template's system text.")
@FRAME
@WINDOW
@click.option("--load", type=click.Path(path_type=Path), help="Resume a conversation written by /save.")
@click.option("--no-history", is_flag=True, help="Neither read nor keep the lines typed.")
@click.pass_context
def chat(context: click.Context, /, **given: Any) -> None:
    """Talk about pictures in the terminal; /help there lists what can be typed.

    Without a terminal, each line of standard input is a question.
    """
    from llava_core.chat.program import SAMPLING, ChatOptions
    from llava_core.chat.program import chat as run
    from llava_core.opening import ModelOptions

    model = ModelOptions(**{field.name: given.pop(field.name) for field in fields(ModelOptions)})
    if given["url"] is not None:
        typed = [name for name in vars(model) if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        unfit = [f"--{name.replace('_', '-')}" for name in typed if name != "model"]
        if unfit:
            raise click.UsageError(f"{', '.join(unfit)} is for a model that is loaded here, not for --url")
    sampling = {name: given.pop(name) for name in SAMPLING}
    known = {name: value for name, value in sampling.items() if value is not None}
    given["keeps_history"] = not given.pop("no_history")
    run(ChatOptions(model=model, sampling=known, view=take_view(given), **given))
