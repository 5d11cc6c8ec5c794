"""`llava inspect`, `convert`, `merge` and `delta`: show a checkpoint's contents, and build checkpoints from others.

Parses options and prints; everything else is imported when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llava_core.types import Size

if TYPE_CHECKING:
    from llava_core.checkpoints.tools.convert import Target


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _read_sizes(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[Size, ...]:
    """`640x480`, width first; anything else is a usage error."""
    matches = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", value.lower()) for value in values]
    for value, match in zip(values, matches, strict=True):
        if match is None:
            raise click.BadParameter(f"{value!r} is not a size in pixels; write for example 640x480")
    return tuple(Size(int(match.group(1)), int(match.group(2))) for match in matches if match)


def _read_num_bytes(_: click.Context, __: click.Parameter, value: str) -> int:
    """`5GB`, `500MB`, `2GiB` or plain bytes; anything else is a usage error."""
    match = re.fullmatch(r"([1-9]\d*)\s*([A-Za-z]*)", value.strip())
    if match is None or match.group(2).upper() not in _UNITS:
        raise click.BadParameter(f"{value!r} is not a size; write for example 5GB, 500MB or 2GiB")
    return int(match.group(1)) * _UNITS[match.group(2).upper()]


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, after which nothing half-written is left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_OUT = click.argument("out", type=click.Path(path_type=Path))
_BASE = click.option("--base", default=None, help="The model that an adapter or projector was trained on.")
_OFFLINE = click.option("--offline", is_flag=True, help="Download nothing; list missing files.")
_SHARD = click.option(
    "--max-shard-size", callback=_read_num_bytes, default="5GB", show_default=True, help="Largest file of weights."
)


@click.command()
@click.argument("model")
@_BASE
@_OFFLINE
@click.option("--format", "output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option(
    "--image-size", "sizes", callback=_read_sizes, multiple=True, metavar="WxH", help="Count its tokens; repeatable."
)
@click.option("--template", default=None, help="Prompt template (default: the one the checkpoint declares).")
@click.pass_context
def inspect(
    ctx: click.Context,
    model: str,
    base: str | None,
    output: str,
    sizes: tuple[Size, ...],
    template: str | None,
    *,
    offline: bool,
) -> None:
    """Show what the checkpoint MODEL is, what it needs, and all problems with it.

    Reads headers, not weights. Exit status 1 when there is a problem.
    """
    from llava_core.checkpoints.tools.report import as_text, inspect_checkpoint

    report = inspect_checkpoint(model, base, offline=offline, sizes=sizes, template=template)
    click.echo(json.dumps(report, indent=2) if output == "json" else as_text(report))
    if report["problems"]:
        ctx.exit(1)


@click.command()
@click.argument("source")
@_OUT
@click.option("--to", required=True, type=click.Choice(["llava-hf", "original"]), help="The layout to write.")
@_SHARD
@_OFFLINE
@_ended_by_sigterm()
def convert(source: str, out: Path, to: Target, max_shard_size: int, *, offline: bool) -> None:
    """Write the checkpoint SOURCE in another layout into the new folder OUT.

    Numbers are never changed. In its own layout, SOURCE is rewritten as safetensors of the given size.
    """
    from llava_core.checkpoints.tools.convert import convert as run

    run(source, out, to, offline=offline, max_shard_size=max_shard_size)


@click.command()
@click.argument("model")
@_OUT
@_BASE
@_SHARD
@_OFFLINE
@_ended_by_sigterm()
def merge(model: str, out: Path, base: str | None, max_shard_size: int, *, offline: bool) -> None:
    """Merge the LoRA or projector MODEL and its base into one whole model, in the new folder OUT.

    Computed in float32, written in the dtype of the base.
    """
    from llava_core.checkpoints.tools.merge import merge as run

    run(model, out, base=base, offline=offline, max_shard_size=max_shard_size)


@click.group()
def delta() -> None:
    """A model as its differences to a base."""


@delta.command("make")
@click.argument("base")
@click.argument("target")
@_OUT
@_SHARD
@_OFFLINE
@_ended_by_sigterm()
def make(base: str, target: str, out: Path, max_shard_size: int, *, offline: bool) -> None:
    """Write TARGET minus BASE into the new folder OUT."""
    from llava_core.checkpoints.tools.delta import make_delta

    make_delta(base, target, out, offline=offline, max_shard_size=max_shard_size)


@delta.command("apply")
@click.argument("base")
@click.argument("delta")
@_OUT
@click.option("--force", is_flag=True, help="Do not check that DELTA is a delta of BASE.")
@_SHARD
@_OFFLINE
@_ended_by_sigterm()
def apply(base: str, delta: str, out: Path, max_shard_size: int, *, offline: bool, force: bool) -> None:
    """Write BASE plus DELTA into the new folder OUT.

    DELTA must be marked as a delta made from this BASE. The original code's deltas have no such mark: use --force.
    """
    from llava_core.checkpoints.tools.delta import apply_delta

    apply_delta(base, delta, out, force=force, offline=offline, max_shard_size=max_shard_size)


TOOLS = (inspect, convert, merge, delta)
