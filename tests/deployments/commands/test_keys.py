"""`llava keys`: a key is shown once, and the service reads what was created or revoked."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from deployments.access.api_keys import key_id_of, read_keys
from llava_core.cli import main


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def _run(path: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["keys", *words, "--keys-file", str(path)])


def test_a_new_key_is_printed_once_and_valid(path: Path) -> None:
    result = _run(path, "create", "team-a")
    assert result.exit_code == 0, result.output
    key = result.stdout.strip()
    assert key_id_of(key) == "team-a"
    assert read_keys(path)["team-a"].is_hash_of(key)
    listed = _run(path, "list").output
    assert "team-a" in listed
    assert "never expires" in listed
    assert key not in listed + path.read_text()


def test_limits_are_kept_and_shown(path: Path) -> None:
    words = ["--requests-per-minute", "60", "--tokens-per-minute", "9000", "--max-concurrent", "4", "--days", "30"]
    assert _run(path, "create", "b", *words, "--route", "models", "--route", "health").exit_code == 0
    key = read_keys(path)["b"]
    assert (key.requests_per_minute, key.tokens_per_minute, key.max_concurrent) == (60, 9000, 4)
    assert key.routes == ("models", "health")
    assert key.expires_at is not None
    assert (key.expires_at - key.created_at).days == 30
    listed = _run(path, "list").output
    for expected in (
        "60 requests/min",
        "9000 tokens/min",
        "4 at once",
        "only models, health",
        f"{key.expires_at:%Y-%m-%d}",
    ):
        assert expected in listed


def test_a_revoked_key_is_removed_and_its_id_may_be_reused(path: Path) -> None:
    _run(path, "create", "a")
    first = read_keys(path)["a"]
    twice = _run(path, "create", "a")
    assert twice.exit_code == 1
    assert "revoke it first" in twice.output
    assert read_keys(path)["a"] == first
    assert _run(path, "revoke", "a").exit_code == 0
    assert read_keys(path) == {}
    assert _run(path, "create", "a").exit_code == 0
    assert read_keys(path)["a"].sha256 != first.sha256


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("create", "a b"), "letters, digits"),
        (("create", "a", "--route", "everything"), "chat_completions"),
        (("create", "a", "--max-concurrent", "0"), "x>=1"),
        (("create", "a", "--days", "36501"), "1<=x<=36500"),
        (("create", "a", "--days", "0"), "1<=x<=36500"),
        (("revoke", "nobody"), "no key with the id nobody"),
        (("list",), "cannot be read"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], expected: str, path: Path) -> None:
    result = _run(path, *words)
    assert result.exit_code in (1, 2)
    assert expected in result.output
    assert not path.exists()
