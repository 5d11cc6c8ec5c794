"""Bulk jobs: tokens per second relative to the engine alone, the gain from a second generator, and kills without loss.

    python -m benchmarks.bulk share [--mid DIR] [--pictures 200] [--rounds 2] [--json FILE]
    python -m benchmarks.bulk actors [--pictures 1600] [--rounds 2] [--json FILE]
    python -m benchmarks.bulk kills [--pictures 400] [--kills 10] [--json FILE]
    python -m benchmarks.bulk memory [--rows 1000000] [--json FILE]

`share`: `llava batch` and a single process that prepares, encodes and generates with the same settings, in turns, on
random weights (`mid`, 642 M parameters) with 64 tokens per answer. Each is timed from its first answers to its last;
loading is excluded from both and reported separately. `actors`: the default model with one and with two single-threaded
generators, in turns: one question about each picture, then eight about each of an eighth of them. `kills`: the driver
and all its processes are killed with SIGKILL, each time at a different row, and the job is restarted; in the end every
row must be there exactly once. `memory`: the peak resident size of the job's own process, for a thousand rows and for
very many, all about one broken picture: what the process keeps of a row does not depend on its picture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import describe_machine
from benchmarks.service.pictures import PictureMaker
from benchmarks.service.start import checkpoint
from llava_core.engine.config import EngineConfig
from llava_core.inference import LocalModel
from llava_core.questions import Question, prepare_question
from llava_core.stages.loading import TORCH_ENVIRONMENT, Compute, in_thread_of_its_own, set_up_compute
from llava_core.types import SamplingParams, TokenDelta

PROMPT = "Describe the picture."
MAX_RUNNING, MAX_TOKENS = 32, 64
# A job returns answers in blocks of this size. The clock starts when the first block has arrived.
FIRST_ROWS = 16
_PICTURES = {"share": 200, "actors": 1600, "kills": 400, "memory": 0}
# For `actors`.
_QUESTIONS_PER_PICTURE = (1, 8)
_LOOK_S = 0.02


@dataclass(frozen=True)
class Timed:
    """Tokens per second from the first answers to the last, the share of the machine's cores in use meanwhile, and
    seconds until the first answers."""

    tokens_per_s: float
    first_s: float
    cores_in_use: float
    mean_batch: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=[*WORKS])
    parser.add_argument("--mid", type=Path, help="the checkpoint; created if missing")
    parser.add_argument("--pictures", type=int, help="[200 for share, 1600 for actors, 400 for kills]")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rows", type=int, default=10**6, help="for memory")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    options.pictures = options.pictures or _PICTURES[options.work]
    with tempfile.TemporaryDirectory(prefix="bulk-") as folder:
        draw(Path(folder) / "pictures", options.pictures)
        results = {"machine": describe_machine(), "work": options.work, "pictures": options.pictures}
        results |= WORKS[options.work](Path(folder), options)
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def share(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a bulk job's tokens per second as a share of the engine's own."""
    rounds: list[dict[str, Any]] = []
    with checkpoint("mid", options.mid) as model:
        for number in range(options.rounds):
            alone = answer_alone(model, folder / "pictures")
            words = ["--model", str(model), "--max-tokens", str(MAX_TOKENS)]
            bulk = time_job(folder / "pictures", folder / f"share-{number}.jsonl", *words)
            rounds.append({"engine": vars(alone), "bulk": vars(bulk), "share": bulk.tokens_per_s / alone.tokens_per_s})
    return {"rounds": rounds, "share": statistics.median(each["share"] for each in rounds)}


def actors(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the gain from a second generator, for each number of questions about a picture."""
    found: dict[str, Any] = {}
    for per_picture in _QUESTIONS_PER_PICTURE:
        questions, rounds = folder / f"{per_picture}.jsonl", list[dict[str, Any]]()
        _ask_about(sorted((folder / "pictures").iterdir()), per_picture, questions)
        for number in range(options.rounds):
            one, two = (
                time_generators(replicas, questions, folder / f"{per_picture}-{number}-{replicas}.jsonl")
                for replicas in (1, 2)
            )
            rounds.append({"1": vars(one), "2": vars(two), "times": two.tokens_per_s / one.tokens_per_s})
        times = statistics.median(each["times"] for each in rounds)
        found[f"{per_picture} questions a picture"] = {"rounds": rounds, "times": times}
    return found


def time_generators(replicas: int, questions: Path, output: Path) -> Timed:
    """Time a job with this many single-threaded generators."""
    stages = (f"generate.replicas={replicas}", "generate.threads=1", "encode.threads=1")
    return time_job(questions, output, *(word for stage in stages for word in ("--stage", stage)))


def _ask_about(pictures: Sequence[Path], per_picture: int, questions: Path) -> None:
    """Write as many rows as there are pictures, but ask `per_picture` questions each about the first of them only."""
    with questions.open("w") as file:
        for row in range(len(pictures)):
            asked = {"id": row, "image": str(pictures[row // per_picture]), "text": f"{PROMPT} ({row % per_picture})"}
            file.write(json.dumps(asked) + "\n")


def kills(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Check that every row is there exactly once, whenever the job is killed."""
    output, chance, killed = folder / "kills.jsonl", random.Random(0), list[int]()
    command = job_command(folder / "pictures", output)
    for _ in range(options.kills):
        at_row = count_lines(output) + chance.randrange(options.pictures // (options.kills + 2))
        process = start(command, folder / "kills.log")
        while process.poll() is None and count_lines(output) <= at_row:
            time.sleep(_LOOK_S)
        if process.poll() is not None:
            assert process.returncode == 0, (folder / "kills.log").read_text()
            break
        time.sleep(chance.random() * 0.2)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed.append(count_lines(output))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line)["row"] for line in output.read_text().splitlines()]
    assert sorted(rows) == [*range(options.pictures)], "a row is missing or there twice"
    return {"killed_at_rows": killed, "rows": len(rows), "each_once": True}


def memory(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the driver's peak memory for few rows and for many."""
    few, many = (_peak_mib(folder, num_rows) for num_rows in (1000, options.rows))
    return {"rows": options.rows, "peak_mib_of_1000_rows": few, "peak_mib": many}


def _peak_mib(folder: Path, num_rows: int) -> float:
    questions, log = folder / f"{num_rows}.jsonl", folder / f"memory-{num_rows}.log"
    (folder / "broken.png").touch()
    with questions.open("w") as file:
        file.writelines(f'{{"id": {row}, "image": "broken.png", "text": "{PROMPT}"}}\n' for row in range(num_rows))
    peak_kib = 0
    process = start(job_command(questions, folder / f"memory-{num_rows}-answers.jsonl"), log)
    while process.poll() is None:
        # An ended process no longer reports its memory.
        if told := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text()):
            peak_kib = int(told[1])
        time.sleep(_LOOK_S)
    assert process.returncode == 0, log.read_text()
    assert process.stdout is not None
    assert json.loads(process.stdout.read())["errors"] == {"invalid_image": num_rows}
    return round(peak_kib / 1024, 1)


WORKS = {"share": share, "actors": actors, "kills": kills, "memory": memory}


def draw(folder: Path, number: int) -> None:
    """Draw new pictures, all different."""
    folder.mkdir()
    maker = PictureMaker("bulk")
    for index in range(number):
        picture = maker.make()
        (folder / f"{index:06}.{picture.format.lower()}").write_bytes(picture.data)


def job_command(questions: Path, output: Path, *arguments: str) -> list[str]:
    llava = [sys.executable, "-c", "from llava_core.cli import main; main()"]
    fixed = ["--prompt", PROMPT, "--max-running", str(MAX_RUNNING), "--format", "json"]
    return [*llava, "batch", str(questions), str(output), *fixed, *arguments]


def start(command: list[str], log: Path) -> subprocess.Popen[str]:
    """Start the command in its own process group."""
    with log.open("a") as file:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True)


def time_job(questions: Path, output: Path, *arguments: str) -> Timed:
    """Run a job, timed by when rows appear in the output."""
    log = output.with_suffix(".log")
    began = time.monotonic()
    process = start(job_command(questions, output, *arguments), log)
    first_s, first_rows, num_rows, last = None, 0, 0, began
    first_used = last_used = psutil.cpu_times()
    while process.poll() is None:
        if (rows := count_lines(output)) > num_rows:
            num_rows, last, last_used = rows, time.monotonic(), psutil.cpu_times()
            if first_s is None and rows >= FIRST_ROWS:
                first_s, first_rows, first_used = last - began, rows, last_used
        time.sleep(_LOOK_S)
    assert process.returncode == 0, log.read_text()
    assert first_s is not None, "there are too few pictures to be timed"
    tokens = [len(json.loads(line)["token_ids"]) for line in output.read_text().splitlines()]
    assert process.stdout is not None
    engines = json.loads(process.stdout.read())["this_run"]["engines"]
    mean_batch = statistics.mean(each["mean_batch"] for each in engines)
    tokens_per_s = sum(tokens[first_rows:]) / (last - began - first_s)
    return Timed(tokens_per_s, first_s, cores_in_use(first_used, last_used), mean_batch)


def cores_in_use(began: Any, ended: Any) -> float:
    """Return the share of all cores in use, by any process, between two readings of psutil.cpu_times()."""
    idle: float = (ended.idle + ended.iowait) - (began.idle + began.iowait)
    total: float = sum(ended) - sum(began)
    return 1.0 - idle / max(total, 1e-9)


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def answer_alone(model: Path, pictures: Path) -> Timed:
    """Answer in a separate process, which reads torch's environment as an actor does."""
    for name, value in TORCH_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_answer_alone, model, pictures, time.time()).result()


def _answer_alone(folder: Path, pictures: Path, began: float) -> Timed:
    def load() -> LocalModel:
        options = set_up_compute(Compute(), num_gpus=0)
        return LocalModel(folder, options=options, engine=EngineConfig(max_running=MAX_RUNNING))

    model = in_thread_of_its_own(load)
    tokens, first_s, first_used = 0, 0.0, psutil.cpu_times()
    for num_done, num_tokens in enumerate(_answers(model, sorted(pictures.iterdir())), start=1):
        if num_done == FIRST_ROWS:
            first_s, first_used = time.time() - began, psutil.cpu_times()
        elif num_done > FIRST_ROWS:
            tokens += num_tokens
    stats = model.engine.stats
    seconds = time.time() - began - first_s
    in_use = cores_in_use(first_used, psutil.cpu_times())
    return Timed(tokens / seconds, first_s, in_use, stats.scheduled_requests / stats.num_steps)


def _answers(model: LocalModel, pictures: list[Path]) -> Iterator[int]:
    """Yield each answer's number of tokens. The engine holds as many requests as it runs at once, and one more."""
    waiting, sampling = deque(enumerate(pictures)), SamplingParams(max_tokens=MAX_TOKENS)
    num_tokens: dict[str, int] = {}
    while waiting or num_tokens:
        while waiting and len(num_tokens) <= MAX_RUNNING:
            row, picture = waiting.popleft()
            model.add(prepare_question(model.preparer, Question(PROMPT, (picture,)), sampling, f"{row}"))
            num_tokens[f"{row}"] = 0
        for output in model.engine.step():
            assert isinstance(output, TokenDelta), output
            num_tokens[output.request_id] += len(output.token_ids)
            if output.finish_reason is not None:
                yield num_tokens.pop(output.request_id)


if __name__ == "__main__":
    main()
