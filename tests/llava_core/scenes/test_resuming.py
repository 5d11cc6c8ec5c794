"""Progress files are complete or absent, and a folder made from other inputs is refused."""

from pathlib import Path

import pytest

from llava_core.errors import LlavaError
from llava_core.scenes.resuming import claim, digest, write_whole


def test_a_file_is_replaced_and_never_overwritten_in_place(tmp_path: Path) -> None:
    note, other = tmp_path / "note", tmp_path / "other"
    write_whole(note, "the old one")
    # A hard link to the same file would reveal any byte written in place.
    other.hardlink_to(note)
    write_whole(note, "new")
    assert (note.read_text(), other.read_text()) == ("new", "the old one")
    assert {path.name for path in tmp_path.iterdir()} == {"note", "other"}


def test_a_folder_can_be_claimed_again_only_for_the_same_inputs(tmp_path: Path) -> None:
    claim(tmp_path / "stage", seed=1, sizes={"b": (2, 3), "a": 1.5})
    claim(tmp_path / "stage", sizes={"a": 1.5, "b": (2, 3)}, seed=1)
    for inputs in ({"seed": 2, "sizes": {"b": (2, 3), "a": 1.5}}, {"seed": 1}):
        with pytest.raises(LlavaError, match=r"stage was made by another recipe.*remove it, or choose another folder"):
            claim(tmp_path / "stage", **inputs)


def test_a_digest_distinguishes_contents(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(text)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
