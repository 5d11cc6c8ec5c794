"""Where the configuration is read from, and which of its applications is ours."""

from pathlib import Path

import pytest

from deployments.errors import LaunchError
from deployments.launch.config_file import DEFAULT_CONFIG, IMPORT_PATH, find_application, read_config


def test_the_default_configuration_is_a_fresh_copy_with_one_application(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = read_config(None)
    find_application(content)["args"] = {"models": [{"name": "mine"}]}
    assert read_config(None) == DEFAULT_CONFIG != content


def test_our_application_is_found_among_others(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"applications: [{{import_path: other:app}}, {{name: x, import_path: {IMPORT_PATH}}}]")
    assert find_application(read_config(path))["name"] == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not YAML"),
        ("- 1", "must hold a Serve configuration"),
        ("applications: []", "names no application"),
        ("applications: [{import_path: other:app}]", "names no application"),
    ],
)
def test_an_invalid_configuration_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(LaunchError, match=message):
        find_application(read_config(tmp_path / "c.yaml"))


def test_a_missing_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")
