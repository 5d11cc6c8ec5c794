"""The `llava` command: answers as text and JSON, one-line errors, plug-in commands listed without importing them."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from llava_core import cli
from llava_core.cli import main
from llava_core.errors import EngineError
from tests.hub import OLD, hub_of, use_cache, write_lora


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.stdout, result.stderr


def ask(checkpoint: Path, *arguments: str) -> tuple[int, str, str]:
    return run("ask", "--model", str(checkpoint), "--dtype", "float32", "--max-tokens", "6", *arguments, "What is it?")


def test_an_answer_is_printed_and_reproducible(tiny_checkpoint: Path, picture: Path) -> None:
    first = ask(tiny_checkpoint, "--image", str(picture))
    assert first[0] == 0
    assert first == ask(tiny_checkpoint, "--image", str(picture))
    assert first[1].endswith("\n")


def test_a_file_of_questions_is_answered(tiny_checkpoint: Path, picture: Path) -> None:
    lines = [{"question_id": 7, "text": "What?", "image": picture.name}, {"question": "Why?"}]
    file = picture.parent / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    given = ("--model", str(tiny_checkpoint), "--dtype", "float32", "--max-tokens", "3", "--questions", str(file))
    code, out, _ = run("ask", *given, "--format", "json")
    assert code == 0
    assert [json.loads(line).get("question_id") for line in out.splitlines()] == [7, None]
    assert run("ask", *given, "one more")[0] == run("ask", *given, "--image", str(picture))[0] == 2


def test_without_a_question_the_usage_is_shown(tiny_checkpoint: Path) -> None:
    code, _, err = run("ask", "--model", str(tiny_checkpoint))
    assert code == 2
    assert "QUESTION or --questions" in err


def test_a_seed_repeats_a_sampled_answer(tiny_checkpoint: Path) -> None:
    sampled = [ask(tiny_checkpoint, "--temperature", "1.5", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--image", "/no/such/picture.png"), "/no/such/picture.png cannot be read"),
        (("--template", "nonsense"), "unknown template 'nonsense'"),
        (("--temperature", "3"), "--temperature"),
        (("--max-tokens", "0"), "--max-tokens"),
        (("--max-tokens", "5000"), "context of 512"),
    ],
)
def test_a_mistake_gives_an_error_without_a_traceback(
    tiny_checkpoint: Path, arguments: tuple[str, ...], named: str
) -> None:
    code, _, err = ask(tiny_checkpoint, *arguments)
    assert code != 0
    assert named in err
    assert "Traceback" not in err


def test_a_file_that_is_no_picture_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    code, _, err = ask(tiny_checkpoint, "--image", str(tmp_path / "text.png"))
    assert code == 1
    assert err.startswith(f"Error: {tmp_path}/text.png: the data is not an image")


def test_downloads_are_logged_to_stderr_not_into_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local checkpoint names its base and tower by hub id."""
    monkeypatch.chdir(tmp_path)
    folders = write_lora(tmp_path / "written")
    model = folders.pop("owner/lora")
    given = ("ask", "--model", str(model), "--template", "vicuna_v1", "--max-tokens", "2", "--format", "json", "Hi")
    with hub_of({repo_id: {OLD: folder} for repo_id, folder in folders.items()}) as hub:
        use_cache(monkeypatch, tmp_path / "cache", hub.url)
        code, out, err = run(*given, "--offline")
        assert (code, out, hub.asked) == (1, "", [])
        assert "Error: owner/base, the base of" in err
        code, out, err = run(*given)
        assert code == 0
    assert json.loads(out)["token_ids"]
    lines = [line for line in err.splitlines() if "downloading" in line]
    assert [line.split(": ")[0] for line in lines] == [
        f"owner/base, the base of {model}",
        f"openai/tower, the mm_vision_tower of {model / 'config.json'}",
    ]


def test_a_missing_model_gives_a_one_line_error() -> None:
    code, _, err = run("ask", "--model", "/no/such/model", "Hi")
    assert code == 1
    assert err.count("\n") == 1


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands offered by packages: one that can be imported and one that cannot."""
    points = {"hello": f"{__name__}:hello", "broken": "no_such_module:command"}

    def entry_points(*, group: str, name: str | None = None) -> list[EntryPoint]:
        return [EntryPoint(key, value, group) for key, value in points.items() if name in (None, key)]

    monkeypatch.setattr(cli, "entry_points", entry_points)
    monkeypatch.setattr(EntryPoint, "load", lambda point: {"hello": hello}[point.name])


@click.command()
def hello() -> None:
    """Fail on purpose."""
    raise EngineError("the engine has stopped")


@pytest.mark.usefixtures("offered")
def test_offered_commands_run_and_give_one_line_errors() -> None:
    assert run("hello") == (1, "", "Error: the engine has stopped\n")


def test_commands_are_listed_without_importing_them(monkeypatch: pytest.MonkeyPatch, offered: None) -> None:
    monkeypatch.setattr(EntryPoint, "load", lambda _: pytest.fail("a command was imported"))
    listed = cli.CommandGroup(commands=main.commands).list_commands(click.Context(main))
    assert listed == sorted([*main.commands, "broken", "hello"])


@pytest.mark.usefixtures("offered")
def test_help_names_a_command_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(point: EntryPoint) -> click.Command:
        if point.name == "hello":
            return hello
        raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")

    monkeypatch.setattr(EntryPoint, "load", load)
    code, out, _ = run("--help")
    assert code == 0
    assert "Fail on purpose" in out
    assert "pydantic is missing" in out
    code, _, err = run("broken", "--some-option", "value")
    assert code == 1
    assert "`llava broken` needs pydantic" in err
    assert "pip install" in err


def test_a_missing_module_of_our_own_is_not_reported_as_an_extra(
    monkeypatch: pytest.MonkeyPatch, offered: None
) -> None:
    def load(_: EntryPoint) -> click.Command:
        raise ModuleNotFoundError("No module named 'deployments.nothing'", name="deployments.nothing")

    monkeypatch.setattr(EntryPoint, "load", load)
    assert isinstance(CliRunner().invoke(main, ["broken"]).exception, ModuleNotFoundError)


def test_help_loads_neither_torch_nor_ray() -> None:
    code = "import sys; from llava_core.cli import main; main(['--help'], standalone_mode=False); "
    code += "print([name for name in ('torch', 'transformers', 'ray', 'starlette') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "serve" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "[]"


def test_an_unknown_command_is_a_usage_error() -> None:
    code, _, err = run("no-such-command")
    assert code == 2
    assert "No such command" in err
