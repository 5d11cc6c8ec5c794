"""`llava batch` from its command line: what is refused before anything starts, and, on a real Ray, whole jobs.

The jobs use the default model. They are stopped once certain rows have been written, never after a fixed time.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from llava_core.cli import main
from llava_core.inference import LocalModel
from llava_core.questions import Question, prepare_question
from llava_core.scenes.draw import draw_scene
from llava_core.scenes.scene import sample_scene
from llava_core.types import SamplingParams

LLAVA = [sys.executable, "-c", "from llava_core.cli import main; main()"]
PROMPT = "Describe the picture."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.jsonl", "out.jsonl", "--stage", "decode.replicas=2"], "there is no stage 'decode'"),
        (["in.jsonl", "out.jsonl", "--stage", "generate.gpus=2"], "there is no setting 'gpus'"),
        (["none.jsonl", "out.jsonl"], "none.jsonl does not exist"),
        (["in.jsonl", "out.csv"], "must end with .jsonl"),
        (["pictures", "out.jsonl"], "give --prompt"),
        (["in.jsonl", "out.jsonl", "--model", "/none"], "/none"),
        (["in.jsonl", "out.jsonl", "--template", "nonsense"], "nonsense"),
    ],
)
def test_invalid_arguments_are_one_line_errors_before_ray_starts(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr("cluster.batch.ray_cluster.set_environment", lambda: pytest.fail("nothing may start"))
    result = CliRunner().invoke(main, ["batch", *arguments, "--offline"])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


class Job:
    """`llava batch` on its own pictures, some of them broken."""

    def __init__(self, folder: Path, num_pictures: int) -> None:
        self.pictures, self.output = folder / "pictures", folder / "out.jsonl"
        self.pictures.mkdir()
        self.rows = folder / "in.jsonl"
        chance = random.Random(0)
        for number in range(num_pictures):
            draw_scene(sample_scene(chance, longest_side=(64, 200))).save(self.pictures / f"{number}.png")
        (self.pictures / "broken.png").write_bytes((self.pictures / "0.png").read_bytes()[:100])
        asked = [{"question_id": f"q{n}", "image": f"{n}.png", "text": PROMPT} for n in range(num_pictures)]
        bad = [
            {"question_id": "broken", "image": "broken.png", "text": PROMPT},
            {"question_id": "missing", "image": "none.png", "text": PROMPT},
            {"question_id": "long", "text": "word " * 5000},
        ]
        lines = [json.dumps(row) for row in [*asked[:10], *bad, *asked[10:]]]
        self.rows.write_text("\n".join([*lines[:5], "{no JSON", *lines[5:]]) + "\n")
        self.num_rows = num_pictures + 4

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the job in its own process group."""
        given = [str(self.rows), str(self.output), "--image-folder", str(self.pictures), "--dtype", "float32"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return subprocess.Popen(
            [*LLAVA, "batch", *given, "--max-running", "8", "--format", "json", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def wait_for_rows(self, process: subprocess.Popen[str], number: int) -> int:
        """Wait until this many rows are written, and return how many there are then."""
        while (rows := self.num_written()) < number:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        return rows

    def num_written(self) -> int:
        return self.output.read_bytes().count(b"\n") if self.output.exists() else 0

    def written(self) -> dict[int, dict[str, Any]]:
        rows = [json.loads(line) for line in self.output.read_text().splitlines()]
        found = {row["row"]: row for row in rows}
        assert len(found) == len(rows), "a row is there twice"
        return found


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen[str]]]:
    """End every process that a test has started."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_stopped_or_killed_job_resumes_and_writes_every_row_once(
    tmp_path: Path, ended: list[subprocess.Popen[str]]
) -> None:
    job = Job(tmp_path, 150)
    # Ray's own handler would end the process with a different status, or with a native stack trace.
    stopped = job.start()
    ended.append(stopped)
    job.wait_for_rows(stopped, 1)
    stopped.terminate()
    _, stderr = stopped.communicate(timeout=120)
    assert stopped.returncode == 1, stderr
    assert stderr.rstrip().endswith("Aborted!")
    assert "Traceback" not in stderr
    num_before = job.num_written()

    first = job.start()
    ended.append(first)
    job.wait_for_rows(first, num_before + 1)
    begun = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.communicate()
    # Its Ray ends with it; two agents detect that only after a minute without a response.
    busy = [process for process in begun if not process.name().endswith("Agent")]
    assert psutil.wait_procs(busy, timeout=60)[1] == []
    before = job.written()
    assert num_before < len(before) < job.num_rows

    # Kill its actor, while a second job runs.
    second = job.start()
    ended.append(second)
    job.wait_for_rows(second, len(before) + 1)
    children = psutil.Process(second.pid).children(recursive=True)
    [engine] = [process for process in children if "MapBatches(Generate)" in " ".join(process.cmdline())]
    engine.kill()
    refused = job.start()
    assert "is being written by another job" in refused.communicate(timeout=120)[1]
    assert refused.returncode == 1
    printed, stderr = second.communicate(timeout=400)
    assert second.returncode == 0, stderr
    rows = job.written()
    assert sorted(rows) == list(range(job.num_rows))
    assert {number: rows[number] for number in before} == before
    assert f"{len(before)} of {job.num_rows} rows are there already" in stderr

    report = json.loads(printed)
    assert report["errors"] == {
        "invalid_row": 1,
        "invalid_image": 1,
        "unreadable_file": 1,
        "context_length_exceeded": 1,
    }
    assert report["this_run"]["rows"] == job.num_rows - len(before)
    assert report["tokens"]["completion"] == sum(len(row["token_ids"] or ()) for row in rows.values())
    assert "in.jsonl:6 is not a JSON object" in rows[5]["error"]["message"]

    from llava_core.checkpoints.load import LoadOptions

    alone = LocalModel(options=LoadOptions(dtype="float32"))
    for row in [row for row in rows.values() if row["error"] is None][::10]:
        question = Question(row["prompt"], tuple(job.pictures / name for name in row["images"]))
        deltas = list(alone.stream(prepare_question(alone.preparer, question, SamplingParams(), str(row["row"]))))
        assert row["text"] == "".join(delta.text for delta in deltas)
        assert row["token_ids"] == [token for delta in deltas for token in delta.token_ids]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_missing_gpus_are_refused_at_once(tmp_path: Path, ended: list[subprocess.Popen[str]]) -> None:
    job = Job(tmp_path, 11)
    process = job.start("--stage", "generate.num_gpus=64")
    ended.append(process)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "generate asks for 1 x (0.25 CPUs, 64 GPUs), of which 0 fit beside" in stderr
    assert "Traceback" not in stderr
