"""Which kind of input a path is, judged by whether it is a folder or a file, and by the suffix."""

from __future__ import annotations

from pathlib import Path

from cluster.batch.errors import InputError
from cluster.batch.parquet_source import Parquet
from cluster.batch.sources import PICTURE_SUFFIXES, JsonLines, PictureFolder, Source


def open_source(path: Path, output: Path, *, image_folder: Path | None, prompt: str | None) -> Source:
    """Open the input. Raises InputError for a path that does not exist, is of unknown type, or is the output itself."""
    if path.resolve() == output.resolve():
        raise InputError(f"{path} cannot be the output of its own answers; name another")
    if image_folder is not None and not image_folder.is_dir():
        raise InputError(f"--image-folder {image_folder} is not a folder; pictures are named from it")
    if path.is_dir():
        return _open_folder(path, image_folder, prompt)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    folder, suffix = image_folder or path.parent, path.suffix.lower()
    if suffix == ".parquet":
        return Parquet((path,), folder, prompt)
    if suffix in (".jsonl", ".json", ".ndjson"):
        return JsonLines(path, folder, prompt)
    raise InputError(
        f"{path} is neither a folder nor a file that ends with .jsonl or .parquet: unpack it if it is compressed, and "
        "convert a table of another kind into either"
    )


def _open_folder(path: Path, image_folder: Path | None, prompt: str | None) -> Source:
    # A folder that ends with .parquet is an output.
    files = [file for file in path.iterdir() if file.is_file()]
    tables = tuple(sorted(file for file in files if file.suffix.lower() == ".parquet"))
    pictures = sorted(file for file in files if file.suffix.lower() in PICTURE_SUFFIXES)
    if tables and pictures:
        raise InputError(
            f"{path} holds both Parquet files and pictures, such as {tables[0].name} and {pictures[0].name}: give the "
            "Parquet file, which may name the pictures, or put each kind into its own folder"
        )
    if tables:
        return Parquet(tables, image_folder or path, prompt)
    if prompt is None:
        raise InputError(f"{path} is a folder of pictures without questions: give --prompt")
    if image_folder is not None:
        raise InputError(f"--image-folder is for a file that names pictures; {path} is a folder of pictures itself")
    return PictureFolder(path, prompt)
