"""Every command line, option and template that the documents tell a user to type exists."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from llava_core.cli import main
from llava_core.prompts.templates import TEMPLATES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`\n]+)`", re.DOTALL | re.MULTILINE)


def commands(document: Path) -> list[str]:
    """Return every command line of `llava` in code blocks and spans, also after a pipe."""
    found = []
    for block, span in CODE.findall(document.read_text(encoding="utf-8")):
        for line in re.split(r"\n|\\?\|", block or span):
            line = line.partition("#")[0].partition(" > ")[0].strip()
            words = line.removeprefix(".venv/bin/")
            if words.startswith("llava ") and "`" not in words:
                found.append(words)
    return found


def named_options(document: Path) -> set[str]:
    """Return the options in code spans that begin with one: those are options of `llava`, because other programs are
    named before theirs."""
    text = document.read_text(encoding="utf-8")
    if document.name == "migrating.md":
        # The left columns show other programs.
        text = re.sub(r"^\|[^|]*", "", text, flags=re.MULTILINE)
    spans = [span for _, span in CODE.findall(text) if span.startswith("--")]
    return {option for span in spans for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", span)}


def options(command: click.Command) -> set[str]:
    """Return the long options of a command, or of all commands of a group, including those of other packages."""
    found = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None, name
            found |= options(inner)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_line_is_valid(document: Path) -> None:
    for line in commands(document):
        # Parts in brackets are optional, but must be valid too.
        words = shlex.split(line.replace("[", " ").replace("]", " "))[1:]
        command: click.Command | None = main
        context = click.Context(main)
        while isinstance(command, click.Group) and words:
            command = command.get_command(context, words.pop(0))
        assert command is not None, line
        if not words:
            # A group's name alone.
            continue
        # Parses and checks every value; runs nothing.
        made = command.make_context("llava", words)
        assert made.params.get("template") in (None, *TEMPLATES), line


def test_every_row_of_the_threat_model_names_existing_tests() -> None:
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_exists(document: Path) -> None:
    assert named_options(document) <= options(main) | {"--version", "--help"}


def test_options_are_extracted_from_code_spans() -> None:
    assert {"--template", "--base", "--padding-jitter"} <= named_options(ROOT / "docs/checkpoints.md")
    migrating = named_options(ROOT / "docs/migrating.md")
    assert "--quantization" in migrating
    assert "--conv-mode" not in migrating


def test_answers_are_converted_to_the_originals_format(tmp_path: Path) -> None:
    program = re.search(r"^```python\n(.*?)^```", (ROOT / "docs/migrating.md").read_text(), re.DOTALL | re.MULTILINE)
    assert program is not None
    files = {
        "questions.jsonl": {"question_id": 7, "image": "x.png", "text": "Is it red?"},
        "answers.jsonl": {"question_id": 7, "prompt": "USER: <image>\nIs it red? ASSISTANT:", "text": " Yes\n"},
    }
    for name, row in files.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", program.group(1), *files], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "question_id": 7,
        "prompt": "Is it red?",
        "text": "Yes",
        "answer_id": "7",
        "model_id": "llava",
        "metadata": {},
    }
