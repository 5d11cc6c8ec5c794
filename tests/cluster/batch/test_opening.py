"""Which kind of input a path is."""

from pathlib import Path

import pytest

from cluster.batch.errors import InputError
from cluster.batch.opening import open_source
from cluster.batch.parquet_source import Parquet
from cluster.batch.sources import JsonLines, PictureFolder

OUTPUT = Path("out.parquet")


def test_the_kind_of_input_follows_from_suffix_or_content(tmp_path: Path) -> None:
    for name in ("a.jsonl", "B.JSONL", "tables/b.PARQUET", "tables/a.parquet", "pictures/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert open_source(tmp_path / "a.jsonl", OUTPUT, image_folder=None, prompt=None) == JsonLines(
        tmp_path / "a.jsonl", tmp_path, None
    )
    assert open_source(tmp_path / "B.JSONL", OUTPUT, image_folder=tmp_path, prompt="q") == JsonLines(
        tmp_path / "B.JSONL", tmp_path, "q"
    )
    tables = tmp_path / "tables"
    assert open_source(tables, OUTPUT, image_folder=tmp_path / "pictures", prompt="q") == Parquet(
        (tables / "a.parquet", tables / "b.PARQUET"), tmp_path / "pictures", "q"
    )
    assert open_source(tables / "a.parquet", OUTPUT, image_folder=None, prompt=None) == Parquet(
        (tables / "a.parquet",), tables, None
    )
    assert open_source(tmp_path / "pictures", OUTPUT, image_folder=None, prompt="q") == PictureFolder(
        tmp_path / "pictures", "q"
    )


def test_an_invalid_input_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    (tmp_path / "a.jsonl").touch()
    for path, folder, message in (
        (tmp_path / "none.jsonl", None, "does not exist"),
        (tmp_path / "a.csv", None, r"ends with \.jsonl or \.parquet: unpack .* convert"),
        (tmp_path, None, "give --prompt"),
        (tmp_path / "a.jsonl", tmp_path / "none", "none is not a folder"),
        (tmp_path / "a.jsonl", tmp_path / "a.csv", r"a\.csv is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(path, OUTPUT, image_folder=folder, prompt=None)
    with pytest.raises(InputError, match="--image-folder is for a file"):
        open_source(tmp_path, OUTPUT, image_folder=tmp_path, prompt="q")


def test_an_output_inside_the_picture_folder_is_not_taken_for_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "out.parquet").mkdir()
    (tmp_path / "out.parquet" / "part-00000.parquet").touch()
    assert open_source(tmp_path, tmp_path / "out.parquet", image_folder=None, prompt="q") == PictureFolder(
        tmp_path, "q"
    )


def test_a_folder_of_both_tables_and_pictures_is_refused(tmp_path: Path) -> None:
    for name in ("a.JPG", "metadata.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"both Parquet files and pictures, such as metadata\.parquet and a\.JPG"):
        open_source(tmp_path, OUTPUT, image_folder=None, prompt="q")


def test_an_input_cannot_be_its_own_output(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").mkdir()
    with pytest.raises(InputError, match="cannot be the output of its own answers"):
        open_source(tmp_path / "a.parquet", tmp_path / "b" / ".." / "a.parquet", image_folder=None, prompt="q")
