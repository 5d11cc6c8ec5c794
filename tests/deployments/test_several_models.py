"""Three models in one service: two that share a tower, one with another, each asked by OpenAI's client."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.commands.top import Change, screen
from deployments.metrics import CACHE_HITS, CACHE_MISSES, TIME_TO_FIRST_TOKEN
from llava_core.checkpoints.load import LoadOptions
from llava_core.inference import LocalModel
from llava_core.types import CompletionRequest, GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from tests.deployments.pictures import plain
from tests.deployments.service import Running, content, messages, serving, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
QUESTION, MAX_TOKENS = "What?", 12


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: Path, other_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints by their models' names. Like a hub id, a name may contain a slash."""
    tuned = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("tuned") / "tuned"))
    tensors = load_file(tuned / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name in sorted(tensors):
        if "tower" not in name:
            tensors[name] += 0.1 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    return {"tiny": tiny_checkpoint, "owner/tuned": tuned, "other": other_tower}


@pytest.fixture(scope="module")
def service(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    stage = {"num_cpus": 0.05}
    compute = {**stage, "dtype": "float32", "device": "cpu", "threads": 1}
    entries: list[dict[str, Any]] = [{"name": name, "checkpoint": str(folder)} for name, folder in folders.items()]
    entries[1]["engine"] = {"max_running": 2}
    with serving(
        folders["tiny"],
        tmp_path_factory.mktemp("service"),
        models=entries,
        gateway=stage,
        preprocessor=stage,
        vision_encoder=compute,
        generator=compute,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def in_process(folders: dict[str, Path]) -> dict[str, LocalModel]:
    return {name: LocalModel(folder, options=LoadOptions(dtype="float32")) for name, folder in folders.items()}


def _expected(model: LocalModel, picture: bytes, template: str | None = None) -> str:
    said = (Message("user", (ImagePart(picture), TextPart(QUESTION))),)
    request = GenerationRequest("expected", said, SamplingParams(max_tokens=MAX_TOKENS), template=template)
    return "".join(delta.text for delta in model.stream(request))


def _ask(service: Running, model: str, picture: bytes, **extra: Any) -> str:
    said: Any = messages(content(picture, QUESTION))
    answer = service.client.chat.completions.create(model=model, messages=said, max_tokens=MAX_TOKENS, extra_body=extra)
    assert answer.model == model
    return str(answer.choices[0].message.content)


def test_each_model_answers_as_alone_and_a_tower_encodes_a_picture_once(
    service: Running, in_process: dict[str, LocalModel]
) -> None:
    picture = plain("green")
    answers = {name: _ask(service, name, picture) for name in in_process}
    assert answers == {name: _expected(model, picture) for name, model in in_process.items()}
    assert len(set(answers.values())) == 3

    def seen(cache: str, deployment: str) -> tuple[float, float]:
        page, labels = service.metrics(), {"cache": cache, "deployment": deployment}
        return page.total(CACHE_MISSES, **labels), page.total(CACHE_HITS, **labels)

    # Encoded for one model and found for the other, which has the same tower; the third shares nothing with them.
    until(lambda: seen("features", "VisionEncoder-tiny") == (1, 1))
    until(lambda: seen("features", "VisionEncoder-other") == (1, 0))
    until(lambda: seen("tiles", "Preprocessor") == (1, 2))


def test_a_template_applies_to_one_request(service: Running, in_process: dict[str, LocalModel]) -> None:
    picture = plain("blue")
    for template in (None, "llava_v0", None):
        extra = {} if template is None else {"template": template}
        assert _ask(service, "owner/tuned", picture, **extra) == _expected(in_process["owner/tuned"], picture, template)
    assert _expected(in_process["owner/tuned"], picture) != _expected(in_process["owner/tuned"], picture, "llava_v0")
    with pytest.raises(openai.BadRequestError, match=r"template: must be one of chatml_direct, .*vicuna_v1"):
        _ask(service, "tiny", picture, template="v9")


def test_completions_and_tokens_are_those_of_the_named_model(
    service: Running, in_process: dict[str, LocalModel]
) -> None:
    for name, model in in_process.items():
        request = CompletionRequest("expected", "Once", SamplingParams(max_tokens=MAX_TOKENS))
        expected = "".join(delta.text for delta in model.stream(request))
        assert service.client.completions.create(model=name, prompt="Once", max_tokens=MAX_TOKENS).choices[0].text == (
            expected
        )
    ids = httpx.post(f"{service.url}/tokenize", json={"model": "other", "prompt": "Once"}, timeout=60).json()["tokens"]
    body = {"model": "owner/tuned", "tokens": ids}
    assert httpx.post(f"{service.url}/detokenize", json=body, timeout=60).json() == {"prompt": "<s>Once"}


def test_all_models_are_listed_and_others_are_refused(service: Running, folders: dict[str, Path]) -> None:
    assert [model.id for model in service.client.models.list()] == list(folders)
    assert service.client.models.retrieve("owner/tuned").id == "owner/tuned"
    with pytest.raises(openai.NotFoundError, match="known are: other, owner/tuned, tiny"):
        _ask(service, "tuned", plain())
    response = service.post(messages=messages("hi"))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


def test_stages_are_shown_with_their_models_names(service: Running) -> None:
    own = ["vision_encoder-tiny", "vision_encoder-other", "generator-tiny", "generator-owner-tuned", "generator-other"]
    health = httpx.get(f"{service.url}/health", timeout=60).json()
    assert health["stages"] == dict.fromkeys(["preprocessor", *own], "ok")
    deployments = {"Gateway", "Preprocessor", "VisionEncoder-tiny", "VisionEncoder-other"} | {
        f"Generator-{name}" for name in ("tiny", "owner-tuned", "other")
    }

    def shown() -> set[str]:
        page = service.metrics()
        return {line.split()[0] for line in screen(Change(page, page)) if line[:1].isupper()}

    until(lambda: shown() == deployments)
    _ask(service, "owner/tuned", plain())
    until(lambda: service.metrics().buckets(TIME_TO_FIRST_TOKEN, model="owner/tuned")[-1] > 0)
