"""What a browser may send although our page never would: missing turns and examples, votes without consent."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from deployments.page.answering import Asker
from deployments.page.handlers import Handlers
from deployments.page.log import ConversationLog
from deployments.page.settings import LogArgs
from deployments.page.talk import Turn
from llava_core.views import DicomView

HANDLERS = Handlers(Asker("http://127.0.0.1:9"))
TALK = (Turn("One?", ("/a.png",), "1"), Turn("Two?", (), "2"))
CHOSEN = ("m", "", "", 0.0, 1.0, 512, "", "", True)


def _event(index: Any, **more: Any) -> Any:
    return SimpleNamespace(index=index, **more)


@pytest.mark.parametrize("index", [-1, 5, 99, None, "0", [], [9, 0], 0.5])
def test_nonexistent_turns_change_nothing(index: Any, tmp_path: Path) -> None:
    log = ConversationLog(LogArgs(folder=tmp_path))
    handlers = Handlers(Asker("http://127.0.0.1:9", log=log))
    for shown in (
        handlers.regenerate(_event(index), TALK, "", ""),
        handlers.edit(_event(index, value="new"), TALK, "", ""),
        handlers.ask_example(_event(index if index != "0" else "x"), ()),
    ):
        assert shown == (gr.skip(), gr.skip(), gr.skip())
    assert handlers.vote(_event(index, liked=True), TALK, *CHOSEN) == TALK
    assert list(tmp_path.iterdir()) == []


def test_an_example_is_chosen_by_its_number_and_never_by_a_path() -> None:
    _, _, talk = HANDLERS.ask_example(_event(0, value={"files": ["/etc/passwd"], "text": "Read it."}), ())
    [turn] = talk
    assert turn.question == "Describe the picture."
    assert [Path(path).name for path in turn.pictures] == ["scene.png"]


@pytest.mark.parametrize("index", [0, 1, 2, [1, 0]])
def test_an_edited_question_keeps_its_pictures_and_drops_later_turns(index: Any) -> None:
    _, _, talk = HANDLERS.edit(_event(index, value=" New? "), TALK, "", "")
    assert talk == (Turn("New?", ("/a.png",), is_open=True),)


@pytest.mark.parametrize(
    ("written", "view"),
    [
        (("", ""), None),
        ((" 1 ", ""), None),
        (("3", ""), DicomView(3)),
        (("", "40,400"), DicomView(window=(40.0, 400.0))),
        (("2", "1"), DicomView(2, 1)),
    ],
)
def test_the_dicom_view_of_the_settings_applies_to_every_question(
    written: tuple[str, str], view: DicomView | None
) -> None:
    _, _, asked = HANDLERS.ask({"text": "What?", "files": ["/a.dcm"]}, (), *written)
    _, _, again = HANDLERS.regenerate(_event(0), TALK, *written)
    _, _, edited = HANDLERS.edit(_event(0, value="New?"), TALK, *written)
    assert [asked[-1].view, again[-1].view, edited[-1].view] == [view] * 3


@pytest.mark.parametrize("written", [("0", ""), ("x", ""), ("", "40,0"), ("", "wide")])
def test_an_invalid_dicom_view_is_reported(written: tuple[str, str]) -> None:
    with pytest.raises(gr.Error, match="DICOM, in the settings: give"):
        HANDLERS.ask({"text": "What?", "files": []}, (), *written)


def test_an_empty_question_is_not_asked() -> None:
    assert HANDLERS.ask({"text": "  ", "files": []}, TALK, "", "") == (gr.skip(), gr.skip(), gr.skip())


def test_turns_that_are_not_open_are_not_asked() -> None:
    async def answered() -> list[object]:
        return [shown async for shown in HANDLERS.answer(TALK, *CHOSEN)]

    assert asyncio.run(answered()) == []


def test_a_stopped_answer_is_marked_and_only_a_problem_starts_polling() -> None:
    *_, talk, timer = HANDLERS.settle((Turn("?", (), "Only", is_open=True),))
    assert (talk[-1].answer, talk[-1].figures, talk[-1].is_open) == ("Only", "stopped", False)
    assert not timer.active
    *_, timer = HANDLERS.settle((Turn("?", problem="Nobody."),))
    assert timer.active


def test_a_vote_sent_twice_is_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gr, "Info", lambda _text: None)
    handlers = Handlers(Asker("http://127.0.0.1:9", log=ConversationLog(LogArgs(folder=tmp_path))))
    talk = handlers.vote(_event(4, liked="Flag"), TALK, *CHOSEN)
    assert handlers.vote(_event(4, liked="Flag"), talk, *CHOSEN) == talk
    handlers.vote(_event(2, liked=True), talk, *CHOSEN)
    [path] = tmp_path.iterdir()
    flag, upvote = path.read_text().splitlines()
    assert '"flag"' in flag
    assert '"upvote"' in upvote
    assert "Two?" not in upvote


def test_a_seed_that_is_not_a_number_is_reported() -> None:
    async def ask() -> None:
        await anext(HANDLERS.answer((Turn("?", is_open=True),), *CHOSEN[:6], "seven", "", False))

    with pytest.raises(gr.Error, match="whole number"):
        asyncio.run(ask())
