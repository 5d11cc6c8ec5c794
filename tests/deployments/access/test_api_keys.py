"""Keys at rest: what the file holds, what it never holds, and which files are not key files."""

import hashlib
import json
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from deployments.access.api_keys import ApiKey, editing, hash_key, key_id_of, make_key, read_keys
from deployments.errors import KeysFileError

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def _entry(key_id: str, key: str = "x", **fields: Any) -> ApiKey:
    return ApiKey(id=key_id, sha256=hash_key(key), created_at=NOW, **fields)


def test_a_key_names_its_id_and_holds_256_random_bits() -> None:
    first, second = make_key("team-a"), make_key("team-a")
    assert key_id_of(first) == key_id_of(second) == "team-a"
    assert first != second
    # 43 characters of 6 bits each.
    assert len(first.rsplit(".", 1)[1]) == 43


@pytest.mark.parametrize(
    "text", ["", "llava.team.short", "sk-" + "x" * 43, "llava..", "llava.a b." + "x" * 43, "é" * 60]
)
def test_malformed_keys_have_no_id(text: str) -> None:
    assert key_id_of(text) is None


def test_the_file_holds_only_hashes_and_is_readable_only_by_its_owner(tmp_path: Path) -> None:
    path, key = tmp_path / "keys.json", make_key("team-a")
    with editing(path) as keys:
        keys["team-a"] = _entry("team-a", key, requests_per_minute=3, expires_at=NOW)
    text = path.read_text()
    assert key not in text
    assert key.rsplit(".", 1)[1] not in text
    assert json.loads(text)["keys"][0]["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_keys(path) == {"team-a": _entry("team-a", key, requests_per_minute=3, expires_at=NOW)}
    assert read_keys(path)["team-a"].is_hash_of(key)
    assert not read_keys(path)["team-a"].is_hash_of(make_key("team-a"))


def test_a_key_is_valid_until_the_moment_it_expires() -> None:
    key = _entry("a", expires_at=NOW)
    assert not key.has_expired(NOW - timedelta(microseconds=1))
    assert key.has_expired(NOW)
    assert not _entry("a").has_expired(NOW)


def test_a_failed_edit_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with editing(path) as keys:
        keys["a"] = _entry("a")
    before = path.read_bytes()
    with pytest.raises(KeyError), editing(path) as keys:
        del keys["a"], keys["a"]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_concurrent_edits_do_not_undo_each_other(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def add(name: str) -> None:
        with editing(path) as keys:
            keys[name] = _entry(name)

    threads = [threading.Thread(target=add, args=(f"key-{index}",)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_keys(path)) == {f"key-{index}" for index in range(16)}


GOOD = {"id": "a", "sha256": "0" * 64, "created_at": "2026-01-02T03:04:05Z"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("no JSON", "the whole"),
        ('{"kees": []}', "kees"),
        ({"keys": [{**GOOD, "sha256": "sesame"}]}, "keys.0.sha256"),
        ({"keys": [{**GOOD, "id": "a b"}]}, "keys.0.id"),
        ({"keys": [{**GOOD, "expires_at": "2027-01-01T00:00:00"}]}, "keys.0.expires_at"),
        ({"keys": [{**GOOD, "requests_per_minute": 0}]}, "keys.0.requests_per_minute"),
        ({"keys": [{**GOOD, "key": "in the clear"}]}, "keys.0.key"),
        ({"keys": [GOOD, GOOD]}, "two keys have the id a"),
    ],
)
def test_an_invalid_keys_file_is_refused_without_quoting_it(content: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(KeysFileError) as caught:
        read_keys(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert "sesame" not in str(caught.value)
    assert "in the clear" not in str(caught.value)


def test_an_inaccessible_keys_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeysFileError, match=r"none\.json cannot be read"):
        read_keys(tmp_path / "none.json")
    with pytest.raises(KeysFileError, match="cannot be written"), editing(tmp_path / "none" / "keys.json"):
        pass
