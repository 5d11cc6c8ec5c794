"""From options to a model; faulty checkpoints are tested through `llava ask` in test_asking.py."""

from pathlib import Path
from typing import Any

import pytest

from llava_core.errors import CheckpointError, RequestError
from llava_core.opening import ModelOptions, load_model, open_model
from llava_core.prepare import Preparer
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from tests.deployments.pictures import plain


def options(model: Path, **given: Any) -> ModelOptions:
    defaults = {
        "base": None,
        "template": None,
        "dtype": "float32",
        "quantization": None,
        "device": "cpu",
        "offline": True,
        "padding_jitter": False,
    }
    return ModelOptions(str(model), **{**defaults, **given})


def test_the_opened_model_is_the_one_loaded(tiny_checkpoint: Path) -> None:
    opened = open_model(options(tiny_checkpoint))
    model = load_model(opened, options(tiny_checkpoint))
    message = Message("user", (ImagePart(plain()), TextPart("What?")))
    request = GenerationRequest("1", (message,), SamplingParams(max_tokens=3))
    before, after = opened.preparer.prepare(request), model.preparer.prepare(request)
    assert (before.prompt, before.prompt_ids) == (after.prompt, after.prompt_ids)
    assert list(model.stream(before))[-1].finish_reason is not None


def test_padding_jitter_is_set_on_the_preparer(tiny_checkpoint: Path) -> None:
    jitters = [open_model(options(tiny_checkpoint, padding_jitter=on)).preparer for on in (True, False)]
    assert [_jitter(preparer) for preparer in jitters] == [True, False]


def _jitter(preparer: Preparer) -> bool:
    return bool(vars(preparer.preprocess)["jitter"])


def test_unknown_names_are_errors(tiny_checkpoint: Path) -> None:
    with pytest.raises(RequestError, match="unknown template 'nonsense'"):
        open_model(options(tiny_checkpoint, template="nonsense"))
    with pytest.raises(CheckpointError, match="/no/such"):
        open_model(options(Path("/no/such")))
