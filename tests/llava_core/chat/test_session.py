"""What lines do to a conversation, with a fake terminal and a fake backend; test_program.py uses real ones."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_core.chat.session import Session
from llava_core.chat.transcript import load_transcript
from llava_core.errors import EngineError
from llava_core.types import ImagePart, ImageUrl, Message, TextPart, TokenDelta
from llava_core.views import DicomView
from tests.deployments.pictures import plain

RED = plain()
HELLO = Message("assistant", (TextPart("Hello"),))


class Answering:
    """A backend that answers with `pieces`, raises those that are exceptions, and records its questions."""

    def __init__(self, *pieces: str | BaseException) -> None:
        self.name = "made up"
        self.takes_addresses = True
        self.pieces: Sequence[str | BaseException] = pieces or ("Hel", "lo")
        self.asked: list[tuple[tuple[Message, ...], str | None]] = []

    def answer(
        self, history: Sequence[Message], question: Message, system: str | None
    ) -> Generator[TokenDelta, None, None]:
        self.asked.append(((*history, question), system))
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield TokenDelta("1", piece)
        yield TokenDelta("1", "", finish_reason="length")


class Typing:
    """A terminal at which these lines are typed; those that are exceptions are raised."""

    def __init__(self, *lines: str | BaseException, is_interactive: bool = True) -> None:
        self.is_interactive = is_interactive
        self.lines = list(lines)
        self.shown: list[str] = []
        self.stream = self.note = self.warn = self.shown.append

    def end_line(self) -> None:
        self.shown.append("\n")

    def read(self, _prompt: str) -> str:
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line


def run(backend: Answering, *lines: str | BaseException, **options: Any) -> tuple[Session, str]:
    terminal = Typing(*lines, **options)
    session = Session(backend, terminal)  # type: ignore[arg-type]
    session.run()
    return session, "|".join(terminal.shown)


def user(text: str, *pictures: ImagePart | ImageUrl) -> Message:
    return Message("user", (*pictures, TextPart(text)))


def test_earlier_turns_are_the_history_of_the_next_question() -> None:
    backend = Answering()
    session, shown = run(backend, "One?", "", "  ", "Two?")
    assert backend.asked[-1] == ((user("One?"), HELLO, user("Two?")), None)
    assert session.messages == [user("One?"), HELLO, user("Two?"), HELLO]
    assert shown.startswith("Hel|lo||\n|(cut off at the token limit)|Hel")


def test_the_text_of_a_stopped_answer_is_kept() -> None:
    session, shown = run(Answering("Hel", KeyboardInterrupt()), "One?")
    assert session.messages == [user("One?"), Message("assistant", (TextPart("Hel"),))]
    assert "(stopped)" in shown
    session, _ = run(Answering(KeyboardInterrupt()), "One?")
    assert session.messages == []


@pytest.mark.parametrize("at_the_prompt", [True, False])
def test_ctrl_c_ends_a_piped_chat(*, at_the_prompt: bool) -> None:
    backend = Answering(*() if at_the_prompt else (KeyboardInterrupt(),))
    with pytest.raises(KeyboardInterrupt):
        run(backend, KeyboardInterrupt() if at_the_prompt else "One?", is_interactive=False)


def test_a_failed_turn_is_dropped_but_its_pictures_are_kept(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    backend = Answering("Hel", EngineError("broken"))
    session, shown = run(backend, f"/image {tmp_path}/red.png", "What?", "/image https://example.com/a.png", "And?")
    assert session.messages == []
    assert session.num_failed == 2
    assert "not part of the conversation" in shown
    assert "error: broken" in shown
    assert backend.asked[-1][0] == (user("And?", ImagePart(RED), ImageUrl("https://example.com/a.png")),)


def test_addresses_are_refused_by_backends_that_do_not_fetch(tmp_path: Path) -> None:
    backend = Answering()
    run(backend, "/image https://example.com/a.png", "What?", f"/save {tmp_path}/talk.json")
    backend.takes_addresses = False
    session, shown = run(backend, "/image https://example.com/a.png", "Alone?", f"/load {tmp_path}/talk.json")
    assert shown.count("only a service (--url) can fetch pictures by address") == 2
    assert session.messages == [user("Alone?"), HELLO]


def test_dicom_files_are_viewed_by_the_last_settings(tmp_path: Path) -> None:
    scan = b"\0" * 128 + b"DICM"
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "ct.dcm").write_bytes(scan)
    address = ImageUrl("https://example.com/ct")
    backend = Answering()
    file, url = f"/image {tmp_path}/ct.dcm", f"/image {address.url}"
    lines = (file, url, "/window 40,400", "/frame 3", file, url, f"{tmp_path}/red.png", "/window 2", file)
    session, shown = run(backend, *lines, "/window", "/frame", file, url, "What?")
    soft, second = DicomView(3, (40, 400)), DicomView(3, 2)
    pictures = (
        *(ImagePart(scan), address, ImagePart(scan, dicom=soft), replace(address, dicom=soft)),
        *(ImagePart(RED), ImagePart(scan, dicom=second), ImagePart(scan), address),
    )
    assert backend.asked[-1][0] == (user("What?", *pictures),)
    assert "frame 3, window (40.0, 400.0)" in shown
    assert "frame 1, as the file says" in shown
    assert session.num_failed == 0


def test_invalid_windows_and_frames_change_nothing() -> None:
    wrong = ("/window 40,0", "/window x", "/frame 0", "/frame -1")
    session, shown = run(Answering(), "/frame 3", "/window 40,400", *wrong)
    assert session.view == DicomView(3, (40, 400))
    assert shown.count("give CENTRE,WIDTH") == 2
    assert shown.count("give the number of a frame, counted from 1") == 2


def test_a_system_text_can_be_set_and_removed() -> None:
    backend = Answering()
    run(backend, "/system  Be brief. ", "One?", "/system", "Two?")
    assert [system for _, system in backend.asked] == ["Be brief.", None]


def test_clear_drops_pending_pictures_too(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    backend = Answering()
    run(backend, "One?", f"{tmp_path}/red.png", "/clear", "Two?")
    assert backend.asked[-1][0] == (user("Two?"),)


def test_a_chat_overwrites_only_its_own_file(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    run(Answering(), "One?", f"/save {file}", "Two?", f"/save {file}")
    assert len(load_transcript(file).messages) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    _, shown = run(Answering(), "Other?", f"/save {file}")
    assert "exists already" in shown
    assert len(load_transcript(file).messages) == 4
    run(Answering(), f"/load {file}", "More?", f"/save {file}")
    assert len(load_transcript(file).messages) == 6
    _, shown = run(Answering(), f"/save {tmp_path}/none/talk.json")
    assert "cannot be written: No such file or directory" in shown


def test_paths_in_a_command_are_not_taken_as_pictures(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    backend = Answering()
    session, shown = run(backend, f"/system Ask about {tmp_path}/red.png", f"/image {tmp_path}/red.png", "What?")
    assert session.system == f"Ask about {tmp_path}/red.png"
    assert backend.asked[-1][0] == (user("What?", ImagePart(RED)),)
    assert "error" not in shown
    assert session.num_failed == 0
