"""Bases: where their name comes from, and how a wrong base is detected."""

from pathlib import Path

import pytest

from llava_core.checkpoints.bases import base_name, check_base, find_base
from llava_core.checkpoints.hub import Hub
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.errors import CheckpointError
from tests.original import Kind, write_original
from tests.tiny import edit_json, write_json


def test_a_given_base_takes_precedence_over_the_adapters_own(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "owner/base"})
    assert base_name(tmp_path, None) == "owner/base"
    assert base_name(tmp_path, "another") == "another"


@pytest.mark.parametrize("named", [None, "", 3])
def test_a_missing_base_name_is_an_error(tmp_path: Path, named: object) -> None:
    with pytest.raises(CheckpointError, match="needs the model it was trained on; name it with --base"):
        base_name(tmp_path, None)
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": named})
    with pytest.raises(CheckpointError, match=rf"base_model_name_or_path in its .* is {named!r}; name it with --base"):
        base_name(tmp_path, None)


def test_the_bases_tower_is_taken_only_on_request(tmp_path: Path) -> None:
    whole = write_original(tmp_path, Kind(tower_inside=True)).folder
    found, weights = find_base(tmp_path, whole, Hub(), takes_tower=False)
    assert found == weights.folder == whole
    assert weights.parts == {"projector", "decoder", "newline"}
    assert find_base(tmp_path, whole, Hub(), takes_tower=True)[1].parts == {*weights.parts, "tower"}


def test_a_base_that_is_not_a_complete_model_is_named(tmp_path: Path) -> None:
    projector = write_original(tmp_path, Kind(layout="projector")).folder
    with pytest.raises(CheckpointError, match=f"{projector}, the base of /x, is not a complete model"):
        find_base(Path("/x"), projector, Hub(), takes_tower=False)


def test_a_base_of_another_size_is_refused_with_both_numbers(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    assert original.base is not None
    config = open_checkpoint(original.folder, original.base).config
    check_base(config, original.folder, original.base)
    edit_json(original.base / "config.json", lambda config: config.update(num_hidden_layers=40))
    message = rf"{original.base} is the wrong base for {original.folder}: its num_hidden_layers is 40, .* says 2"
    with pytest.raises(CheckpointError, match=message):
        check_base(config, original.folder, original.base)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(original.folder, original.base)
