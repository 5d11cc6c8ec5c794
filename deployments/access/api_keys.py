"""API keys at rest: a JSON file that has each key's holder, expiry and limits, but not the key itself.

A key is `llava.<id>.<256 random bits>`. Only its plain SHA-256 is stored: slow, salted hashes protect secrets that can
be guessed, which these cannot, and hashing every request's key slowly would let anyone keep the service busy. Knows
nothing about HTTP.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from deployments.errors import KeysFileError

_PREFIX = "llava"
ID_FORM = r"[A-Za-z0-9_-]{1,64}"
_KEY = re.compile(rf"{_PREFIX}\.({ID_FORM})\.[A-Za-z0-9_-]{{43}}")
_SECRET_BYTES = 32


class ApiKey(BaseModel):
    """What is stored of a key. A limit of None is no limit; `routes` None allows every route."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=f"^{ID_FORM}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    max_concurrent: int | None = Field(default=None, ge=1)
    routes: tuple[str, ...] | None = None

    def is_hash_of(self, key: str) -> bool:
        """Compares in constant time, so that the duration reveals nothing about the hash."""
        return hmac.compare_digest(self.sha256, hash_key(key))

    def has_expired(self, now: datetime) -> bool:
        """Whether the key's expiry has passed."""
        return self.expires_at is not None and now >= self.expires_at


class _KeysFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[ApiKey, ...] = ()

    @model_validator(mode="after")
    def _check_ids(self) -> Self:
        ids = [key.id for key in self.keys]
        if repeated := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"two keys have the id {repeated[0]}")
        return self


def make_key(key_id: str) -> str:
    """A new key for this id; only its hash will be stored."""
    key = f"{_PREFIX}.{key_id}.{secrets.token_urlsafe(_SECRET_BYTES)}"
    assert _KEY.fullmatch(key), f"{key_id!r} is no id of a key"
    return key


def key_id_of(key: str) -> str | None:
    """The id in a key, or None if it does not have the form of a key. Does not check whether the key is valid."""
    match = _KEY.fullmatch(key)
    return match[1] if match else None


def hash_key(key: str) -> str:
    """The hash that is stored of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> dict[str, ApiKey]:
    """The keys by id. Raises KeysFileError, which quotes nothing from the file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KeysFileError(f"the file of API keys {path} cannot be read: {error.strerror}") from None
    try:
        parsed = _KeysFile.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise KeysFileError(f"the file of API keys {path} is wrong at {where}: {first['msg']}") from None
    return {key.id: key for key in parsed.keys}


@contextmanager
def editing(path: Path) -> Iterator[dict[str, ApiKey]]:
    """Yields the keys, for the block to add to and remove from; the result is written atomically when the block ends.

    Concurrent edits of the same file wait. A missing file has no keys.
    """
    try:
        with _locked(path.parent):
            keys = read_keys(path) if path.exists() else {}
            before = dict(keys)
            yield keys
            if keys != before:
                _write(path, keys)
    except OSError as error:
        raise KeysFileError(f"the file of API keys {path} cannot be written: {error.strerror}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the folder and not the file, which gets replaced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, keys: dict[str, ApiKey]) -> None:
    """Writes the file in a folder that only its owner can enter, and moves it from there into place."""
    content = _KeysFile(keys=tuple(keys.values())).model_dump_json(indent=2, exclude_none=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
        descriptor = os.open(Path(folder) / path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(content + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(Path(folder) / path.name, path)
