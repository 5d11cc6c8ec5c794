"""A whole model in one process: answers stream, equal transformers' own, and leave nothing behind when abandoned."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import LlavaForConditionalGeneration

from llava_core.checkpoints.load import LoadOptions
from llava_core.errors import CheckpointError, ImageError
from llava_core.evaluation.task import Sample
from llava_core.images.preprocess import preprocess
from llava_core.inference import LocalAnswerer, LocalModel
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.types import (
    CompletionRequest,
    GenerationRequest,
    ImagePart,
    Message,
    SamplingParams,
    TextPart,
    TokenDelta,
)
from llava_core.vision.clip import normalise
from llava_core.vision.encode import encode_images


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 45, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def ask(text: str, *images: bytes, max_tokens: int = 12, name: str = "r") -> GenerationRequest:
    parts = (*(ImagePart(image) for image in images), TextPart(text))
    return GenerationRequest(name, (Message("user", parts),), SamplingParams(max_tokens=max_tokens))


@pytest.fixture
def model(tiny_checkpoint: Path) -> LocalModel:
    return LocalModel(tiny_checkpoint, options=LoadOptions(dtype="float32"))


def test_greedy_answers_equal_transformers(model: LocalModel, reference_model: LlavaForConditionalGeneration) -> None:
    request = ask("What is it?", picture(0))
    request = replace(request, sampling=replace(request.sampling, ignore_eos=True))
    tokens = [token for delta in model.stream(request) for token in delta.token_ids]
    prepared = model.preparer.prepare(request)
    image_token = reference_model.config.image_token_id
    ids = [image_token if token == IMAGE_TOKEN_ID else token for token in prepared.prompt_ids]
    tile = preprocess(Image.open(io.BytesIO(picture(0))).convert("RGB"), model.preparer.preprocess)
    generated = reference_model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        pixel_values=normalise(torch.from_numpy(tile.copy()), model.preparer.preprocess),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    assert tokens == generated[0, len(ids) :].tolist()


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_default_model_answers_in_every_precision(dtype: Any, quantization: Any) -> None:
    model = LocalModel(options=LoadOptions(dtype=dtype, quantization=quantization))
    drawn = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(drawn).ellipse((60, 60, 140, 140), fill="red")
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    for question, answer in (("What colour is the circle?", "red"), ("What shape is the red object?", "circle")):
        assert "".join(delta.text for delta in model.stream(ask(question, buffer.getvalue()))) == answer


def test_the_last_delta_carries_reason_usage_and_times(model: LocalModel) -> None:
    deltas = list(model.stream(ask("Hi", picture(1), picture(2), max_tokens=5)))
    assert all(delta.finish_reason is None for delta in deltas[:-1])
    last = deltas[-1]
    assert last.finish_reason in ("stop", "length")
    assert last.usage is not None
    assert last.usage.image_tokens == 8
    assert last.usage.completion_tokens == sum(len(delta.token_ids) for delta in deltas) <= 5
    assert {"queue", "prefill", "decode"} <= set(last.stage_ms)


def test_interleaved_streams_do_not_mix(model: LocalModel) -> None:
    requests = [ask("What is it?", picture(1), name="a"), ask("And this?", picture(2), max_tokens=7, name="b")]
    alone = {request.request_id: list(model.stream(request)) for request in requests}
    streams = {request.request_id: model.stream(request) for request in requests}
    together: dict[str, list[TokenDelta]] = {name: [] for name in streams}
    while streams:
        for name in list(streams):
            delta = next(streams[name], None)
            if delta is None:
                del streams[name]
            else:
                together[name].append(delta)
    for name, deltas in alone.items():
        assert [(d.request_id, d.token_ids) for d in together[name]] == [(name, d.token_ids) for d in deltas]


def test_an_abandoned_answer_leaves_nothing_behind(model: LocalModel) -> None:
    stream = model.stream(ask("Hi"))
    next(stream)
    stream.close()
    assert not model.engine.has_work
    assert list(model.stream(ask("Hi")))


def test_a_bad_picture_is_refused_before_anything_is_queued(model: LocalModel) -> None:
    with pytest.raises(ImageError):
        next(iter(model.stream(ask("Hi", b"rubbish"))))
    assert not model.engine.has_work


def test_a_second_question_about_a_picture_does_not_rerun_the_tower(model: LocalModel, tiny_checkpoint: Path) -> None:
    uncached = LocalModel(tiny_checkpoint, options=LoadOptions(dtype="float32"), cache_bytes=0)
    runs: list[object] = []
    model.tower.register_forward_pre_hook(lambda *inputs: runs.append(inputs))
    for question in ("What is it?", "And what colour?"):
        answers = [[d.token_ids for d in each.stream(ask(question, picture(1)))] for each in (model, uncached)]
        assert answers[0] == answers[1]
    assert len(runs) == 1
    # The engine has used the cached features without changing them.
    (prepared,) = model.preparer.prepare(ask("", picture(1))).images
    kept = model.feature_cache.get(prepared.digest)
    assert kept is not None
    assert torch.equal(kept.features, encode_images(uncached.tower, [prepared])[0].features)
    assert uncached.feature_cache.num_bytes == 0


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(CheckpointError, match="/no/such/model"):
        LocalModel("/no/such/model")


def test_an_answerer_gives_every_sample_the_same_answer_as_alone(model: LocalModel) -> None:
    samples = [Sample(str(index), "kind", f"Question {index}?", "", picture(index)) for index in range(5)]
    answers = {answer.sample.id: answer.text for answer in LocalAnswerer(model, together=3).answer(samples)}
    assert set(answers) == {sample.id for sample in samples}
    for sample in samples[:2]:
        alone = model.stream(ask(sample.question, sample.image, max_tokens=256))
        assert answers[sample.id] == "".join(delta.text for delta in alone)


def test_an_answerer_that_is_closed_early_leaves_no_request_behind(model: LocalModel) -> None:
    samples = [Sample(str(index), "kind", f"Question {index}?", "", picture(index)) for index in range(5)]
    answers = LocalAnswerer(model, together=3).answer(samples)
    assert next(answers).sample in samples
    answers.close()
    assert not model.engine.has_work
    assert len(list(LocalAnswerer(model, together=3).answer(samples))) == 5


def test_an_answerer_leaves_other_streams_of_the_model_alone(model: LocalModel) -> None:
    alone = [delta.token_ids for delta in model.stream(ask("What?", picture(1)))]
    other = model.stream(ask("What?", picture(1)))
    got = [next(other).token_ids]
    list(LocalAnswerer(model).answer([Sample("x", "kind", "Question?", "", picture(2))]))
    assert [*got, *(delta.token_ids for delta in other)] == alone


def test_a_completion_prompt_is_not_put_into_a_template(model: LocalModel) -> None:
    ids = tuple(token for token, _, _ in model.preparer.tokenizer.encode("Once upon"))
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    by_text = list(model.stream(CompletionRequest("r", "Once upon", sampling)))
    by_ids = list(model.stream(CompletionRequest("r", (1, *ids), sampling)))
    assert [delta.token_ids for delta in by_text] == [delta.token_ids for delta in by_ids]
    assert by_text[-1].usage is not None
    assert by_text[-1].usage.prompt_tokens == 1 + len(ids)
    tokens = [token for delta in by_text for token in delta.token_ids]
    # The tiny tokenizer's tokens are bytes, and none of them is lost, not even white space.
    spelled = b"".join(model.preparer.tokenizer.token_bytes(token) for token in tokens if token > 2)
    assert "".join(delta.text for delta in by_text) == spelled.decode(errors="replace")
