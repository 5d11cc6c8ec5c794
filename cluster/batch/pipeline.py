"""The stages as a Ray Data pipeline over the rows that are still to be done.

Read tasks make small blocks of rows; pools of actors take them from stage to stage, as many at once as keep an engine
full. Ray does again what was lost with a process. Knows nothing about outputs.
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

# Of each block Ray Data keeps what it knows until its dataset ends. So a long input is done by several, one after
# another, and the driver needs no more memory the longer it is. Each starts the stages anew, so it has so many rows for
# each engine.
_DATASET_ROWS = 128 * 1024
# Rows that go from stage to stage together; of long inputs more.
_BLOCK_ROWS, _BLOCKS = (16, 64), 2048
READ_CPUS = 0.1
# How often Ray does again what was lost with a process, and how many blocks of rows that are in company may be lost for
# good: more are no accident. Of rows that are alone any number may: it is the job that then judges.
_RETRIES, _MAX_LOST_BLOCKS, _ANY_NUMBER = 2, 100, -1
_PREPARE_THREADS = 2


@dataclass(frozen=True)
class Rows(Datasource):
    """The rows of these spans that are not in `written`; whoever reads a span gets its part of that."""

    source: Source
    spans: Sequence[Span]
    written: npt.NDArray[np.bool_]

    def estimate_inmemory_data_size(self) -> int | None:
        """Ray sizes its reading by it; nobody knows."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One for each span, however many Ray would like."""
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
                # Raised, it would be one of the blocks that may be lost.
                message = str(error) if isinstance(error, InputError) else f"{span.file} cannot be read: {error}"
                block.append(Record(span.start, Failure(INPUT_ERROR, message)))
            yield to_block(block)

        num_rows = int((~done).sum())
        return ReadTask(read, BlockMetadata(num_rows=num_rows, size_bytes=None, exec_stats=None, input_files=None))


def answer_rows(
    job: JobSettings, source: Source, plan: Plan, written: npt.NDArray[np.bool_], *, isolated: bool = False
) -> Generator[list[Record], None, None]:
    """As Answering. What was lost with its process is left out; `isolated` rows are alone in each process, so that
    whatever ends it was that row. An input that cannot be read any more comes as a failure of the kind INPUT_ERROR.

    Raises what Ray raises when it cannot go on.
    """
    for spans in datasets(plan, written, max_rows=_DATASET_ROWS * job.stages["generate"].replicas):
        dataset = _dataset(job, Rows(source, spans, written), plan.num_rows, isolated=isolated)
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield list(from_block(block))


def datasets(plan: Plan, written: npt.NDArray[np.bool_], *, max_rows: int) -> Iterator[list[Span]]:
    """The spans that are not done when it is their turn, those of at most so many rows together, or one with more."""
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
    """The rows on their way through the stages; the whole input has `num_all`."""
    context = DataContext.get_current()
    _quiet(context)
    context.max_errored_blocks = _ANY_NUMBER if isolated else _MAX_LOST_BLOCKS
    num_rows = 1 if isolated else block_rows(num_all)
    num_blocks = 1 if isolated else blocks_at_once(job.max_running, num_rows)
    # As many blocks as there are tasks: what is read is not cut up before it is cut into blocks of the right size.
    dataset: Dataset = ray.data.read_datasource(rows, num_cpus=READ_CPUS, override_num_blocks=len(rows.spans))
    dataset = dataset.repartition(target_num_rows_per_block=num_rows)
    # With how many calls at once, and what each is told beside the job.
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
    """Of an input with so many."""
    least, most = _BLOCK_ROWS
    return min(most, max(least, num_rows // _BLOCKS))


def blocks_at_once(max_running: int, num_rows: int) -> int:
    """So many that an engine has answers waiting whenever one ends, though a block's answers are handed on together."""
    return 2 + math.ceil(max_running / num_rows)


def _actor_options() -> dict[str, Any]:
    """Beside what Ray Data has names for."""
    return {"max_task_retries": _RETRIES}


def _pool(settings: StageSettings, num_calls: int, *, isolated: bool) -> ActorPoolStrategy:
    return ActorPoolStrategy(
        size=settings.replicas,
        max_concurrent_calls_per_actor=num_calls,
        # Beside those that are worked on, one that is on its way.
        max_tasks_in_flight_per_actor=num_calls if isolated else num_calls + 1,
        enable_true_multi_threading=True,
    )


def _quiet(context: DataContext) -> None:
    """Progress and errors are the job's to tell. What Ray Data records of blocks that are lost stands in its file,
    `logs/ray-data/ray-data.log` of Ray's session."""
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray has no other name for how often a task is tried again.
    warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated")
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
