"""The work of `llava ask`: load once, answer one question or a file of them, print text or JSON.

The JSON holds the prompt as the model saw it, so that an answer can be compared with another program's. Knows nothing
about option parsing.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_core.errors import EngineError, LlavaError, RequestError
from llava_core.opening import ModelOptions, load_model, open_model
from llava_core.prepare import Preparer
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.questions import Question, prepare_question, read_questions
from llava_core.types import PreparedRequest, SamplingParams, TokenDelta
from llava_core.views import DicomView, ImageTransform

if TYPE_CHECKING:
    from llava_core.inference import LocalModel

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class AskOptions(ModelOptions):
    """The options given to `llava ask`."""

    images: tuple[Path, ...]
    questions: Path | None
    temperature: float
    max_tokens: int | None
    seed: int | None
    output: str
    view: DicomView | None = None


@dataclass(frozen=True)
class _Prepared:
    """A request, and how many milliseconds its preparation took."""

    request: PreparedRequest
    ms: float


def ask_one(options: AskOptions, question: str) -> None:
    """Print the answer: as text while it is generated, or as one JSON object."""
    opened = open_model(options)
    prepared = _prepare(opened.preparer, options, Question(question, options.images))
    model = load_model(opened, options)
    if options.output == "json":
        click.echo(json.dumps(_answer(model, prepared)))
        return
    for path, transform in zip(options.images, prepared.request.transforms, strict=True):
        if transform is not None:
            click.echo(f"{path}: {shown(transform)}", err=True)
    for delta in model.stream(prepared.request):
        click.echo(delta.text, nl=False)
    click.echo()


def ask_all(options: AskOptions, file: Path) -> None:
    """Print the answer to every question of the file, in order, one JSON object per line; the model is loaded once.

    With text as output, only the answers are printed. A question that cannot be answered gets an `error` instead, and
    the command fails at the end. Raises LlavaError in that case.
    """
    questions = list(read_questions(file))
    opened, num_failed = open_model(options), 0
    model = load_model(opened, options)
    for question in questions:
        try:
            answer = _answer(model, _prepare(opened.preparer, options, question))
        except (RequestError, EngineError) as error:
            num_failed += 1
            answer = {"error": str(error)}
        if options.output == "text":
            click.echo(answer.get("text", f"error: {answer.get('error')}"))
        else:
            click.echo(json.dumps(answer if question.id is None else {"question_id": question.id, **answer}))
    if num_failed:
        raise LlavaError(f"{num_failed} of {len(questions)} questions could not be answered")


def _prepare(preparer: Preparer, options: AskOptions, question: Question) -> _Prepared:
    sampling = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed)
    started = time.perf_counter()
    request = prepare_question(preparer, question, sampling, uuid.uuid4().hex, view=options.view)
    return _Prepared(request, (time.perf_counter() - started) * 1e3)


def _answer(model: LocalModel, prepared: _Prepared) -> JsonObject:
    """Prompt and answer, ids and counts; times in milliseconds by stage."""
    request, started = prepared.request, time.perf_counter()
    deltas = list(model.stream(request))
    total_ms = prepared.ms + (time.perf_counter() - started) * 1e3
    last: TokenDelta = deltas[-1]
    stages = {"preprocess": prepared.ms, **last.stage_ms}
    return {
        "prompt": request.prompt,
        "prompt_token_ids": original_ids(request),
        "num_image_tokens": list(request.num_image_tokens),
        "image_transforms": [each and asdict(each) for each in request.transforms],
        "token_ids": [token for delta in deltas for token in delta.token_ids],
        "text": "".join(delta.text for delta in deltas),
        "finish_reason": last.finish_reason,
        "usage": asdict(last.usage) if last.usage else None,
        "timings": {**stages, "encode": max(0.0, total_ms - sum(stages.values())), "total": total_ms},
    }


def shown(transform: ImageTransform) -> str:
    """How a picture's values became what the model sees, in one line."""
    said = [f"{transform.format}, {transform.bits} bits, {transform.photometric}"]
    if transform.num_frames > 1:
        said.append(f"frame {transform.frame} of {transform.num_frames}")
    if transform.rescale is not None:
        said.append("times {:g} plus {:g}".format(*transform.rescale))
    if transform.window is not None:
        window = transform.window
        said.append(f"window {window.centre:g} wide {window.width:g} ({window.function}, of the {window.source})")
    tables = (("modality", transform.has_modality_lut), ("window", transform.has_voi_lut))
    said += [f"by the file's {name} table" for name, is_there in tables if is_there]
    return ", ".join([*said, *(["turned over"] if transform.is_inverted else [])])


def original_ids(prepared: PreparedRequest) -> list[int]:
    """The prompt's ids with one sentinel per picture, as the original code has them."""
    ids: list[int] = []
    counts, left = iter(prepared.num_image_tokens), 0
    for token in prepared.prompt_ids:
        if token != IMAGE_TOKEN_ID:
            ids.append(token)
            continue
        if not left:
            ids.append(token)
            left = next(counts)
        left -= 1
    return ids
