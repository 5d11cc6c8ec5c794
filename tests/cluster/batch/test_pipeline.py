"""Ray reads the rows that are not done, and no others."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from cluster.batch import sources
from cluster.batch.pipeline import Rows, block_rows, blocks_at_once, datasets
from cluster.batch.records import INPUT_ERROR, Failure, from_block
from cluster.batch.sources import JsonLines, Plan, Span


def test_only_unwritten_rows_are_read(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "a"}\n' * 10_000)
    source = JsonLines(file, tmp_path, None)
    plan = source.plan()
    assert len(plan.spans) == 3
    written = np.zeros(plan.num_rows, bool)
    written[: sources.SPAN_ROWS] = True
    written[5000:9998] = True
    [spans] = datasets(plan, written, max_rows=10**6)
    tasks = Rows(source, spans, written).get_read_tasks(200)
    assert len(tasks) == 2
    read = [record.row for task in tasks for block in task() for record in from_block(block)]
    assert read == [*range(sources.SPAN_ROWS, 5000), 9998, 9999]
    assert [task.metadata.num_rows for task in tasks] == [5000 - sources.SPAN_ROWS, 2]


def test_unwritten_rows_are_split_into_datasets_of_bounded_size(tmp_path: Path) -> None:
    ends = (4, 8, 10, 14, 30, 33, 37)
    spans = tuple(Span(start, stop, tmp_path) for start, stop in pairwise((0, *ends)))
    written = np.zeros(37, bool)
    written[8:10] = True
    parts = [[(span.start, span.stop) for span in part] for part in datasets(Plan(37, "", spans), written, max_rows=10)]
    assert parts == [[(0, 4), (4, 8)], [(10, 14)], [(14, 30)], [(30, 33), (33, 37)]]


def test_a_span_written_meanwhile_is_still_read_as_planned(tmp_path: Path) -> None:
    """A task is pickled: what the driver writes later does not affect it."""
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "a"}\n' * 3)
    source = JsonLines(file, tmp_path, None)
    written = np.zeros(3, bool)
    [task] = Rows(source, source.plan().spans, written).get_read_tasks(1)
    written[:] = True
    assert sum(block.num_rows for block in task()) == 3


def test_an_input_that_disappears_is_read_as_an_input_failure(tmp_path: Path) -> None:
    """If it were raised, Ray Data would count it among the blocks that it may lose, and skip the rows."""
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "a"}\n' * 3)
    source = JsonLines(file, tmp_path, None)
    [task] = Rows(source, source.plan().spans, np.zeros(3, bool)).get_read_tasks(1)
    for change, message, num_read in (
        (lambda: file.write_text('{"text": "a"}\n'), "has changed since the job began", 1),
        (file.unlink, "every machine of the cluster must see it", 0),
        (file.mkdir, "cannot be read", 0),
    ):
        change()
        *read, last = [record for block in task() for record in from_block(block)]
        assert len(read) == num_read
        assert isinstance(last.value, Failure)
        assert last.value.kind == INPUT_ERROR
        assert message in last.value.message


def test_enough_blocks_are_in_flight_to_fill_the_engine() -> None:
    for num_rows in (16, 40, 64):
        for max_running in (1, 15, 16, 17, 32, 256):
            assert (blocks_at_once(max_running, num_rows) - 2) * num_rows >= max_running


def test_long_inputs_have_larger_blocks_within_bounds() -> None:
    assert [block_rows(number) for number in (1, 32_768, 81_920, 131_072, 10**9)] == [16, 16, 40, 64, 64]
