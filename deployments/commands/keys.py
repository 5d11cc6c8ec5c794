"""`llava keys`: makes, lists and revokes API keys. A key is printed once, when it is made, and kept nowhere.

A running service picks up changes within a second. `llava` finds this module through the entry-point group
`llava.commands`.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from deployments.access.api_keys import ID_FORM, ApiKey, editing, hash_key, make_key, read_keys
from llava_core.errors import LlavaError

_file = click.option(
    "--keys-file",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("keys.json"),
    show_default=True,
    help="The file that auth.keys_file of the configuration names.",
)
_limit = click.IntRange(min=1)


def _check_id(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(ID_FORM, value):
        raise click.BadParameter("up to 64 letters, digits, dashes and underscores")
    return value


def _check_routes(_context: click.Context, _parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if value:
        # Not imported for --help, which needs no HTTP.
        from deployments.openapi import OPERATIONS

        if unknown := sorted(set(value) - OPERATIONS.keys()):
            raise click.BadParameter(f"{unknown[0]} is not a route; there are {', '.join(sorted(OPERATIONS))}")
    return value


@click.group()
def keys() -> None:
    """API keys of the service."""


@keys.command()
@click.argument("key_id", metavar="ID", callback=_check_id)
@_file
@click.option("--days", type=click.IntRange(1, 36_500), help="Days until the key expires. [default: never]")
@click.option("--requests-per-minute", type=_limit)
@click.option("--tokens-per-minute", type=_limit, help="Prompt and generated tokens together.")
@click.option("--max-concurrent", type=_limit, help="Requests at once.")
@click.option(
    "--route",
    "routes",
    multiple=True,
    callback=_check_routes,
    help="A route that the key is for; may be given several times. [default: every route]",
)
def create(
    *,
    key_id: str,
    keys_file: Path,
    days: int | None,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    max_concurrent: int | None,
    routes: tuple[str, ...],
) -> None:
    """Make a key for ID, a name of your choice, and print it."""
    key = make_key(key_id)
    now = datetime.now(UTC).replace(microsecond=0)
    entry = ApiKey(
        id=key_id,
        sha256=hash_key(key),
        created_at=now,
        expires_at=None if days is None else now + timedelta(days=days),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
        routes=routes or None,
    )
    try:
        with editing(keys_file) as known:
            if key_id in known:
                raise click.ClickException(f"there is a key with the id {key_id} in {keys_file}; revoke it first")
            known[key_id] = entry
    except LlavaError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"The key of {key_id}, which will not be shown again:", err=True)
    click.echo(key)


@keys.command("list")
@_file
def list_keys(keys_file: Path) -> None:
    """List all keys with their expiry and limits."""
    try:
        known = read_keys(keys_file)
    except LlavaError as error:
        raise click.ClickException(str(error)) from None
    now = datetime.now(UTC)
    for key in known.values():
        ends = "never expires" if key.expires_at is None else f"expires {key.expires_at:%Y-%m-%d}"
        limits = {
            "requests/min": key.requests_per_minute,
            "tokens/min": key.tokens_per_minute,
            "at once": key.max_concurrent,
        }
        parts = [
            f"{key.id:24} made {key.created_at:%Y-%m-%d}",
            "EXPIRED" if key.has_expired(now) else ends,
            *(f"{most} {what}" for what, most in limits.items() if most is not None),
            *([] if key.routes is None else [f"only {', '.join(key.routes)}"]),
        ]
        click.echo(", ".join(parts))


@keys.command()
@click.argument("key_id", metavar="ID", callback=_check_id)
@_file
def revoke(*, key_id: str, keys_file: Path) -> None:
    """Revoke the key of ID."""
    try:
        with editing(keys_file) as known:
            if known.pop(key_id, None) is None:
                raise click.ClickException(f"there is no key with the id {key_id} in {keys_file}")
    except LlavaError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"The key of {key_id} is no longer valid.")
