"""The stages as a Ray Data pipeline over the rows that are not yet done.

Read tasks make small blocks of rows; pools of actors pass them from stage to stage, with as many in flight as keep an
engine full. Ray retries blocks that are lost with a process. Knows nothing about outputs.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from cluster.batch.errors import InputError
from cluster.batch.records import INPUT_ERROR, Block, Failure, Record, from_block, to_block
from cluster.batch.settings import JobSettings, StageName, StageSettings
from cluster.batch.sources import Plan, Source, Span
from cluster.batch.stages import Encode, Generate, Prepare

# Ray Data keeps metadata of every block until its dataset ends. So a long input is split into consecutive datasets, and
# the driver's memory does not grow with the input. Each dataset restarts the stages, so it gets this many rows per
# engine.
_DATASET_ROWS = 128 * 1024
# Rows per block, fewest and most: the longer the input, the more, for about this many blocks.
_BLOCK_ROWS, _BLOCKS = (16, 64), 2048
READ_CPUS = 0.1
# How often Ray retries a block that was lost with a process, and how many blocks of several rows may be lost for good:
# more are no accident. Of isolated rows any number may be lost: then the job decides.
_RETRIES, _MAX_LOST_BLOCKS, _ANY_NUMBER = 2, 100, -1
_PREPARE_THREADS = 2


@dataclass(frozen=True)
class Rows(Datasource):
    """The rows of these spans that are not in `written`; each read task carries its own span's part of it."""

    source: Source
    spans: Sequence[Span]
    written: npt.NDArray[np.bool_]

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: Ray would size its read tasks by it, but the size is unknown."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """Return one task per span, whatever parallelism Ray asks for."""
        return [self._task(span) for span in self.spans]

    def _task(self, span: Span) -> ReadTask:
        source, done = self.source, self.written[span.start : span.stop].copy()

        def read() -> Iterator[Block]:
            open_rows = (record for record in source.read(span) if not done[record.row - span.start])
            block: list[Record] = []
            try:
                for record in open_rows:
                    block.append(record)
                    if len(block) == 1024:
                        yield to_block(block)
                        block = []
            except (InputError, OSError) as error:
                # If raised, it would only count as one of the blocks that may be lost.
                message = str(error) if isinstance(error, InputError) else f"{span.file} cannot be read: {error}"
                block.append(Record(span.start, Failure(INPUT_ERROR, message)))
            yield to_block(block)

        num_rows = int((~done).sum())
        return ReadTask(read, BlockMetadata(num_rows=num_rows, size_bytes=None, exec_stats=None, input_files=None))


def answer_rows(
    job: JobSettings, source: Source, plan: Plan, written: npt.NDArray[np.bool_], *, isolated: bool = False
) -> Generator[list[Record], None, None]:
    """See Answering. Rows that were lost with their process are left out; `isolated` rows are alone in each process, so
    that a process which dies was killed by its row. An input that can no longer be read arrives as a failure of kind
    INPUT_ERROR.

    Raises whatever Ray raises when it cannot continue.
    """
    for spans in datasets(plan, written, max_rows=_DATASET_ROWS * job.stages["generate"].replicas):
        dataset = _dataset(job, Rows(source, spans, written), plan.num_rows, isolated=isolated)
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield list(from_block(block))


def datasets(plan: Plan, written: npt.NDArray[np.bool_], *, max_rows: int) -> Iterator[list[Span]]:
    """Yield groups of the spans that are not done by their turn, each of at most `max_rows` rows or of one span with
    more."""
    spans, num_rows = list[Span](), 0
    for span in plan.spans:
        if written[span.start : span.stop].all():
            continue
        if spans and num_rows + span.stop - span.start > max_rows:
            yield spans
            spans, num_rows = [], 0
        spans.append(span)
        num_rows += span.stop - span.start
    if spans:
        yield spans


def _dataset(job: JobSettings, rows: Rows, num_all: int, *, isolated: bool) -> Dataset:
    """Send the rows through the stages; the whole input has `num_all`."""
    context = DataContext.get_current()
    _quiet(context)
    context.max_errored_blocks = _ANY_NUMBER if isolated else _MAX_LOST_BLOCKS
    num_rows = 1 if isolated else block_rows(num_all)
    num_blocks = 1 if isolated else blocks_at_once(job.max_running, num_rows)
    # As many blocks as read tasks: rows are not split before they are repartitioned into blocks of the right size.
    dataset: Dataset = ray.data.read_datasource(rows, num_cpus=READ_CPUS, override_num_blocks=len(rows.spans))
    dataset = dataset.repartition(target_num_rows_per_block=num_rows)
    # Each with its number of concurrent calls and its constructor arguments besides the job.
    stages: tuple[tuple[StageName, Callable[..., Any], int, tuple[int, ...]], ...] = (
        ("preprocess", Prepare, job.stages["preprocess"].threads or _PREPARE_THREADS, ()),
        ("encode", Encode, 1, ()),
        ("generate", Generate, num_blocks, (num_rows * num_blocks,)),
    )
    for name, stage, num_calls, told in stages:
        settings = job.stages[name]
        dataset = dataset.map_batches(
            stage,
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            fn_constructor_args=(job, *told),
            compute=_pool(settings, 1 if isolated else num_calls, isolated=isolated),
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            ray_remote_args_fn=_actor_options,
        )
    return dataset


def block_rows(num_rows: int) -> int:
    """Return the rows per block for an input with `num_rows` rows."""
    least, most = _BLOCK_ROWS
    return min(most, max(least, num_rows // _BLOCKS))


def blocks_at_once(max_running: int, num_rows: int) -> int:
    """Return how many blocks an engine needs so that another answer waits whenever one ends, although a block's answers
    are returned together."""
    return 2 + math.ceil(max_running / num_rows)


def _actor_options() -> dict[str, Any]:
    """Return actor options that Ray Data has no parameters for."""
    return {"max_task_retries": _RETRIES}


def _pool(settings: StageSettings, num_calls: int, *, isolated: bool) -> ActorPoolStrategy:
    return ActorPoolStrategy(
        size=settings.replicas,
        max_concurrent_calls_per_actor=num_calls,
        # In addition to the running calls, one that is on its way.
        max_tasks_in_flight_per_actor=num_calls if isolated else num_calls + 1,
        enable_true_multi_threading=True,
    )


def _quiet(context: DataContext) -> None:
    """Silence Ray Data: the job itself reports progress and errors. Ray Data's records of lost blocks are in
    `logs/ray-data/ray-data.log` of Ray's session."""
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray offers no other way to set how often a task is retried.
    warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated")
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
