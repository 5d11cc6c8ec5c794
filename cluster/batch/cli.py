"""`llava batch`: turns options into a job, shows its progress on standard error and prints its report at the end.

`llava` finds it through the entry-point group `llava.commands`. Ray is imported only once the job needs it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click

from cluster.batch.settings import STAGES, JobSettings, ModelSettings, read_stages
from llava_core.cli import FRAME, WINDOW, take_view
from llava_core.types import SamplingParams

_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed")


@click.command()
@click.argument("input", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--prompt", help="The question for rows without one, and for every picture of a folder.")
@click.option("--image-folder", type=click.Path(path_type=Path), help="Base folder of pictures. [INPUT's folder]")
@FRAME
@WINDOW
@click.option("--model", help="Checkpoint folder or hub id (default: the small model of this project).")
@click.option("--base", help="The model that an adapter or projector was trained on.")
@click.option("--template", help="Prompt template (default: the one the checkpoint declares).")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", help="[auto]")
@click.option("--quantization", type=click.Choice(["8bit", "4bit"]), help="Quantize the decoder's linear layers.")
@click.option("--offline", is_flag=True, help="Download nothing; list missing files.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=0, help="0: all tokens.  [0]")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer (default: the context).")
@click.option("--seed", type=int, help="Makes sampled answers repeatable.")
@click.option(
    "--stage",
    "stages",
    multiple=True,
    metavar="STAGE.SETTING=VALUE",
    help=f"Of {', '.join(STAGES)}: replicas; num_cpus, num_gpus and threads of each replica. Repeatable.",
)
@click.option(
    "--max-running", type=click.IntRange(1), default=32, show_default=True, help="Concurrent answers of an engine."
)
@click.option("--wait-for-nodes", is_flag=True, help="Start before the cluster has room: nodes will join.")
@click.option("--retry-errors", is_flag=True, help="Repeat the rows that are errors in OUTPUT.")
@click.option("--format", "shown", type=click.Choice(["text", "json"]), default="text", help="Report format.  [text]")
def batch(input: Path, output: Path, shown: str, **given: Any) -> None:
    """Answer every row of INPUT exactly once and write it to OUTPUT; the same command resumes a stopped job.

    INPUT is a .jsonl or .parquet file of questions (`question` or `text`; `image` or `images`; `question_id` or `id`),
    or a folder of pictures. OUTPUT ends with .jsonl, for one file, or with .parquet, for a folder of parts. A row that
    cannot be answered is written with its `error`, and is repeated only with --retry-errors. Runs on the Ray cluster
    that RAY_ADDRESS names, or else starts its own.
    """
    from cluster.batch.job import Job
    from cluster.batch.opening import open_source
    from cluster.batch.ray_cluster import check_output_stays, seen_by_workers
    from cluster.batch.ray_job import on_ray

    stages = read_stages(given["stages"])
    check_output_stays(output)
    folder = given["image_folder"] and seen_by_workers(given["image_folder"])
    source = open_source(seen_by_workers(input), output, image_folder=folder, prompt=given["prompt"])
    settings = JobSettings(
        _find_model(given),
        SamplingParams(**{name: given[name] for name in _SAMPLING}),
        given["prompt"],
        stages,
        given["max_running"],
        given["wait_for_nodes"],
        take_view(given),
    )
    # `ray job stop` and others stop a job this way.
    signal.signal(signal.SIGTERM, _interrupt)
    # Ray reports dead processes on standard output, which is reserved for the report.
    with contextlib.redirect_stdout(sys.stderr):
        job = Job(source, output, settings, on_ray, given["retry_errors"])
        report = job.run(lambda text: click.echo(text, err=True), sys.stderr)
    click.echo(json.dumps(report.as_json()) if shown == "json" else "\n".join(report.lines()))


def _find_model(given: dict[str, Any]) -> ModelSettings:
    from llava_core.checkpoints.found import find_checkpoint

    model, base = (_located(given[name]) for name in ("model", "base"))
    found = find_checkpoint(model, base, template=given["template"], offline=given["offline"])
    return ModelSettings(found, given["template"], given["dtype"], given["quantization"])


def _located(model: str | None) -> str | None:
    """Return a folder's path as workers find it; a hub id is the same everywhere."""
    from cluster.batch.ray_cluster import seen_by_workers

    return str(seen_by_workers(Path(model))) if model is not None and Path(model).is_dir() else model


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
