"""One model's entry: its names, its location, and the settings it inherits from the application."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.settings.app import AppArgs
from deployments.settings.models import ModelArgs
from deployments.settings.stages import EngineArgs, GeneratorArgs
from llava_core.checkpoints.files import DEFAULT_MODEL


def test_the_default_model_is_served_under_its_own_name() -> None:
    [model] = AppArgs().models
    assert model.source == str(DEFAULT_MODEL)
    assert model.served_name == model.label == "scenes-llava"


def test_a_folder_is_served_under_its_name_and_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-llava").mkdir()
    monkeypatch.chdir(tmp_path)
    model = ModelArgs(checkpoint="my-llava", base="my-llava")
    assert model.source == model.base_source == str(tmp_path / "my-llava")
    assert model.served_name == "my-llava"


def test_a_hub_id_is_served_as_it_is() -> None:
    model = ModelArgs(checkpoint="owner/some-llava")
    assert model.served_name == model.source == "owner/some-llava"
    # Names of deployments are also used for log files.
    assert model.label == "owner-some-llava"
    assert ModelArgs(checkpoint="owner/some-llava", name="short").served_name == "short"


def _models(**args: Any) -> tuple[ModelArgs, ...]:
    return AppArgs.model_validate(args).models


def test_an_entry_overrides_only_the_fields_it_names() -> None:
    general = {"threads": 3, "max_replicas": 4}
    # Fewer than 4, and more than a stage's default of 1.
    own = {"name": "a", "generator": {"min_replicas": 2}, "engine": {"max_running": 5}}
    first, second = _models(generator=general, engine={"max_waiting": 7}, models=[own, {"name": "b"}])
    assert first.generator == GeneratorArgs(threads=3, max_replicas=4, min_replicas=2)
    assert second.generator == GeneratorArgs(threads=3, max_replicas=4)
    assert first.engine == EngineArgs(max_running=5, max_waiting=7)
    assert second.engine == EngineArgs(max_waiting=7)
    assert first.vision_encoder == second.vision_encoder == AppArgs().vision_encoder


def test_settings_built_in_python_are_equivalent() -> None:
    args = AppArgs(generator=GeneratorArgs(threads=3), models=(ModelArgs(generator=GeneratorArgs(num_gpus=1)),))
    assert args.models[0].generator == GeneratorArgs(threads=3, num_gpus=1)
    assert AppArgs.model_validate(args.model_dump()) == args


UPSTREAM = {"url": "http://gpu-1/v1", "model": "m", "max_requests": 7}


def test_a_model_with_an_upstream_has_no_local_settings() -> None:
    own, other = _models(models=[{"name": "a"}, {"name": "big", "upstream": UPSTREAM}], engine={"max_running": 3})
    assert (own.engine.max_running, own.upstream) == (3, None)
    assert other.upstream is not None
    assert other.model_fields_set == {"name", "upstream"}
    args = AppArgs.model_validate({"models": [{"name": "big", "upstream": UPSTREAM}]})
    assert args.own_models == ()
    assert list(args.upstreams) == ["big"]
    assert args.max_requests_in_flight == 7
    for wrong, why in (
        ({"upstream": UPSTREAM}, "needs a name"),
        ({"name": "a", "upstream": UPSTREAM, "checkpoint": "b", "generator": {}}, "checkpoint, generator"),
        ({"name": "a", "upstream": {"url": "http://gpu-1/v1"}}, "model"),
    ):
        with pytest.raises(ValidationError, match=why):
            _models(models=[wrong])
