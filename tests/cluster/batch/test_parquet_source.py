"""Parquet as an input, including the form that image datasets use."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.batch.errors import InputError
from cluster.batch.parquet_source import Parquet
from cluster.batch.records import Failure, Record
from llava_core.questions import Question


def read_all(source: Parquet) -> list[Record]:
    plan = source.plan()
    rows = [record for span in plan.spans for record in source.read(span)]
    assert [record.row for record in rows] == list(range(plan.num_rows))
    return rows


def write(file: Path, rows: list[dict[str, object]], **options: object) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), file, **options)
    return file


def test_rows_of_several_files_and_row_groups_are_numbered_consecutively(tmp_path: Path) -> None:
    files = [
        write(
            tmp_path / f"{k}.parquet",
            [{"id": f"{k}{i}", "text": "a", "image": "x.png"} for i in range(5)],
            row_group_size=2,
        )
        for k in range(2)
    ]
    rows = read_all(Parquet(tuple(files), tmp_path, None))
    assert [record.id for record in rows] == [f"{k}{i}" for k in range(2) for i in range(5)]
    assert rows[0].value == Question("a", (tmp_path / "x.png",), "00")


def test_pictures_may_be_embedded_in_the_table(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    data = buffer.getvalue()
    rows = [{"question": "a", "image": {"bytes": data, "path": "x.png"}}, {"question": "a", "image": None}]
    first, second = read_all(Parquet((write(tmp_path / "a.parquet", rows),), tmp_path, None))
    assert (first.value, second.value) == (Question("a", (data,)), Question("a"))
    assert first.images == ("",)


def test_a_row_without_a_question_is_a_failure(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [{"text": "a", "id": 1.0}, {"text": None, "id": 2.0}])
    good, bad = read_all(Parquet((file,), tmp_path, None))
    assert isinstance(good.value, Question)
    assert isinstance(bad.value, Failure)
    assert "row 1 needs `question`" in bad.value.message
    assert bad.id == 2.0


def test_a_table_without_questions_is_refused_with_its_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [{"picture": "x", "caption": "y"}])
    with pytest.raises(InputError, match="but picture, caption"):
        Parquet((file,), tmp_path, None).plan()


def test_rows_of_a_damaged_row_group_fail_and_others_are_read(tmp_path: Path) -> None:
    rows = [{"id": i, "text": "some text " * 20 + str(i)} for i in range(40)]
    file = write(tmp_path / "a.parquet", rows, row_group_size=20, compression="gzip", use_dictionary=False)
    group = pq.ParquetFile(file).metadata.row_group(1).column(1)
    data = bytearray(file.read_bytes())
    at = group.data_page_offset
    data[at : at + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    file.write_bytes(data)
    values = [record.value for record in read_all(Parquet((file,), tmp_path, None))]
    assert all(isinstance(value, Question) for value in values[:20])
    for value in values[20:]:
        assert isinstance(value, Failure)
        assert "row group 1 is damaged" in value.message


def test_a_file_that_is_not_parquet_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(InputError, match=r"a\.parquet is not a Parquet file"):
        Parquet((tmp_path / "a.parquet",), tmp_path, None).plan()
