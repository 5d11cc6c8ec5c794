"""What the documents tell a user to type exists: every command line, option and template that they name."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from llava_core.cli import main
from llava_core.prompts.templates import TEMPLATES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`\n]+)`", re.DOTALL | re.MULTILINE)


def commands(document: Path) -> list[str]:
    """Every command line of `llava` in blocks and spans of code, whole ones alone."""
    found = []
    for block, span in CODE.findall(document.read_text(encoding="utf-8")):
        for line in (block or span).splitlines():
            line = line.partition("#")[0].partition(" > ")[0].strip()
            words = line.removeprefix(".venv/bin/")
            if words.startswith("llava ") and len(words.split()) > 2 and "`" not in words:
                found.append(words)
    return found


def options(command: click.Command) -> set[str]:
    """The long options of a command, or of all commands of a group."""
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    own = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    return own.union(*map(options, inner))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_line_is_understood(document: Path) -> None:
    for line in commands(document):
        # What stands in brackets may be left out, and is understood as well.
        words = shlex.split(line.replace("[", " ").replace("]", " "))[1:]
        command: click.Command | None = main
        context = click.Context(main)
        while isinstance(command, click.Group):
            command = command.get_command(context, words.pop(0))
        assert command is not None, line
        # Parses and checks every value; runs nothing.
        made = command.make_context("llava", words)
        assert made.params.get("template") in (None, *TEMPLATES), line


def test_every_line_of_the_threat_model_has_a_test_and_every_test_is_there() -> None:
    text = (ROOT / "docs/threat-model.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| threat", "| ---"))]
    assert len(rows) >= 25
    named = re.compile(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)")
    for row in rows:
        proofs = named.findall(row.rsplit("|", 2)[1])
        assert proofs, f"no test is named: {row}"
        for function, file in proofs:
            tests = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
            names = {node.name for node in tests if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert function in names, f"{file} has no {function}"


def test_every_checkpoint_of_the_table_has_a_command() -> None:
    table = [line for line in (ROOT / "docs/checkpoints.md").read_text().splitlines() if "`llava ask --model " in line]
    assert len([line for line in table if line.startswith("| ")]) >= 18


def test_every_option_is_one() -> None:
    known = options(main) | {"--version", "--help"}
    text = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named
    assert named <= known
