"""The `llava` command. What needs only this package is here; other packages add commands through entry points.

Modules with commands import nothing heavy before a command runs, so `--help` answers at once. Knows no ray, HTTP
server or training.
"""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click

from llava_core.checkpoints.tools.cli import TOOLS
from llava_core.errors import LlavaError

COMMAND_GROUP = "llava.commands"
OWN_PACKAGES = ("llava_core", "deployments", "cluster")


class CommandGroup(click.Group):
    """The core's own commands and those that installed packages offer under COMMAND_GROUP, imported when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, without importing any."""
        return sorted({*super().list_commands(ctx), *(point.name for point in entry_points(group=COMMAND_GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name; an offered one is imported now."""
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
    """The offered command, or one in its place that says which extra is missing when it is run."""
    try:
        command: click.Command = point.load()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OWN_PACKAGES:
            raise
        missing = error.name

        def explain(**_: object) -> None:
            raise click.ClickException(
                f"`llava {point.name}` needs {missing}, which is not installed: pip install 'llava-serve[serve,train]'"
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
    """For what is fetched from the hub: nobody should have to guess why a command takes an hour."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message alone."""
        click.echo(record.getMessage(), err=True)


for tool in TOOLS:
    main.add_command(tool)


@main.command()
@click.argument("question", required=False)
@click.option("--model", default=None, help="Checkpoint folder or hub id (default: the small model of this project).")
@click.option("--base", default=None, help="The model that an adapter or projector was trained on.")
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="Picture file; repeatable.")
@click.option("--questions", type=click.Path(path_type=Path), help="Many questions, one JSON object a line.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--max-tokens", type=click.IntRange(1), default=None, help="Longest answer (default: the context).")
@click.option("--seed", type=int, default=None, help="Makes a sampled answer repeatable.")
@click.option("--template", default=None, help="Prompt template (default: the one the checkpoint declares).")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", help="[auto]")
@click.option("--quantization", type=click.Choice(["8bit", "4bit"]), help="Of the decoder's linear layers.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--offline", is_flag=True, help="Fetch nothing; what is not here is listed.")
@click.option("--padding-jitter", is_flag=True, help="Move padding by up to a pixel, as LLaVA-Med did.")
@click.option("--format", "output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def ask(question: str | None, **given: Any) -> None:
    """Answer QUESTION, about pictures if there are any, in this process.

    Each line of a --questions file holds `question` or `text`, and may hold `image` or `images` (paths, from the
    file's folder) and `question_id` or `id`, which comes back with the answer, a JSON object a line.
    """
    from llava_core.asking import AskOptions, ask_all, ask_one

    options = AskOptions(**given)
    if (question is None) == (options.questions is None):
        raise click.UsageError("give either a QUESTION or --questions FILE")
    if options.questions is not None:
        if options.images:
            raise click.UsageError("with --questions the pictures are named in its lines, not by --image")
        ask_all(options, options.questions)
    else:
        ask_one(options, question or "")
