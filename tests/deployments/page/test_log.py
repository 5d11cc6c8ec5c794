"""The log of visitors who agreed: lines in the format of LLaVA's own page, kept for some days, for one reader."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from deployments.page.log import ConversationLog
from deployments.page.settings import LogArgs
from deployments.page.talk import Choices, Turn
from tests.deployments.pictures import plain

TODAY = datetime.now(UTC).date()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "log"


@pytest.fixture
def talk(tmp_path: Path) -> tuple[Turn, ...]:
    picture = tmp_path / "Doe^Jane.png"
    picture.write_bytes(plain())
    return Turn("What is it?", (str(picture),), "A cat."), Turn("Größe?", (), "Small.", "5 tokens")


def _lines(folder: Path) -> list[dict[str, Any]]:
    [path] = folder.glob("*-conv.json")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_chat_and_votes_are_lines_in_the_originals_format(folder: Path, talk: tuple[Turn, ...]) -> None:
    log = ConversationLog(LogArgs(folder=folder))
    choices = Choices("llava-v1.5-7b", template="vicuna_v1")
    log.chat(talk, choices, start=1700000000.123456, finish=1700000002.5)
    for kind in ("upvote", "downvote", "flag"):
        log.vote(kind, talk, choices)  # type: ignore[arg-type]
    chat, *votes = _lines(folder)
    assert list(chat) == ["tstamp", "type", "model", "start", "finish", "state", "images", "ip"]
    assert abs(chat["tstamp"] - datetime.now(UTC).timestamp()) < 60
    assert chat["tstamp"] == round(chat["tstamp"], 4)
    assert (chat["type"], chat["model"], chat["start"], chat["finish"]) == (
        "chat",
        "llava-v1.5-7b",
        1700000000.1235,
        1700000002.5,
    )
    assert chat["images"] == [hashlib.md5(plain()).hexdigest()]
    assert chat["ip"] == ""
    assert set(chat["state"]) == {"system", "roles", "messages", "offset", "sep", "sep2", "template"}
    assert chat["state"]["system"].startswith("A chat between a curious user")
    assert chat["state"]["messages"] == [
        ["USER", "What is it?\n<image>"],
        ["ASSISTANT", "A cat."],
        ["USER", "Größe?"],
        ["ASSISTANT", "Small."],
    ]
    assert (chat["state"]["roles"], chat["state"]["offset"]) == (["USER", "ASSISTANT"], 0)
    assert (chat["state"]["sep"], chat["state"]["sep2"]) == (" ", "</s>")
    assert [vote["type"] for vote in votes] == ["upvote", "downvote", "flag"]
    assert all(list(vote) == ["tstamp", "type", "model", "state", "ip"] for vote in votes)


def test_an_unknown_template_is_recorded_as_null(folder: Path, talk: tuple[Turn, ...]) -> None:
    ConversationLog(LogArgs(folder=folder)).vote("flag", talk, Choices("m", system="Be brief."))
    state = _lines(folder)[0]["state"]
    assert (state["system"], state["template"], state["sep"], state["sep2"]) == ("Be brief.", None, None, None)


def test_file_names_are_never_kept_and_pictures_only_if_configured(folder: Path, talk: tuple[Turn, ...]) -> None:
    ConversationLog(LogArgs(folder=folder)).chat(talk, Choices(), start=0, finish=1)
    assert [path.name for path in folder.iterdir()] == [f"{TODAY}-conv.json"]
    ConversationLog(LogArgs(folder=folder, pictures=True)).chat(talk, Choices(), start=0, finish=1)
    [picture] = (folder / "serve_images" / str(TODAY)).iterdir()
    assert picture.read_bytes() == plain()
    assert picture.name == hashlib.md5(plain()).hexdigest()
    everything = "\n".join(str(path) for path in folder.rglob("*")) + json.dumps(_lines(folder))
    assert "Doe" not in everything


def test_the_log_is_readable_only_by_its_owner(folder: Path, talk: tuple[Turn, ...]) -> None:
    ConversationLog(LogArgs(folder=folder, pictures=True)).chat(talk, Choices(), start=0, finish=1)
    assert {path.stat().st_mode & 0o077 for path in (folder, *folder.rglob("*"))} == {0}


def test_only_expired_logs_and_pictures_are_deleted(folder: Path, talk: tuple[Turn, ...]) -> None:
    def day(ago: int) -> str:
        return str(TODAY - timedelta(days=ago))

    (folder / "serve_images").mkdir(parents=True)
    for ago in (7, 8):
        (folder / f"{day(ago)}-conv.json").touch()
        (folder / "serve_images" / day(ago)).mkdir()
        (folder / "serve_images" / day(ago) / "picture").touch()
    (folder / "notes-conv.json").touch()
    ConversationLog(LogArgs(folder=folder, days=7)).vote("flag", talk, Choices())
    kept = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert kept == {
        f"{TODAY}-conv.json",
        "notes-conv.json",
        f"{day(7)}-conv.json",
        "serve_images",
        f"serve_images/{day(7)}",
        f"serve_images/{day(7)}/picture",
    }
