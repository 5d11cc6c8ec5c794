"""Records pass through Ray's blocks unchanged."""

import torch

from cluster.batch.records import Answer, Failure, Record, failure, from_block, to_block
from llava_core.errors import EngineError, ImageError, PromptTooLongError
from llava_core.questions import Question
from llava_core.types import EngineRequest, ImageFeatures, SamplingParams, Usage


def test_records_of_every_stage_survive_a_round_trip() -> None:
    asked = Record(3, Question("What?", (b"picture",), {"any": "id"}), {"any": "id"}, ("",), "What?")
    records = [
        asked,
        asked.became(Failure("invalid_image", "no picture"), preprocess=2.0),
        asked.became(Answer("A cat.", (1, 2), "stop", Usage(3, 2)), decode=1.0),
    ]
    block = to_block(records)
    assert list(from_block(block)) == records
    assert block.column("row").to_pylist() == [3, 3, 3]
    assert list(from_block(to_block([]))) == []


def test_features_keep_their_bits() -> None:
    features = torch.randn(4, 8).bfloat16()
    request = EngineRequest("1", (1, 2), (ImageFeatures("digest", features),), SamplingParams())
    [record] = from_block(to_block([Record(0, request)]))
    assert isinstance(record.value, EngineRequest)
    assert torch.equal(record.value.features[0].features, features)
    assert record.value.features[0].features.dtype == torch.bfloat16


def test_times_add_up_stage_by_stage() -> None:
    record = Record(0, Failure("a", "b"), timings={"preprocess": 1.0}).became(Failure("a", "b"), encode=2.0, queue=3.0)
    assert record.timings == {"preprocess": 1.0, "encode": 2.0, "queue": 3.0}


def test_failures_have_the_code_of_their_error() -> None:
    assert failure(ImageError("broken")) == Failure("invalid_image", "broken")
    assert failure(PromptTooLongError("too long")).kind == "context_length_exceeded"
    assert failure(EngineError("no memory")) == Failure("engine_error", "no memory")
