"""`llava chat` in use: the real program at a pseudo-terminal or a pipe, with a local model or a service."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from llava_core.chat.transcript import load_transcript
from llava_core.cli import main
from llava_core.errors import EngineError
from llava_core.types import GenerationRequest, ImagePart, Message, TextPart
from llava_core.views import DicomView
from tests.deployments.fakes import ScriptedEngine, answer
from tests.deployments.pictures import plain
from tests.deployments.service import until
from tests.dicom_files import dicom, radiograph
from tests.pseudo_terminals import PROGRAM, PseudoTerminal, llava_at_a_terminal
from tests.sockets import SSE_HEAD, chunked, scripted, serving_engine, whole

RED, BLUE = plain(), plain("blue")


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(answer("Hel", "lo"))


@pytest.fixture
def chat(engine: ScriptedEngine, tmp_path: Path) -> Iterator[PseudoTerminal]:
    """A chat at a terminal, with the gateway giving scripted answers."""
    with serving_engine(engine) as url, llava_at_a_terminal("chat", "--url", url, home=tmp_path) as terminal:
        yield terminal


def asked(engine: ScriptedEngine) -> tuple[Message, ...]:
    request = engine.requests[-1]
    assert isinstance(request, GenerationRequest)
    return request.messages


def texts(engine: ScriptedEngine) -> list[str]:
    return [part.text for message in asked(engine) for part in message.parts if isinstance(part, TextPart)]


def test_ctrl_c_stops_the_answer_and_the_chat_continues(chat: PseudoTerminal, engine: ScriptedEngine) -> None:
    """The answer is shown as it arrives: while it hangs, the text so far is on the screen."""
    engine.items, engine.hangs = answer("Hel", "lo")[:1], True
    chat.line("First?")
    chat.expect("\nHel")
    assert engine.num_open == 1
    chat.interrupt()
    chat.expect("(stopped)")
    until(lambda: engine.num_open == 0)
    engine.items, engine.hangs = answer("By", "e"), False
    chat.line("Second?")
    assert chat.expect("Bye").endswith("Second?\n")
    assert texts(engine) == ["First?", "Hel", "Second?"]
    assert chat.end() == 0


def test_ctrl_c_at_the_prompt_drops_the_line(chat: PseudoTerminal, engine: ScriptedEngine) -> None:
    chat.expect(">>> ")
    chat.type("never sent")
    chat.expect("never sent")
    chat.interrupt()
    chat.line("Sent?")
    chat.expect("Hello")
    assert texts(engine) == ["Sent?"]
    assert chat.end() == 0


def test_dropped_pictures_are_asked_about_in_any_turn(
    chat: PseudoTerminal, engine: ScriptedEngine, tmp_path: Path
) -> None:
    (tmp_path / "my red.png").write_bytes(RED)
    (tmp_path / "blue.png").write_bytes(BLUE)
    chat.line(str(tmp_path / "my red.png").replace(" ", "\\ "))
    chat.expect("picture 1: ")
    chat.line("What?")
    chat.expect("Hello")
    chat.line(f"/image '{tmp_path / 'blue.png'}'")
    chat.expect("picture 2: ")
    chat.line(f"'{tmp_path / 'my red.png'}' And these?")
    chat.expect("Hello")
    assert asked(engine) == (
        Message("user", (ImagePart(RED), TextPart("What?"))),
        Message("assistant", (TextPart("Hello"),)),
        Message("user", (ImagePart(BLUE), ImagePart(RED), TextPart("And these?"))),
    )
    assert chat.end() == 0


def test_a_chat_is_saved_cleared_and_loaded_again(chat: PseudoTerminal, engine: ScriptedEngine, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    file = tmp_path / "talk.json"
    chat.line("/system Be brief.")
    chat.line(f"{tmp_path / 'red.png'} What?")
    chat.expect("Hello")
    chat.line(f"/save {file}")
    chat.expect("2 messages written")
    saved = load_transcript(file)
    assert (saved.model, saved.system) == ("m", "Be brief.")
    assert saved.messages == (*asked(engine), Message("assistant", (TextPart("Hello"),)))
    chat.line("/clear")
    chat.line("Alone?")
    chat.expect("Hello")
    assert texts(engine) == ["Alone?"]
    chat.line(f"/load {file}")
    chat.expect("2 messages of")
    chat.line("Again?")
    chat.expect("Hello")
    assert texts(engine) == ["What?", "Hello", "Again?"]
    assert asked(engine)[0].parts[0] == ImagePart(RED)
    assert chat.end() == 0


def test_several_lines_are_one_question(chat: PseudoTerminal, engine: ScriptedEngine) -> None:
    chat.line('"""one')
    chat.expect("... ")
    chat.type("two\r")
    chat.expect("... ")
    chat.type('three"""\r')
    chat.expect("Hello")
    assert texts(engine) == ["one\ntwo\nthree"]
    # Pasted text, as a terminal sends it.
    chat.expect(">>> ")
    chat.type("\x1b[200~four\nfive\x1b[201~")
    chat.expect("five")
    chat.type("\r")
    chat.expect("Hello")
    assert texts(engine)[-1] == "four\nfive"
    assert chat.end() == 0


def test_help_and_mistakes_do_not_end_the_chat(chat: PseudoTerminal, engine: ScriptedEngine, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    chat.line("/help")
    assert "/save FILE" in chat.expect("Ctrl-C stops")
    for line, expected in [
        ("/nonsense", "/nonsense is not a command"),
        ("/image", "usage: /image PATH"),
        ("/image /none.png", "/none.png cannot be read"),
        (f"/image {tmp_path}/notes.txt", "is not a picture"),
        (f"{tmp_path}/notes.txt", "not a picture that can be read"),
        ("/load /none.json", "/none.json cannot be read"),
        (f"/save {tmp_path}/notes.txt", "exists already"),
    ]:
        chat.line(line)
        chat.expect(expected)
    assert (tmp_path / "notes.txt").read_text() == "x"
    chat.line("Still there?")
    chat.expect("Hello")
    assert texts(engine) == ["Still there?"]
    chat.line("/exit")
    assert chat.process.wait(30) == 0


def test_an_interrupted_answer_is_reported_and_can_be_retried(
    chat: PseudoTerminal, engine: ScriptedEngine, tmp_path: Path
) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    engine.items = [*answer("Hel", "lo")[:1], EngineError("broken")]
    chat.line(f"{tmp_path / 'red.png'} What?")
    chat.expect("\nHel")
    chat.expect("could not be generated")
    engine.items = answer("Hel", "lo")
    chat.line("What?")
    chat.expect("Hello")
    assert asked(engine) == (Message("user", (ImagePart(RED), TextPart("What?"))),)
    assert chat.end() == 0


def test_the_death_of_the_service_during_an_answer_is_reported(tmp_path: Path) -> None:
    event = b'data: {"choices": [{"index": 0, "delta": {"content": "Hel"}}]}\n\n'
    released = threading.Event()

    def die(connection: socket.socket) -> None:
        connection.sendall(SSE_HEAD + chunked(event))
        assert released.wait(60)
        # The server resets the connection, as if its process were killed.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    end = chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    models = whole("200 OK", b'{"data": [{"id": "m"}]}')
    with (
        scripted(models, die, SSE_HEAD + chunked(event) + end) as server,
        llava_at_a_terminal("chat", "--url", server.url, home=tmp_path) as chat,
    ):
        chat.line("First?")
        chat.expect("\nHel")
        released.set()
        chat.expect("the connection broke")
        chat.line("Second?")
        chat.expect("\nHel")
        assert chat.end() == 0
    assert [message["content"] for message in json.loads(server.requests[-1][1])["messages"]] == ["Second?"]


def test_lines_are_kept_for_the_next_chat_except_with_no_history(engine: ScriptedEngine, tmp_path: Path) -> None:
    history = tmp_path / ".local" / "state" / "llava" / "chat_history"
    with serving_engine(engine) as url:
        with llava_at_a_terminal("chat", "--url", url, "--no-history", home=tmp_path) as chat:
            chat.line("Forgotten?")
            assert chat.end() == 0
        assert not history.exists()
        with llava_at_a_terminal("chat", "--url", url, home=tmp_path) as chat:
            chat.line("Remembered?")
            chat.expect("Hello")
            assert chat.end() == 0
        assert history.read_text() == "Remembered?\n"
        assert stat.S_IMODE(history.stat().st_mode) == 0o600
        with llava_at_a_terminal("chat", "--url", url, home=tmp_path) as chat:
            chat.expect(">>> ")
            # The up-arrow key, for the previous line.
            chat.type("\x1b[A")
            chat.expect("Remembered?")
            chat.type("\r")
            chat.expect("Hello")
            assert chat.end() == 0
    assert texts(engine) == ["Remembered?"]


def test_an_unwritable_history_is_reported(engine: ScriptedEngine, tmp_path: Path) -> None:
    (tmp_path / "llava").write_text("a file where a folder should be")
    with (
        serving_engine(engine) as url,
        llava_at_a_terminal("chat", "--url", url, home=tmp_path, XDG_STATE_HOME=str(tmp_path)) as chat,
    ):
        chat.expect("no history: ")
        chat.line("Hi")
        chat.expect("Hello")
        assert chat.end() == 0


def test_only_terminals_get_colours_and_answers_cannot_set_any(engine: ScriptedEngine, tmp_path: Path) -> None:
    engine.items = answer("red \x1b[31mand \x07bell", "")
    with serving_engine(engine) as url:
        for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
            with llava_at_a_terminal("chat", "--url", url, home=tmp_path, **environment) as chat:
                chat.line("/nonsense")
                chat.line("Hi")
                chat.expect("red \ufffd[31mand \ufffdbell")
                assert chat.end() == 0
            assert ("\x1b[31m" in chat.shown) == coloured
            assert ("\x1b[1;32m" in chat.shown) == coloured


def test_a_chat_with_a_model_in_the_same_process(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "my red.png").write_bytes(RED)
    given = ("--model", str(tiny_checkpoint), "--dtype", "float32", "--max-tokens", "6")
    question = f"{tmp_path}/my\\ red.png What is it?"
    with llava_at_a_terminal("chat", *given, home=tmp_path) as chat:
        chat.expect("Loading ")
        chat.line(question)
        chat.line("And?")
        chat.line(f"/save {tmp_path}/talk.json")
        chat.expect("4 messages written")
        assert chat.end() == 0
    first = load_transcript(tmp_path / "talk.json").messages[1]
    asked_once = CliRunner().invoke(main, ["ask", *given, "--image", str(tmp_path / "my red.png"), "What is it?"])
    assert first == Message("assistant", (TextPart(asked_once.stdout.removesuffix("\n")),))


def piped(text: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "chat", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_a_pipe_is_answered_line_by_line(engine: ScriptedEngine, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    with serving_engine(engine) as url:
        done = piped(f'{tmp_path}/red.png\nOne?\n\n"""Two\nand\n', "--url", url, home=tmp_path)
    assert (done.returncode, done.stdout) == (0, "Hello\nHello\n")
    assert re.fullmatch(r"picture 1: .*red\.png\n", done.stderr)
    assert texts(engine) == ["One?", "Hello", "Two\nand"]
    assert not (tmp_path / ".local").exists()


def test_an_unanswered_line_fails_a_script(engine: ScriptedEngine, tmp_path: Path) -> None:
    with serving_engine(engine) as url:
        done = piped("/image none.png\nOne?\n", "--url", url, home=tmp_path)
    assert (done.returncode, done.stdout) == (1, "Hello\n")
    assert (
        done.stderr
        == "error: none.png cannot be read: No such file or directory\nError: 1 of the lines could not be answered\n"
    )


def test_options_reach_the_service(engine: ScriptedEngine, tmp_path: Path) -> None:
    given = ["--temperature", "0.5", "--top-p", "0.9", "--seed", "3", "--max-tokens", "9", "--system", "Be brief."]
    with serving_engine(engine) as url:
        result = CliRunner().invoke(main, ["chat", "--url", url, *given], input="Hi\n")
        unfit = CliRunner().invoke(main, ["chat", "--url", url, "--dtype", "float32"], input="Hi\n")
        other = CliRunner().invoke(main, ["chat", "--url", url, "--model", "other"], input="Hi\n")
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    request = engine.requests[-1]
    assert isinstance(request, GenerationRequest)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.max_tokens) == (0.5, 0.9, 3, 9)
    assert request.system == "Be brief."
    assert (unfit.exit_code, "--dtype is for a model that is loaded here" in unfit.stderr) == (2, True)
    assert (other.exit_code, "unknown model 'other'" in other.stderr) == (1, True)


def test_commands_override_the_dicom_options(engine: ScriptedEngine, tmp_path: Path) -> None:
    scan = dicom(radiograph())
    (tmp_path / "scan.dcm").write_bytes(scan)
    (tmp_path / "red.png").write_bytes(RED)
    lines = f"{tmp_path}/red.png One?\n{tmp_path}/scan.dcm Two?\n/window 40,400\n{tmp_path}/scan.dcm Three?\n"
    with serving_engine(engine) as url:
        result = CliRunner().invoke(main, ["chat", "--url", url, "--window", "1"], input=lines)
    assert (result.exit_code, result.stdout) == (0, "Hello\n" * 3)
    assert [part for message in asked(engine) for part in message.parts if not isinstance(part, TextPart)] == [
        ImagePart(RED),
        ImagePart(scan, dicom=DicomView(window=1)),
        ImagePart(scan, dicom=DicomView(window=(40, 400))),
    ]
    wrong = CliRunner().invoke(main, ["chat", "--window", "40,0"])
    assert (wrong.exit_code, "CENTRE,WIDTH" in wrong.stderr) == (2, True)


def test_an_unreachable_service_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_core.client.synchronous.sleep", lambda _: None)
    result = CliRunner().invoke(main, ["chat", "--url", "http://127.0.0.1:9"], input="Hi\n")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "connection to http://127.0.0.1:9 failed" in result.stderr
