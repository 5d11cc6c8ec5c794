"""Input lines and messages without a terminal; test_program.py uses one."""

import io
import sys
from pathlib import Path

import pytest

from llava_core.chat.terminal import Terminal, default_history


def at_a_pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> Terminal:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    return Terminal(None)


def test_lines_are_read_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_a_pipe(monkeypatch, b"one\r\n  two  \nlast")
    assert [terminal.read("> ") for _ in range(3)] == ["one", "  two  ", "last"]
    with pytest.raises(EOFError):
        terminal.read("> ")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'"""one\ntwo"""\n', "one\ntwo"),
        (b'"""\none\n\ntwo\n"""\n', "one\n\ntwo"),
        (b'  """one"""  \n', "one"),
        (b'"""one\nwithout an end', "one\nwithout an end"),
        (b'one """ two\n', 'one """ two'),
    ],
)
def test_triple_quotes_enclose_several_lines(monkeypatch: pytest.MonkeyPatch, data: bytes, text: str) -> None:
    assert at_a_pipe(monkeypatch, data).read("> ") == text


def test_invalid_utf_8_does_not_end_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    assert at_a_pipe(monkeypatch, b"a\xff\xfe\n").read("> ") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"


def test_only_answers_go_to_standard_output_and_unchanged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = at_a_pipe(monkeypatch, b"")
    terminal.note("a note")
    terminal.warn("a warning\x1b[2J")
    terminal.stream("an \x1b[31manswer")
    terminal.end_line()
    out, err = capsys.readouterr()
    assert out == "an \x1b[31manswer\n"
    assert err == "a note\na warning [2J\n"


def test_there_is_no_history_without_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    with Terminal(tmp_path / "history").remembering():
        pass
    assert not (tmp_path / "history").exists()


def test_the_history_is_in_the_xdg_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_history() == tmp_path / "llava" / "chat_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_history() == Path("/home/somebody/.local/state/llava/chat_history")
