"""The stages without Ray: blocks through all three, the same answers as in one process, failures where they belong."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.batch.records import INPUT_ERROR, UNREADABLE, Answer, Failure, Record, from_block, to_block
from cluster.batch.settings import JobSettings, ModelSettings, read_stages
from cluster.batch.sources import question_record
from cluster.batch.stages import Encode, Generate, Prepare, compute_of
from llava_core.checkpoints.found import FoundCheckpoint
from llava_core.checkpoints.load import LoadOptions
from llava_core.engine.engine import Engine
from llava_core.errors import EngineError
from llava_core.inference import LocalModel
from llava_core.questions import Question, prepare_question
from llava_core.stages.loading import Compute
from llava_core.types import PreparedRequest, SamplingParams
from llava_core.views import DicomView
from tests.dicom_files import dicom


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def job(tiny_checkpoint: Path) -> JobSettings:
    model = ModelSettings(FoundCheckpoint(str(tiny_checkpoint), None, {}, offline=True), dtype="float32")
    stages = read_stages(["encode.threads=1", "generate.threads=1"])
    return JobSettings(model, SamplingParams(max_tokens=5), stages=stages, max_running=3)


QUESTIONS = [
    Question("What is it?", (picture("red"),), "red"),
    Question("No picture at all.", (), "text"),
    Question("What is it?", (b"no picture",), "broken"),
    Question("What is it?", (Path("/no/such/picture.png"),), "missing"),
    Question("word " * 3000, (), "long"),
    *(Question(f"Question {number}", (picture("blue"),), number) for number in range(8)),
]


def test_answers_match_one_process_and_failures_stay_with_their_rows(job: JobSettings) -> None:
    block = to_block(question_record(row, question) for row, question in enumerate(QUESTIONS))
    for stage in (Prepare(job), Encode(job), Generate(job, 64)):
        block = stage(block)
    done = list(from_block(block))
    assert [record.row for record in done] == list(range(len(QUESTIONS)))
    failures = {record.id: record.value for record in done if isinstance(record.value, Failure)}
    assert {name: failure.kind for name, failure in failures.items()} == {
        "broken": "invalid_image",
        "missing": "unreadable_file",
        "long": "context_length_exceeded",
    }
    assert "image 1: " in failures["broken"].message
    assert "/no/such/picture.png cannot be read" in failures["missing"].message

    alone = LocalModel(job.model.checkpoint.open(), options=LoadOptions(dtype="float32"))
    for record, question in zip(done, QUESTIONS, strict=True):
        if record.id in failures:
            continue
        deltas = list(alone.stream(prepare_question(alone.preparer, question, job.sampling, "alone")))
        assert isinstance(record.value, Answer)
        assert record.value.text == "".join(delta.text for delta in deltas)
        assert record.value.token_ids == tuple(token for delta in deltas for token in delta.token_ids)
        assert record.value.finish_reason == deltas[-1].finish_reason
        assert record.value.usage.completion_tokens == len(record.value.token_ids)
        assert {"preprocess", "encode", "queue", "prefill", "decode"} <= record.timings.keys()
    reading = done[-1].reading
    assert reading is not None
    assert 1 < reading.scheduled_requests / reading.num_steps <= job.max_running


def test_dicom_files_are_rendered_with_the_jobs_view(job: JobSettings) -> None:
    file = dicom(np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8))
    digests = []
    for view in (None, DicomView(1, (2000.0, 100.0))):
        [record] = from_block(Prepare(replace(job, view=view))(to_block([question_record(0, Question("?", (file,)))])))
        assert isinstance(record.value, PreparedRequest)
        digests.append(record.value.images[0].digest)
    assert digests[0] != digests[1]


def test_a_missing_picture_is_certain_only_if_others_can_be_read(job: JobSettings, tmp_path: Path) -> None:
    folder, prepare = tmp_path / "volume", Prepare(job)

    def unreadable() -> Failure:
        [record] = from_block(prepare(to_block([question_record(0, Question("What?", (folder / "none.png",)))])))
        assert isinstance(record.value, Failure)
        return record.value

    assert (unreadable().kind, unreadable().is_certain) == (UNREADABLE, False)
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture, but there")
    prepare(to_block([question_record(0, Question("What?", (folder / "a.png",)))]))
    assert (unreadable().kind, unreadable().is_certain) == (UNREADABLE, True)
    (folder / "a.png").unlink()
    gone = unreadable()
    assert gone.kind == INPUT_ERROR
    assert f"nor can {folder / 'a.png'}, which was read before: No such file" in gone.message


def test_a_tower_failure_fails_only_its_row(job: JobSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Prepare(job)(to_block(question_record(row, QUESTIONS[row]) for row in (0, 1)))
    encode = Encode(job)
    monkeypatch.setattr(encode._tower, "forward", lambda _: (_ for _ in ()).throw(RuntimeError("out of memory")))
    failed, passed = from_block(encode(block))
    assert isinstance(failed.value, Failure)
    assert failed.value.kind == "engine_error"
    assert not isinstance(passed.value, Failure)


def test_a_process_exits_when_its_engine_has_ended(job: JobSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would fail every further row."""
    block = Encode(job)(Prepare(job)(to_block([question_record(0, QUESTIONS[1])])))
    generate = Generate(job, 64)
    ended: list[int] = []
    monkeypatch.setattr("cluster.batch.stages.os._exit", ended.append)
    monkeypatch.setattr(Engine, "step", lambda _: (_ for _ in ()).throw(RuntimeError("no device")))
    [record] = from_block(generate(block))
    assert ended == [1]
    assert isinstance(record.value, Failure)


def test_a_single_failing_row_does_not_end_the_process(job: JobSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Generate(job, 64)
    monkeypatch.setattr("cluster.batch.stages.os._exit", lambda _: pytest.fail("the engine is alive"))

    async def refused(_: object) -> object:
        raise EngineError("not this one")
        yield

    monkeypatch.setattr(generate._running, "generate", refused)
    block = Encode(job)(Prepare(job)(to_block([question_record(0, QUESTIONS[1])])))
    [record] = from_block(generate(block))
    assert record.value == Failure("engine_error", "not this one")


def test_only_the_decoder_is_quantized(job: JobSettings) -> None:
    model = ModelSettings(job.model.checkpoint, None, "bfloat16", "8bit")
    changed = JobSettings(model, stages=read_stages(["generate.threads=2"]))
    assert compute_of("generate", changed) == Compute("auto", "bfloat16", 2, "8bit")
    assert compute_of("encode", changed) == Compute("auto", "bfloat16", None, None)


def test_failed_rows_pass_through_every_stage(job: JobSettings) -> None:
    failed = Record(7, Failure("invalid_row", "broken"))
    for stage in (Prepare(job), Encode(job), Generate(job, 64)):
        assert [each.value for each in from_block(stage(to_block([failed])))] == [failed.value]
